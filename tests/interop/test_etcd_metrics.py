"""Our exposition beside a real etcd's: the same names, types and labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import urllib3
from prometheus_client import CollectorRegistry, generate_latest

from tests.support.etcd import Cluster, wait_until
from tests.support.http import peer_headers, reply_of_socket

pytestmark = pytest.mark.etcd

# name: type, names of labels
Shapes = dict[str, tuple[str, tuple[str, ...]]]


def shapes(text: str) -> Shapes:
    """Read a text exposition, without a parser that knows better what a counter is called."""
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    found: Shapes = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        names = tuple(re.findall(r'(\w+)="', labels))
        if not name.startswith("etcd_network_"):
            continue
        of_histogram = re.sub("_(bucket|count|sum)$", "", name)
        if types.get(of_histogram) == "histogram":
            found[name] = "histogram", names
        elif name in types:
            found[name] = types[name], names
    return found


def bounds(text: str) -> list[str]:
    """Read the buckets' bounds of the round trips, as they are spelled."""
    return re.findall(r'^etcd_network_peer_round_trip_\w+{.*le="(.*?)".*}', text, re.MULTILINE)


def test_our_series_are_called_and_labelled_as_etcd_s(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        transport, etcd = cluster.transport, cluster.etcd
        assert transport is not None
        registry = CollectorRegistry()
        registry.register(transport.metrics_collector())
        ours = generate_latest(registry).decode()
        headers = peer_headers(
            x_etcd_cluster_id=f"{etcd.cluster_id:x}",
            x_peerurls=None,  # or etcd would take us for one more member
        )
        assert reply_of_socket(etcd.peer_url, "POST", "/raft", headers, b"\xff").status == 400
        cluster.stop_ours()  # so that etcd has failures and a peer less

        def of_etcd() -> str:
            return urllib3.request("GET", f"{etcd.client_url}/metrics").data.decode()

        us, them = f"{etcd.other_id:x}", f"{etcd.id:x}"
        gone = f'etcd_network_disconnected_peers_total{{Local="{them}",Remote="{us}"}}'
        failed = f'etcd_network_peer_sent_failures_total{{To="{us}"}}'
        wait_until(lambda: etcd.metric(gone) > 0 and etcd.metric(failed) > 0, "etcd has seen us go")
        # etcd looks at its probes 5 s after it began them.
        wait_until(lambda: bounds(of_etcd()) != [], "etcd has counted round trips")
        theirs = of_etcd()
    finally:
        cluster.stop()

    mine, etcds = shapes(ours), shapes(theirs)
    assert sorted(mine) == [
        "etcd_network_active_peers",
        "etcd_network_disconnected_peers_total",
        "etcd_network_peer_received_bytes_total",
        "etcd_network_peer_received_failures_total",
        "etcd_network_peer_round_trip_time_seconds_bucket",
        "etcd_network_peer_round_trip_time_seconds_count",
        "etcd_network_peer_round_trip_time_seconds_sum",
        "etcd_network_peer_sent_bytes_total",
        "etcd_network_peer_sent_failures_total",
    ]
    assert {name: etcds.get(name) for name in mine} == mine
    assert set(bounds(ours)) == set(bounds(theirs))
    # IDs are spelled alike: what etcd calls itself and us, we do.
    assert f'etcd_network_active_peers{{Local="{us}",Remote="{them}"}} 1.0' in ours
    assert f'etcd_network_active_peers{{Local="{them}",Remote="{us}"}} ' in theirs
