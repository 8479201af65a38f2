"""The typed face of ``_jobs.pyx``; checked by stubtest."""

from collections.abc import Sized
from typing import SupportsIndex

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

__all__ = ["EncodedMessage"]

@disjoint_base
class EncodedMessage(Sized):
    def __new__(
        cls, data: ReadableBuffer, *, type: SupportsIndex, to: SupportsIndex
    ) -> EncodedMessage: ...
    @property
    def data(self) -> ReadableBuffer: ...
    @property
    def type(self) -> int: ...
    @property
    def to(self) -> int: ...
    def __len__(self) -> int: ...
