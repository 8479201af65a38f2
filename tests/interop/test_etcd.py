"""A real etcd and our Transport, both ways: neither member can commit without the other."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3

from pipeline import (
    ConfState,
    Message,
    MessageType,
    PipelineConfig,
    ReceiverConfig,
    Snapshot,
    SnapshotMetadata,
    SnapshotSourceError,
    TransportConfig,
)
from pipeline.examples.etcd import EtcdError, put_of, puts_in
from tests.support import LONG_TIMEOUT
from tests.support.etcd import (
    LEFT_BEHIND,
    Cluster,
    assert_balanced,
    left_behind,
    move_leadership_to_us,
    puts_in_our_log,
    streams,
    wait_for_streams,
)
from tests.support.tls import Authority
from tests.support.waiting import connections_to, eventually, is_listening

pytestmark = pytest.mark.etcd


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Both members running, etcd leading; the books are checked when they stop.

    Joined by posts; or by streams, which are up at the beginning and at the end.
    """
    by = getattr(request, "param", "posts")
    cluster = Cluster(
        tmp_path,
        config=TransportConfig(streams=by != "posts"),
        authority=Authority(tmp_path / "certs") if by == "streams over TLS" else None,
    )
    try:
        cluster.start()
        wait_for_streams(cluster)
        yield cluster
        if cluster.transport is not None:
            wait_for_streams(cluster)
    finally:
        cluster.stop()


either_way = pytest.mark.parametrize(
    "cluster", ["posts", "streams", "streams over TLS"], indirect=True
)


def test_both_accept_the_posts_of_the_other(cluster: Cluster) -> None:
    written = {b"key %d" % i: b"value %d" % i for i in range(100)}
    for key, value in written.items():
        cluster.etcd.put(key, value)

    assert puts_in_our_log(cluster) == written
    assert cluster.follower.received[MessageType.APP] >= len(written)
    stats = cluster.stats()
    assert stats.sent >= len(written)
    assert (stats.failed, stats.dropped, stats.refused) == (cluster.failed_at_start, 0, 0)
    to_us = f'To="{cluster.follower.member_id:x}"'
    assert cluster.etcd.metric(f"etcd_network_peer_sent_bytes_total{{{to_us}}}") > 0
    assert cluster.etcd.metric(f"etcd_network_peer_sent_failures_total{{{to_us}}}") == 0


def test_an_etcd_that_is_refused_streams_does_not_dial_again(cluster: Cluster) -> None:
    listener, follower = cluster.listener, cluster.follower
    cluster.etcd.put(b"key", b"value")
    accepted, heartbeats = listener.stats().accepted, follower.received[MessageType.HEARTBEAT]
    # Refused with an answer that ends, it would dial ten times a second for each kind.
    eventually(
        lambda: follower.received[MessageType.HEARTBEAT] >= heartbeats + 60,
        "sixty heartbeats, one each tenth of a second",
    )
    assert listener.stats().accepted - accepted < 12
    between = f'{{Local="{cluster.etcd.id:x}",Remote="{follower.member_id:x}"}}'
    assert cluster.etcd.metric(f"etcd_network_active_peers{between}") == 1
    assert cluster.etcd.metric(f"etcd_network_disconnected_peers_total{between}") == 0


@pytest.mark.parametrize("profile", ["3.6", "3.7"])
def test_etcd_understands_the_encodings_of_its_successors(tmp_path: Path, profile: str) -> None:
    config = TransportConfig(pipeline=PipelineConfig(profile=profile))
    cluster = Cluster(tmp_path, config=config)
    try:
        cluster.start()
        move_leadership_to_us(cluster)  # so that we send every type of message we know
        cluster.etcd.put(b"key", b"value")
        assert cluster.etcd.get(b"key") == b"value"
        assert puts_in_our_log(cluster) == {b"key": b"value"}
        assert cluster.stats().failed == cluster.failed_at_start
    finally:
        cluster.stop()


