"""An inbox: what is put there, in which order it is taken, by whom, and what it says of itself.

What happens when it is full is in test_inbox_full.py, how it ends in test_inbox_stop.py.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import pipeline.aio
from pipeline import (
    EncodedMessage,
    Inbox,
    InboxStats,
    Message,
    MessageType,
    Transport,
    UsageError,
)
from tests.functional.test_encoded import FIELDS, strange
from tests.support import LONG_TIMEOUT, MIB, SHORT_TIMEOUT
from tests.support.fronts import AsgiFront, WsgiFront, running
from tests.support.http import CLUSTER_ID, peer_headers, reply_of_socket
from tests.support.inbox import (
    APP,
    HEARTBEAT,
    PROP,
    SNAP,
    Caller,
    Reports,
    Running,
    assert_books,
    body_of,
    indexes,
    receiving,
    request_of,
    take_exactly,
    wait_until_waiting,
)
from tests.support.listening import ask, post
from tests.support.tls import Authority


def is_readable(inbox: Inbox[Any], timeout: float = 0.0) -> bool:
    return bool(select.select([inbox], [], [], timeout)[0])


# What is taken


def test_messages_are_taken_in_the_order_in_which_they_came_whatever_their_lane() -> None:
    inbox = Inbox()
    kinds = [
        (HEARTBEAT, 0),
        (APP, 0),
        (APP, 100_000),
        (MessageType.APP_RESP, 0),
        (APP, 3 * MIB),
        (MessageType.VOTE, 0),
        (HEARTBEAT, 0),
    ] * 3
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        for index, (kind, size) in enumerate(kinds):
            assert caller.ask(kind, index, size=size) == 204
        messages = inbox.take()
        assert [(m.index, m.type) for m in messages] == [(i, k) for i, (k, _) in enumerate(kinds)]
        assert [len(m.entries[0].data) if m.entries else 0 for m in messages] == [
            size for _, size in kinds
        ]


def test_take_returns_so_many_at_most_and_nothing_twice() -> None:
    inbox = Inbox()
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        for index in range(10):
            assert caller.ask(HEARTBEAT, index) == 204
        assert indexes(inbox.take(3)) == [0, 1, 2]
        assert indexes(inbox.take(1)) == [3]
        assert indexes(inbox.take()) == [4, 5, 6, 7, 8, 9]
        assert inbox.take() == []
        assert_books(inbox)


def test_take_returns_256_unless_it_is_told_how_many() -> None:
    inbox = Inbox()
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        caller.sock.sendall(request_of(body_of(HEARTBEAT)) * 300)
        caller.answers(300)
        assert (len(inbox.take()), len(inbox.take())) == (256, 44)


@pytest.mark.parametrize("timeout", [LONG_TIMEOUT, None])
def test_take_returns_at_the_first_message(timeout: float | None) -> None:
    inbox = Inbox()
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        taking = Running(inbox.take, 256, timeout)
        time.sleep(SHORT_TIMEOUT)
        assert taking.is_running
        assert caller.ask(HEARTBEAT, 5) == 204
        assert indexes(taking.join()) == [5]


def test_take_waits_as_long_as_it_is_told_and_no_shorter() -> None:
    inbox = Inbox()
    with receiving(inbox):
        began = time.monotonic()
        assert inbox.take(timeout=SHORT_TIMEOUT) == []
        assert time.monotonic() - began >= SHORT_TIMEOUT


def test_others_run_while_take_waits() -> None:
    """It waits without the GIL: it would not even be woken by what this thread sends."""
    inbox = Inbox()
    with receiving(inbox) as (_, listener):
        taking = Running(inbox.take, 1, None)
        for index in range(20):
            with Caller(listener.url) as caller:
                assert caller.ask(HEARTBEAT, index) == 204
            assert indexes(taking.join()) == [index]
            taking = Running(inbox.take, 1, None)
    assert taking.join() == []


def test_many_consumers_lose_nothing_and_take_nothing_twice() -> None:
    inbox = Inbox(max_messages=16)
    producers, each = 8, 300
    taken: list[list[tuple[int, int]]] = [[] for _ in range(4)]

    def produce(member: int) -> None:
        with Caller(url, member) as caller:
            for index in range(each):
                assert caller.ask((HEARTBEAT, APP, PROP)[index % 3], index) == 204

    def consume(number: int) -> None:
        while messages := inbox.take(1 + number, None):
            taken[number] += [(m.from_, m.index) for m in messages]

    with receiving(inbox) as (_, listener):
        url = listener.url
        consumers = [Running(consume, number) for number in range(4)]
        producing = [Running(produce, member) for member in range(1, producers + 1)]
        for producer in producing:
            producer.join()
        while len(inbox) > 0:
            time.sleep(0.001)
    for consumer in consumers:
        consumer.join()
    everything = sorted(pair for mine in taken for pair in mine)
    assert everything == [(m, i) for m in range(1, producers + 1) for i in range(each)]
    for mine in taken:  # what one consumer has of a member it has in order
        for member in range(1, producers + 1):
            of_member = [index for sender, index in mine if sender == member]
            assert of_member == sorted(of_member)
    assert_books(inbox)


def test_large_payloads_outlive_inbox_and_transport() -> None:
    inbox = Inbox()
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        assert caller.ask(APP, size=3 * MIB) == 204
        (message,) = inbox.take()
    del inbox, listener
    assert bytes(message.entries[0].data) == bytes(3 * MIB)


# What an inbox says of itself


@pytest.mark.parametrize("is_early", [True, False], ids=["before", "after the first message"])
def test_the_descriptor_is_readable_while_there_is_something(is_early: bool) -> None:
    inbox = Inbox()
    if is_early:
        assert not is_readable(inbox)
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        for _ in range(3):
            for index in range(3):
                assert caller.ask(HEARTBEAT, index) == 204
                # Consumers are told once for all that came in a turn of the loop, a moment later.
                assert is_readable(inbox, LONG_TIMEOUT)
            inbox.take(2)
            assert is_readable(inbox)
            inbox.take(1)
            assert not is_readable(inbox)
        descriptor = inbox.fileno()
        assert caller.ask(HEARTBEAT) == 204
        assert inbox.fileno() == descriptor
    assert (len(inbox), inbox.closed) == (0, True)
    assert is_readable(inbox)
    assert inbox.fileno() == descriptor


def test_len_bool_repr_and_books_say_what_is_there() -> None:
    inbox = Inbox()
    assert (len(inbox), bool(inbox), inbox.closed) == (0, True, False)
    assert inbox.stats() == InboxStats(0, 0, 0, 0, 0, 0)
    assert repr(inbox) == "<Inbox: 0 queued, 0 waiting>"
    sizes = [len(body_of(APP, size=size)) for size in (10, 200)]
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        assert [caller.ask(APP, size=size) for size in (10, 200)] == [204, 204]
        assert (len(inbox), inbox.stats()) == (2, InboxStats(2, 0, 0, 2, sum(sizes), 0))
        assert repr(inbox) == "<Inbox: 2 queued, 0 waiting>"
        inbox.take(1)
        assert inbox.stats() == InboxStats(2, 1, 0, 1, sizes[1], 0)
    assert inbox.stats() == InboxStats(2, 1, 1, 0, 0, 0)
    assert repr(inbox) == "<Inbox: closed>"


def test_the_books_balance_at_every_instant_under_load() -> None:
    inbox = Inbox(max_messages=8)
    is_over = threading.Event()

    def look() -> int:
        looks = before = 0
        while not is_over.is_set():
            stats = inbox.stats()
            assert stats.received == stats.taken + stats.queued + stats.dropped, stats
            assert stats.received >= before
            assert 0 <= stats.queued <= 4 * 8
            assert 0 <= stats.waiting <= 8
            before = stats.received
            looks += 1
        return looks

    def produce(member: int) -> None:
        with Caller(url, member) as caller:
            for index in range(200):
                assert caller.ask((HEARTBEAT, APP, PROP)[member % 3], index) == 204

    with receiving(inbox) as (_, listener):
        url = listener.url
        looking = Running(look)
        producing = [Running(produce, member) for member in range(1, 7)]
        take_exactly(inbox, 6 * 200, batch=5)
        for producer in producing:
            producer.join()
        is_over.set()
        assert looking.join() > 10
    assert inbox.stats() == InboxStats(1200, 1200, 0, 0, 0, 0)


# Which node, and which messages


def test_one_inbox_serves_several_transports_and_is_closed_with_the_last() -> None:
    inbox = Inbox()
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(receiving(inbox)) for _ in range(3)]
        for number, (_, listener) in enumerate(nodes):
            with Caller(listener.url) as caller:
                assert caller.ask(HEARTBEAT, number) == 204
        nodes[0][0].stop()
        assert not inbox.closed
        assert inbox.stats()[:4] == (3, 0, 1, 2)  # what came to the one that has stopped is dropped
        assert indexes(inbox.take()) == [1, 2]
        nodes[1][0].stop()
        with Caller(nodes[2][1].url) as caller:
            assert caller.ask(HEARTBEAT, 9) == 204
        assert indexes(inbox.take()) == [9]
        nodes[2][0].stop()
        assert inbox.closed


def test_a_transport_that_was_never_started_keeps_an_inbox_open_until_it_is_stopped() -> None:
    inbox = Inbox()
    idle = Transport(3, CLUSTER_ID, Reports(), inbox=inbox)
    with receiving(inbox):
        pass
    assert not inbox.closed
    idle.stop()
    assert inbox.closed
    idle.stop()


def test_a_closed_inbox_is_given_to_no_other_transport() -> None:
    inbox = Inbox()
    with receiving(inbox):
        pass
    with pytest.raises(UsageError, match="inbox: closed"):
        Transport(2, CLUSTER_ID, Reports(), inbox=inbox)


def test_a_closed_inbox_is_given_to_no_other_transport_of_asyncio() -> None:
    inbox = pipeline.aio.Inbox()
    with receiving(inbox.threaded):
        pass
    with pytest.raises(UsageError, match="inbox: closed"):
        pipeline.aio.Transport(2, CLUSTER_ID, Reports(), inbox=inbox)


def test_a_raft_without_process_needs_an_inbox() -> None:
    raft: Any = Reports()
    with pytest.raises(UsageError, match="process"):
        Transport(2, CLUSTER_ID, raft)
    with pytest.raises(UsageError, match="process"):
        pipeline.aio.Transport(2, CLUSTER_ID, raft)


def test_process_is_not_called_where_there_is_an_inbox() -> None:
    class Both(Reports):
        def process(self, message: Message) -> None:
            raise AssertionError("called")

    inbox = Inbox()
    with Transport(2, CLUSTER_ID, Both(), inbox=inbox) as transport:
        with Caller(transport.listen("http://127.0.0.1:0").url) as caller:
            for size in (0, 100_000):
                assert caller.ask(APP, size=size) == 204
        assert len(inbox.take()) == 2
        assert transport.transport_stats().callback_errors == 0


@pytest.mark.parametrize("size", [0, 100_000], ids=["small", "100 kB"])
def test_local_and_unknown_types_are_answered_and_not_delivered(size: int) -> None:
    inbox = Inbox()
    with receiving(inbox) as (transport, listener), Caller(listener.url) as caller:
        for kind in (MessageType.HUP, MessageType.STORAGE_APPLY_RESP, 24, 63, 64, 2**31 - 1):
            assert caller.ask(kind, size=size) == 204
        stats = transport.transport_stats()
        assert (stats.ignored, stats.unknown) == (2, 4)
        assert inbox.stats().received == 0


def test_what_is_no_message_is_refused() -> None:
    inbox = Inbox()
    with receiving(inbox) as (transport, listener):
        for body in (b"\x0a", b"\x08" + b"\xff" * 9 + b"\x01", bytes(100_000)):
            assert ask(listener.url, post(body)).status == 400
        assert inbox.stats().received == 0
        assert transport.transport_stats().received_failures == 3


def test_types_of_a_later_raft_are_delivered_encoded() -> None:
    inbox = Inbox(encoded=True)
    with receiving(inbox) as (transport, listener), Caller(listener.url) as caller:
        for kind in (MessageType.HUP, 24, 63, 64, 2**31 - 1):
            assert caller.ask(kind) == 204
        assert [message.type for message in inbox.take()] == [24, 63, 64, 2**31 - 1]
        assert transport.transport_stats()[3:5] == (1, 0)


def test_lost_fields_are_counted_and_the_log_hears_once_of_a_member(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inbox = Inbox()
    with receiving(inbox) as (transport, listener):
        for _ in range(3):
            assert ask(listener.url, post(strange())).status == 204
        assert transport.transport_stats().unknown_fields == 0  # not while it is not taken
        assert len(inbox.take()) == 3
        assert transport.transport_stats().unknown_fields == 3
    assert len([r for r in caplog.records if "raftpb does not have" in r.getMessage()]) == 1


def test_what_is_taken_is_counted_as_received() -> None:
    inbox = Inbox()
    sent = {1: 0, 7: 0}
    with receiving(inbox) as (transport, listener):
        for member in sent:
            with Caller(listener.url, member) as caller:
                for kind, size in ((APP, 10), (APP, 100_000), (HEARTBEAT, 0), (APP, 5)):
                    assert caller.ask(kind, size=size) == 204
                    sent[member] += len(body_of(kind, size=size, member=member))
        assert transport.snapshot().received.received_bytes == {}
        assert len(take_exactly(inbox, 8, batch=3)) == 8
        assert transport.snapshot().received.received_bytes == sent
        assert transport.server_stats()["recvAppendRequestCnt"] == 6
        assert transport.server_stats()["leaderInfo"]["leader"] == "7"  # type: ignore[index]


# The ways in


@contextlib.contextmanager
def by_listener(transport: Transport) -> Iterator[Callable[[bytes], int]]:
    url = transport.listen("http://127.0.0.1:0").url
    yield lambda body: ask(url, post(body)).status


@contextlib.contextmanager
def by_h11(transport: Transport) -> Iterator[Callable[[bytes], int]]:
    url = transport.listen("http://127.0.0.1:0").url
    yield lambda body: ask(url, post(body, is_chunked=True)).status


@contextlib.contextmanager
def by_asgi(transport: Transport) -> Iterator[Callable[[bytes], int]]:
    with running(AsgiFront) as front:
        front.app = transport.asgi_app
        yield lambda body: reply_of_socket(front.url, "POST", "/raft", peer_headers(), body).status


@contextlib.contextmanager
def by_wsgi(transport: Transport) -> Iterator[Callable[[bytes], int]]:
    with running(WsgiFront) as front:
        front.app = transport.wsgi_app
        yield lambda body: reply_of_socket(front.url, "POST", "/raft", peer_headers(), body).status


each_way = pytest.mark.parametrize(
    "way", [by_listener, by_h11, by_asgi, by_wsgi], ids=["listener", "h11", "asgi", "wsgi"]
)
Way = Callable[[Transport], contextlib.AbstractContextManager[Callable[[bytes], int]]]


@each_way
@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB], ids=["small", "100 kB", "3 MiB"])
def test_a_message_comes_decoded_whichever_way_it_comes(way: Way, size: int) -> None:
    inbox = Inbox()
    with receiving(inbox) as (transport, _), way(transport) as send:
        assert send(body_of(APP, 5, size=size)) == 204
        (message,) = inbox.take()
        assert (message.type, message.from_, message.index) == (APP, 1, 5)
        assert [bytes(entry.data) for entry in message.entries] == [bytes(size)] * (size > 0)
        assert transport.transport_stats().unknown_fields == 0
        assert transport.snapshot().received.received_bytes == {1: len(message.marshal())}


@each_way
@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB], ids=["small", "100 kB", "3 MiB"])
def test_a_message_comes_byte_for_byte_into_an_encoded_inbox(way: Way, size: int) -> None:
    inbox = Inbox(encoded=True)
    body = strange(size)
    assert FIELDS in body
    with receiving(inbox) as (transport, _), way(transport) as send:
        assert send(body) == 204
        (message,) = inbox.take()
        assert type(message) is EncodedMessage
        assert message.data == body
        assert memoryview(message.data).readonly
        assert (message.type, message.to, message.from_, message.term) == (3, 2, 1, 5)
        assert transport.transport_stats().unknown_fields == 0


@each_way
@pytest.mark.parametrize("kind", [PROP, SNAP], ids=["MsgProp", "MsgSnap"])
@pytest.mark.parametrize("size", [0, 100_000], ids=["small", "100 kB"])
def test_msgprop_and_msgsnap_are_answered_when_they_are_taken(
    way: Way, kind: int, size: int
) -> None:
    inbox = Inbox()
    with receiving(inbox) as (transport, _), way(transport) as send:
        sending = Running(send, body_of(kind, 3, size=size))
        wait_until_waiting(inbox, 1)
        assert len(inbox) == 1
        time.sleep(SHORT_TIMEOUT)
        assert sending.is_running
        assert indexes(inbox.take()) == [3]
        assert sending.join() == 204
        assert_books(inbox)


@each_way
def test_a_full_lane_withholds_the_answer_whichever_way_it_comes(way: Way) -> None:
    inbox = Inbox(max_messages=1)
    with receiving(inbox) as (transport, _), way(transport) as send:
        assert send(body_of(APP, 0)) == 204
        sending = Running(send, body_of(APP, 1))
        wait_until_waiting(inbox, 1)
        assert send(body_of(HEARTBEAT, 2)) == 204
        assert sending.is_running
        assert indexes(inbox.take(1)) == [0]
        assert sending.join() == 204
        assert indexes(inbox.take()) == [2, 1]
        assert_books(inbox)


def test_an_asgi_server_keeps_no_heartbeat_waiting_for_what_its_threads_wait_for() -> None:
    inbox = Inbox(max_messages=4)
    with receiving(inbox) as (transport, _), by_asgi(transport) as send:
        for index in range(4):
            assert send(body_of(APP, index)) == 204
        sending = [Running(send, body_of(PROP, 10 + n)) for n in range(4)]
        wait_until_waiting(inbox, 4)  # as many as there are threads
        sending += [Running(send, body_of(APP, 20 + n)) for n in range(4)]
        for index in range(4):
            assert send(body_of(HEARTBEAT, 30 + index)) == 204
        assert all(each.is_running for each in sending)
        assert len(take_exactly(inbox, 16)) == 16
        assert [each.join() for each in sending] == [204] * 8
        assert_books(inbox)


@each_way
@pytest.mark.parametrize("kind", [PROP, APP], ids=["MsgProp", "MsgApp"])
def test_what_waits_is_answered_503_when_the_node_stops(way: Way, kind: int) -> None:
    inbox = Inbox(max_messages=1)
    with receiving(inbox) as (transport, _), way(transport) as send:
        sending = [Running(send, body_of(kind, n)) for n in range(2)]
        wait_until_waiting(inbox, 2 if kind == PROP else 1)
        transport.stop()
        statuses = sorted(each.join() for each in sending)
        assert statuses == ([503, 503] if kind == PROP else [204, 503])
    assert inbox.stats() == InboxStats(1, 0, 1, 0, 0, 0)


# TLS


def test_messages_come_over_tls_and_what_is_held_is_answered_when_it_is_taken(
    tmp_path: Any,
) -> None:
    authority = Authority(tmp_path)
    inbox = Inbox(max_messages=2)
    info = authority.info()
    with receiving(inbox, tls=info, url="https://127.0.0.1:0", peers=[1]) as (_, listener):
        context = authority.client(*authority.issue("caller"))
        with Caller(listener.url, tls=context) as one, Caller(listener.url, tls=context) as two:
            for index, size in enumerate((0, 100_000)):
                assert one.ask(APP, index, size=size) == 204
            two.post(PROP, 2)
            one.post(SNAP, 3)
            wait_until_waiting(inbox, 2)
            assert not one.is_answered()
            assert not two.is_answered()
            assert sorted(indexes(inbox.take())) == [0, 1, 2, 3]
            assert (one.status(), two.status()) == (204, 204)
            one.post(APP, 4)
            assert one.status() == 204
            assert listener.stats().general_requests == 2  # the first of each connection
    assert inbox.stats()[:3] == (5, 4, 1)


def test_a_sender_with_the_certificate_of_another_reaches_no_inbox(tmp_path: Any) -> None:
    authority = Authority(tmp_path)
    inbox = Inbox()
    allowed = {7}
    info = authority.info(allow_member=lambda certificate, member: member in allowed)
    with receiving(inbox, tls=info, url="https://127.0.0.1:0", peers=[7, 8]) as (_, listener):
        context = authority.client(*authority.issue("caller"))
        with (
            Caller(listener.url, 7, tls=context) as good,
            Caller(listener.url, 8, tls=context) as bad,
        ):
            for size in (0, 100_000):
                assert bad.ask(HEARTBEAT, size=size) == 412
                for index in range(3):  # the first is odd, the others are the core's
                    assert good.ask(APP, index, size=size) == 204
            assert [m.from_ for m in inbox.take()] == [7] * 6
            good.post(PROP, 1)
            wait_until_waiting(inbox, 1)
            assert len(inbox.take()) == 1
            assert good.status() == 204
            allowed.clear()
            for kind, size in ((APP, 0), (APP, 100_000), (PROP, 0)):
                assert good.ask(kind, size=size) == 412
            assert listener.stats().fast_requests >= 7
    assert inbox.stats().received == 7
    assert_books(inbox)


def test_credentials_are_replaced_under_traffic_and_nothing_is_lost(tmp_path: Any) -> None:
    authority = Authority(tmp_path)
    inbox = Inbox()
    info = authority.info()
    url = "https://127.0.0.1:0"
    with receiving(inbox, tls=info, url=url, peers=[1]) as (transport, listener):
        context = authority.client(*authority.issue("caller"))
        with Caller(listener.url, tls=context) as held, Caller(listener.url, tls=context) as idle:
            assert idle.ask(APP, 0) == 204
            assert held.ask(APP, 1) == 204
            held.post(PROP, 2)
            wait_until_waiting(inbox, 1)
            authority.issue("node")
            assert transport.reload_tls()
            assert idle.status() is None
            assert indexes(inbox.take()) == [0, 1, 2]
            (answer,) = held.answers(1)
            assert answer.startswith(b"HTTP/1.1 204")
            assert b"connection: close" in answer.lower()
            assert held.status() is None
        with Caller(listener.url, tls=context) as again:
            assert again.ask(HEARTBEAT, 3) == 204
    assert inbox.stats()[:3] == (4, 3, 1)
