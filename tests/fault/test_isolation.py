"""One peer's trouble stays its own: callbacks that block or raise, peers that are black holes."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from pipeline import MessageType, PipelineConfig, SnapshotStatus, Transport, TransportConfig
from pipeline.logs import lost_lines
from tests.support import LONG_TIMEOUT
from tests.support.callbacks import RudeError
from tests.support.logs import handler_that_raises
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, message, pipeline_to, settle
from tests.support.server import ERROR, OK, ScriptedServer, always, answer, black_hole, in_turn
from tests.support.waiting import eventually

HEALTHY = 9


class BlockedFor(FakeRaft):
    """Blocks the callbacks of some members, until released."""

    def __init__(self, *members: int) -> None:
        super().__init__()
        self.members = members
        self.release = threading.Event()

    def report_unreachable(self, member_id: int) -> None:
        super().report_unreachable(member_id)
        if member_id in self.members:
            self.release.wait()


def test_blocked_callbacks_hold_up_their_peer_only() -> None:
    raft = BlockedFor(PEER)
    with (
        ScriptedServer(always(ERROR)) as bad,
        ScriptedServer() as good,
        Transport(1, 1, raft) as transport,
    ):
        transport.add_peer(PEER, [bad.url])
        transport.add_peer(HEALTHY, [good.url])
        transport.send([message()] * 30)
        raft.wait_unreachable(4)
        for count in range(1, 50):
            transport.send([message(to=HEALTHY)])
            good.wait_requests(count)
        assert transport.stats()[PEER].in_flight == 4
        raft.release.set()


def test_a_black_hole_holds_up_nobody() -> None:
    raft = FakeRaft()
    holes = range(10, 20)
    # Nobody is given up meanwhile, and who waited for one of them would wait for that.
    config = TransportConfig(pipeline=PipelineConfig(dial_timeout_s=2 * LONG_TIMEOUT))
    with (
        black_hole() as port,
        ScriptedServer() as good,
        Transport(1, 1, raft, config=config) as transport,
    ):
        for peer in holes:
            transport.add_peer(peer, [f"http://127.0.0.1:{port}"])
            transport.send([message(to=peer)] * 5)
        transport.add_peer(HEALTHY, [good.url])
        for count in range(1, 50):
            transport.send([message(to=HEALTHY)])
            good.wait_requests(count)
        books = settle(transport._peers[HEALTHY].pipeline)
        assert (books.sent, books.failed, books.refused) == (49, 0, 0)
        assert not any(transport.stats()[peer].sent for peer in holes)
        assert raft.unreachable == []
    raft.wait_for(lambda: set(raft.unreachable) == set(holes))


def test_a_black_hole_is_a_failure_at_the_dial_timeout() -> None:
    raft = FakeRaft()
    with (
        black_hole() as port,
        pipeline_to(f"http://127.0.0.1:{port}", raft, dial_timeout_s=0.1) as pipeline,
    ):
        pipeline.send(message())
        raft.wait_unreachable(1)
        assert settle(pipeline).failed == 1


def test_answers_that_never_end_hold_up_their_peer_only() -> None:
    """Peers that begin an odd answer and fall silent: more of them than dispatcher threads."""
    unfinished = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 100\r\n"
    raft = FakeRaft()
    with (
        ScriptedServer(always(unfinished)) as bad,
        ScriptedServer() as good,
        Transport(1, 1, raft) as transport,
    ):
        for peer in (10, 11, 12):
            transport.add_peer(peer, [bad.url])
            transport.send([message(to=peer)] * 4)
        pipelines = [transport._peers[peer].pipeline for peer in (10, 11, 12)]
        eventually(lambda: all(p.states() == ["reading odd"] * 4 for p in pipelines))
        transport.add_peer(HEALTHY, [good.url])
        transport.send([message(to=HEALTHY)])
        assert settle(transport._peers[HEALTHY].pipeline).sent == 1
        assert all(p.states() == ["reading odd"] * 4 for p in pipelines)
        assert raft.unreachable == []


def test_64_peers_cost_one_io_thread_one_that_probes_and_few_of_python_s() -> None:
    config = TransportConfig(dispatchers=4)
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    with contextlib.ExitStack() as stack:
        # The server's own threads are counted out: one for all peers, in one accept thread.
        server = stack.enter_context(ScriptedServer())
        transport = stack.enter_context(Transport(1, 1, FakeRaft(), config=config))
        for peer in range(100, 164):
            transport.add_peer(peer, [server.url])
            transport.send([message(to=peer)] * 4)
        server.wait_requests(4 * 64)
        servers = sum(thread.name.startswith("server-") for thread in threading.enumerate())
        assert threading.active_count() - before[0] - servers <= 4 + 1
        assert len(os.listdir("/proc/self/task")) - before[1] - servers <= 4 + 2
        eventually(lambda: transport.active_peers() == 64)


class Boom(Exception):
    pass


ERRORS = [Boom, SystemExit, KeyboardInterrupt, GeneratorExit]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_a_callback_that_raises_is_logged_and_counted_and_kills_nothing(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    raft = FakeRaft(report_error=error("from a callback"))
    with (
        ScriptedServer(in_turn(*[ERROR] * 6, OK)) as server,
        pipeline_to(server, raft) as pipeline,
    ):
        for _ in range(6):
            pipeline.send(message(MessageType.SNAP))
        assert settle(pipeline).failed == 6
        pipeline.send(message(MessageType.SNAP))
        books = settle(pipeline)
        assert (books.sent, books.failed) == (1, 6)
        assert len(raft.unreachable) == 6
        assert raft.snapshots.count((PEER, SnapshotStatus.FAILURE)) == 6
        assert raft.snapshots[-1] == (PEER, SnapshotStatus.FINISH)
        assert pipeline.callback_errors == 13
        assert "from a callback" in caplog.text


@pytest.mark.parametrize("error", [*ERRORS, RudeError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("log_error", [SystemExit, RecursionError], ids=lambda e: e.__name__)
def test_dispatchers_survive_callbacks_and_log_handlers_that_raise_together(
    error: type[BaseException], log_error: type[BaseException]
) -> None:
    raft = FakeRaft(report_error=error())
    config = TransportConfig(pipeline=PipelineConfig(queue_length=1), dispatchers=1)
    with (
        ScriptedServer(in_turn(*[ERROR] * 6, OK)) as server,
        Transport(1, 1, raft, config=config) as transport,
    ):
        transport.add_peer(PEER, [server.url])
        before = lost_lines()
        # Not while the main thread logs: there it would be raised on.
        with handler_that_raises("", log_error) as handler:
            for count in range(1, 7):
                transport.send([message(MessageType.SNAP)])
                raft.wait_for(lambda count=count: len(raft.snapshots) == count)  # type: ignore[misc]
                eventually(lambda: transport.stats()[PEER].in_flight == 0)
            transport.send([message()])
            eventually(lambda: transport.stats()[PEER].sent == 1)
        assert transport.stats()[PEER].failed == 6
        assert transport.callbacks.errors == 12
        assert lost_lines() - before == handler.raised > 0


@pytest.mark.parametrize("error", [*ERRORS, RudeError], ids=lambda e: e.__name__)
def test_a_critical_error_callback_may_raise(error: type[BaseException]) -> None:
    """``on_critical_error=lambda error: sys.exit(1)`` is what people write first."""

    def fail(failure: Exception) -> None:
        raise error

    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(answer("403 Forbidden"), OK)) as server,
        pipeline_to(server, raft, on_critical_error=fail) as pipeline,
    ):
        pipeline.send(message())
        raft.wait_unreachable(1)
        pipeline.send(message())
        books = settle(pipeline)
        assert (books.sent, books.failed) == (1, 1)


def test_a_report_of_a_full_queue_that_raises_kills_nothing() -> None:
    raft = FakeRaft(report_error=SystemExit())
    config = TransportConfig(pipeline=PipelineConfig(connections=1, queue_length=1), dispatchers=1)
    with ScriptedServer() as server, Transport(1, 1, raft, config=config) as transport:
        transport.add_peer(PEER, [server.url])
        server.script = server.hold
        transport.send([message()])
        server.wait_requests(1)
        transport.send([message()] * 3)
        assert set(raft.wait_unreachable(1)) == {PEER}
        server.release.set()
        books = settle(transport._peers[PEER].pipeline)
        assert (books.sent, books.failed, books.refused) == (2, 0, 2)


def test_a_log_handler_that_raises_loses_no_message(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise Boom

    handler = Raising()
    logger = logging.getLogger("pipeline.send.status")
    logger.addHandler(handler)
    try:
        with (
            ScriptedServer(in_turn(OK, ERROR, OK)) as server,
            pipeline_to(server, connections=1) as pipeline,
        ):
            for _ in range(3):
                pipeline.send(message())
                settle(pipeline)
            books = pipeline.stats()
            assert books.sent + books.failed == 3
    finally:
        logger.removeHandler(handler)
