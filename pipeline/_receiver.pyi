"""The typed face of ``_receiver.pyx``; checked by stubtest."""

from collections.abc import Callable
from socket import socket
from typing import NamedTuple

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

from pipeline.config import ReceiverConfig
from pipeline.general import General
from pipeline.handlers import Handlers

__all__ = ["Receiver", "ReceiverStats", "recognise_post"]

class ReceiverStats(NamedTuple):
    accepted: int
    connections: int
    fast_requests: int
    general_requests: int
    closed_for_room: int
    head_timeouts: int
    body_timeouts: int
    idle_timeouts: int
    accept_pauses: int
    body_pauses: int

def recognise_post(data: ReadableBuffer) -> tuple[int, int] | None: ...

@disjoint_base
class Receiver:
    def __new__(
        cls,
        handlers: Handlers,
        config: ReceiverConfig,
        cluster_header: bytes,
        take: Callable[[socket | None, General], None],
    ) -> Receiver: ...
    def start(self, descriptors: list[int]) -> None: ...
    def begin_close(self) -> None: ...
    def wait_closed(self, timeout_s: float) -> bool: ...
    def forget_after_fork(self) -> None: ...
    def stats(self) -> ReceiverStats: ...
    def serve(self, is_general: bool = False) -> None: ...
    def learn(self, head: bytes) -> bool: ...
