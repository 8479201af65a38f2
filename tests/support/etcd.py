"""A cluster of a real etcd and the example member on our Transport, for the interop tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline import (
    MemberRemovedError,
    Message,
    PeerChange,
    PipelineStats,
    StreamStats,
    Transport,
    TransportConfig,
)
from pipeline.examples.etcd import EtcdMember, config_beside, find_etcd, free_port, put_of
from pipeline.examples.follower import Follower, Role
from tests.support import LONG_TIMEOUT
from tests.support.tls import Authority
from tests.support.waiting import eventually

#: Writes that a member has missed whose log is lost (``left_behind``).
LEFT_BEHIND = 300


def assert_balanced(stats: PipelineStats) -> None:
    """Check the books (design R4)."""
    assert stats.offered == stats.accepted + stats.refused, stats
    outcomes = stats.sent + stats.failed + stats.dropped + stats.queued + stats.in_flight
    assert stats.accepted == outcomes, stats


class RecordingFollower(Follower):
    """The example member; keeps what it is given."""

    def __init__(
        self, member_id: int, *peer_ids: int, takes_snapshots: bool = False, campaigns: bool = True
    ) -> None:
        super().__init__(member_id, *peer_ids, takes_snapshots=takes_snapshots, campaigns=campaigns)
        self.messages: list[Message] = []

    def _hear(self, messages: Iterable[Message]) -> None:
        messages = list(messages)
        self.messages.extend(messages)
        super()._hear(messages)


class PatientEtcd(EtcdMember):
    """Writes and reads again what found no leader: a busy machine is without one now and then."""

    def put(self, key: bytes, value: bytes, timeout_s: float = 30.0) -> None:
        self.insist(partial(super().put, key, value, timeout_s))

    def get(
        self, key: bytes, *, serializable: bool = False, timeout_s: float = 30.0
    ) -> bytes | None:
        return self.insist(
            partial(super().get, key, serializable=serializable, timeout_s=timeout_s)
        )


class Cluster:
    """Two members: ``etcd``, and ``follower`` on ``transport``.

    Parameters
    ----------
    directory : Path
        For etcd's data and log.
    config : TransportConfig, optional
        Of our Transport.
    has_right_cluster_id : bool
        False gives our Transport another cluster's.
    flags : sequence of str
        More flags for etcd.
    campaigns : bool
        False: our member leads only if the leadership is handed to it.
    authority : Authority, optional
        Each member gets a certificate of it, and mTLS is spoken both ways.
    binary : Path, optional
        Of etcd, or what starts it.
    our_url : str, optional
        What etcd dials us at. Without it both are on loopback.
    etcd_url : str, optional
        Where etcd listens.

    Attributes
    ----------
    listen_url : str
        Where we listen; another one if etcd's dials come by a proxy, say.
    dialled_url : str
        What we dial etcd at; the same.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: TransportConfig | None = None,
        has_right_cluster_id: bool = True,
        flags: Sequence[str] = (),
        campaigns: bool = True,
        authority: Authority | None = None,
        binary: Path | None = None,
        our_url: str | None = None,
        etcd_url: str | None = None,
    ) -> None:
        scheme = "http" if authority is None else "https"
        self.our_url = self.listen_url = our_url or f"{scheme}://127.0.0.1:{free_port()}"
        self.tls = theirs = None
        if authority is not None:
            self.tls, theirs = authority.info("ours"), authority.info("etcd")
        self.etcd = PatientEtcd(
            binary or find_etcd(),
            directory,
            self.our_url,
            flags=flags,
            tls=theirs,
            peer_url=etcd_url,
        )
        self.dialled_url = self.etcd.peer_url
        self.follower = RecordingFollower(self.etcd.other_id, self.etcd.id, campaigns=campaigns)
        self.our_cluster_id = self.etcd.cluster_id ^ (0 if has_right_cluster_id else 1)
        self.config = config_beside(self.etcd.version, config)
        self.transport: Transport | None = None
        self.on_critical_error: Callable[[MemberRemovedError], None] | None = None
        self.on_peer_change: Callable[[PeerChange], None] | None = None

    def start(self) -> None:
        """Start both members and wait until etcd leads."""
        self.start_ours()
        self.etcd.start()
        self.wait_until_etcd_leads()

    def wait_until_etcd_leads(self) -> None:
        """Wait until both members work together, and the leader is etcd."""
        self.etcd.wait_ready()

        def etcd_leads() -> bool:
            self.follower.transfer_leadership()  # on a busy machine we may have been first
            return self.follower.state().leader == self.etcd.id

        eventually(etcd_leads, "etcd leads")
        #: Posts that etcd missed: on a busy machine we ask for its vote before it listens.
        self.failed_at_start = self.stats().failed

    def start_ours(self, *, listening: bool = True) -> None:
        """Start our member, with the log it had when it was stopped."""
        self.transport = Transport(
            self.follower.member_id,
            self.our_cluster_id,
            self.follower,
            peer_urls=[self.our_url],
            tls=self.tls,
            config=self.config,
            on_critical_error=self.on_critical_error,
            on_peer_change=self.on_peer_change,
        )
        self.transport.start()
        self.transport.add_peer(self.etcd.id, [self.dialled_url])
        if listening:
            self.listener = self.transport.listen(self.listen_url)
        self.follower.start(self.transport.send)

    def stop_ours(self) -> None:
        """Stop our member; its books must balance to the end, and nothing of etcd's be lost."""
        transport, self.transport = self.transport, None
        assert transport is not None
        self.follower.stop()
        stats = transport.stats()[self.etcd.id]
        transport.stop()
        assert_balanced(stats)
        assert transport.transport_stats().unknown_fields == 0

    def stop(self) -> None:
        """Stop what runs. Print etcd's log: pytest shows it when the test failed."""
        self.etcd.stop()
        if self.transport is not None:
            self.stop_ours()
        print(self.etcd.log_tail(100))

    def stats(self) -> PipelineStats:
        """Return the books of what we send to etcd."""
        assert self.transport is not None
        return self.transport.stats()[self.etcd.id]


