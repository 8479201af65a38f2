"""How an inbox ends: stop, close, Ctrl-C and signals, in every state; what becomes of whom."""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import Inbox, InboxStats, ReceiverConfig, TransportConfig
from pipeline.receive._arrivals import Source
from tests.support import LONG_TIMEOUT, MIB
from tests.support.descriptors import open_descriptors
from tests.support.inbox import (
    APP,
    HEARTBEAT,
    PROP,
    SNAP,
    Caller,
    Running,
    assert_books,
    body_of,
    indexes,
    receiving,
    take_exactly,
    wait_until_waiting,
)
from tests.support.listening import ANY, ask, catch_up, is_closed, listener_threads, post
from tests.support.snapshots import FILE, framed, post_snapshot, snapshot
from tests.support.tls import Authority
from tests.support.waiting import eventually


@pytest.fixture(autouse=True)
def no_listener_left() -> Iterator[None]:
    """Fail a test that leaves a thread of a listener, the native one above all, or a descriptor."""
    gc.collect()
    before = open_descriptors()
    yield
    assert listener_threads() == []
    gc.collect()
    eventually(lambda: open_descriptors() <= before)


# Stop, in every state

# How many messages are left in the inbox; what those are answered that are not answered yet.
Left = tuple[int, list[int | None]]
Connect = Callable[..., Caller]


@contextlib.contextmanager
def nothing(inbox: Inbox[Any], connect: Connect) -> Iterator[Left]:
    yield 0, []


@contextlib.contextmanager
def queued(inbox: Inbox[Any], connect: Connect) -> Iterator[Left]:
    with connect() as caller:
        for index, size in enumerate((0, 100_000, 3 * MIB)):
            assert caller.ask(APP, index, size=size) == 204
        yield 3, []


@contextlib.contextmanager
def full(inbox: Inbox[Any], connect: Connect) -> Iterator[Left]:
    """Small and large ones wait; the connection that is idle longest is one of them."""
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect(1 + n % 3)) for n in range(20)]
        for caller in callers:
            caller.post(APP)
        wait_until_waiting(inbox, 16)
        for caller in (large := [stack.enter_context(connect()) for _ in range(6)]):
            caller.post(APP, size=100_000)
        wait_until_waiting(inbox, 18)
        statuses: list[int | None] = []
        yield 8, statuses
        statuses += [caller.status() for caller in (*callers, *large)]
        assert statuses.count(204) == 8
        statuses[:] = [status for status in statuses if status != 204]
        assert len(statuses) == 18


@contextlib.contextmanager
def held(inbox: Inbox[Any], connect: Connect) -> Iterator[Left]:
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect()) for _ in range(6)]
        for caller in callers:
            caller.post(PROP)
        wait_until_waiting(inbox, 6)
        (other := stack.enter_context(connect())).post(SNAP)
        wait_until_waiting(inbox, 7)
        statuses: list[int | None] = []
        yield 5, statuses
        statuses += [caller.status() for caller in (*callers, other)]


@contextlib.contextmanager
def taking(inbox: Inbox[Any], connect: Connect) -> Iterator[Left]:
    consumers = [Running(inbox.take, 1, timeout) for timeout in (None, LONG_TIMEOUT, None)]
    time.sleep(0.01)
    yield 0, []
    assert [consumer.join() for consumer in consumers] == [[], [], []]


@contextlib.contextmanager
def chunked(inbox: Inbox[Any], connect: Connect) -> Iterator[Left]:
    """The odd thread is to answer these."""
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect()) for _ in range(8)]
        for caller, kind in zip(callers, (PROP, PROP, *[APP] * 6), strict=True):
            caller.sock.sendall(post(body_of(kind), is_chunked=True))
        wait_until_waiting(inbox, 4)
        statuses: list[int | None] = []
        yield 6, statuses
        statuses += [caller.status() for caller in callers]
        assert statuses.count(204) == 4
        statuses[:] = [status for status in statuses if status != 204]


State = Callable[[Inbox[Any], Connect], contextlib.AbstractContextManager[Left]]
each_state = pytest.mark.parametrize("state", [nothing, queued, full, held, taking, chunked])


