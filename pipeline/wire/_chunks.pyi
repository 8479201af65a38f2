"""The typed face of ``_chunks.pyx``; checked by stubtest."""

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

__all__ = ["Chunks"]

@disjoint_base
class Chunks:
    @property
    def is_whole(self) -> bool: ...
    @property
    def is_odd(self) -> bool: ...
    @property
    def used(self) -> int: ...
    @property
    def line(self) -> bytes: ...
    def decode(self, data: ReadableBuffer) -> bytearray: ...
