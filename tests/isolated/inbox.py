"""An inbox, in a process of its own: ``inbox.py CASE [DIRECTORY]`` prints "ok" or why not.

With a directory, for certificates, its connections have TLS. Callers are forked processes, made
while there are no threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import selectors
import ssl
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

import pipeline.aio
from pipeline import Inbox, Transport, UsageError
from tests.support import LONG_TIMEOUT, MIB
from tests.support.http import CLUSTER_ID
from tests.support.inbox import (
    APP,
    HEARTBEAT,
    PROP,
    SNAP,
    Caller,
    Reports,
    Running,
    body_of,
    indexes,
    receiving,
    request_of,
    take_exactly,
    wait_until_waiting,
)
from tests.support.memory import IS_SANITIZED, rss
from tests.support.tls import Authority
from tests.support.waiting import eventually, exit_status_of

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads
warnings.simplefilter("ignore", ResourceWarning)  # connections end with the process


class Shared:
    """Numbers that a process and its forked caller both see."""

    def __init__(self) -> None:
        self._memory = mmap(-1, 64)

    def __getitem__(self, at: int) -> int:
        return int(struct.unpack_from("=q", self._memory, 8 * at)[0])

    def __setitem__(self, at: int, number: int) -> None:
        struct.pack_into("=q", self._memory, 8 * at, number)

    def wait(self, at: int) -> int:
        """Wait until it is not 0."""
        eventually(lambda: self[at], f"number {at} is set", timeout=4 * LONG_TIMEOUT)
        return self[at]


PORT, READY, GO, COUNT, STOP = range(5)


def forked(main: Callable[[Shared], None]) -> tuple[Shared, int]:
    """Run a caller in a forked process; it is told the port as the number PORT."""
    shared = Shared()
    child = os.fork()
    if child == 0:
        try:
            main(shared)
        except BaseException as error:
            print(f"the caller: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return shared, child


def held_gil(directory: str = "") -> None:
    """While one call holds the GIL for a second, 10,000 heartbeats come and are answered."""
    count, each = 10_000, 4
    authority = Authority(Path(directory)) if directory else None
    context = authority and authority.client(*authority.issue("caller"))

    def call(shared: Shared) -> None:
        scheme = "https" if directory else "http"
        url = f"{scheme}://127.0.0.1:{shared.wait(PORT)}"
        callers = [Caller(url, tls=context) for _ in range(each)]
        for caller in callers:  # the heads are known from here on
            assert caller.ask(HEARTBEAT, 0) == 204
        shared[READY] = 1
        shared.wait(GO)
        for index in range(1, 1 + count // each):
            request = request_of(body_of(HEARTBEAT, index))
            for caller in callers:
                caller.sock.sendall(request)
            for caller in callers:
                assert caller.status() == 204
            shared[COUNT] += each

    shared, child = forked(call)
    inbox = Inbox(max_messages=16_384)
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while shared[COUNT] < count:
            ticks += 1
            time.sleep(0)

    tls = authority and authority.info()
    url = "https://127.0.0.1:0" if directory else "http://127.0.0.1:0"
    with receiving(inbox, url=url, tls=tls, peers=[1]) as (_, listener):
        shared[PORT] = int(listener.url.rpartition(":")[2])
        shared.wait(READY)
        assert len(take_exactly(inbox, each)) == each
        ticking = Running(tick)
        eventually(lambda: ticks > 100)
        libc = ctypes.PyDLL(None)  # whose calls hold the GIL
        sys.setswitchinterval(1000)
        before = ticks
        shared[GO] = 1
        for _ in range(int(LONG_TIMEOUT)):
            libc.usleep(1_000_000)
            if shared[COUNT] == count:
                break
        answered, ticked = shared[COUNT], ticks - before
        sys.setswitchinterval(0.005)
        assert answered == count, f"{answered} were answered"
        assert ticked <= 1, "the GIL was let go of"
        assert inbox.stats()[:4] == (count + each, each, 0, count)
        messages = inbox.take(count)
        assert sorted(indexes(messages)) == sorted([*range(1, 1 + count // each)] * each)
        ticking.join()
    assert exit_status_of(child) == 0


def memory(seconds: str) -> None:
    """While nobody takes, 64 peers that push fill what there is room for, and no more."""
    peers, size, max_bytes = 64, 4096, 16 * MIB
    kinds = ((HEARTBEAT, 0), (APP, size), (APP, 100_000))

    def push(shared: Shared) -> None:
        url = f"http://127.0.0.1:{shared.wait(PORT)}"
        selector = selectors.DefaultSelector()
        sent = [0] * peers
        for member in range(peers):
            caller = Caller(url, 1 + member)
            selector.register(caller.sock, selectors.EVENT_READ, caller)
            caller.post(HEARTBEAT, 0)
        open_, answered = peers, 0
        while open_:
            for key, _ in selector.select():
                caller = key.data
                assert caller.status() == 204
                answered += 1
                shared[COUNT] = answered
                if shared[STOP]:
                    selector.unregister(caller.sock)
                    open_ -= 1
                    continue
                number = caller.member - 1
                sent[number] += 1
                kind, length = kinds[(number + (answered > 100)) % 3]
                caller.post(kind, sent[number], size=length)
        shared[READY] = 1
        shared.wait(GO)

    shared, child = forked(push)
    inbox = Inbox(max_messages=4096, max_bytes=max_bytes)
    with receiving(inbox) as (_, listener):
        before = rss()
        peak = 0
        shared[PORT] = int(listener.url.rpartition(":")[2])
        deadline = time.monotonic() + float(seconds)
        while time.monotonic() < deadline or inbox.stats().waiting < peers:
            peak = max(peak, rss() - before)
            time.sleep(0.01)
        stats = inbox.stats()
        assert stats.queued <= 3 * 4096
        assert stats.queued_bytes <= 2 * max_bytes + 4096 * 64
        assert stats.taken == 0
        # Bytes of appends and of large ones; of each message what it costs to keep; and of each
        # connection what waits to be let in, with what is read of the next.
        bound = 2 * max_bytes + stats.queued * 1024 + peers * 256 * 1024
        assert IS_SANITIZED or 2 * max_bytes < peak <= bound, (peak / MIB, bound / MIB, stats)
        shared[STOP] = 1
        taken: dict[int, list[int]] = {}
        while not shared[READY] or len(inbox):
            for message in inbox.take(64, 0.05):
                taken.setdefault(message.from_, []).append(message.index)
        assert sum(map(len, taken.values())) == shared[COUNT]
        for of_member in taken.values():
            assert of_member == [*range(len(of_member))], "lost, twice or out of order"
        shared[GO] = 1
    assert exit_status_of(child) == 0


@contextlib.contextmanager
def busy(inbox: Inbox[Any], url: str, context: ssl.SSLContext | None) -> Iterator[list[Caller]]:
    """Have messages there, some held, some wait for room, and others be delivered by threads."""
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(Caller(url, tls=context)) for _ in range(6)]
        for caller in callers[:2]:
            assert caller.ask(APP, 1, size=100_000) == 204
        for caller in callers[2:4]:
            caller.post(PROP, 2)
        wait_until_waiting(inbox, 2)
        for caller in callers[4:]:
            caller.post(APP, 3, size=3 * MIB)
        wait_until_waiting(inbox, 4)
        yield callers


def fork(directory: str = "") -> None:
    """A forked child is told whose inbox it is, touches nothing and ends; the parent goes on."""
    authority = Authority(Path(directory)) if directory else None
    context = authority and authority.client(*authority.issue("caller"))
    scheme = "https" if directory else "http"
    inbox = Inbox(max_messages=2)
    awaited = pipeline.aio.Inbox()
    others = Inbox()
    tls = authority and authority.info()
    with (
        receiving(inbox, url=f"{scheme}://127.0.0.1:0", tls=tls, peers=[1]) as (
            transport,
            listener,
        ),
        receiving(awaited.threaded),
        busy(inbox, listener.url, context) as callers,
    ):
        assert transport.handlers.source is not None
        delivering = Running(transport.handlers.source.deliver, body_of(PROP, 4))
        wait_until_waiting(inbox, 5)
        taking = [Running(others.take, 1, None) for _ in range(2)]
        descriptor = inbox.fileno()
        child = os.fork()
        if child == 0:
            refuses(inbox, ("take", "stats", "fileno", "__len__"), ("closed",))
            refuses(awaited, ("stats", "fileno", "__len__"), ("closed",))
            assert repr(inbox) == "<inbox of the process that forked this one>"
            with pytest.raises(OSError, match="Bad file descriptor"):  # it has no copy of it
                os.fstat(descriptor)
            assert transport.stop() == 0
            with pytest.raises(UsageError, match="belongs to the process that forked"):
                Transport(2, CLUSTER_ID, Reports(), inbox=inbox)
            assert (len(others), others.stats()[:4], others.closed) == (0, (0, 0, 0, 0), False)
            mine = Inbox()
            with receiving(mine) as (_, own), Caller(own.url) as caller:
                caller.post(SNAP, 9)
                assert indexes(take_exactly(mine, 1)) == [9]
                assert caller.status() == 204
            del inbox, transport, listener, awaited, others
            gc.collect()
            sys.exit(0)  # with atexit handlers and all
        assert exit_status_of(child) == 0
        assert sorted(indexes(take_exactly(inbox, 7))) == [1, 1, 2, 2, 3, 3, 4]
        assert [caller.status() for caller in callers[2:]] == [204] * 4
        assert delivering.join() is True
        assert callers[0].ask(HEARTBEAT, 5) == 204
        assert indexes(inbox.take()) == [5]
        with receiving(others):
            pass
        assert [each.join() for each in taking] == [[], []]


def refuses(inbox: Any, methods: tuple[str, ...], properties: tuple[str, ...]) -> None:
    uses: list[Callable[[], Any]] = [getattr(inbox, name) for name in methods]
    uses += [functools.partial(getattr, inbox, name) for name in properties]
    for use in uses:
        with pytest.raises(UsageError, match="belongs to the process that forked"):
            use()


def fork_while_it_changes() -> None:
    """Children of a process whose loops put in and drop all the time end all the same."""
    inbox = Inbox(max_messages=64)
    is_over = threading.Event()

    def push(url: str) -> None:
        with Caller(url) as caller:
            index = 0
            while not is_over.is_set():
                caller.post((HEARTBEAT, APP, PROP)[index % 3], size=0 if index % 5 else 70_000)
                if caller.status() != 204:
                    return
                index += 1

    def consume() -> None:
        while not is_over.is_set():
            inbox.take(7, 0.01)

    with receiving(inbox) as (transport, listener):
        threads = [Running(push, listener.url) for _ in range(6)] + [Running(consume)]
        for _ in range(10):
            child = os.fork()
            if child == 0:
                del inbox, listener, transport
                gc.collect()
                os._exit(0)
            assert exit_status_of(child) == 0
        is_over.set()
        while any(thread.is_running for thread in threads):
            inbox.take(timeout=0.01)
        for thread in threads:
            thread.join()


def exits(state: str, directory: str = "") -> None:
    """The interpreter exits without stop, whatever the inbox is at."""
    authority = Authority(Path(directory)) if directory else None
    context = authority and authority.client(*authority.issue("caller"))
    inbox = Inbox(max_messages=2)
    transport = Transport(2, CLUSTER_ID, Reports(), inbox=inbox, tls=authority and authority.info())
    transport.start()
    transport.add_peer(1, ["http://127.0.0.1:9"])
    scheme = "https" if directory else "http"
    url = transport.listen(f"{scheme}://127.0.0.1:0").url
    if state == "busy":
        busy(inbox, url, context).__enter__()
    elif state == "taking":
        for _ in range(2):
            threading.Thread(target=inbox.take, args=(1, None), daemon=True).start()
        time.sleep(0.05)
    elif state == "delivering":
        source = transport.handlers.source
        assert source is not None
        for index in range(4):
            args = (body_of(PROP, index),)
            threading.Thread(target=source.deliver, args=args, daemon=True).start()
        wait_until_waiting(inbox, 4)
    elif state == "taken":
        with Caller(url, tls=context) as caller:
            assert caller.ask(APP, size=3 * MIB) == 204
        KEPT.extend(inbox.take())
    elif state == "thrown away":
        caller = Caller(url, tls=context)
        assert caller.ask(APP, size=3 * MIB) == 204
        del transport, inbox
        gc.collect()
    else:
        raise ValueError(state)


KEPT: list[Any] = []

CASES: dict[str, Callable[..., None]] = {
    "held GIL": held_gil,
    "memory": memory,
    "fork": fork,
    "fork while it changes": fork_while_it_changes,
    "exits": exits,
}
case, *arguments = sys.argv[1:]
CASES[case](*arguments)
print("ok", flush=True)
