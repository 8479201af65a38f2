"""What a member must not forget, in one file: its term, its vote and its log.

Example code. Raft is safe only if these are on disk before a message tells others of them. A node
would also cut the file when it takes a snapshot; this one only grows.

The file is a row of records: length and CRC-32 of what follows, little-endian, then a kind and its
fields. A record that a crash has cut short ends the file when it is opened again: nobody was told
of what it says, since ``save`` had not returned.

=====  ========  ==============================================
kind   fields    meaning
=====  ========  ==============================================
``S``  Q Q       term and vote
``E``  Q Q B     index, term and type of an entry, then its data;
                 it takes the place of all from this index on
``B``  Q Q       index and term of the last entry that a snapshot
                 stands for; it takes the place of the whole log
=====  ========  ==============================================
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from pipeline import Entry, EntryType

__all__ = ["Storage"]

_FRAME = struct.Struct("<II")
_PAIR = struct.Struct("<QQ")
_ENTRY = struct.Struct("<QQB")


class Storage:
    """A member's file, for one process at a time. The caller sees to it that calls take turns.

    Parameters
    ----------
    path : Path
        Made if it is missing; its directory exists.

    Attributes
    ----------
    term, vote : int
    base, base_term : int
        Of the last entry that a snapshot stands for.
    entries : list of Entry
        The log behind it. All are as they were when the file was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.term = self.vote = self.base = self.base_term = 0
        self.entries: list[Entry] = []
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        whole = 0  # bytes
        for record in _records(path.read_bytes()):
            self._replay(record)
            whole += _FRAME.size + len(record)
        os.ftruncate(self._fd, whole)
        os.lseek(self._fd, whole, os.SEEK_SET)
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file. Everything saved is in it."""
        os.close(self._fd)

    def __enter__(self) -> Storage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def save(self, term: int, vote: int, entries: Iterable[Entry]) -> None:
        """Write term, vote and the log's new end; returns when they are on disk."""
        records = [b"S" + _PAIR.pack(term, vote)]
        for entry in entries:
            head = _ENTRY.pack(entry.index, entry.term, int(entry.type))
            records.append(b"E" + head + bytes(entry.data or b""))
        self._write(records)

    def save_snapshot(self, index: int, term: int) -> None:
        """Write that a snapshot stands for the log up to an entry; returns when it is on disk."""
        self._write([b"B" + _PAIR.pack(index, term)])

    def _write(self, records: Iterable[bytes]) -> None:
        data = b"".join(_FRAME.pack(len(r), zlib.crc32(r)) + r for r in records)
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)

    def _replay(self, record: bytes) -> None:
        match record[:1]:
            case b"S":
                self.term, self.vote = _PAIR.unpack_from(record, 1)
            case b"E":
                index, term, kind = _ENTRY.unpack_from(record, 1)
                del self.entries[index - 1 - self.base :]
                data = record[1 + _ENTRY.size :]
                self.entries.append(
                    Entry(term=term, index=index, type=EntryType(kind), data=data or None)
                )
            case b"B":
                self.base, self.base_term = _PAIR.unpack_from(record, 1)
                self.entries.clear()


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the whole records of a file, up to the first that is not."""
    at = 0
    while len(data) - at >= _FRAME.size:
        length, crc = _FRAME.unpack_from(data, at)
        record = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(record) < length or zlib.crc32(record) != crc:
            return
        yield record
        at += _FRAME.size + length
