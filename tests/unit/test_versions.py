"""What peers' versions say of ours: one warning for each change, and what it asks for."""

from __future__ import annotations

import logging

import pytest

from pipeline.wire import versions as module
from pipeline.wire.versions import Versions

ETCD, OURS = "Go-http-client/1.1", "raft-pipeline/0.1"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 10.0
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Each look at the clock is 10 s after the one before."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Cluster:
    """What is known of a cluster, and what the log said of it since the last look."""

    def __init__(self, ours: str, peers: set[int], caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "pipeline.wire.versions")
        self.peers = peers
        self.versions = Versions(ours, lambda: self.peers)
        self._caplog = caplog

    def hear(self, member: int, version: str, product: str = ETCD) -> list[str]:
        self.versions.note(member, {"x-server-version": version, "user-agent": product})
        return self.said()

    def said(self) -> list[str]:
        lines = [record.getMessage() for record in self._caplog.records]
        self._caplog.clear()
        return lines


@pytest.mark.parametrize(
    ("ours", "peers", "wanted"),
    [
        pytest.param("3.5.0", ["3.5.0"], None, id="the same"),
        pytest.param("3.5.0", ["3.5.1", "3.5.35"], None, id="later patches"),
        pytest.param("3.5.1", ["3.5.1"], None, id="the same patch"),
        pytest.param("3.5.2", ["3.5.1"], "3.5.0", id="a later patch than theirs"),
        pytest.param("3.5.0", ["3.6.16", "3.6.2"], "3.6.0", id="an earlier minor"),
        pytest.param("3.5.0", ["3.7.3", "3.6.1"], "3.6.0", id="the lowest of them decides"),
        pytest.param("3.5.0", ["3.6.16", "3.5.9"], None, id="one is not upgraded yet"),
        pytest.param("3.6.0", ["3.6.16", "3.5.9"], "3.5.0", id="we were upgraded too early"),
        pytest.param("3.5.0", ["3.4.23"], "3.4.0", id="a later minor"),
        pytest.param("3.5.0", ["4.0.1"], "4.0.0", id="an earlier major"),
        pytest.param("3.7.0", ["3.8.0-alpha.0"], "3.8.0-alpha.0", id="a pre-release"),
        pytest.param("3.8.0", ["3.8.0-alpha.0"], "3.8.0-alpha.0", id="before its release"),
        pytest.param("3.8.0-alpha.0", ["3.8.0-alpha.0"], None, id="the same pre-release"),
        pytest.param("3.8.0", ["3.8.1-rc.0+meta"], None, id="a pre-release of a patch"),
        pytest.param("3.5.0", ["x", "", "3.6", "9" * 400, "3.6.0\r\nX: y"], None, id="no version"),
    ],
)
def test_what_is_asked_for(
    ours: str, peers: list[str], wanted: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(ours, set(range(2, 2 + len(peers))), caplog)
    said = [line for member, v in enumerate(peers, 2) for line in cluster.hear(member, v)]
    if wanted is None:
        assert said == []
    else:
        assert said[-1].startswith(f"server_version {ours} ")
        assert said[-1].endswith(f"set TransportConfig.server_version to {wanted!r}")


def test_both_reasons_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    assert Cluster("3.5.0", {2}, caplog).hear(2, "3.6.16") == [
        "server_version 3.5.0 holds the cluster at version 3.5 (peer 2, the lowest, is at 3.6.16): "
        "set TransportConfig.server_version to '3.6.0'"
    ]
    assert Cluster("3.5.0", {0xAB}, caplog).hear(0xAB, "3.4.23") == [
        "server_version 3.5.0 is above what a peer has, which warns of it whenever it leads "
        "(peer ab, the lowest, is at 3.4.23): set TransportConfig.server_version to '3.4.0'"
    ]


def test_it_is_told_once_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster("3.5.0", {2, 3}, caplog)
    assert cluster.hear(2, "3.6.16") == []  # the other one may be at 3.5
    assert len(cluster.hear(3, "3.6.16")) == 1
    for member in (2, 3, 2, 3):
        assert cluster.hear(member, "3.6.16") == []
    assert cluster.hear(2, "3.6.17") == []  # asks for the same
    assert cluster.hear(2, "3.5.9") == ["server_version 3.5.0 suits the peers now"]
    assert len(cluster.hear(2, "3.7.3")) == 1
    assert "'3.7.0'" in cluster.hear(3, "3.7.3")[0]


def test_a_peer_that_was_not_heard_may_hold_the_cluster_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An etcd raises the cluster's version when it has heard of all members only."""
    cluster = Cluster("3.5.0", {2, 3}, caplog)
    assert cluster.hear(2, "3.6.16") == []
    cluster.peers = {2}
    cluster.versions.forget(3)
    assert "'3.6.0'" in cluster.said()[0]


def test_members_of_this_library_are_no_measure_beside_an_etcd(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two that were left at the default would otherwise find each other in order."""
    cluster = Cluster("3.5.0", {2, 3}, caplog)
    assert cluster.hear(2, "3.5.0", OURS) == []
    assert "'3.6.0'" in cluster.hear(3, "3.6.16")[0]
    # Nor is one that claims too little a reason for others to do so.
    right = Cluster("3.6.0", {2, 3}, caplog)
    assert right.hear(3, "3.6.16") == right.hear(2, "3.5.0", OURS) == []
    # By themselves they are.
    assert "'3.6.0'" in Cluster("3.5.0", {2}, caplog).hear(2, "3.6.0", OURS)[0]


def test_an_answer_does_not_say_whose_it_is_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = Cluster("3.5.0", {2, 3}, caplog)
    cluster.hear(2, "3.5.0", OURS)
    cluster.versions.note(2, {"x-server-version": "3.5.0"})
    assert "'3.6.0'" in cluster.hear(3, "3.6.16")[0]


def test_strangers_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster("3.5.0", {2}, caplog)
    assert cluster.hear(9, "3.4.0") == []
    assert cluster.versions.get(9) is None
    cluster.versions.note(2, {})
    assert cluster.versions.get(2) is None
    cluster.hear(2, "3.5.7")
    assert cluster.versions.get(2) == "3.5.7"
    cluster.versions.forget(2)
    assert cluster.versions.get(2) is None


def test_made_up_versions_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster("3.5.0", {2}, caplog)
    assert len(cluster.hear(2, "3.6.0")) == 1
    monkeypatch.setattr(clock, "monotonic", lambda: clock.now)
    assert [line for n in range(7, 99) for line in cluster.hear(2, f"3.{n}.0")] == []
    clock.now += module.INTERVAL_S
    # What was left out is told at the next occasion, new or not.
    assert "'3.98.0'" in cluster.hear(2, "3.98.0")[0]
    assert cluster.hear(2, "3.98.0") == []
