"""A database of bbolt, which is what etcd keeps its keys in and sends as a snapshot.

It is a B+ tree of pages, written by a little-endian machine. A page has a header of 16 bytes (flags
at 8, number of elements at 10), 16 bytes for each element, and what these point to. Page 0 says how
large a page is and where the root is. The root's elements are the buckets, and a bucket's are its
pairs, in the order of their keys.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

__all__ = ["pairs"]

Pages = bytes | mmap.mmap


def pairs(database: Pages, bucket: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of each pair that a bucket has. KeyError if there is no such bucket."""
    page_bytes, root = struct.unpack_from("<8xI4xQ", database, 16)

    def elements(pages: Pages, start: int) -> Iterator[tuple[bytes, bytes]]:
        flags, count = struct.unpack_from("<8xHH", pages, start)
        for at in range(start + 16, start + 16 + 16 * count, 16):
            if flags & 1:  # a branch: its elements are pages
                page = struct.unpack_from("<8xQ", pages, at)[0]
                yield from elements(database, page * page_bytes)
            else:
                offset, key_bytes, value_bytes = struct.unpack_from("<4xIII", pages, at)
                middle = at + offset + key_bytes
                yield pages[at + offset : middle], pages[middle : middle + value_bytes]

    header = dict(elements(database, root * page_bytes))[bucket]
    (root,) = struct.unpack_from("<Q", header)
    # A small bucket has its only page behind its header of 16 bytes.
    return elements(database, root * page_bytes) if root else elements(header, 16)