@each_state
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_stop_ends_everything_in_every_state(state: State, scheme: str, tmp_path: Path) -> None:
    inbox = Inbox(max_messages=4)
    tls = context = None
    if scheme == "https":
        authority = Authority(tmp_path)
        tls, context = authority.info(), authority.client(*authority.issue("caller"))
    url = f"{scheme}://127.0.0.1:0"
    with receiving(inbox, url=url, tls=tls, peers=[1, 3]) as (transport, listener):
        connect = functools.partial(Caller, listener.url, tls=context)
        with state(inbox, connect) as (left, statuses):
            transport.stop()
            assert (inbox.closed, inbox.take(), inbox.take(timeout=None)) == (True, [], [])
    assert_books(inbox)
    assert inbox.stats().dropped == left
    assert set(statuses) <= {503}


@each_state
def test_a_listener_is_closed_in_every_state(state: State) -> None:
    """What has been answered stays in the inbox; who waits is refused, now or at the deadline."""
    inbox = Inbox(max_messages=4)
    with receiving(inbox) as (transport, listener), contextlib.ExitStack() as stack:
        left, statuses = stack.enter_context(state(inbox, functools.partial(Caller, listener.url)))
        listener.close(deadline_s=0.2)
        stats = inbox.stats()
        assert stats.dropped + stats.queued == left
        assert stats.waiting == 0
        if state is held:
            assert stats.dropped == 5
        if state in (queued, full):
            assert stats.queued == left
        assert len(inbox.take(256)) == stats.queued
        if state is not taking:
            stack.close()
            assert set(statuses) <= {503}
        again = transport.listen(ANY)
        with Caller(again.url) as caller:
            if state is taking:
                for _ in range(3):
                    assert caller.ask(HEARTBEAT, 7) == 204
                stack.pop_all()
                eventually(lambda: inbox.stats().taken == 3)
            else:
                assert caller.ask(HEARTBEAT, 7) == 204
                assert indexes(inbox.take()) == [7]
    assert_books(inbox)


@pytest.mark.parametrize("oldest", ["idle", "waits for room", "held"])
def test_a_listener_is_closed_whatever_its_oldest_connection_is_at(oldest: str) -> None:
    """Those that are refused are closed while the others are looked for."""
    inbox = Inbox(max_messages=1)
    with receiving(inbox) as (_, listener), contextlib.ExitStack() as stack:
        first, *callers = [stack.enter_context(Caller(listener.url)) for _ in range(5)]
        for caller in callers:
            caller.post(APP)
        wait_until_waiting(inbox, 3)
        if oldest != "idle":
            first.post(APP if oldest == "waits for room" else PROP)
            wait_until_waiting(inbox, 4)
        listener.close(0.2)
        assert listener.stats().connections == 0
        statuses = [caller.status() for caller in callers]
        assert (statuses.count(204), statuses.count(503)) == (1, 3)
        assert first.status() == (None if oldest == "idle" else 503)


def test_a_held_message_that_is_taken_while_its_listener_closes_is_answered_204() -> None:
    inbox = Inbox()
    with receiving(inbox) as (_, listener), Caller(listener.url) as caller:
        caller.post(PROP, 1)
        wait_until_waiting(inbox, 1)
        closing = Running(listener.close, LONG_TIMEOUT)
        eventually(lambda: listener.is_closed)
        assert indexes(take_exactly(inbox, 1)) == [1]
        assert caller.status() == 204
        closing.join()
        assert is_closed(caller.sock)


def test_two_listeners_of_one_node_end_by_themselves() -> None:
    inbox = Inbox()
    with receiving(inbox) as (transport, listener):
        other = transport.listen(ANY)
        with Caller(listener.url) as one, Caller(other.url) as two:
            one.post(PROP, 1)
            two.post(PROP, 2)
            wait_until_waiting(inbox, 2)
            other.close(deadline_s=0.1)
            assert two.status() == 503
            assert not one.is_answered()
            assert indexes(inbox.take()) == [1]
            assert one.status() == 204
            assert inbox.stats()[:3] == (2, 1, 1)


def test_what_is_answered_stays_when_its_listener_has_gone_with_its_memory() -> None:
    inbox = Inbox()
    with receiving(inbox) as (_, listener):
        with Caller(listener.url) as caller:
            for index, size in enumerate((0, 100_000, 3 * MIB)):
                assert caller.ask(APP, index, size=size) == 204
        listener.close()
        gone = weakref.ref(listener)
        del listener
        gc.collect()
        assert gone() is None or gone().is_closed  # type: ignore[union-attr]
        messages = inbox.take()
        assert [len(bytes(m.entries[0].data)) if m.entries else 0 for m in messages] == [
            0,
            100_000,
            3 * MIB,
        ]
        assert_books(inbox)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["taken", "dropped"])