@pytest.mark.parametrize("step", [-1, 0, 1], ids=["lower", "the same", "higher"])
def test_a_claim_that_does_not_suit_an_etcd_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    cluster = Cluster(tmp_path)
    right = cluster.config.server_version
    major, minor, _ = map(int, right.split("."))
    claim = f"{major}.{minor + step}.0"
    cluster.config = dataclasses.replace(cluster.config, server_version=claim)
    try:
        cluster.start()
        cluster.etcd.put(b"key", b"value")
        assert cluster.transport is not None
        peer = cluster.transport.peer_stats()[cluster.etcd.id]
        assert peer.server_version == cluster.etcd.version
    finally:
        cluster.stop()
    told = [r.getMessage() for r in caplog.records if r.name == "pipeline.wire.versions"]
    assert [text.rpartition(" ")[2] for text in told] == ([repr(right)] if step else [])


def test_etcd_counts_the_bytes_that_we_count_as_sent(cluster: Cluster) -> None:
    sample = f'etcd_network_peer_received_bytes_total{{From="{cluster.follower.member_id:x}"}}'
    for i in range(20):
        cluster.etcd.put(b"key %d" % i, b"value")

    def is_equal() -> bool:
        before = cluster.stats()
        received = cluster.etcd.metric(sample)
        # Only an instant without a heartbeat between the two readings says anything.
        return received == before.sent_bytes and before == cluster.stats()

    eventually(is_equal, "both count the same bytes")


def test_a_linearizable_read_is_answered_because_we_echo_the_context(cluster: Cluster) -> None:
    cluster.etcd.put(b"key", b"value")
    assert cluster.etcd.get(b"key") == b"value"

    asked = [m for m in cluster.follower.messages if m.type == MessageType.HEARTBEAT and m.context]
    assert asked, "etcd asked nobody whether it still leads"


@either_way
def test_etcd_hands_its_leadership_to_us_and_takes_it_back(cluster: Cluster) -> None:
    cluster.etcd.put(b"under etcd", b"1")
    move_leadership_to_us(cluster)
    cluster.etcd.put(b"under us", b"2")
    assert cluster.etcd.get(b"under us") == b"2"
    assert cluster.follower.received[MessageType.PROP] >= 1
    assert cluster.follower.sent[MessageType.READ_INDEX_RESP] >= 1
    led_term = cluster.follower.state().term

    eventually(cluster.follower.transfer_leadership, "etcd holds our whole log")
    assert cluster.follower.wait_for(lambda s: s.leader == cluster.etcd.id, LONG_TIMEOUT)
    cluster.etcd.put(b"under etcd again", b"3")

    assert puts_in_our_log(cluster) == {
        b"under etcd": b"1",
        b"under us": b"2",
        b"under etcd again": b"3",
    }
    terms = [entry.term for entry in cluster.follower.committed()]
    assert terms == sorted(terms)
    assert led_term in terms
    assert cluster.follower.state().term > led_term


@either_way
@pytest.mark.parametrize("leader", ["etcd", "us"])
def test_a_value_of_one_mebibyte_goes_through(cluster: Cluster, leader: str) -> None:
    if leader == "us":
        move_leadership_to_us(cluster)
    value = bytes(range(256)) * 4096
    cluster.etcd.put(b"large", value)

    assert cluster.etcd.get(b"large") == value
    assert puts_in_our_log(cluster) == {b"large": value}
    if leader == "us":
        assert cluster.stats().sent_bytes > len(value)
    if ends := streams(cluster):
        assert ends["msgapp", "out" if leader == "us" else "in"].bytes > len(value)


