"""The three ways to be reached, as servers on a port: compiled listener, ASGI, WSGI.

uvicorn and waitress are started once; what they serve is changed from test to test.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from waitress.server import create_server

from tests.support import LONG_TIMEOUT


class AsgiFront:
    """An ASGI server. ``app`` is what it serves."""

    def __init__(self) -> None:
        self.app: Any = None
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        config = uvicorn.Config(
            self._serve, interface="asgi3", http="h11", lifespan="off", log_config=None
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [sock]}, name="uvicorn", daemon=True
        )
        self._thread.start()

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(LONG_TIMEOUT)


class WsgiFront:
    """A WSGI server. ``app`` is what it serves."""

    def __init__(self) -> None:
        self.app: Any = None
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        # The ends of its connections are noticed at once: it selects with the listening socket.
        self._server = create_server(
            self._serve, sockets=[sock], threads=4, clear_untrusted_proxy_headers=True, map={}
        )
        self._is_pulled = threading.Event()
        self._thread = threading.Thread(target=self._server.run, name="waitress", daemon=True)
        self._thread.start()

    def _serve(self, environ: Any, start_response: Any) -> Any:
        return self.app(environ, start_response)

    def close(self) -> None:
        # Those that answer write to the trigger as well, which is closed with the rest.
        self._server.task_dispatcher.shutdown()
        # Its loop ends when nothing is left to select.
        self._server.trigger.pull_trigger(self._close_all)
        self._is_pulled.set()
        self._thread.join(LONG_TIMEOUT)

    def _close_all(self) -> None:
        # Something else may have woken the loop before the trigger was written to.
        self._is_pulled.wait(LONG_TIMEOUT)
        for channel in list(self._server._map.values()):
            with contextlib.suppress(OSError):
                channel.close()


Front = AsgiFront | WsgiFront


@contextlib.contextmanager
def running(front: type[AsgiFront] | type[WsgiFront]) -> Iterator[Front]:
    server = front()
    try:
        yield server
    finally:
        server.close()
