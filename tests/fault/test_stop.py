"""stop() from every state, and what is left after it: nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline import EncodedMessage, MessageType, Pipeline, SendResult, Transport, TransportConfig
from pipeline.send import pipeline as module
from tests.support import LONG_TIMEOUT
from tests.support.descriptors import open_descriptors
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, assert_balanced, message, pipeline_to, settle
from tests.support.server import ERROR, Connection, ScriptedServer, always, black_hole, in_turn
from tests.support.waiting import dials_to, eventually

# A stop that waited for its timeout, where nothing stands in its way, would take twice as long as
# any may take here: who measures its second on a busy machine measures the machine.
PATIENT = TransportConfig(stop_timeout_s=LONG_TIMEOUT)


def tasks() -> int:
    """Threads of this process, those Python does not know of included."""
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail a test after which there are more threads or descriptors than before."""
    gc.collect()
    before = tasks(), len(open_descriptors())
    yield

    def is_gone() -> bool:
        gc.collect()
        return tasks() <= before[0] and len(open_descriptors()) <= before[1]

    eventually(is_gone, lambda: f"{tasks()} threads, {open_descriptors()}; there were {before}")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the stop of a Pipeline as patient as that of a Transport with ``PATIENT``."""
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", LONG_TIMEOUT)


def assert_waited_for_nobody(took_s: float) -> None:
    """What is held comes after LONG_TIMEOUT, or never."""
    assert took_s < LONG_TIMEOUT / 2


def stop_timed(pipeline: Pipeline | Transport) -> int:
    begin = time.monotonic()
    dropped = pipeline.stop()
    assert_waited_for_nobody(time.monotonic() - begin)
    return dropped


# Each brings a pipeline into a state; yields it and its server.
State = Callable[[FakeRaft], contextlib.AbstractContextManager[Pipeline]]


@contextlib.contextmanager
def never_used(raft: FakeRaft) -> Iterator[Pipeline]:
    with ScriptedServer() as server:
        pipeline = pipeline_to(server, raft)
        pipeline.start()
        yield pipeline


@contextlib.contextmanager
def idle(raft: FakeRaft) -> Iterator[Pipeline]:
    with ScriptedServer() as server:
        pipeline = pipeline_to(server, raft)
        pipeline.start()
        for _ in range(8):
            pipeline.send(message())
        settle(pipeline)
        yield pipeline


@contextlib.contextmanager
def dialling(raft: FakeRaft) -> Iterator[Pipeline]:
    with black_hole() as port:
        pipeline = pipeline_to(f"http://127.0.0.1:{port}", raft, dial_timeout_s=30.0)
        pipeline.start()
        for _ in range(10):
            pipeline.send(message())
        eventually(lambda: dials_to(port) == 4)
        yield pipeline


@contextlib.contextmanager
def writing(raft: FakeRaft) -> Iterator[Pipeline]:
    def wait(connection: Connection, head: bytes) -> bool:
        connection.server.release.wait()
        return False

    with ScriptedServer(on_head=wait) as server:
        pipeline = pipeline_to(server, raft)
        pipeline.start()
        big = memoryview(bytearray(32 << 20))
        for _ in range(10):
            pipeline.send(EncodedMessage(big, type=MessageType.APP, to=PEER))
        # The fourth is kept for small messages.
        eventually(lambda: pipeline.states() == ["idle", "writing", "writing", "writing"])
        yield pipeline


@contextlib.contextmanager
def reading(raft: FakeRaft) -> Iterator[Pipeline]:
    with ScriptedServer() as server:
        server.script = server.hold
        pipeline = pipeline_to(server, raft)
        pipeline.start()
        for _ in range(10):
            pipeline.send(message())
        eventually(lambda: pipeline.states() == ["reading"] * 4)
        yield pipeline


@contextlib.contextmanager
def reading_an_odd_answer(raft: FakeRaft) -> Iterator[Pipeline]:
    with ScriptedServer(always(b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n")) as server:
        pipeline = pipeline_to(server, raft)
        pipeline.start()
        for _ in range(10):
            pipeline.send(message())
        eventually(lambda: pipeline.states() == ["reading odd"] * 4)
        yield pipeline


STATES = [never_used, idle, dialling, writing, reading, reading_an_odd_answer]


@pytest.mark.usefixtures("nothing_left", "patient")
@pytest.mark.parametrize("state", STATES)
def test_stop_ends_every_state(state: State) -> None:
    raft = FakeRaft()
    with state(raft) as pipeline:
        before = pipeline.stats()
        dropped = stop_timed(pipeline)
        books = pipeline.stats()
        assert_balanced(books)
        assert dropped == books.dropped == before.queued
        assert (books.queued, books.in_flight, books.queued_bytes) == (0, 0, 0)
        assert books.failed == before.failed + before.in_flight
        # Those in flight fail with all the side effects, also at stop (spec 2.2).
        assert len(raft.unreachable) == books.failed
        assert pipeline.send(message()) is SendResult.STOPPED
        assert pipeline.states() == ["retired"] * 4
        assert stop_timed(pipeline) == 0


@pytest.mark.usefixtures("nothing_left")
def test_stop_of_what_was_never_started() -> None:
    pipeline = pipeline_to("http://127.0.0.1:1")
    assert pipeline.stop() == 0
    assert pipeline.stop() == 0
    transport = Transport(1, 1, FakeRaft())
    assert transport.stop() == 0


@pytest.mark.usefixtures("nothing_left", "patient")
@pytest.mark.parametrize("state", STATES)
def test_stop_may_be_called_by_many_at_once(state: State) -> None:
    with state(FakeRaft()) as pipeline:
        queued = pipeline.stats().queued
        results: list[int] = []
        barrier = threading.Barrier(6)

        def stop() -> None:
            barrier.wait()
            results.append(pipeline.stop())

        threads = [threading.Thread(target=stop) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_TIMEOUT)
        assert sorted(results) == [0] * 5 + [queued]
        assert_balanced(pipeline.stats())
        assert pipeline.stats().in_flight == 0


def test_stop_with_a_blocked_callback_returns_and_tells(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()
    raft = FakeRaft(gate=gate)
    with ScriptedServer(always(ERROR)) as server, pipeline_to(server, raft) as pipeline:
        for _ in range(10):
            pipeline.send(message())
        raft.wait_unreachable(4)
        assert stop_timed(pipeline) == 6
        assert "still in a callback" in caplog.text
        assert pipeline.stats().in_flight == 4
        assert_balanced(pipeline.stats())
        gate.set()
        books = settle(pipeline)
        assert (books.failed, books.dropped, books.in_flight) == (4, 6, 0)


@pytest.mark.usefixtures("nothing_left")
def test_nothing_is_left_once_a_blocked_callback_returns() -> None:
    gate = threading.Event()
    raft = FakeRaft(gate=gate)
    with ScriptedServer(always(ERROR)) as server:
        pipeline = pipeline_to(server, raft)
        pipeline.start()
        for _ in range(4):
            pipeline.send(message())
        raft.wait_unreachable(4)
        stop_timed(pipeline)
        gate.set()
        settle(pipeline)


@pytest.mark.usefixtures("nothing_left", "patient")
def test_stop_inside_a_callback_of_its_own() -> None:
    class Stopper(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            begin = time.monotonic()
            self.dropped = self.pipeline.stop()
            self.took_s = time.monotonic() - begin
            super().report_unreachable(member_id)

    raft = Stopper()
    with ScriptedServer() as server:
        server.script = in_turn(ERROR, server.hold)
        pipeline = raft.pipeline = pipeline_to(server, raft, connections=1)
        pipeline.start()
        pipeline.send(message())
        pipeline.send(message())
        raft.wait_unreachable(1)
        # It does not wait for the callback it is called from.
        assert_waited_for_nobody(raft.took_s)
        assert raft.dropped + len(server.requests) == 2
        books = settle(pipeline)
        assert books.failed + books.dropped == 2


@pytest.mark.usefixtures("nothing_left")
def test_transport_stop_inside_a_callback() -> None:
    class Stopper(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            begin = time.monotonic()
            self.transport.stop()
            self.took_s = time.monotonic() - begin
            super().report_unreachable(member_id)

    raft = Stopper()
    with ScriptedServer(always(ERROR)) as server, ScriptedServer() as other:
        transport = raft.transport = Transport(1, 1, raft, config=PATIENT)
        transport.start()
        transport.add_peer(PEER, [server.url])
        transport.add_peer(3, [other.url])
        transport.send([message(to=3), message()])
        raft.wait_unreachable(1)
        assert_waited_for_nobody(raft.took_s)


@pytest.mark.usefixtures("nothing_left")
def test_a_thread_about_to_start_does_not_make_stop_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dispatcher thread is noted before it runs, and stop may come in between."""
    start = threading.Thread.start
    entered = threading.Event()
    proceed = threading.Event()

    def slow_start(thread: threading.Thread) -> None:
        if thread.name.startswith("pipeline-dispatch-") and thread.name.endswith("-1"):
            entered.set()
            proceed.wait(LONG_TIMEOUT)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slow_start)
    with ScriptedServer(always(ERROR)) as server:
        pipeline = pipeline_to(server)
        pipeline.start()
        pipeline.send(message())
        assert entered.wait(LONG_TIMEOUT)
        try:
            stop_timed(pipeline)
        finally:
            proceed.set()
        settle(pipeline)