@either_way
@pytest.mark.parametrize("leader", ["etcd", "us"])
def test_the_cluster_goes_on_when_etcd_is_killed_and_started_again(
    cluster: Cluster, leader: str
) -> None:
    cluster.etcd.put(b"before", b"1")
    if leader == "us":
        move_leadership_to_us(cluster)
    cluster.etcd.commit_database()
    cluster.etcd.stop()
    if leader == "us":
        eventually(lambda: cluster.stats().failed > cluster.failed_at_start, "a heartbeat fails")
        eventually(lambda: cluster.follower.unreachable > 0, "we are told so")
        assert_balanced(cluster.stats())
    cluster.etcd.start()
    cluster.etcd.wait_ready()

    cluster.etcd.put(b"after", b"2")
    assert cluster.etcd.get(b"before") == b"1"
    assert puts_in_our_log(cluster) == {b"before": b"1", b"after": b"2"}


def test_etcd_shutting_down_in_good_order_leaves_the_leadership_to_us(cluster: Cluster) -> None:
    cluster.etcd.put(b"before", b"1")
    term = cluster.follower.state().term
    cluster.etcd.stop(graceful=True)
    assert cluster.follower.received[MessageType.TIMEOUT_NOW] == 1
    # Alone we lead for a second, until we look whether a majority is there.
    assert cluster.follower.wait_for(lambda s: s.term > term, 0)
    assert cluster.follower.received[MessageType.VOTE_RESP] == 1
    cluster.etcd.start()
    cluster.etcd.wait_ready()
    cluster.etcd.put(b"after", b"2")
    assert puts_in_our_log(cluster) == {b"before": b"1", b"after": b"2"}


@either_way
@pytest.mark.parametrize("leader", ["etcd", "us"])
def test_the_cluster_goes_on_when_our_transport_is_replaced(cluster: Cluster, leader: str) -> None:
    cluster.etcd.put(b"before", b"1")
    if leader == "us":
        move_leadership_to_us(cluster)
    cluster.stop_ours()
    with pytest.raises(EtcdError):  # nothing commits without us
        cluster.etcd.call("/v3/kv/range", {"key": "eA=="}, timeout_s=1.0)
    cluster.start_ours()
    cluster.etcd.wait_ready()

    cluster.etcd.put(b"after", b"2")
    assert cluster.etcd.get(b"before") == b"1"
    assert puts_in_our_log(cluster) == {b"before": b"1", b"after": b"2"}


def test_etcd_hears_at_once_that_its_snapshot_is_refused(tmp_path: Path) -> None:
    with left_behind(tmp_path, TransportConfig(), takes_snapshots=False) as cluster:
        eventually(
            lambda: "unexpected http status Not Implemented" in cluster.etcd.log_tail(500),
            "etcd hears that its snapshot was refused",
        )


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_a_snapshot_of_etcd_is_stored_and_we_go_on_from_it(tmp_path: Path, has_tls: bool) -> None:
    stored = tmp_path / "ours"
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=stored))
    authority = Authority(tmp_path / "certs") if has_tls else None
    with left_behind(tmp_path, config, takes_snapshots=True, authority=authority) as cluster:
        follower, etcd = cluster.follower, cluster.etcd
        assert follower.wait_for(lambda s: s.commit > 0, LONG_TIMEOUT)
        (message,) = (m for m in follower.messages if m.type == MessageType.SNAP)
        assert message.snapshot is not None
        index = message.snapshot.metadata.index
        assert index > 100
        assert cluster.transport is not None
        path = cluster.transport.snapshot_path(index)
        assert path == stored / f"{index:016x}.snap.db"
        assert [p.name for p in stored.iterdir()] == [path.name]

        etcd.wait_ready()
        etcd.put(b"after", b"1")  # does not commit without us
        assert follower.wait_for(lambda s: s.commit == s.last_index > index, LONG_TIMEOUT)
        assert (b"after", b"1") in map(put_of, follower.committed())
        to_us = f'{{To="{follower.member_id:x}"}}'
        assert etcd.metric(f"etcd_network_snapshot_send_success{to_us}") == 1
        counts = cluster.transport.handlers.snapshots.counts()[f"{etcd.id:x}"]
        assert (counts.success, counts.failures, counts.in_flight) == (1, 0, 0)
        saved = path.stat().st_size
        assert cluster.transport.handlers.received.bytes_by_sender[etcd.id] > saved

        written = {(b"%d" % n, b"x") for n in range(LEFT_BEHIND)} | {(b"after", b"1")}
        assert puts_in(path) | set(map(put_of, follower.committed())) - {None} == written
        # etcd's own tool reads what we have stored: all that was put before.
        tool = snapshot_tool(etcd.binary)
        command = [tool, "snapshot", "status", path, "--write-out", "json"]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        told = subprocess.run(command, check=True, capture_output=True, env=environment).stdout
        status = json.loads(told)
        assert status["totalKey"] >= len(puts_in(path))
        assert status["totalSize"] == saved
        restore = [tool, "snapshot", "restore", path, "--skip-hash-check"]
        restored = tmp_path / "restored"
        subprocess.run([*restore, "--data-dir", restored], check=True, env=environment)
        assert (restored / "member" / "snap" / "db").exists()


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_etcd_stores_a_snapshot_we_send_with_its_length(tmp_path: Path, has_tls: bool) -> None:
    """etcd itself sends chunks; what it makes of our Content-Length is shown here."""
    cluster = Cluster(tmp_path, authority=Authority(tmp_path / "certs") if has_tls else None)
    try:
        cluster.start()
        send_a_snapshot(cluster, tmp_path / "database")
    finally:
        cluster.stop()