def test_a_snapshot_with_its_database_is_answered_when_its_message_is_taken(
    is_stopped: bool, tmp_path: Path
) -> None:
    inbox = Inbox()
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path))
    with receiving(inbox, config) as (transport, listener):
        asking = Running(ask, listener.url, post_snapshot(framed(snapshot(), b"database")))
        wait_until_waiting(inbox, 1)
        assert (tmp_path / FILE).read_bytes() == b"database"
        assert asking.is_running
        if is_stopped:
            transport.stop()
            assert asking.join().status >= 500
        else:
            (message,) = inbox.take()
            assert (message.type, message.snapshot.metadata.index) == (SNAP, 1000)
            assert asking.join().status == 204
            sizes = transport.snapshot().received.received_bytes
            assert sizes == {1: len(snapshot().marshal()) + len(b"database")}
    assert_books(inbox)
    assert inbox.stats().dropped == is_stopped


def test_an_inbox_dies_with_its_transports() -> None:
    inbox = Inbox()
    with receiving(inbox) as (transport, listener), Caller(listener.url) as caller:
        assert caller.ask(APP) == 204
        inbox.fileno()
    gone = [weakref.ref(inbox), weakref.ref(transport)]
    del inbox, transport, listener
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_listener_whose_thread_cannot_start_leaves_no_port_and_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.threads import LibraryThread

    def start(self: object) -> None:
        raise RuntimeError("can't start new thread")

    inbox = Inbox()
    with receiving(inbox) as (transport, listener), Caller(listener.url) as caller:
        with monkeypatch.context() as patch:
            patch.setattr(LibraryThread, "start", start)
            before = open_descriptors()
            with pytest.raises(RuntimeError, match="can't start"):
                transport.listen(ANY)
        eventually(lambda: open_descriptors() <= before)
        assert caller.ask(HEARTBEAT) == 204
        assert len(inbox.take()) == 1


# What is interrupted


