"""Listener: the handlers on a TCP port of their own.

For now uvicorn serves them; nothing outside this file knows.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from functools import partial
from typing import Any

import h11
import uvicorn
from urllib3.util import parse_url
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.asgi import asgi_app
from pipeline.config import ReceiverConfig
from pipeline.errors import UsageError
from pipeline.handlers import Handlers
from pipeline.picker import parse_urls

__all__ = ["Listener"]

logger = logging.getLogger(__name__)

# What uvicorn takes to notice that it shall stop, and to wake from the last of its naps.
_UVICORN_LAG_S = 0.2


class Listener:
    """Serve ``handlers`` at ``url`` until ``close``. Also a context manager.

    Parameters
    ----------
    handlers : Handlers
        What is served.
    url : str
        ``http://host:port``; port 0 takes a free one. ``[::]`` takes IPv4 as well.
    config : ReceiverConfig
        Limits and timeouts.

    Attributes
    ----------
    url : str
        Where it is served, with the real port.

    Raises
    ------
    UsageError
        If the URL is not valid, or not ``http``.
    OSError
        If the address cannot be bound, or there are no descriptors left.

    Notes
    -----
    When the constructor returns, connections are accepted. Runs one loop thread
    (``pipeline-listen-<port>``) and up to ``config.handlers`` others, all daemons.
    """

    def __init__(self, handlers: Handlers, url: str, config: ReceiverConfig) -> None:
        (given,) = parse_urls((url,))
        if not given.startswith("http://"):
            raise UsageError(f"url: {url!r}: only http can be listened on")
        sock = _bind(given, config.max_connections)
        port = sock.getsockname()[1]
        self.url = f"{given.rpartition(':')[0]}:{port}"
        self._lock = threading.Lock()  # one close at a time
        self._server = _Server(
            uvicorn.Config(
                asgi_app(handlers, config),
                loop="asyncio",
                http=partial(_Protocol, config),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                interface="asgi3",
                # The host may run a uvicorn of its own: its loggers are not ours to set up, which
                # access_log=False would do.
                log_config=None,
                proxy_headers=False,
                server_header=False,  # etcd sends Date and no Server
                backlog=config.max_connections,
                timeout_keep_alive=config.idle_timeout_s,  # type: ignore[arg-type]
                h11_max_incomplete_event_size=config.max_head_bytes,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run_on, args=(sock,), name=f"pipeline-listen-{port}", daemon=True
        )
        self._thread.start()
        self._server.ready.wait()
        if self._server.failure is not None:
            sock.close()
            raise self._server.failure

    def close(self, deadline_s: float = 1.0) -> None:
        """Stop accepting, let running requests finish, close every connection.

        Parameters
        ----------
        deadline_s : float
            A request not answered within this many seconds is answered 503. A call of
            ``raft.process`` that blocks even longer keeps its thread until it returns.

        Notes
        -----
        When it returns the port is free. Thread-safe; a second call does nothing.
        """
        with self._lock:
            self._server.stop(deadline_s)
            self._thread.join(deadline_s + 5.0)
            if self._thread.is_alive():
                logger.error("listener at %s did not end in time", self.url)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bind(url: str, backlog: int) -> socket.socket:
    """Listen before the loop runs: from here on nobody is refused."""
    parsed = parse_url(url)
    assert parsed.host is not None  # parse_urls has seen to it
    host = parsed.host.strip("[]")
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, parsed.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )[0]
    # asyncio sets TCP_NODELAY only where it sees the protocol number.
    sock = socket.socket(family, kind, protocol)
    try:
        # The port of a listener just closed is free although its connections linger.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


class _Server(uvicorn.Server):
    """A uvicorn that keeps a deadline and leaves no socket behind."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()  # started, or failed to
        self.failure: BaseException | None = None
        self._deadline = 0.0  # monotonic seconds, set by stop

    def run_on(self, sock: socket.socket) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._main(sock))
        except BaseException as error:
            if self.started:
                raise
            self.failure = error
            self.ready.set()

    def stop(self, deadline_s: float) -> None:
        self._deadline = time.monotonic() + deadline_s
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        left = self._deadline - time.monotonic() - _UVICORN_LAG_S
        self.config.timeout_graceful_shutdown = max(0.0, left)  # type: ignore[assignment]
        await super().shutdown(sockets)

    async def _main(self, sock: socket.socket) -> None:
        with sock:
            await self.serve([sock])
        # Those past the deadline, cancelled just now, answer 503.
        if tasks := self.server_state.tasks:
            await asyncio.wait(tasks, timeout=_UVICORN_LAG_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with the limits it lacks: connections, and time for a head."""

    def __init__(self, limits: ReceiverConfig, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self.access_log = False
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            transport.abort()
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:
            # What follows an answer given early is not HTTP, and uvicorn cannot answer twice.
            self.transport.abort()
        if self.transport.is_closing() and self.cycle is not None:
            # uvicorn has answered 400 while the handler was at work, whose answer comes too late.
            self.cycle.disconnected = True
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch_head()

    def _watch_head(self) -> None:
        """Let the timer run while a head is awaited; bodies and idle connections have others."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._unwatch_head()
        elif self._head_timer is None:
            timeout_s = self._limits.head_timeout_s
            self._head_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