def snapshot_tool(etcd: Path) -> Path:
    """The tool beside an etcd that reads its databases: etcdutl, or etcdctl before 3.5."""
    for name in ("etcdutl", "etcdctl"):
        if (tool := etcd.with_name(name)).exists():
            return tool
    pytest.fail(f"neither etcdutl nor etcdctl beside {etcd}")


def send_a_snapshot(cluster: Cluster, database: Path) -> None:
    transport, etcd, us = cluster.transport, cluster.etcd, cluster.follower.member_id
    assert transport is not None
    for i in range(200):
        etcd.put(b"key %d" % i, bytes(10_000))
    snap = etcd.directory / "data" / "member" / "snap"
    shutil.copy(snap / "db", database)
    # Of a term that is over: etcd stores it and 204s, and its raft takes no notice.
    metadata = SnapshotMetadata(index=0xABCDEF, term=1, conf_state=ConfState(voters=(etcd.id, us)))
    message = Message(
        type=MessageType.SNAP, to=etcd.id, from_=us, term=1, snapshot=Snapshot(metadata=metadata)
    )
    transfer = transport.send_snapshot(message, database)
    transfer.result(LONG_TIMEOUT)

    stored = snap / "0000000000abcdef.snap.db"
    assert stored.read_bytes() == database.read_bytes()
    size = database.stat().st_size
    assert transfer.progress[:3] == ("done", size, size)
    from_us = f'{{From="{us:x}"}}'
    assert etcd.metric(f"etcd_network_snapshot_receive_success{from_us}") == 1
    assert etcd.metric(f"etcd_network_snapshot_receive_failures{from_us}") == 0

    # One that breaks off leaves nothing there.
    broken = transport.send_snapshot(message, [bytes(1 << 20)], size=(1 << 20) + 1)
    with pytest.raises(SnapshotSourceError):
        broken.result(LONG_TIMEOUT)
    eventually(
        lambda: etcd.metric(f"etcd_network_snapshot_receive_failures{from_us}") == 1,
        "etcd has seen it break off",
    )
    assert [path.name for path in snap.glob("*.snap.db")] == [stored.name]
    assert list(snap.glob("tmp*")) == []
    etcd.put(b"after", b"1")
    assert etcd.get(b"after") == b"1"


