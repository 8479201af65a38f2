"""What leaves the receiving loop: a connection, and the request that has begun on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pipeline.receive.places import Place
from pipeline.wire.answers import Request

if TYPE_CHECKING:
    from pipeline.receive.request_body import RequestBody

__all__ = ["BegunRequest", "Connection"]


class Connection(Protocol):
    """What is asked of a connection that left the loop: an ``OwnSocket``, plain or with TLS.

    ``recv_into`` returns 0 at the end. ``shutdown`` of reading, or of both directions, may be
    called while another thread is in ``recv_into``, which it ends.
    """

    def recv_into(self, buffer: memoryview, /) -> int: ...
    def sendall(self, data: bytes, flags: int, /) -> None: ...
    def settimeout(self, value: float, /) -> None: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


class BegunRequest(Protocol):
    """A request that has been let past and has a place; its body is still to be read."""

    request: Request
    #: Reads the body; not None once the head is whole.
    framing: RequestBody | None
    #: What has come behind the head, and ``framing`` has not seen.
    early: bytes

    #: Whether the caller knows chunks.
    is_http_1_1: bool

    def move_place(self) -> Place:
        """Hand over the place that was taken for it. Once."""