@pytest.mark.usefixtures("nothing_left")
def test_a_thread_that_cannot_be_started_loses_no_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit of threads is reached: those that run do the work."""
    start = threading.Thread.start

    def limited_start(thread: threading.Thread) -> None:
        if thread.name.startswith("pipeline-dispatch-") and not thread.name.endswith("-0"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited_start)
    raft = FakeRaft()
    with ScriptedServer(always(ERROR)) as server:
        pipeline = pipeline_to(server, raft)
        pipeline.start()
        for _ in range(8):
            pipeline.send(message())
        raft.wait_unreachable(8)
        assert settle(pipeline).failed == 8
        stop_timed(pipeline)


@pytest.mark.usefixtures("nothing_left", "patient")
def test_starting_and_stopping_many_times_leaves_nothing() -> None:
    with ScriptedServer(always(ERROR)) as server:
        for count in range(30):
            with pipeline_to(server) as pipeline:
                for _ in range(count % 7):
                    pipeline.send(message())
            books = pipeline.stats()
            assert_balanced(books)
            assert (books.queued, books.in_flight) == (0, 0)


@pytest.mark.usefixtures("nothing_left")
def test_peers_come_and_go_while_messages_are_sent() -> None:
    raft = FakeRaft()
    with ScriptedServer() as server:
        transport = Transport(1, 1, raft, config=PATIENT)
        transport.start()
        is_over = threading.Event()

        def produce() -> None:
            while not is_over.is_set():
                transport.send([message(to=peer) for peer in (2, 3, 4)])

        threads = [threading.Thread(target=produce) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(15):
            for peer in (2, 3, 4):
                transport.add_peer(peer, [server.url])
            for peer in (4, 2, 3):
                transport.remove_peer(peer)
        is_over.set()
        for thread in threads:
            thread.join(LONG_TIMEOUT)
        stop_timed(transport)


def test_remove_peer_during_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer taken out of the table and not yet stopped when the transport's loop ends."""
    from pipeline.peer import Peer

    begin = Peer.stop_begin
    taken = threading.Event()
    proceed = threading.Event()

    def late(peer: Peer) -> int:
        taken.set()
        proceed.wait(LONG_TIMEOUT)
        return begin(peer)

    with ScriptedServer() as server:
        transport = Transport(1, 1, FakeRaft(), config=PATIENT)
        transport.start()
        transport.add_peer(PEER, [server.url])
        monkeypatch.setattr(Peer, "stop_begin", late)
        took_s: list[float] = []

        def remove() -> None:
            start = time.monotonic()
            transport.remove_peer(PEER)
            took_s.append(time.monotonic() - start)

        remover = threading.Thread(target=remove)
        remover.start()
        assert taken.wait(LONG_TIMEOUT)
        stopper = threading.Thread(target=transport.stop)
        stopper.start()
        stopper.join(0.3)
        proceed.set()
        stopper.join(LONG_TIMEOUT)
        remover.join(LONG_TIMEOUT)
        # An unused pipeline has nothing to wait for.
        assert_waited_for_nobody(took_s[0])


