"""A real etcd and our Transport, joined by streams in both directions."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import MemberRemovedError, MessageType, ReceiverConfig, TransportConfig
from pipeline.examples.etcd import EtcdError, EtcdMember, find_etcd, put_of
from tests.chaos.cluster import Cluster as ChaosCluster
from tests.chaos.link import Network
from tests.support import LONG_TIMEOUT
from tests.support.etcd import (
    Cluster,
    assert_balanced,
    left_behind,
    posts,
    puts_in_our_log,
    streams,
    wait_for_streams,
)
from tests.support.tls import Authority, serial_of
from tests.support.waiting import eventually

pytestmark = [pytest.mark.etcd, pytest.mark.streams]


@pytest.fixture(params=["plain", "TLS"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """Both members running, etcd leading, all four streams up; the books are checked at the end."""
    authority = Authority(tmp_path / "certs") if request.param == "TLS" else None
    cluster = Cluster(tmp_path, authority=authority)
    try:
        cluster.start()
        wait_for_streams(cluster)
        yield cluster
        if cluster.transport is not None:
            for end in streams(cluster).values():
                if end.books is not None:
                    assert_balanced(end.books)
    finally:
        cluster.stop()


def lines_about_us(cluster: Cluster) -> list[str]:
    """What etcd has logged of us at warn and above, but for its own being late."""
    return lines_at_warn(cluster.etcd, f"{cluster.follower.member_id:x}")


def lines_at_warn(etcd: EtcdMember, member: str) -> list[str]:
    """What it has logged of a member at warn and above, but for its own being late."""
    return [
        line
        for line in etcd.log_tail(100_000).splitlines()
        if member in line
        and any(f'"level":"{level}"' in line for level in ("warn", "error"))
        and "leader failed to send out heartbeat on time" not in line  # on a busy machine
    ]


def test_in_the_steady_state_nothing_is_posted_dialled_or_complained_of(cluster: Cluster) -> None:
    follower = cluster.follower
    cluster.etcd.put(b"first", b"0")
    posted, logged = posts(cluster), lines_about_us(cluster)
    accepted = cluster.listener.stats().accepted
    written = {b"key %d" % i: b"value %d" % i for i in range(100)}
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda put: cluster.etcd.put(*put), written.items()):
            pass
    heartbeats = follower.received[MessageType.HEARTBEAT]
    eventually(
        lambda: follower.received[MessageType.HEARTBEAT] >= heartbeats + 30,
        "thirty heartbeats, one each tenth of a second",
    )
    assert puts_in_our_log(cluster) == {b"first": b"0", **written}

    assert posts(cluster) == posted
    assert cluster.listener.stats().accepted - accepted <= 2  # etcd's probes, if they dial anew
    assert lines_about_us(cluster) == logged
    ends = streams(cluster)
    assert ends["msgapp", "in"].messages >= len(written)
    assert ends["message", "in"].messages >= 30
    assert ends["message", "out"].messages >= len(written)
    between = f'{{Local="{cluster.etcd.id:x}",Remote="{follower.member_id:x}"}}'
    assert cluster.etcd.metric(f"etcd_network_active_peers{between}") == 1


@pytest.mark.slow  # the five seconds of silence that end a stream
def test_an_etcd_that_stands_still_is_found_and_comes_back(cluster: Cluster) -> None:
    cluster.etcd.put(b"before", b"1")
    cluster.etcd.send_signal(signal.SIGSTOP)
    try:
        eventually(
            lambda: (
                streams(cluster)["msgapp", "in"].since is None
                and streams(cluster)["message", "in"].since is None
            ),
            "both streams from it are given up",
        )
    finally:
        cluster.etcd.send_signal(signal.SIGCONT)
    cluster.etcd.wait_ready()
    cluster.etcd.put(b"after", b"2")
    wait_for_streams(cluster)
    assert puts_in_our_log(cluster) == {b"before": b"1", b"after": b"2"}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2.0, 8.0])
@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_a_process_of_ours_that_stands_still_is_found_and_comes_back(
    tmp_path: Path, has_tls: bool, seconds: float
) -> None:
    with Network() as network:
        cluster = ChaosCluster(find_etcd(), tmp_path, network, ours=1, has_tls=has_tls)
        etcd, (ours,) = cluster.etcd, cluster.ours
        us = f"{ours.setting.member_id:x}"
        try:
            cluster.start()
            written = {b"before %d" % n: b"%d" % n for n in range(20)}
            for key, value in written.items():
                etcd.insist(lambda key=key, value=value: etcd.put(key, value))  # type: ignore[misc]
            cluster.settle()
            opened = len(ours.descriptors())
            with cluster.frozen(ours.name):
                until = time.monotonic() + seconds
                with pytest.raises(EtcdError):
                    etcd.put(b"unheard", b"", 0.5)
                time.sleep(until - time.monotonic())
            etcd.wait_ready(LONG_TIMEOUT)
            cluster.settle()
            eventually(lambda: is_quiet(cluster, us), "all goes by streams again")
            # Kept: connections for posts, four either way, and for probes.
            assert len(ours.descriptors()) <= opened + 10
            last = cluster.settle()
            items = etcd.items()
            cluster.check()
            ours.stop()
            held = dict(put for entry in ours.log(last).entries if (put := put_of(entry)))
            assert held.items() >= written.items()
            assert held == items
            assert cluster.unbalanced() == 0
        finally:
            cluster.stop()
            print(ours.log_path.read_text()[-8000:])


def is_quiet(cluster: ChaosCluster, us: str) -> bool:
    """Write a hundred keys; tell whether nothing was dialled or complained of meanwhile."""
    complaints = lines_at_warn(cluster.etcd, us)
    accepted = sum(link.accepted for link in cluster.network.links)
    for n in range(100):
        cluster.etcd.insist(lambda n=n: cluster.etcd.put(b"after %d" % n, b"x"))  # type: ignore[misc]
    dialled = sum(link.accepted for link in cluster.network.links) - accepted
    return dialled <= 2 and lines_at_warn(cluster.etcd, us) == complaints  # probes of an etcd


def test_certificates_are_replaced_while_streams_are_up(tmp_path: Path) -> None:
    """Ours with a reload, which ends the streams; an etcd's is read at each handshake."""
    authority, shown = Authority(tmp_path / "certs"), []

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        shown.append(certificate["serialNumber"])
        return True

    cluster = Cluster(tmp_path, authority=authority)
    assert cluster.tls is not None
    cluster.tls = replace(cluster.tls, allow_member=allow)
    try:
        cluster.start()
        wait_for_streams(cluster)
        assert cluster.transport is not None
        since = {key: end.since for key, end in streams(cluster).items()}
        authority.issue("etcd")
        cluster.etcd.put(b"etcd's", b"1")
        assert {key: end.since for key, end in streams(cluster).items()} == since

        old = serial_of(authority.directory / "ours.pem")
        authority.issue("ours")
        assert serial_of(authority.directory / "ours.pem") != old
        assert cluster.transport.reload_tls()
        eventually(
            lambda: all(
                end.since not in (None, since[key]) for key, end in streams(cluster).items()
            ),
            "all streams are others",
        )
        assert shown[-1] == serial_of(authority.directory / "etcd.pem")
        cluster.etcd.put(b"ours", b"2")

        def goes_by_streams() -> bool:
            before = posts(cluster), cluster.listener.stats().fast_requests
            for n in range(20):
                cluster.etcd.put(b"%d" % n, b"")
            return (posts(cluster), cluster.listener.stats().fast_requests) == before

        eventually(goes_by_streams, "nothing is posted any more")
        complaints = lines_about_us(cluster)
        assert goes_by_streams()
        assert lines_about_us(cluster) == complaints
        held = puts_in_our_log(cluster)
        assert (held[b"etcd's"], held[b"ours"]) == (b"1", b"2")
        assert cluster.stats().failed == cluster.failed_at_start
    finally:
        cluster.stop()


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_who_is_removed_is_told(tmp_path: Path, has_tls: bool) -> None:
    told: list[MemberRemovedError] = []
    authority = Authority(tmp_path / "certs") if has_tls else None
    flags = ("--strict-reconfig-check=false",)  # or it would have to be five seconds old
    cluster = Cluster(tmp_path, flags=flags, authority=authority)
    cluster.on_critical_error = told.append
    try:
        cluster.start()
        wait_for_streams(cluster)
        cluster.etcd.call("/v3/cluster/member/remove", {"ID": str(cluster.follower.member_id)})
        eventually(
            lambda: sum("it was removed" in line for line in lines_about_us(cluster)) == 2,
            "the dials that follow are answered 410, of each kind",
        )
        eventually(lambda: told, "we are told")
        assert [(error.peer_id, error.status) for error in told] == [(cluster.etcd.id, 410)]
    finally:
        cluster.stop()


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
def test_a_snapshot_comes_while_streams_are_up(tmp_path: Path, has_tls: bool) -> None:
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path / "ours"))
    authority = Authority(tmp_path / "certs") if has_tls else None
    with left_behind(tmp_path, config, takes_snapshots=True, authority=authority) as cluster:
        follower = cluster.follower
        assert follower.wait_for(lambda s: s.commit > 0, LONG_TIMEOUT)
        assert [m.type for m in follower.messages if m.type == MessageType.SNAP]
        cluster.etcd.wait_ready()
        wait_for_streams(cluster)
        cluster.etcd.put(b"after", b"1")
        assert follower.wait_for(lambda s: s.commit == s.last_index, LONG_TIMEOUT)
