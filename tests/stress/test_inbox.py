"""Many connections push, several consumers take, and everything is stopped at some instant."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
from typing import Any

import pytest

from pipeline import Inbox
from tests.support import LONG_TIMEOUT
from tests.support.descriptors import assert_all_closed, open_descriptors
from tests.support.inbox import (
    APP,
    HEARTBEAT,
    PROP,
    SNAP,
    Caller,
    Running,
    assert_books,
    body_of,
    receiving,
)
from tests.support.listening import listener_threads
from tests.support.waiting import eventually

KINDS = ((HEARTBEAT, 0), (APP, 0), (PROP, 0), (APP, 70_000), (SNAP, 0), (APP, 1_200_000))


class Push:
    """What one connection has sent, and what of it was answered 204: those are there or taken."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.member = seed
        self.answered: set[int] = set()
        self.sent = 0

    def run(self, url: str) -> None:
        """Send until an answer is not 204, or none comes."""
        with contextlib.suppress(OSError), Caller(url, self.member) as caller:
            while True:
                kind, size = self._random.choices(KINDS, (8, 4, 2, 2, 1, 1))[0]
                self.sent += 1
                if caller.ask(kind, self.sent, size=size) != 204:
                    return
                self.answered.add(self.sent)


def consume(inbox: Inbox[Any], seed: int, taken: list[tuple[int, int]]) -> None:
    """Take until the inbox is closed."""
    rng = random.Random(seed)
    while not inbox.closed or len(inbox):
        timeout = rng.choice((0.0, 0.001, None))
        for message in inbox.take(rng.choice((1, 3, 256)), timeout):
            taken.append((message.from_, message.index))


def look(inbox: Inbox[Any], is_over: threading.Event) -> int:
    looks = 0
    while not is_over.is_set():
        stats = inbox.stats()
        assert stats.received == stats.taken + stats.queued + stats.dropped, stats
        assert stats.waiting >= 0
        looks += 1
        time.sleep(0)
    return looks


@pytest.mark.parametrize("how", ["stop", "close", "stop one of two"])
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 30))]
)
def test_stopped_at_some_instant_the_books_balance_and_nothing_is_left(seed: int, how: str) -> None:
    rng = random.Random(seed)
    inbox = Inbox(max_messages=rng.choice((1, 4, 64)), max_bytes=4 << 20)
    inbox.fileno()
    before = open_descriptors()
    taken: list[list[tuple[int, int]]] = [[] for _ in range(3)]
    is_over = threading.Event()
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(receiving(inbox)) for _ in range(2)]
        looking = Running(look, inbox, is_over)
        consuming = [Running(consume, inbox, n, taken[n]) for n in range(rng.choice((0, 1, 3)))]
        pushes = [Push(member) for member in range(1, 13)]
        pushing = [Running(push.run, nodes[push.member % 2][1].url) for push in pushes]
        eventually(lambda: inbox.stats().received >= (2 if not consuming else 50 * seed))
        time.sleep(rng.random() / 50)
        if how == "close":
            for _, listener in nodes:
                listener.close(0.05)
        elif how == "stop":
            stops = [Running(transport.stop) for transport, _ in nodes]
            for stop in stops:
                stop.join()
        else:
            nodes[0][0].stop()
            time.sleep(rng.random() / 50)
        stack.close()
        for each in (*pushing, *consuming):
            each.join()
        is_over.set()
        assert looking.join() > 0
    assert_books(inbox)
    everything = [pair for mine in taken for pair in mine]
    assert len(set(everything)) == len(everything) == inbox.stats().taken
    sent = {(push.member, index) for push in pushes for index in range(1, push.sent + 1)}
    assert sent >= set(everything)
    # Whatever was answered was taken, or dropped when its node stopped.
    answered = {(push.member, index) for push in pushes for index in push.answered}
    assert len(answered - set(everything)) <= inbox.stats().dropped
    assert listener_threads() == []
    del nodes, stack
    gc.collect()
    assert_all_closed(before)


def test_threads_and_connections_deliver_side_by_side() -> None:
    """As one node behind a listener and another behind an ASGI server do."""
    inbox = Inbox(max_messages=2)
    each = 150

    def deliver(number: int) -> None:
        for index in range(each):
            kind = (APP, PROP)[index % 2]
            assert source.deliver(body_of(kind, index, member=100 + number))

    def push(number: int) -> None:
        with Caller(url, number) as caller:
            for index in range(each):
                assert caller.ask((APP, PROP)[index % 2], index) == 204

    taken: list[list[tuple[int, int]]] = [[], []]
    with receiving(inbox) as (transport, listener):
        assert transport.handlers.source is not None
        source, url = transport.handlers.source, listener.url
        work = [Running(what, number) for number in range(1, 4) for what in (deliver, push)]
        consuming = [Running(consume, inbox, n, taken[n]) for n in range(2)]
        for one in work:
            one.join()
        eventually(lambda: inbox.stats().queued == 0, timeout=LONG_TIMEOUT)
    for one in consuming:
        one.join()
    expected = [(m, i) for m in (1, 2, 3, 101, 102, 103) for i in range(each)]
    assert sorted(taken[0] + taken[1]) == expected
    assert_books(inbox)