@pytest.mark.usefixtures("patient")
def test_a_context_manager_stops() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        pipeline.send(message())
    assert pipeline.stats().in_flight == 0
    assert pipeline.send(message()) is SendResult.STOPPED


def test_connections_are_closed_after_stop() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        for _ in range(20):
            pipeline.send(message())
        settle(pipeline)
        pipeline.stop()
        # While the pipeline object is alive.
        server.wait_for(lambda: server.ended == len(server.connections))


def test_a_write_under_way_at_stop_does_not_outlive_it() -> None:
    """The payload is the caller's again when stop has returned."""
    with writing(FakeRaft()) as pipeline:
        stop_timed(pipeline)
        buffer = bytearray(1 << 20)
        assert pipeline.send(EncodedMessage(buffer, type=3, to=PEER)) is SendResult.STOPPED
        gc.collect()
        buffer.append(0)  # BufferError while it is borrowed


def test_the_io_thread_has_a_name() -> None:
    """``pipeline-io-<member hex>``, cut to the 15 characters Linux shows."""
    with ScriptedServer() as server, pipeline_to(server):
        names = []
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/comm") as file:
                names.append(file.read().strip())
        assert any(name.startswith("pipeline-io-") for name in names)


def test_a_stopped_pipeline_closes_a_socket_still_connecting() -> None:
    with black_hole() as port:
        pipeline = pipeline_to(f"http://127.0.0.1:{port}", dial_timeout_s=30.0)
        pipeline.start()
        pipeline.send(message())
        eventually(lambda: dials_to(port) == 1)
        pipeline.stop()
        assert dials_to(port) == 0
