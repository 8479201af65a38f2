"""Our exposition beside a real etcd's: the same names, types and labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import urllib3
from prometheus_client import CollectorRegistry, generate_latest

from pipeline import (
    Message,
    MessageType,
    ReceiverConfig,
    Snapshot,
    SnapshotMetadata,
    SnapshotSourceError,
    TransportConfig,
)
from tests.support import LONG_TIMEOUT
from tests.support.etcd import left_behind
from tests.support.http import peer_headers, reply_of_socket
from tests.support.waiting import eventually

pytestmark = pytest.mark.etcd

# name: type, names of labels, upper bounds of a histogram
Shapes = dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]


def shapes(text: str) -> Shapes:
    """Read a text exposition, without a parser that knows better what a counter is called."""
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    found: Shapes = {}
    for sample, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        name = sample.removesuffix("_bucket")
        if name in types and name.startswith(("etcd_network_", "etcd_snap_db_")):
            names = tuple(n for n in re.findall(r'(\w+)="', labels) if n != "le")
            _, _, bounds = found.get(name, ("", (), ()))
            bounds += tuple(b for b in re.findall(r'le="([^"]*)"', labels) if b not in bounds)
            found[name] = types[name], names, bounds
    return found


def test_our_series_are_called_and_labelled_as_etcd_s(tmp_path: Path) -> None:
    """Both have sent a snapshot and taken one, and have seen failures."""
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path / "ours"))
    with left_behind(tmp_path, config, takes_snapshots=True) as cluster:
        transport, etcd = cluster.transport, cluster.etcd
        assert transport is not None
        assert cluster.follower.wait_for(lambda s: s.commit > 0, LONG_TIMEOUT)
        metadata = SnapshotMetadata(index=1, term=1)
        message = Message(
            type=MessageType.SNAP,
            to=etcd.id,
            from_=etcd.other_id,
            term=1,
            snapshot=Snapshot(metadata=metadata),
        )
        transport.send_snapshot(message, b"database").result(LONG_TIMEOUT)
        with pytest.raises(SnapshotSourceError):
            transport.send_snapshot(message, [b"x"], size=2).result(LONG_TIMEOUT)
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
        eventually(lambda: etcd.metric(gone) > 0 and etcd.metric(failed) > 0, "etcd has seen us go")
        # etcd looks at its probes 5 s after it began them.
        trips = "etcd_network_peer_round_trip_time_seconds"
        eventually(lambda: trips in shapes(of_etcd()), "etcd has counted round trips")
        theirs = of_etcd()

    mine, etcds = shapes(ours), shapes(theirs)
    assert sorted(mine) == [
        "etcd_network_active_peers",
        "etcd_network_disconnected_peers_total",
        "etcd_network_peer_received_bytes_total",
        "etcd_network_peer_received_failures_total",
        trips,
        "etcd_network_peer_sent_bytes_total",
        "etcd_network_peer_sent_failures_total",
        "etcd_network_snapshot_receive_failures",
        "etcd_network_snapshot_receive_inflights_total",
        "etcd_network_snapshot_receive_success",
        "etcd_network_snapshot_receive_total_duration_seconds",
        "etcd_network_snapshot_send_failures",
        "etcd_network_snapshot_send_inflights_total",
        "etcd_network_snapshot_send_success",
        "etcd_network_snapshot_send_total_duration_seconds",
        "etcd_snap_db_fsync_duration_seconds",
        "etcd_snap_db_save_total_duration_seconds",
    ]
    # etcd's exposition has no series of failures to send a snapshot until there is one.
    missing = mine.pop("etcd_network_snapshot_send_failures")
    assert missing == mine["etcd_network_snapshot_send_success"]
    for name, (kind, labels, bounds) in mine.items():
        # docs/metrics.md: prometheus_client would rename these counters.
        is_renamed = kind == "untyped" and not name.endswith("_total")
        assert etcds.get(name) == ("counter" if is_renamed else kind, labels, bounds)
    # IDs are spelled alike: what etcd calls itself and us, we do.
    assert f'etcd_network_active_peers{{Local="{us}",Remote="{them}"}} ' in ours
    assert f'etcd_network_active_peers{{Local="{them}",Remote="{us}"}} ' in theirs
