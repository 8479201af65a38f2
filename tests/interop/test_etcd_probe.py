"""``raft-pipeline probe`` of a real etcd in service: what it says, and that it disturbs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.cli.commands import commands
from tests.support.etcd import Cluster
from tests.support.tls import Authority
from tests.support.waiting import eventually

pytestmark = [pytest.mark.etcd, pytest.mark.streams]


@pytest.fixture(params=["plain", "TLS"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    authority = Authority(tmp_path / "tls") if request.param == "TLS" else None
    cluster = Cluster(tmp_path, authority=authority)
    try:
        cluster.start()
        eventually(lambda: all(since is not None for since in streams_since(cluster)))
        yield cluster
    finally:
        cluster.stop()


def streams_since(cluster: Cluster) -> list[float | None]:
    assert cluster.transport is not None
    return [stream.since for stream in cluster.transport.peer_stats()[cluster.etcd.id].streams]


def probe(cluster: Cluster, *options: str, url: str = "") -> dict[str, Any]:
    files: list[str] = []
    if cluster.tls is not None:
        tls = cluster.tls
        files = ["--cert", str(tls.cert_file), "--key", str(tls.key_file)]
        files += ["--cacert", str(tls.trusted_ca_file)]
    arguments = ["probe", url or cluster.etcd.peer_url, "--json", *files, *options]
    result = CliRunner().invoke(commands, arguments)
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_an_etcd_in_service_is_asked_and_keeps_its_streams(cluster: Cluster) -> None:
    before = streams_since(cluster)
    found = probe(cluster, "--as-member", f"{cluster.etcd.other_id:x}")
    assert (found["verdict"], found["reason"], found["notes"]) == ("ok", "", [])
    assert found["version"] == cluster.etcd.version
    assert found["cluster_id"] == f"{cluster.etcd.cluster_id:x}"
    assert found["round_trips"] == 10
    assert (found["tls"] is None) == (cluster.tls is None)
    assert probe(cluster, "--as-member", "99")["verdict"] == "unknown-member"
    assert probe(cluster, "--cluster-id", "8")["verdict"] == "wrong-cluster"
    assert streams_since(cluster) == before


def test_its_port_for_clients_is_no_peer_port(cluster: Cluster) -> None:
    found = probe(cluster, url=cluster.etcd.client_url)
    assert found["verdict"] == "not-a-peer", found
    assert found["notes"] == ["it answers /version: perhaps the member's port for clients"]
