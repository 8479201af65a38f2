"""The typed face of ``_frames.pyx``; checked by stubtest."""

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

from pipeline.wire._messages import EncodedMessage, Message

__all__ = ["FrameReader", "FrameWriter"]

@disjoint_base
class FrameReader:
    def __new__(
        cls,
        stream: str,
        *,
        from_: int = 0,
        to: int = 0,
        limit: int = ...,
        encoded: bool = False,
    ) -> FrameReader: ...
    @property
    def term(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def needed(self) -> int: ...
    def feed(self, data: ReadableBuffer) -> None: ...
    def read(self) -> Message | EncodedMessage | None: ...

@disjoint_base
class FrameWriter:
    def __new__(
        cls, stream: str, *, from_: int = 0, to: int = 0, profile: str = "3.5"
    ) -> FrameWriter: ...
    @property
    def term(self) -> int: ...
    @property
    def index(self) -> int: ...
    def heartbeat(self) -> bytes: ...
    def write(self, message: Message | EncodedMessage, *, borrow_min: int = 0) -> bytes: ...
    def write_segments(self, pieces: list[bytes]) -> bytes: ...

def _write_changed(
    writer: FrameWriter, message: bytes, after: bytes, borrow_min: int
) -> tuple[bool, bool]: ...
