"""A full inbox: whose answers are withheld, whose are not, who is let in next, what it holds."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline import Inbox, MessageType, ReceiverConfig, TransportConfig
from tests.support import MIB
from tests.support.inbox import (
    APP,
    HEARTBEAT,
    PROP,
    Caller,
    Running,
    assert_books,
    body_of,
    indexes,
    receiving,
    request_of,
    take_exactly,
    wait_until_waiting,
)
from tests.support.listening import GOOD, catch_up, dial, post, read_answers, read_status

# By lane: what a message of it is like.
LANES: dict[str, dict[str, int]] = {
    "heartbeats": {"kind": HEARTBEAT},
    "appends": {"kind": APP},
    "proposals": {"kind": PROP},
    "large": {"kind": APP, "size": 100_000},
}


@contextlib.contextmanager
def callers(url: str, count: int, member: int = 1) -> Iterator[list[Caller]]:
    """Open connections of a member, whose head is known from here on."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Caller(url, member)) for _ in range(count)]


def fill(inbox: Inbox[Any], caller: Caller, count: int, *, kind: int, size: int = 0) -> None:
    """Fill a lane with messages that are answered at once."""
    for index in range(count):
        assert caller.ask(kind, index, size=size) == 204


@pytest.mark.parametrize("lane", LANES)
def test_a_full_lane_keeps_nobody_out_of_another(lane: str) -> None:
    inbox = Inbox(max_messages=2)
    with receiving(inbox) as (_, listener), callers(listener.url, 4) as (one, two, three, other):
        for caller in (one, two):
            caller.post(**LANES[lane])
        wait_until_waiting(inbox, 2 if lane == "proposals" else 0)
        while len(inbox) < 2:
            catch_up(listener)
        three.post(**LANES[lane])  # there is no room for it
        wait_until_waiting(inbox, 3 if lane == "proposals" else 1)
        for index, name in enumerate(name for name in LANES if name not in (lane, "proposals")):
            assert other.ask(index=index, **LANES[name]) == 204
        if lane != "proposals":
            other.post(**LANES["proposals"])
            wait_until_waiting(inbox, 2)
        assert not three.is_answered()
        take_exactly(inbox, inbox.stats().queued)
        assert len(inbox) == 1 or take_exactly(inbox, 1)
        inbox.take()
        assert [caller.status() for caller in (one, two, three)] == [204] * 3
        assert_books(inbox)


def test_a_full_lane_withholds_answers_and_drops_nothing() -> None:
    inbox = Inbox(max_messages=4)
    with receiving(inbox) as (_, listener), callers(listener.url, 8) as waiting:
        for index, caller in enumerate(waiting):
            caller.post(APP, index)
            if index >= 4:
                wait_until_waiting(inbox, index - 3)
            else:
                assert caller.status() == 204
        assert not any(caller.is_answered() for caller in waiting[4:])
        assert inbox.stats()[3::2] == (4, 4)
        for taken in range(8):
            assert indexes(take_exactly(inbox, 1)) == [taken]
            if taken < 4:
                assert waiting[4 + taken].status() == 204
        assert_books(inbox)


@pytest.mark.parametrize("size", [0, 100_000], ids=["small", "100 kB"])
def test_a_member_of_which_a_message_waits_is_not_read_any_further(size: int) -> None:
    inbox = Inbox(max_messages=1)
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        assert caller.ask(APP, 0, size=size) == 204
        requests = [request_of(body_of(APP, index, size=size)) for index in range(1, 50)]
        sending = Running(caller.sock.sendall, b"".join(requests))
        wait_until_waiting(inbox, 1)
        catch_up(listener)
        assert not caller.is_answered()
        assert inbox.stats().queued == 1
        assert indexes(take_exactly(inbox, 50, batch=1)) == [*range(50)]
        sending.join()
        assert len(caller.answers(49)) == 49
        assert_books(inbox)


def test_requests_sent_ahead_are_all_answered_and_taken_in_order() -> None:
    inbox = Inbox()
    count = 1000
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        sending = Running(
            caller.sock.sendall,
            b"".join(request_of(body_of(HEARTBEAT, index)) for index in range(count)),
        )
        answers = caller.answers(count)
        sending.join()
        assert {answer[:24] for answer in answers} == {b"HTTP/1.1 204 No Content\r"}
        assert indexes(take_exactly(inbox, count)) == [*range(count)]
        assert_books(inbox)


