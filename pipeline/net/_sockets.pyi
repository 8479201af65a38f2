"""The typed face of ``_sockets.pyx``; checked by stubtest."""

import socket
import weakref

from pipeline.tls._engine import Session

__all__ = ["OwnSocket", "link_is_dead", "open_socket"]

class OwnSocket(socket.socket):
    tls: Session | None
    def __init__(
        self, family: int = ..., type: int = ..., proto: int = ..., fileno: int | None = ...
    ) -> None: ...
    def reset(self) -> None: ...

own_sockets: weakref.WeakSet[OwnSocket]

def link_is_dead(sock: socket.socket, timeout_s: float) -> bool: ...
def open_socket(family: int, kind: int, protocol: int) -> OwnSocket: ...
