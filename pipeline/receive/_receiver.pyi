"""The typed face of ``_receiver.pyx``; checked by stubtest."""

from collections.abc import Callable

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

from pipeline.config import ReceiverConfig
from pipeline.net._sockets import OwnSocket
from pipeline.receive.detached import BegunRequest
from pipeline.receive.handlers import Handlers
from pipeline.stats import ReceiverStats
from pipeline.tls.credentials import Credentials

__all__ = ["LINGER_S", "Receiver", "match_post", "recognise_post"]

LINGER_S: float

def match_post(data: bytes, known: bytes) -> tuple[int, int] | None: ...
def recognise_post(data: ReadableBuffer) -> tuple[int, int] | None: ...

@disjoint_base
class Receiver:
    def __new__(
        cls,
        handlers: Handlers,
        config: ReceiverConfig,
        cluster_header: bytes,
        take: Callable[[OwnSocket, BegunRequest], None] | None,
        credentials: Credentials | None = None,
    ) -> Receiver: ...
    def start(self, plain: list[OwnSocket], encrypted: list[OwnSocket]) -> None: ...
    def retire(self) -> None: ...
    def begin_close(self) -> None: ...
    def wait_closed(self, timeout_s: float) -> bool: ...
    def forget_after_fork(self) -> None: ...
    def stats(self) -> ReceiverStats: ...
    def serve(self, is_odd: bool = False) -> None: ...