@contextlib.contextmanager
def left_behind(
    directory: Path,
    config: TransportConfig,
    *,
    takes_snapshots: bool,
    authority: Authority | None = None,
) -> Iterator[Cluster]:
    """A cluster whose etcd has to send its snapshot: our member has lost its log."""
    flags = ("--snapshot-count", "100")
    cluster = Cluster(directory, config=config, flags=flags, authority=authority)
    try:
        cluster.start()
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda n: cluster.etcd.put(b"%d" % n, b"x"), range(LEFT_BEHIND)):
                pass
        eventually(cluster.etcd.has_snapshot, "etcd's snapshot")
        cluster.stop_ours()
        cluster.follower = RecordingFollower(
            cluster.etcd.other_id, cluster.etcd.id, takes_snapshots=takes_snapshots
        )
        # A leader does not forget how far a follower was; and while it runs it keeps 5,000 entries
        # behind its snapshot, after a restart none.
        cluster.etcd.commit_database()
        cluster.etcd.stop()
        cluster.start_ours()
        cluster.etcd.start()
        yield cluster
    finally:
        cluster.stop()


def streams(cluster: Cluster) -> dict[tuple[str, str], StreamStats]:
    """Our four ends, by kind and direction."""
    assert cluster.transport is not None
    peer = cluster.transport.peer_stats()[cluster.etcd.id]
    return {(end.kind, end.direction): end for end in peer.streams}


def wait_for_streams(cluster: Cluster) -> None:
    eventually(
        lambda: all(end.since is not None for end in streams(cluster).values()),
        "all streams are up",
    )


def posts(cluster: Cluster) -> int:
    """How many messages were offered to the pipeline."""
    by_stream = [end.books.offered for end in streams(cluster).values() if end.books is not None]
    return cluster.stats().offered - sum(by_stream)


def out_of_order(appends: Sequence[Message]) -> list[tuple[int, int]]:
    """Where an append ends and the next, of the same leader, begins, if it is not there."""
    steps = [
        (before.index + len(before.entries), after.index)
        for before, after in pairwise(appends)
        if before.term == after.term
    ]
    return [(end, begin) for end, begin in steps if end != begin]


def puts_in_our_log(cluster: Cluster) -> dict[bytes, bytes]:
    """Return what is committed in our log, once all of it is."""
    assert cluster.follower.wait_for(lambda s: s.commit == s.last_index, LONG_TIMEOUT)
    return dict(put for entry in cluster.follower.committed() if (put := put_of(entry)))


def move_leadership_to_us(cluster: Cluster) -> None:
    cluster.etcd.move_leader(cluster.follower.member_id)
    assert cluster.follower.state().role is Role.LEADER


def make_pretender(directory: Path) -> Path:
    """Write a program that says it is an etcd, and ends when it is started as one."""
    binary = directory / "pretender"
    # Not a shell script: a shell does not run with the thread sanitizer preloaded.
    binary.write_text(f"#!{sys.executable}\nprint('etcd Version: 3.5.1')\n")
    binary.chmod(0o755)
    return binary


def hide_etcds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this the process of a machine without any etcd."""
    monkeypatch.delenv("PIPELINE_ETCD", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