@pytest.mark.slow  # the five seconds are etcd's own
@pytest.mark.parametrize("idle_timeout_s", [4.0, 60.0], ids=["too old for us", "young enough"])
def test_a_message_after_a_long_silence_is_not_lost(tmp_path: Path, idle_timeout_s: float) -> None:
    """etcd closes a connection after 5 s without a read (spec section 10.1)."""
    pipeline = PipelineConfig(idle_timeout_s=idle_timeout_s)
    # Probes have a connection of their own, which they keep warm.
    config = TransportConfig(pipeline=pipeline, probe_interval_s=0)
    cluster = Cluster(tmp_path, config=config, campaigns=False)
    heartbeat = Message(
        type=MessageType.HEARTBEAT_RESP, to=cluster.etcd.id, from_=cluster.follower.member_id
    )
    try:
        cluster.etcd.start()
        eventually(lambda: is_listening(cluster.etcd.peer_url), "etcd listens")
        eventually(lambda: connections_to(cluster.etcd.peer_url) == 0, "and has heard nothing yet")
        cluster.start_ours(listening=False)  # else etcd's elections would keep us talking
        assert cluster.transport is not None
        cluster.transport.send([heartbeat])
        eventually(lambda: cluster.stats().sent == 1, "the first is sent")
        assert connections_to(cluster.etcd.peer_url) == 1
        eventually(lambda: connections_to(cluster.etcd.peer_url) == 0, "the connection is closed")
        cluster.transport.send([heartbeat])
        eventually(lambda: cluster.stats().sent == 2, "the second is sent")
        assert cluster.stats().failed == 0
    finally:
        cluster.stop()


def test_a_wrong_cluster_id_is_refused_on_both_sides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(tmp_path, has_right_cluster_id=False, campaigns=False)
    try:
        with caplog.at_level(logging.DEBUG, logger="pipeline"):
            cluster.start_ours()
            cluster.etcd.start()

            def has_learnt() -> bool:
                """From our 412, which has our cluster's ID."""
                lines = cluster.etcd.log_tail(1000).splitlines()
                ignored = [line for line in lines if "request sent was ignored" in line]
                return any(f"{cluster.our_cluster_id:x}" in line for line in ignored)

            eventually(has_learnt, "etcd learns of our 412")
            assert cluster.transport is not None
            cluster.transport.send(
                [
                    Message(
                        type=MessageType.HEARTBEAT_RESP,
                        to=cluster.etcd.id,
                        from_=cluster.follower.member_id,
                        term=1,
                    )
                ]
            )
            eventually(lambda: cluster.follower.unreachable > 0, "we are told so")
            eventually(lambda: cluster.stats().in_flight == 0, "and it has its outcome")
        assert "cluster ID mismatch" in caplog.text
        stats = cluster.stats()
        assert (stats.sent, stats.failed) == (0, 1)
        assert_balanced(stats)
        assert cluster.follower.messages == []
    finally:
        cluster.stop()


def cluster_version(cluster: Cluster) -> str:
    """Return the version that etcd has raised the cluster to."""
    url = f"{cluster.etcd.client_url}/version"
    return str(urllib3.request("GET", url).json()["etcdcluster"])


def test_the_leader_learns_our_version_and_raises_the_cluster_s(cluster: Cluster) -> None:
    claimed = cluster.config.server_version
    assert claimed.rpartition(".")[0] == cluster.etcd.version.rpartition(".")[0]
    eventually(
        lambda: cluster_version(cluster) == claimed,
        "the cluster's version is that of its members",
    )
    assert "failed to get version" not in cluster.etcd.log_tail(100_000)


def test_etcd_answers_our_probes_on_one_connection(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, config=TransportConfig(probe_interval_s=0.05))
    try:
        cluster.start()
        assert cluster.transport is not None
        transport, etcd = cluster.transport, cluster.etcd.id
        eventually(lambda: transport.probe_stats()[etcd].is_healthy, "etcd answers a probe")
        before = transport.probe_stats()[etcd]
        eventually(lambda: transport.probe_stats()[etcd].total > before.total + 5, "and more")
        after = transport.probe_stats()[etcd]
        assert after.lost == before.lost
        assert after.last_rtt_s is not None
        assert 0 < after.smoothed_rtt_s < LONG_TIMEOUT
    finally:
        cluster.stop()
