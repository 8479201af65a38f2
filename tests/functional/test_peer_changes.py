"""``on_peer_change``: what the application hears of peers, and when. Source of what a change is:
etcd's ``peer_status.go``, which only logs it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline import (
    MessageType,
    PeerChange,
    PeerState,
    PipelineConfig,
    SnapshotStatus,
    Transport,
    TransportConfig,
)
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import (
    ERROR,
    OK,
    Connection,
    Request,
    ScriptedServer,
    always,
    answer,
    in_turn,
    refused_port,
)
from tests.support.tls import Authority
from tests.support.waiting import eventually

ONE = TransportConfig(pipeline=PipelineConfig(connections=1), probe_interval_s=0)
QUIET = TransportConfig(probe_interval_s=0)
REMOVED = "the member has been permanently removed from the cluster"


class Changes:
    """Records what it is told; no two calls at a time for one peer."""

    def __init__(self) -> None:
        self.told: list[PeerChange] = []
        self.threads: set[str] = set()
        self.overlaps = 0
        self._inside: dict[int, threading.Lock] = {}
        self._news = threading.Condition()

    def __call__(self, change: PeerChange) -> None:
        inside = self._inside.setdefault(change.member_id, threading.Lock())
        if not inside.acquire(blocking=False):
            self.overlaps += 1
            return
        with self._news:
            self.told.append(change)
            self.threads.add(threading.current_thread().name)
            self._news.notify_all()
        inside.release()

    def wait(self, count: int) -> list[PeerChange]:
        with self._news:
            assert self._news.wait_for(lambda: len(self.told) >= count, LONG_TIMEOUT), self.told
            return list(self.told)

    @property
    def states(self) -> list[PeerState]:
        return [change.state for change in self.told]


def send_one_by_one(transport: Transport, count: int, to: int = 2) -> None:
    for _ in range(count):
        assert transport.send([message(to=to)]) == 0
        eventually(lambda: transport.stats()[to].queued + transport.stats()[to].in_flight == 0)


def test_each_flip_of_a_peer_is_told_once_with_its_reason() -> None:
    changes = Changes()
    script = in_turn(ERROR, ERROR, OK, OK, OK, ERROR, OK)
    with (
        ScriptedServer(script) as server,
        Transport(1, 1, FakeRaft(), config=ONE, on_peer_change=changes) as transport,
    ):
        transport.add_peer(2, [server.url])
        send_one_by_one(transport, 7)
        last = transport.peer_stats()[2].last_error
        assert last is not None
        down = PeerChange(2, PeerState.INACTIVE, last.text)
        up = PeerChange(2, PeerState.ACTIVE, "")
        assert changes.told == [down, up, down, up]
        assert "unexpected http status" in down.reason
        assert transport.peer_stats()[2].disconnects == 1
    assert all(name.startswith("pipeline-dispatch-") for name in changes.threads)


def test_a_peer_that_was_never_there_is_told_of_once_and_then_that_it_is_there() -> None:
    changes = Changes()
    with (
        refused_port() as port,
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=ONE, on_peer_change=changes) as transport,
    ):
        transport.add_peer(2, [f"http://127.0.0.1:{port}"])
        send_one_by_one(transport, 3)
        ((member_id, state, reason),) = changes.told
        assert (member_id, state) == (2, PeerState.INACTIVE)
        assert "Connection refused" in reason
        transport.update_peer(2, [server.url])
        send_one_by_one(transport, 1)
        assert changes.states == [PeerState.INACTIVE, PeerState.ACTIVE]


def test_a_member_of_another_cluster_is_mismatched_until_it_is_replaced() -> None:
    changes, received = Changes(), FakeRaft()
    with (
        Transport(2, 0x77, received, config=ONE) as other,
        Transport(1, 0x78, FakeRaft(), config=ONE, on_peer_change=changes) as transport,
    ):
        listener = other.listen("http://127.0.0.1:0")
        transport.add_peer(2, [listener.url])
        send_one_by_one(transport, 2)
        assert changes.told == [PeerChange(2, PeerState.MISMATCHED, "cluster ID mismatch")]
        listener.close()
        send_one_by_one(transport, 1)  # refused: another failure, and no change
        with Transport(2, 0x78, received, config=ONE) as member:
            transport.update_peer(2, [member.listen("http://127.0.0.1:0").url])
            send_one_by_one(transport, 1)
        assert changes.states == [PeerState.MISMATCHED, PeerState.ACTIVE]


def test_a_peer_with_a_certificate_of_another_authority_is_mismatched(tmp_path: Path) -> None:
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    for directory in (ours, theirs):
        directory.mkdir()
    changes = Changes()
    with (
        Transport(2, 1, FakeRaft(), config=ONE, tls=Authority(theirs).info()) as other,
        Transport(
            1, 1, FakeRaft(), config=ONE, tls=Authority(ours).info(), on_peer_change=changes
        ) as transport,
    ):
        transport.add_peer(2, [other.listen("https://127.0.0.1:0").url])
        send_one_by_one(transport, 1)
        (change,) = changes.told
        assert change.state is PeerState.MISMATCHED
        assert "certificate" in change.reason


def test_our_removal_is_told_between_the_critical_error_and_the_reports() -> None:
    calls: list[object] = []

    class Recording(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            calls.append("unreachable")
            super().report_unreachable(member_id)

        def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
            calls.append(status)
            super().report_snapshot(member_id, status)

    raft = Recording()
    with (
        ScriptedServer(always(answer("403 Forbidden"))) as server,
        Transport(
            1,
            1,
            raft,
            config=ONE,
            on_critical_error=lambda error: calls.append(type(error).__name__),
            on_peer_change=calls.append,
        ) as transport,
    ):
        transport.add_peer(2, [server.url])
        transport.send([message(MessageType.SNAP), message(MessageType.SNAP)])
        raft.wait_snapshots(2)
    first, second = (
        ["MemberRemovedError", "unreachable", SnapshotStatus.FAILURE] for _ in range(2)
    )
    first.insert(1, PeerChange(2, PeerState.REMOVED, REMOVED))
    assert calls == first + second


def test_a_snapshot_s_outcome_is_a_change_as_well() -> None:
    changes = Changes()
    with (
        ScriptedServer(in_turn(ERROR, OK)) as server,
        Transport(1, 1, FakeRaft(), config=ONE, on_peer_change=changes) as transport,
    ):
        transport.add_peer(2, [server.url])
        for _ in range(2):
            transfer = transport.send_snapshot(message(MessageType.SNAP), b"a database")
            transfer.future.exception(LONG_TIMEOUT)
        assert changes.states == [PeerState.INACTIVE, PeerState.ACTIVE]
    assert changes.threads == {"pipeline-snapshot-to-2"}


def test_what_four_workers_find_out_at_once_is_told_in_turn() -> None:
    """As many falls as ``disconnects`` has, each between two rises, no two calls at a time.

    However late the thread is that tells, there are too few for some to be left out.
    """
    changes = Changes()
    lock, answers = threading.Lock(), 0

    def flap(connection: Connection, request: Request) -> bytes:
        nonlocal answers
        with lock:
            answers += 1
            return (OK, ERROR, OK, OK, ERROR)[answers % 5]

    config = TransportConfig(
        pipeline=PipelineConfig(connections=4, queue_length=60), probe_interval_s=0
    )
    with (
        ScriptedServer(flap) as server,
        Transport(1, 1, FakeRaft(), config=config, on_peer_change=changes) as transport,
    ):
        transport.add_peer(2, [server.url])
        assert transport.send([message()] * 60) == 0
        eventually(lambda: transport.stats()[2].sent == 36 and transport.stats()[2].failed == 24)
        stats = transport.peer_stats()[2]
        is_active = transport.active_peers() == 1
    told = changes.states
    assert changes.overlaps == 0
    assert all(a is not b for a, b in pairwise(told))
    falls = sum(a is PeerState.ACTIVE for a in told[:-1])
    assert falls == stats.disconnects > 0
    assert (told[-1] is PeerState.ACTIVE) == is_active


def test_a_callback_that_blocks_holds_up_one_worker_and_nobody_else() -> None:
    changes, release, is_blocked = Changes(), threading.Event(), threading.Event()

    def block(change: PeerChange) -> None:
        if change.member_id == 2:
            is_blocked.set()
            assert release.wait(LONG_TIMEOUT)
        changes(change)

    with (
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=QUIET, on_peer_change=block) as transport,
    ):
        for peer in (2, 3):
            transport.add_peer(peer, [server.url])
        transport.send([message()])
        assert is_blocked.wait(LONG_TIMEOUT)
        transport.send([message(to=to) for to in (2, 3) for _ in range(20)])
        eventually(lambda: transport.stats()[2].sent == 20)
        eventually(lambda: transport.stats()[3].sent == 20)
        assert transport.stats()[2].in_flight == 1
        assert changes.wait(1) == [PeerChange(3, PeerState.ACTIVE, "")]
        release.set()
        eventually(lambda: transport.stats()[2].sent == 21)
        assert changes.told[1:] == [PeerChange(2, PeerState.ACTIVE, "")]


@pytest.mark.parametrize("ends", ["stop", "remove_peer", "remove_all_peers"])
def test_what_we_end_is_no_change(ends: str) -> None:
    changes = Changes()
    steps: dict[str, Callable[[Transport], object]] = {
        "stop": lambda transport: transport.stop(),
        "remove_peer": lambda transport: transport.remove_peer(2),
        "remove_all_peers": lambda transport: transport.remove_all_peers(),
    }
    raft = FakeRaft()
    config = TransportConfig(stop_timeout_s=LONG_TIMEOUT, probe_interval_s=0)
    with (
        ScriptedServer() as server,
        Transport(1, 1, raft, config=config, on_peer_change=changes) as transport,
    ):
        transport.add_peer(2, [server.url])
        transport.send([message()])
        changes.wait(1)
        server.script = server.hold
        transfer = transport.send_snapshot(message(MessageType.SNAP), b"a database")
        transport.send([message()] * 4)
        server.wait_requests(6)
        steps[ends](transport)
        assert transfer.done()
        assert raft.unreachable  # Raft hears of what was in flight
        assert changes.states == [PeerState.ACTIVE]
        server.release.set()


def test_a_peer_that_is_added_again_is_told_of_anew() -> None:
    changes = Changes()
    with (
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=ONE, on_peer_change=changes) as transport,
    ):
        for _ in range(2):
            transport.add_peer(2, [server.url])
            send_one_by_one(transport, 2)
            transport.remove_peer(2)
    assert changes.states == [PeerState.ACTIVE] * 2


def test_a_peer_may_be_removed_and_all_be_stopped_from_the_callback() -> None:
    ended = threading.Event()
    config = TransportConfig(stop_timeout_s=3600.0, probe_interval_s=0)

    def end(change: PeerChange) -> None:
        if change.member_id == 2:
            transport.remove_peer(2)
            transport.send([message(to=3)] * 4)
        else:
            transport.stop()
            ended.set()

    with (
        ScriptedServer(always(answer("403 Forbidden"))) as server,
        Transport(1, 1, FakeRaft(), config=config, on_peer_change=end) as transport,
    ):
        for peer in (2, 3):
            transport.add_peer(peer, [server.url])
        transport.send([message()] * 4)
        assert ended.wait(LONG_TIMEOUT)


def test_a_callback_that_raises_is_counted_and_messages_go_on() -> None:
    def fail(change: PeerChange) -> None:
        raise ValueError("what a change")

    with (
        ScriptedServer(in_turn(OK, ERROR, OK)) as server,
        Transport(1, 1, FakeRaft(), config=ONE, on_peer_change=fail) as transport,
    ):
        transport.add_peer(2, [server.url])
        send_one_by_one(transport, 3)
        assert transport.transport_stats().callback_errors == 3
        assert transport.stats()[2].sent == 2


def test_a_remote_is_no_peer() -> None:
    changes = Changes()
    with (
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=ONE, on_peer_change=changes) as transport,
    ):
        transport.add_remote(2, [server.url])
        transport.send([message()])
        eventually(lambda: transport.remote_stats()[2].pipeline.sent == 1)
    assert changes.told == []
