"""Where a snapshot's database comes from: a file or chunks, of exactly the length declared.

Source: etcd ``ioutil.NewExactReadCloser``, ``snap.Message``. What follows the last byte is looked
at before that byte is given out: with a Content-Length the receiver would take the snapshot for
whole otherwise.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeAlias, cast

from pipeline.arguments import absolute_path, require_whole
from pipeline.errors import SnapshotSourceError, UsageError
from pipeline.logs import show

__all__ = ["ChunkSource", "FileSource", "SnapshotSource", "close_quietly", "open_source"]

#: What ``Transport.send_snapshot`` takes: a path, a binary file, bytes, or an iterable of them.
SnapshotSource: TypeAlias = (
    str
    | os.PathLike[str]
    | BinaryIO
    | bytes
    | bytearray
    | memoryview
    | Iterable[bytes | bytearray | memoryview]
)

#: What is read at once of a file that cannot go out by ``sendfile``.
CHUNK_BYTES = 256 * 1024
#: Of a file, and so of a source.
SIZE_MAX = (1 << 63) - 1


class FileSource:
    """A regular file, from an offset on. Its own position is not moved.

    Parameters
    ----------
    fd : int
        Borrowed until ``close``.
    offset, size : int
        Which bytes of it.
    close : callable
    """

    def __init__(self, fd: int, offset: int, size: int, close: Callable[[], object]) -> None:
        self.fd = fd
        self.offset = offset
        self.size = size
        self.close = close

    def chunks(self) -> Iterator[memoryview]:
        """Yield all of it; a chunk is valid until the next one is asked for."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, self.size))))
        done = 0
        while done < self.size:
            want = min(len(buffer), self.size - done)
            if done + want == self.size:
                self.require_end()
            try:
                n = os.preadv(self.fd, [buffer[:want]], self.offset + done)
            except OSError as error:
                raise SnapshotSourceError(f"the source cannot be read: {error}") from error
            if n == 0:
                raise _short(done, self.size)
            done += n
            yield buffer[:n]

    def send(self, sock_fd: int, done: int, count: int) -> int:
        """Have the kernel write ``count`` bytes, or fewer, to a socket, from byte ``done`` on.

        Raises ``OSError`` for the socket's reasons, ``SnapshotSourceError`` if the file is short.
        """
        with sigpipe_blocked():
            n = os.sendfile(sock_fd, self.fd, self.offset + done, count)
        if n == 0:
            raise _short(done, self.size)
        return n

    def require_end(self) -> None:
        """Raise ``SnapshotSourceError`` if the file goes on behind the bytes declared."""
        if os.pread(self.fd, 1, self.offset + self.size):
            raise _long(self.size)


class ChunkSource:
    """Bytes-like objects from an iterator, borrowed until the next one is asked for.

    Parameters
    ----------
    chunks : iterator
    size : int
        Bytes in all.
    close : callable
    """

    def __init__(self, chunks: Iterator[object], size: int, close: Callable[[], object]) -> None:
        self.size = size
        self.close = close
        self._iterator = chunks

    def chunks(self) -> Iterator[memoryview]:
        """Yield all of it; ``SnapshotSourceError`` if it is not as declared, or raises."""
        left = self.size
        while left:
            chunk = self._next()
            if chunk is None:
                raise _short(self.size - left, self.size)
            left -= len(chunk)
            if left < 0:
                raise _long(self.size)
            if left == 0:
                self.require_end()
            yield chunk

    def require_end(self) -> None:
        """Raise ``SnapshotSourceError`` if there is more."""
        if self._next() is not None:
            raise _long(self.size)

    def _next(self) -> memoryview | None:
        """Return the next chunk that is not empty; None at the end."""
        try:
            for chunk in self._iterator:
                # bytes-like is what memoryview takes; it says so of all else
                view = memoryview(cast(bytes, chunk)).cast("B")
                if view:
                    return view
        except BaseException as error:  # also sys.exit(): nobody else's business in our thread
            raise SnapshotSourceError(f"the source raised {show(error)}") from error
        return None