def test_requests_sent_ahead_in_pieces_of_any_size_are_all_answered() -> None:
    inbox = Inbox()
    data = b"".join(
        request_of(body_of(APP, index, size=(0, 70_000)[index % 5 == 0])) for index in range(20)
    )
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        pieces = itertools.cycle((1, 17, 300, 5000, 40_000))
        while data:
            size = next(pieces)
            caller.sock.sendall(data[:size])
            data = data[size:]
        assert len(caller.answers(20)) == 20
        assert indexes(take_exactly(inbox, 20)) == [*range(20)]


def test_a_chunked_request_waits_and_is_answered_like_any_other() -> None:
    inbox = Inbox(max_messages=1)
    with receiving(inbox) as (_, listener), dial(listener.url) as sock:
        bodies = [body_of(kind, n) for n, kind in enumerate((APP, APP, PROP, APP))]
        sock.sendall(b"".join(post(body, is_chunked=True) for body in bodies))
        assert read_status(sock) == 204
        wait_until_waiting(inbox, 1)
        assert indexes(inbox.take()) == [0]
        assert read_status(sock) == 204
        assert indexes(take_exactly(inbox, 2)) == [1, 2]
        # The last is answered as soon as it is in, so maybe together with the one before.
        answers = read_answers(sock, 2)
        assert all(answer.startswith(b"HTTP/1.1 204 ") for answer in answers)
        assert indexes(take_exactly(inbox, 1)) == [3]
        assert_books(inbox)


# Bytes


@pytest.mark.parametrize("size", [1000, 100_000, 3 * MIB], ids=["1 kB", "100 kB", "3 MiB"])
def test_max_bytes_are_of_a_lane(size: int) -> None:
    inbox = Inbox(max_bytes=2 * len(body_of(APP, 3, size=size)))
    with receiving(inbox) as (_, listener), callers(listener.url, 4) as waiting:
        for index, caller in enumerate(waiting[:2]):
            assert caller.ask(APP, index, size=size) == 204
        for index, caller in enumerate(waiting[2:], 2):
            caller.post(APP, index, size=size)
            wait_until_waiting(inbox, index - 1)
        assert waiting[0].ask(HEARTBEAT, 4) == 204
        assert inbox.stats().queued == 3
        assert sorted(indexes(take_exactly(inbox, 5, batch=1))) == [0, 1, 2, 3, 4]
        assert [caller.status() for caller in waiting[2:]] == [204, 204]
        assert_books(inbox)


@pytest.mark.parametrize("size", [2000, 100_000, 5 * MIB], ids=["2 kB", "100 kB", "5 MiB"])
def test_one_message_larger_than_max_bytes_is_let_in_by_itself(size: int) -> None:
    inbox = Inbox(max_bytes=1000)
    with receiving(inbox) as (_, listener), callers(listener.url, 2) as (one, two):
        assert one.ask(APP, 0, size=size) == 204
        two.post(APP, 1, size=size)
        wait_until_waiting(inbox, 1)
        assert indexes(inbox.take()) == [0]
        assert two.status() == 204
        assert indexes(inbox.take()) == [1]
        assert_books(inbox)


def test_a_large_message_is_let_in_although_smaller_ones_keep_coming() -> None:
    """What there is no room for keeps its turn: others do not use up the room it waits for."""
    inbox = Inbox(max_bytes=300_000)
    is_over = threading.Event()

    def push(member: int) -> None:
        with Caller(url, member) as caller:
            while not is_over.is_set():
                assert caller.ask(APP, size=100_000) == 204

    with receiving(inbox) as (_, listener):
        url = listener.url
        pushing = [Running(push, member) for member in range(1, 9)]
        with Caller(url, 9) as caller:
            wait_until_full(inbox)
            caller.post(APP, 1000, size=250_000)
            for _ in range(1000):
                if 1000 in indexes(take_exactly(inbox, 1)):
                    break
            else:
                pytest.fail("it is not let in")
            is_over.set()
            while any(each.is_running for each in pushing):
                inbox.take(timeout=0.01)
            assert caller.status() == 204


def wait_until_full(inbox: Inbox[Any]) -> None:
    while inbox.stats().waiting == 0:
        threading.Event().wait(0.001)