class Told:
    """Hears of what is taken, as a node does; does what it is told to, first."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, bool, int]] = []
        self.then: Callable[[], None] = lambda: None

    def __call__(self, *call: Any) -> None:
        self.then()
        self.calls.append(call)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def inbox() -> Inbox[Any]:
    return Inbox(max_messages=2)


@pytest.fixture
def source(inbox: Inbox[Any], told: Told) -> Source:
    return inbox.open_source(told)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_is_taken_is_told_in_runs_of_one_member_and_kind(
    inbox: Inbox[Any], source: Source, told: Told
) -> None:
    kinds = [(APP, 1), (APP, 1), (HEARTBEAT, 1), (APP, 2)]
    for kind, member in kinds[:3]:
        assert source.deliver(body_of(kind, member=member))
    assert len(inbox.take(2)) == 2
    assert source.deliver(body_of(APP, member=2))
    assert len(inbox.take()) == 2
    size = len(body_of(APP))
    assert told.calls == [
        (1, 2, 2 * size, True, 0),
        (1, 1, len(body_of(HEARTBEAT)), False, 0),
        (2, 1, size, True, 0),
    ]


@pytest.mark.parametrize("size", [0, 3 * MIB], ids=["small", "3 MiB"])
def test_a_take_that_is_interrupted_puts_back_what_it_had(
    size: int, inbox: Inbox[Any], source: Source, told: Told
) -> None:
    for index in range(2):
        assert source.deliver(body_of(APP, index, size=size))
    before = inbox.stats()
    told.then = interrupt
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            inbox.take()
        assert inbox.stats() == before
    with pytest.raises(KeyboardInterrupt):
        inbox.take(1)
    told.then = lambda: None
    messages = inbox.take()
    assert indexes(messages) == [0, 1]
    assert [bytes(m.entries[0].data) for m in messages if m.entries] == [bytes(size)] * (
        2 * (size > 0)
    )
    assert_books(inbox)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("size", [0, 100_000, 3 * MIB], ids=["small", "100 kB", "3 MiB"])
def test_a_take_without_memory_at_any_point_loses_nothing(size: int, encoded: bool) -> None:
    testcapi = pytest.importorskip("_testcapi", reason="this Python has no _testcapi")
    make: Any = Inbox
    inbox = make(encoded=encoded)
    source = inbox.open_source(lambda *_: None)
    bodies = [body_of(APP, index, size=size) for index in range(3)]
    for body in bodies:
        assert source.deliver(body)
    before = inbox.stats()
    messages: list[Any] = []
    for failing in range(1000):
        testcapi.set_nomemory(failing, failing + 1)
        try:
            messages = inbox.take()
        except MemoryError:
            pass
        finally:
            testcapi.remove_mem_hooks()
        if messages:
            break
        assert inbox.stats() == before
    assert failing > 3
    assert [m.data if encoded else m.marshal() for m in messages] == bodies
    assert_books(inbox)


def test_what_comes_while_a_take_is_interrupted_is_behind_what_it_puts_back(
    inbox: Inbox[Any], source: Source, told: Told
) -> None:
    def come_and_interrupt() -> None:
        source.deliver(body_of(HEARTBEAT, 5))
        raise KeyboardInterrupt

    for index in range(2):
        assert source.deliver(body_of(APP, index))
    told.then = come_and_interrupt
    with pytest.raises(KeyboardInterrupt):
        inbox.take(1)
    told.then = lambda: None
    assert indexes(inbox.take(1)) == [0]
    assert source.deliver(body_of(HEARTBEAT, 6))
    assert indexes(inbox.take()) == [1, 5, 6]
    assert_books(inbox)


def test_what_a_take_puts_back_after_its_node_has_stopped_is_dropped(
    inbox: Inbox[Any], source: Source, told: Told
) -> None:
    """A signal's handler stops the node in the middle of a take, and raises SystemExit."""
    other = inbox.open_source(told)

    def stop() -> None:
        inbox.close_source(source)
        raise SystemExit

    for member, whose in enumerate((source, other)):
        assert whose.deliver(body_of(APP, 3, size=3 * MIB, member=member))
    told.then = stop
    with pytest.raises(SystemExit):
        inbox.take()
    assert inbox.stats()[:4] == (2, 0, 1, 1)
    told.then = lambda: None
    assert [m.from_ for m in inbox.take()] == [1]
    inbox.close_source(other)
    assert inbox.closed
    assert_books(inbox)


def test_who_waits_for_a_message_is_refused_when_a_take_that_had_it_is_interrupted_by_stop() -> (
    None
):
    """The loop has ended by then, and the connection is to be freed."""
    inbox = Inbox()
    with receiving(inbox) as (transport, listener), Caller(listener.url) as caller:
        caller.post(PROP)
        wait_until_waiting(inbox, 1)
        assert transport.handlers.source is not None
        count = transport.handlers.received.count_bytes

        def stop_and_exit(sender: int, size: int) -> None:
            transport.handlers.received.count_bytes = count  # type: ignore[method-assign]
            transport.stop()
            raise SystemExit

        transport.handlers.received.count_bytes = stop_and_exit  # type: ignore[method-assign]
        with pytest.raises(SystemExit):
            inbox.take()
        assert inbox.stats() == InboxStats(1, 0, 1, 0, 0, 0)
        assert caller.status() == 503


@contextlib.contextmanager
def handling(handler: Callable[[], None]) -> Iterator[None]:
    """Have a signal run a function in this thread, which is the main one."""
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def signal_when(condition: Callable[[], bool]) -> Running:
    main = threading.main_thread().ident
    assert main is not None

    def wait_and_signal() -> None:
        eventually(condition)
        signal.pthread_kill(main, signal.SIGUSR1)

    return Running(wait_and_signal)


def test_a_take_that_waits_for_ever_is_ended_by_ctrl_c(inbox: Inbox[Any], source: Source) -> None:
    main = threading.main_thread()
    ended = threading.Event()

    def keep_signalling() -> None:  # it may not wait yet when the first one comes
        while not ended.wait(0.01):
            signal.pthread_kill(main.ident, signal.SIGUSR1)  # type: ignore[arg-type]

    with handling(interrupt):
        signalling = Running(keep_signalling)
        with pytest.raises(KeyboardInterrupt):
            inbox.take(1, None)
        with contextlib.suppress(KeyboardInterrupt):  # there may be one more
            ended.set()
        with contextlib.suppress(KeyboardInterrupt):
            signalling.join()
    assert source.deliver(body_of(APP, 1))
    assert indexes(inbox.take()) == [1]