@contextlib.contextmanager
def sigpipe_blocked() -> Iterator[None]:
    """Have this thread spared the SIGPIPE of a ``sendfile``, which takes no MSG_NOSIGNAL.

    Python ignores the signal, but an application may have put it back to ending the process. It is
    blocked for the one call only: a mask that stays would be inherited by what a callback starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    finally:
        if signal.SIGPIPE not in before:
            # Sent also where the call wrote something before the peer was gone, and did not fail.
            signal.sigtimedwait({signal.SIGPIPE}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _short(got: int, size: int) -> SnapshotSourceError:
    return SnapshotSourceError(f"the source ended after {got} of {size} bytes")


def _long(size: int) -> SnapshotSourceError:
    return SnapshotSourceError(f"the source has more than the {size} bytes declared")


def open_source(source: SnapshotSource, size: int | None) -> FileSource | ChunkSource:
    """Make one kind or the other of what the application gave.

    Raises
    ------
    UsageError
        If it is no source, or its size cannot be found out and was not given.
    OSError
        If the file cannot be opened.
    """
    if size is not None:
        require_whole("size", size, 0, SIZE_MAX)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, size)
    if isinstance(source, (bytes, bytearray, memoryview)):
        length = memoryview(source).nbytes
        return ChunkSource(iter((source,)), length if size is None else size, _nothing)
    if hasattr(source, "read"):
        return _open_file(source, size)
    if not isinstance(source, Iterable):
        raise UsageError(f"source: {show(source)} is no path, binary file or iterable of bytes")
    if size is None:
        raise UsageError("size: is needed for an iterable")
    iterator = iter(source)
    return ChunkSource(iterator, size, _closing(source, iterator))


def close_quietly(source: object) -> None:
    """Close what was refused, if it can be; what that raises is of no interest any more."""
    with contextlib.suppress(Exception):
        _closing(source)()


def _open_path(given: str | os.PathLike[str], size: int | None) -> FileSource:
    path = absolute_path("source", given)
    # Not blocking: a FIFO would wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise UsageError(f"source: {show(given)} is not a regular file")
    file = io.FileIO(fd, "rb")
    return FileSource(fd, 0, found.st_size if size is None else size, file.close)


def _open_file(file: Any, size: int | None) -> FileSource | ChunkSource:
    if isinstance(file, io.TextIOBase):
        raise UsageError("source: is a text file; open it in binary mode")
    # Only of Python's own files is it known that their descriptor is what they read: GzipFile,
    # for one, has the descriptor of what is compressed.
    raw = file.raw if isinstance(file, (io.BufferedReader, io.BufferedRandom)) else file
    if isinstance(raw, io.FileIO):
        found = os.fstat(raw.fileno())
        if stat.S_ISREG(found.st_mode):
            file.flush()
            offset = file.tell()
            rest = max(0, os.fstat(raw.fileno()).st_size - offset)
            return FileSource(raw.fileno(), offset, rest if size is None else size, file.close)
    if size is None:
        size = _rest_of(file)
    return ChunkSource(_reads(file), size, _closing(file))


def _rest_of(file: BinaryIO) -> int:
    try:
        offset = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(offset)
    except (AttributeError, OSError) as error:
        raise UsageError("size: is needed for a file that cannot seek") from error
    return max(0, end - offset)


def _reads(file: BinaryIO) -> Iterator[object]:
    while (chunk := file.read(CHUNK_BYTES)) != b"":
        yield chunk


def _closing(*things: object) -> Callable[[], object]:
    """Return what closes those that can be closed."""

    def close() -> None:
        for thing in things:
            closing = getattr(thing, "close", None)
            if closing is not None:
                closing()

    return close


def _nothing() -> None:
    """There is nothing to close."""
