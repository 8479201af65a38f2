"""A watch over the tests' own peers: one thread at a time may be in a connection's TLS object.

OpenSSL asks for that and CPython (3.11) does not see to it: two threads in one object corrupt the
heap, and the process aborts some time later, somewhere else. So the second one is kept out, and
noted here. Of our own connections debug and sanitizer builds assert the same (``tls_enter``).
"""

from __future__ import annotations

import ssl
import threading
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["shared", "watch"]

#: Of each use beside another one: who, in what, and where.
shared: list[str] = []


def _watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def use(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Made here, for ssl does not call __init__; setdefault is atomic.
        in_use = self.__dict__.setdefault("_in_use", threading.Lock())
        if not in_use.acquire(blocking=False):
            who = threading.current_thread().name
            text = f"{who} in {name} beside another thread\n{''.join(traceback.format_stack())}"
            shared.append(text)
            raise AssertionError(text)
        try:
            return call(self, *args, **kwargs)
        finally:
            in_use.release()

    return use


def _watched_class(base: type, *names: str) -> type:
    methods = {name: _watched(name, getattr(base, name)) for name in names}
    return type(base.__name__, (base,), methods)


def watch() -> None:
    """Watch all TLS objects made from now on in this process."""
    used = ("do_handshake", "read", "write", "unwrap")
    # Everything else of a socket that reads goes through read.
    ssl.SSLContext.sslobject_class = _watched_class(ssl.SSLObject, *used)
    ssl.SSLContext.sslsocket_class = _watched_class(ssl.SSLSocket, *used, "send")