def test_a_take_goes_on_waiting_after_a_signal_that_raises_nothing(
    inbox: Inbox[Any], source: Source
) -> None:
    handled: list[bool] = []
    with handling(lambda: handled.append(True)):

        def deliver_after_signals() -> None:
            while len(handled) < 3:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]
                time.sleep(0.01)
            source.deliver(body_of(APP, 1))

        delivering = Running(deliver_after_signals)
        assert indexes(inbox.take(1, LONG_TIMEOUT)) == [1]
        delivering.join()


@pytest.mark.parametrize("kind", [APP, PROP], ids=["for room", "to be taken"])
def test_a_signals_handler_may_use_the_inbox_that_its_thread_waits_for(
    kind: int, inbox: Inbox[Any], source: Source
) -> None:
    """A WSGI server waits in the main thread, where handlers of signals run."""
    for index in range(2 * (kind == APP)):
        assert source.deliver(body_of(kind, index))
    taken: list[Any] = []
    with handling(lambda: taken.extend(inbox.take())):
        signalling = signal_when(lambda: inbox.stats().waiting == 1)
        assert source.deliver(body_of(kind, 2))
        signalling.join()
    assert indexes([*taken, *inbox.take()]) == ([0, 1, 2] if kind == APP else [2])
    assert_books(inbox)


@pytest.mark.parametrize("kind", [APP, PROP], ids=["for room", "to be taken"])
def test_a_signals_handler_may_stop_the_node_that_its_thread_waits_for(
    kind: int, inbox: Inbox[Any], source: Source
) -> None:
    for index in range(2 * (kind == APP)):
        assert source.deliver(body_of(kind, index))
    with handling(lambda: inbox.close_source(source)):
        signalling = signal_when(lambda: inbox.stats().waiting == 1)
        assert not source.deliver(body_of(kind, 2))
        signalling.join()
    assert inbox.closed
    assert_books(inbox)


@pytest.mark.parametrize("kind", [APP, PROP], ids=["for room", "to be taken"])
def test_ctrl_c_ends_a_delivery_and_nobody_waits_for_it_any_more(
    kind: int, inbox: Inbox[Any], source: Source
) -> None:
    for index in range(2 * (kind == APP)):
        assert source.deliver(body_of(kind, index))
    with handling(interrupt):
        signalling = signal_when(lambda: inbox.stats().waiting == 1)
        with pytest.raises(KeyboardInterrupt):
            source.deliver(body_of(kind, 2))
        signalling.join()
    # A MsgProp was there already, and is taken; it is nobody's to be told.
    assert indexes(inbox.take()) == ([0, 1] if kind == APP else [2])
    assert_books(inbox)


def test_what_comes_after_a_source_has_closed_is_refused(
    inbox: Inbox[Any], source: Source, told: Told
) -> None:
    other = inbox.open_source(told)
    inbox.close_source(source)
    inbox.close_source(source)
    assert not inbox.closed
    assert not source.deliver(body_of(APP))
    assert other.deliver(body_of(APP))
    assert len(inbox) == 1


def test_a_source_that_closes_drops_its_own_and_nobody_elses(
    inbox: Inbox[Any], source: Source, told: Told
) -> None:
    other = inbox.open_source(told)
    waiting = [
        Running(whose.deliver, body_of(PROP, index)) for index, whose in ((1, source), (2, other))
    ]
    wait_until_waiting(inbox, 2)
    blocked = Running(source.deliver, body_of(PROP, 3))
    wait_until_waiting(inbox, 3)
    inbox.close_source(source)
    assert (waiting[0].join(), blocked.join()) == (False, False)
    assert indexes(inbox.take()) == [2]
    assert waiting[1].join() is True
    assert_books(inbox)


def test_a_connection_that_was_reset_while_it_waited_is_freed_with_the_loop() -> None:
    inbox = Inbox(max_messages=1)
    with receiving(inbox) as (_, listener):
        callers = [Caller(listener.url) for _ in range(4)]
        for kind, caller in zip((PROP, PROP, APP, APP), callers, strict=True):
            caller.post(kind)
        wait_until_waiting(inbox, 3)
        for caller in callers:
            caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            caller.close()
        catch_up(listener)
    assert inbox.stats() == InboxStats(2, 0, 2, 0, 0, 0)
