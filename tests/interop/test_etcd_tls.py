"""Mutual TLS with a real etcd that asks its peers for certificates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import Message, MessageType, TLSInfo, Transport, TransportConfig
from pipeline.examples.etcd import EtcdMember, find_etcd, free_port
from tests.support.etcd import Cluster, move_leadership_to_us, puts_in_our_log
from tests.support.raft import FakeRaft
from tests.support.tls import Authority
from tests.support.waiting import eventually

pytestmark = pytest.mark.etcd


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certs")


@pytest.fixture
def etcd(tmp_path: Path, authority: Authority) -> Iterator[EtcdMember]:
    """A member whose only peer, which is us, does not listen."""
    member = EtcdMember(
        find_etcd(),
        tmp_path,
        f"https://127.0.0.1:{free_port()}",
        tls=authority.info("etcd"),
    )
    try:
        member.start()
        yield member
    finally:
        member.stop()
        print(member.log_tail(100))


@contextlib.contextmanager
def our_transport(etcd: EtcdMember, info: TLSInfo, raft: FakeRaft) -> Iterator[Transport]:
    config = TransportConfig(probe_interval_s=0.05)
    with Transport(etcd.other_id, etcd.cluster_id, raft, tls=info, config=config) as transport:
        transport.add_peer(etcd.id, [etcd.peer_url])
        yield transport


def heartbeat(etcd: EtcdMember, context: bytes = b"") -> Message:
    return Message(
        type=MessageType.HEARTBEAT, to=etcd.id, from_=etcd.other_id, term=1, context=context
    )


def test_etcd_takes_what_we_post_over_mutual_tls(etcd: EtcdMember, authority: Authority) -> None:
    info, raft = authority.info(), FakeRaft()
    with our_transport(etcd, info, raft) as transport:
        # Etcd answers probes as soon as it listens.
        eventually(lambda: transport.probe_stats()[etcd.id].is_healthy, "a probe over TLS")
        for i in range(50):
            transport.send([heartbeat(etcd, bytes(i * 1000))])
        eventually(lambda: transport.stats()[etcd.id].sent == 50, "etcd answers 204")
        assert transport.reload_tls()
        transport.send([heartbeat(etcd)])
        eventually(lambda: transport.stats()[etcd.id].sent == 51, "etcd answers after a rotation")
        books = transport.stats()[etcd.id]
        assert (books.failed, raft.unreachable) == (0, [])


def test_etcd_refuses_a_certificate_of_another_authority(
    etcd: EtcdMember, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "other").info(trusted_ca_file=authority.ca_file)
    raft = FakeRaft()
    with our_transport(etcd, authority.info(), FakeRaft()) as ours:
        eventually(lambda: ours.probe_stats()[etcd.id].is_healthy, "a probe over TLS")
    with our_transport(etcd, stranger, raft) as transport:
        transport.send([heartbeat(etcd)])
        assert raft.wait_unreachable(1) == [etcd.id]
        eventually(
            lambda: "alert" in transport.probe_stats()[etcd.id].last_error, "the reason is told"
        )
        assert transport.stats()[etcd.id].sent == 0


# Both ways: a cluster of two


@pytest.fixture
def cluster(tmp_path: Path, authority: Authority) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, authority=authority)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_both_accept_the_posts_of_the_other_over_mutual_tls(cluster: Cluster) -> None:
    written = {b"key %d" % i: b"value %d" % i for i in range(50)}
    written[b"large"] = bytes(range(256)) * 4096
    for key, value in written.items():
        cluster.etcd.put(key, value)
    move_leadership_to_us(cluster)
    written[b"under us"] = bytes(range(256)) * 4096
    cluster.etcd.put(b"under us", written[b"under us"])
    assert cluster.etcd.get(b"under us") == written[b"under us"]

    assert puts_in_our_log(cluster) == written
    stats = cluster.stats()
    assert stats.sent >= len(written)
    assert (stats.failed, stats.dropped, stats.refused) == (cluster.failed_at_start, 0, 0)
    to_us = f'To="{cluster.follower.member_id:x}"'
    assert cluster.etcd.metric(f"etcd_network_peer_sent_failures_total{{{to_us}}}") == 0
    received = cluster.listener.stats()
    assert received.handshake_failures == 0
    # One head for all of etcd's messages: of each connection the first goes through h11.
    assert received.fast_requests > received.handshakes


def test_an_etcd_whose_certificate_we_do_not_allow_is_kept_out_and_lives(
    tmp_path: Path, authority: Authority
) -> None:
    asked: list[int] = []

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        asked.append(member_id)
        return False

    # A peer that never was active is told of at this level only.
    cluster = Cluster(tmp_path, authority=authority, flags=("--log-level", "debug"))
    assert cluster.tls is not None
    cluster.tls = replace(cluster.tls, allow_member=allow)
    try:
        cluster.start_ours()
        cluster.etcd.start()
        theirs = "certificate not allowed for this member"
        eventually(lambda: theirs in cluster.etcd.log_tail(1000), "etcd logs our answer")
        assert set(asked) == {cluster.etcd.id}
        assert cluster.follower.messages == []
        assert cluster.etcd.is_running()
    finally:
        cluster.stop()


def test_an_etcd_of_another_authority_is_kept_out(tmp_path: Path, authority: Authority) -> None:
    cluster = Cluster(tmp_path, authority=authority)
    cluster.tls = Authority(tmp_path / "other").info()
    try:
        cluster.start_ours()
        cluster.etcd.start()
        eventually(lambda: cluster.listener.stats().handshake_failures > 0, "etcd is refused")
        assert cluster.listener.stats().handshakes == 0
        assert cluster.follower.messages == []
    finally:
        cluster.stop()


def test_new_certificates_are_taken_by_both_without_a_restart(cluster: Cluster) -> None:
    cluster.etcd.put(b"before", b"1")
    assert cluster.transport is not None
    before = cluster.listener.stats().handshakes
    assert cluster.transport.reload_tls()
    # Old connections end; nothing that was posted on them is lost for good.
    cluster.etcd.put(b"after", b"2")
    eventually(lambda: cluster.listener.stats().handshakes > before, "etcd connects anew")
    assert puts_in_our_log(cluster) == {b"before": b"1", b"after": b"2"}