@pytest.mark.parametrize("size", [0, 3 * MIB], ids=["small", "3 MiB"])
def test_the_budget_of_bodies_is_free_again_when_they_are_in_the_inbox(size: int) -> None:
    inbox = Inbox(max_bytes=1 << 30)
    config = TransportConfig(
        receiver=ReceiverConfig(max_body_bytes=4 * MIB, max_buffered_bytes=8 * MIB)
    )
    with receiving(inbox, config) as (transport, listener), callers(listener.url, 4) as pushing:
        for index in range(10):
            for caller in pushing:
                caller.post(APP, index, size=size)
            assert [caller.status() for caller in pushing] == [204] * 4
        assert transport.handlers.budget.used == 0
        assert len(take_exactly(inbox, 40)) == 40


# Whose turn it is


def test_a_member_that_pushes_over_64_connections_keeps_no_other_waiting() -> None:
    inbox = Inbox(max_messages=1)
    rounds = 20
    is_over = threading.Event()

    def push(caller: Caller) -> None:
        while not is_over.is_set():
            assert caller.ask(APP) == 204

    with (
        receiving(inbox) as (_, listener),
        callers(listener.url, 64, member=1) as many,
        Caller(listener.url, 2) as one,
    ):
        pushing = [Running(push, caller) for caller in many]
        for index in range(rounds):
            wait_until_waiting(inbox, 64)  # and one more message is there
            one.post(APP, index)
            wait_until_waiting(inbox, 65)
            # The one that is there, one of the others whose turn it may be, and then its own.
            assert (2, index) in [(m.from_, m.index) for m in take_exactly(inbox, 3, batch=1)]
            assert one.status() == 204
        is_over.set()
        while any(each.is_running for each in pushing):
            inbox.take(timeout=0.01)
        for each in pushing:
            each.join()


def test_whose_turn_it_is_keeps_it_although_there_is_no_room_yet() -> None:
    """The loop looks after each batch that was taken, of whatever lane it was."""
    inbox = Inbox(max_messages=2)
    with (
        receiving(inbox) as (_, listener),
        callers(listener.url, 2, member=1) as (first, also),
        Caller(listener.url, 2) as second,
    ):
        for index in range(2):
            assert first.ask(HEARTBEAT, index) == 204
        for index in range(2, 4):
            assert first.ask(APP, index) == 204
        second.post(APP, 4)
        wait_until_waiting(inbox, 1)
        first.post(APP, 5)
        wait_until_waiting(inbox, 2)
        also.post(APP, 6)
        wait_until_waiting(inbox, 3)
        assert indexes(inbox.take(1)) == [0]  # a heartbeat: there is no room for appends
        catch_up(listener)
        assert indexes(inbox.take(2)) == [1, 2]
        assert second.status() == 204
        assert [m.from_ for m in inbox.take()] == [1, 2]


@pytest.mark.parametrize("kinds", [(HEARTBEAT,), (APP,), (HEARTBEAT, APP, PROP)])
def test_64_peers_push_against_a_slow_consumer_and_nothing_is_lost(
    kinds: tuple[MessageType, ...],
) -> None:
    inbox = Inbox(max_messages=8)
    peers, each = 64, 20

    def push(member: int) -> None:
        with Caller(url, member) as caller:
            for index in range(each):
                assert caller.ask(kinds[index % len(kinds)], index) == 204

    with receiving(inbox) as (_, listener):
        url = listener.url
        pushing = [Running(push, member) for member in range(1, peers + 1)]
        taken = [(m.from_, m.index) for m in take_exactly(inbox, peers * each, batch=3)]
        for pusher in pushing:
            pusher.join()
        assert sorted(taken) == [(m, i) for m in range(1, peers + 1) for i in range(each)]
        for member in range(1, peers + 1):
            assert [i for m, i in taken if m == member] == [*range(each)]
        assert_books(inbox)


@pytest.mark.parametrize("kind", [APP, PROP], ids=["waits for room", "waits to be taken"])
@pytest.mark.parametrize(
    "end", [lambda caller: caller.close(), lambda caller: caller.sock.shutdown(1)]
)
def test_the_message_of_a_caller_that_has_gone_is_taken_all_the_same(
    kind: int, end: Callable[[Caller], None]
) -> None:
    inbox = Inbox(max_messages=1)
    with receiving(inbox) as (_, listener), callers(listener.url, 2) as (first, gone):
        if kind == APP:
            assert first.ask(APP, 0) == 204
        gone.post(kind, 1)
        wait_until_waiting(inbox, 1)
        end(gone)
        catch_up(listener)
        assert indexes(take_exactly(inbox, 1 + (kind == APP), batch=1))[-1] == 1
        assert_books(inbox)
        with dial(listener.url) as sock:
            sock.sendall(GOOD)
            assert read_status(sock) == 204
