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
from pipeline.locks import lock_of
from pipeline.logs import get_logger, show
from pipeline.names import show_address
from pipeline.net._budget import BodyShare
from pipeline.receive.body_time import BodyTime
from pipeline.receive.handlers import Handlers, behind_prefix
from pipeline.threads import LibraryThread
from pipeline.wire.answers import BODILESS, Answer, Request

__all__ = ["ASGIApp", "App", "asgi_app"]

logger = get_logger(__name__)

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def asgi_app(handlers: Handlers, config: ReceiverConfig) -> ASGIApp:
    """Return an application that serves ``handlers``; see :class:`App`."""
    return App(handlers, config)


# A body that comes in small pieces lets others on the loop have a turn after this many.
_PIECES_MAX = 64


class App:
    """An ASGI application that serves ``handlers``.

    Parameters
    ----------
    handlers : Handlers
        What is served. Paths are matched exactly, behind the prefix it is mounted at
        (``root_path``).
    config : ReceiverConfig
        ``handlers`` calls of ``raft.process`` run at once, each on a thread of its own, never on
        the loop. With an inbox the threads have what waits; a small message that there is room for
        needs none. Bodies are limited by ``max_body_bytes``, ``stall_timeout_s`` and
        ``min_body_rate``.

    Notes
    -----
    The threads are daemons and start when first needed. They end at lifespan shutdown, of which a
    mounted application does not hear, and with ``close``.
    """

    def __init__(self, handlers: Handlers, config: ReceiverConfig) -> None:
        self._handlers = handlers
        self._config = config
        self._threads = _Threads(config.handlers)

    def close(self) -> None:
        """End the threads for good, without waiting for them.

        One in ``raft.process`` ends after it; what waits for its turn is answered 503.
        """
        self._threads.close(is_final=True)

    def wait_closed(self, deadline: float) -> None:
        """Wait for the threads until ``deadline``, but for the calling one."""
        self._threads.join(deadline)

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
        self._threads.close(is_final=False)
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, request: Request, receive: Receive, send: Send) -> None:
        handlers = self._handlers
        answer = handlers.check(request)
        share = handlers.budget.share()  # closed by who is done with the body
        try:
            if answer is None:
                body = await _read_body(receive, self._config, share)
                answer = self._handlers.deliver_at_once(request, body)
                if answer is not None:
                    share.close()
                else:
                    answer = await self._threads.run(partial(self._deliver, request, body, share))
        except _NoRoomError:
            answer = handlers.overloaded(request.remote)
        except _BodyTooLargeError:
            answer = handlers.body_too_large(request.remote)
        except TimeoutError:
            answer = handlers.read_failed(request.remote)
        except _DisconnectedError:
            handlers.read_failed(request.remote)
            return
        except _ClosedError:
            answer = handlers.shutting_down()
        except asyncio.CancelledError:
            # The server shuts down and waits no longer; the sender must not take this for success.
            answer = handlers.shutting_down()
        await _send(send, answer)

    def _deliver(self, request: Request, body: bytearray, share: BodyShare) -> Answer:
        try:
            if self._threads.is_closed:
                return self._handlers.shutting_down()
            return self._handlers.deliver(request, body)
        finally:
            share.close()


def _head_size(scope: Scope) -> int:
    """Bytes of the request line and the headers: servers limit only what they must buffer."""
    size = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
    return size + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def _request(scope: Scope) -> Request:
    # raw_path is optional; without it an encoded path cannot be told from a plain one.
    raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
    root_path: str = scope.get("root_path") or ""
    return Request(
        scope["method"],
        behind_prefix(raw_path.decode("latin-1"), root_path.encode().decode("latin-1")),
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


class _NoRoomError(Exception):
    """There is no memory for a body just now."""


class _DisconnectedError(Exception):
    pass


class _ClosedError(Exception):
    pass


async def _read_body(receive: Receive, config: ReceiverConfig, share: BodyShare) -> bytearray:
    """Read until the end; what is held grows with what arrived, never with what was announced."""
    body = bytearray()
    try:
        await _read_pieces(receive, config, share, body)
    except BaseException:
        share.close()
        raise
    return body


async def _read_pieces(
    receive: Receive, config: ReceiverConfig, share: BodyShare, body: bytearray
) -> None:
    body_time = BodyTime(config)
    for pieces in itertools.count(1):
        if pieces % _PIECES_MAX == 0:  # a server that has them at hand lets nobody else run
            await asyncio.sleep(0)
        begin = time.monotonic()
        async with asyncio.timeout(body_time.left_s):
            event = await receive()
        if event["type"] == "http.disconnect":
            raise _DisconnectedError
        part = event.get("body", b"")
        if not share.set(len(body) + len(part)):
            raise _NoRoomError
        body += part
        body_time.arrived(len(part), time.monotonic() - begin)
        if len(body) > config.max_body_bytes:
            raise _BodyTooLargeError
        if not event.get("more_body", False):
            break


async def _send(send: Send, answer: Answer) -> None:
    # ASGI wants names in lower case; HTTP does not care.
    headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers]
    if answer.status not in BODILESS:
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
        self._lock = lock_of(self)  # guards what follows
        self._threads: set[LibraryThread] = set()
        self._ending = 0  # of the threads, told to
        self._pending = 0  # jobs given and not done
        self.is_closed = False

    async def run(self, job: Callable[[], Answer]) -> Answer:
        """Run ``job`` on a thread, after those that came before it, and wait for its answer.

        ``_ClosedError`` once the threads are closed for good.
        """
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

        try:
            self._give(run)
        except BaseException:
            future.cancel()  # so that the thread, if it takes the call after all, skips it
            raise
        return await future

    def close(self, *, is_final: bool) -> None:
        """Let every thread end after what was given. Does not wait.

        A later job starts a thread anew, unless it is final: then ``is_closed`` is set.
        """
        with self._lock:
            self.is_closed = self.is_closed or is_final
            for _ in range(len(self._threads) - self._ending):
                self._jobs.put(None)
            self._ending = len(self._threads)

    def join(self, deadline: float) -> None:
        """Wait until ``deadline`` for the threads, but for the calling one."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.wait_ended(deadline)

    def _give(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self.is_closed:
                raise _ClosedError
            running = len(self._threads) - self._ending
            if running < min(self._pending + 1, self._limit):
                thread = LibraryThread(self._work, f"pipeline-handler-{next(self._numbers)}")
                self._threads.add(thread)
                try:
                    thread.start()
                except (RuntimeError, MemoryError):  # no more threads to be had
                    self._threads.discard(thread)
                    if not running:
                        raise
            self._pending += 1
            self._jobs.put(job)
            self._end_late_ones()

    def _end_late_ones(self) -> None:
        """End what was just started if a signal's handler has closed us meanwhile."""
        if self.is_closed:
            self.close(is_final=True)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            logger.survive("a message was not answered", job)
            with self._lock:
                self._pending -= 1
        with self._lock:
            self._ending -= 1
            self._threads = {t for t in self._threads if t is not threading.current_thread()}
