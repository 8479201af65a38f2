"""Handlers as an ASGI application, for our own listener or any ASGI server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

from pipeline.config import ReceiverConfig
from pipeline.errors import InternalError
from pipeline.handlers import Answer, Handlers, Request
from pipeline.logs import get_logger, show
from pipeline.names import show_address
from pipeline.threads import LibraryThread

__all__ = ["ASGIApp", "asgi_app"]

logger = get_logger(__name__)

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def asgi_app(handlers: Handlers, config: ReceiverConfig) -> ASGIApp:
    """Return the application that serves ``handlers``.

    Parameters
    ----------
    handlers : Handlers
        What is served. It must be reached at the root: paths are matched exactly.
    config : ReceiverConfig
        ``handlers`` calls of ``raft.process`` run at once, each on a thread of its own, never on
        the loop. Bodies are limited by ``max_body_bytes``, ``stall_timeout_s`` and
        ``min_body_rate``.

    Notes
    -----
    The threads are daemons, start when first needed, and end at lifespan shutdown.
    """
    return _App(handlers, config)


class _App:
    def __init__(self, handlers: Handlers, config: ReceiverConfig) -> None:
        self._handlers = handlers
        self._config = config
        self._threads = _Threads(config.handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if _head_size(scope) > self._config.max_head_bytes:
                await _send(send, self._handlers.head_too_large())
            else:
                await self._serve(_request(scope), receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            raise ValueError(f"ASGI scope {scope['type']!r} is not served")

    async def _live(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        self._threads.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, request: Request, receive: Receive, send: Send) -> None:
        handlers = self._handlers
        answer = handlers.check(request)
        try:
            if answer is None:
                body = await _read_body(receive, self._config)
                answer = await self._threads.run(partial(handlers.deliver, request, body))
        except _BodyTooLargeError:
            answer = handlers.body_too_large(request)
        except TimeoutError:
            answer = handlers.read_failed(request)
        except _DisconnectedError:
            handlers.read_failed(request)
            return
        except asyncio.CancelledError:
            # The server shuts down and waits no longer; the sender must not take this for success.
            answer = handlers.shutting_down()
        await _send(send, answer)


def _head_size(scope: Scope) -> int:
    """Bytes of the request line and the headers: servers limit only what they must buffer."""
    size = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
    return size + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def _request(scope: Scope) -> Request:
    # raw_path is optional; without it an encoded path cannot be told from a plain one.
    raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
    return Request(
        scope["method"],
        raw_path.decode("latin-1"),
        _first_values(scope["headers"]),
        _remote(scope.get("client")),
    )


def _first_values(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in headers:
        values.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return values


def _remote(client: tuple[str, int] | None) -> str:
    if client is None:
        return "unknown"
    return show_address(*client)


class _BodyTooLargeError(Exception):
    pass


class _DisconnectedError(Exception):
    pass


async def _read_body(receive: Receive, config: ReceiverConfig) -> bytearray:
    """Read until the end; what is held grows with what arrived, never with what was announced."""
    body = bytearray()
    left_s = config.stall_timeout_s
    while True:
        begin = time.monotonic()
        async with asyncio.timeout(left_s):
            event = await receive()
        if event["type"] == "http.disconnect":
            raise _DisconnectedError
        part = event.get("body", b"")
        body += part
        if config.min_body_rate:  # as conn_body_arrived in _conn.pxd
            left_s += len(part) / config.min_body_rate - (time.monotonic() - begin)
            left_s = min(left_s, config.stall_timeout_s)
        if len(body) > config.max_body_bytes:
            raise _BodyTooLargeError
        if not event.get("more_body", False):
            return body


async def _send(send: Send, answer: Answer) -> None:
    # ASGI wants names in lower case; HTTP does not care.
    headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
    if answer.status not in (204, 304):
        headers.append((b"content-length", b"%d" % len(answer.body)))
    if answer.close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


class _Threads:
    """A few daemon threads that run what must not run on the loop.

    ``concurrent.futures`` would not do: the interpreter joins its threads at exit, and a
    ``raft.process`` that blocks would keep the process alive for ever.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._numbers = itertools.count()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # guards the two below
        self._threads = 0
        self._pending = 0  # jobs given and not done

    async def run(self, job: Callable[[], Answer]) -> Answer:
        """Run ``job`` on a thread, after those that came before it, and wait for its answer."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()

        def finish(answer: Answer | None, error: BaseException | None) -> None:
            if future.done():
                return
            if answer is not None:
                future.set_result(answer)
            else:
                future.set_exception(InternalError(f"handler failed: {show(error)}"))

        def run() -> None:
            if future.cancelled():  # the server gave up before it was our turn
                return
            answer = failure = None
            try:
                answer = job()
            except BaseException as error:  # no memory, at worst; the thread must go on
                failure = error
            with contextlib.suppress(RuntimeError):  # it gave up since: the loop is closed
                loop.call_soon_threadsafe(finish, answer, failure)

        self._give(run)
        return await future

    def close(self) -> None:
        """Let every thread end after what it runs. Does not wait; a later job starts anew."""
        with self._lock:
            for _ in range(self._threads):
                self._jobs.put(None)
            self._threads = 0

    def _give(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._threads < min(self._pending + 1, self._limit):
                try:
                    name = f"pipeline-handler-{next(self._numbers)}"
                    LibraryThread(self._work, name).start()
                    self._threads += 1
                except (RuntimeError, MemoryError):  # no more threads to be had
                    if self._threads == 0:
                        raise
            self._pending += 1
            self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            logger.survive("a message was not answered", job)
            with self._lock:
                self._pending -= 1
