"""The collector: what it shows of a transport, for how long, and beside others."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pipeline import (
    Message,
    MessageType,
    PipelineConfig,
    ReceiverConfig,
    SnapshotSourceError,
    StreamStats,
    Transport,
    TransportConfig,
    UsageError,
    aio,
)
from pipeline.logs import get_logger
from pipeline.metrics import _FAMILIES, MetricsCollector
from pipeline.receive.received import REFUSALS
from tests.support import LONG_TIMEOUT
from tests.support.http import HEARTBEAT, peer_headers, post_heartbeat, reply_of_socket
from tests.support.listening import ask
from tests.support.logs import handler_that_raises
from tests.support.processes import TIMEOUT_S
from tests.support.raft import FakeRaft
from tests.support.senders import MEMBER, message
from tests.support.server import ScriptedServer, always, answer, refused_port
from tests.support.snapshots import framed, post_snapshot, snapshot
from tests.support.waiting import eventually

CLUSTER_ID = 0xCDF818194E3A8C32

Labels = Mapping[str, str]


class Exposition:
    """What a registry exposes, by sample name."""

    def __init__(self, *collectors: MetricsCollector) -> None:
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        self.text = generate_latest(registry).decode()
        self.samples = [
            sample
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
        ]

    def labels(self, name: str) -> list[Labels]:
        return [sample.labels for sample in self.samples if sample.name == name]

    def value(self, name: str, **labels: str) -> float:
        (value,) = [s.value for s in self.samples if s.name == name and s.labels == labels]
        return value


def failed_request(transport: Transport, remote: str) -> None:
    transport.handlers.read_failed(remote)


def test_a_peer_s_books_and_etcd_s_series_are_shown() -> None:
    with ScriptedServer() as server, Transport(0xA1, CLUSTER_ID, FakeRaft()) as transport:
        transport.add_peer(0xB2, [server.url])
        sent = message(to=0xB2)
        transport.send([sent])
        eventually(lambda: transport.stats()[0xB2].sent == 1)
        shown = Exposition(transport.metrics_collector())
    peer = {"Local": "a1", "To": "b2"}
    assert shown.value("etcd_network_active_peers", Local="a1", Remote="b2") == 1
    assert shown.value("etcd_network_disconnected_peers_total", Local="a1", Remote="b2") == 0
    assert shown.value("etcd_network_peer_sent_bytes_total", To="b2") == sent.byte_size()
    assert shown.value("etcd_network_peer_sent_failures_total", To="b2") == 0
    for name in ("offered", "accepted", "sent"):
        assert shown.value(f"raft_pipeline_{name}_messages_total", **peer) == 1
    for name in ("refused", "failed", "dropped"):
        assert shown.value(f"raft_pipeline_{name}_messages_total", **peer) == 0
    for name in ("queued_messages", "in_flight_messages", "queued_bytes"):
        assert shown.value(f"raft_pipeline_{name}", **peer) == 0


def test_failed_and_refused_messages_are_send_failures() -> None:
    config = TransportConfig(pipeline=PipelineConfig(connections=1, queue_length=1))
    with (
        ScriptedServer(always(answer("500 Internal Server Error"))) as failing,
        ScriptedServer(always(b"")) as stuck,
        Transport(1, CLUSTER_ID, FakeRaft(), config=config) as transport,
    ):
        transport.add_peer(2, [failing.url])
        transport.add_peer(3, [stuck.url])
        transport.send([message(to=2), message(to=3)])
        eventually(lambda: transport.stats()[2].failed == 1)
        eventually(lambda: transport.stats()[3].in_flight == 1)
        transport.send([message(to=3)] * 3)  # one fits
        shown = Exposition(transport.metrics_collector())
    assert shown.value("etcd_network_peer_sent_failures_total", To="2") == 1
    assert shown.value("etcd_network_peer_sent_failures_total", To="3") == 2
    assert shown.value("raft_pipeline_queued_messages", Local="1", To="3") == 1
    assert shown.value("raft_pipeline_in_flight_messages", Local="1", To="3") == 1
    assert shown.value("raft_pipeline_queued_bytes", Local="1", To="3") > 0


def test_what_is_received_is_counted_by_its_sender_and_its_listener() -> None:
    with Transport(2, CLUSTER_ID, FakeRaft()) as transport:
        listener = transport.listen("http://127.0.0.1:0")
        collector = transport.metrics_collector()
        assert post_heartbeat(listener.url).status == 204
        later = Message(type=24, from_=3).marshal() + b"\x78\x01"
        reply = reply_of_socket(listener.url, "POST", "/raft", peer_headers(), later)
        assert reply.status == 204
        shown = Exposition(collector)
        listener.close()
        closed = Exposition(collector)
    size = HEARTBEAT.byte_size()
    assert shown.value("etcd_network_peer_received_bytes_total", From="1") == size
    assert shown.value("raft_pipeline_unknown_messages_total", Local="2") == 1
    assert shown.value("raft_pipeline_ignored_messages_total", Local="2") == 0
    assert shown.value("raft_pipeline_unknown_fields_total", Local="2") == 1
    labels = {"Local": "2", "Listener": listener.url}
    assert shown.value("raft_pipeline_listener_accepted_connections_total", **labels) == 2
    assert shown.value("raft_pipeline_listener_general_requests_total", **labels) == 1
    assert closed.labels("raft_pipeline_listener_connections") == []


@pytest.mark.parametrize("is_all", [False, True], ids=["remove_peer", "remove_all_peers"])
def test_the_series_of_a_removed_peer_disappear(is_all: bool) -> None:
    with Transport(2, CLUSTER_ID, FakeRaft()) as transport:
        transport.add_peer(1, ["http://127.0.0.1:1"])
        post_heartbeat(transport.listen("http://127.0.0.1:0").url)
        collector = transport.metrics_collector()
        before = Exposition(collector)
        if is_all:
            transport.remove_all_peers()
        else:
            transport.remove_peer(1)
        after = Exposition(collector)
    for shown, count in ((before, 1), (after, 0)):
        assert len(shown.labels("etcd_network_active_peers")) == count
        assert len(shown.labels("etcd_network_peer_sent_bytes_total")) == count
        assert len(shown.labels("etcd_network_peer_received_bytes_total")) == count
        assert len(shown.labels("raft_pipeline_queued_messages")) == count


def test_received_failures_are_one_series_unless_addresses_are_asked_for() -> None:
    transport = Transport(1, CLUSTER_ID, FakeRaft())
    name = "etcd_network_peer_received_failures_total"
    plain = transport.metrics_collector()
    assert Exposition(plain).value(name, From="") == 0
    failed_request(transport, "10.0.0.1:1")
    assert Exposition(plain).labels(name) == [{"From": ""}]

    by_address = transport.metrics_collector(received_failures_by_address=True)
    for n in range(200):
        failed_request(transport, f"10.0.0.2:{n}")
    failed_request(transport, "10.0.0.2:0")
    shown = Exposition(by_address)
    assert len(shown.labels(name)) == 128 + 1
    assert shown.value(name, From="10.0.0.2:0") == 2
    assert shown.value(name, From="") == 1 + 72
    # To ask again forgets nothing.
    again = Exposition(transport.metrics_collector(received_failures_by_address=True))
    assert again.text == shown.text


def test_senders_past_the_first_128_are_one_series() -> None:
    transport = Transport(1, CLUSTER_ID, FakeRaft())
    for sender in range(1, 131):
        transport.handlers.received.count_bytes(sender, 10)
    name = "etcd_network_peer_received_bytes_total"
    shown = Exposition(transport.metrics_collector())
    assert len(shown.labels(name)) == 129
    assert shown.value(name, From="80") == 10
    assert shown.value(name, From="") == 20


def test_snapshots_received_are_shown_under_etcd_s_names(tmp_path: Path) -> None:
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path))
    with Transport(1, CLUSTER_ID, FakeRaft(), config=config) as transport:
        url = transport.listen("http://127.0.0.1:0").url
        assert ask(url, post_snapshot(framed(snapshot(from_=0xB2), b"x"))).status == 204
        assert ask(url, post_snapshot(framed(HEARTBEAT))).status == 400
        assert ask(url, post_snapshot(b"").replace(b"POST", b"GET")).status == 405
        shown = Exposition(transport.metrics_collector())
        twice = Exposition(MetricsCollector([transport, transport]))
    name = "etcd_network_snapshot_receive"
    for sender, success, failures in (
        ("b2", 1, 0),
        ("1", 0, 1),
        ("UNKNOWN_SNAPSHOT_SENDER", 0, 1),
    ):
        assert shown.value(f"{name}_success", From=sender) == success
        assert shown.value(f"{name}_failures", From=sender) == failures
        assert shown.value(f"{name}_inflights_total", From=sender) == 0
        assert shown.value(f"{name}_total_duration_seconds_count", From=sender) == success
    fsyncs = shown.labels("etcd_snap_db_fsync_duration_seconds_bucket")
    assert [labels["le"] for labels in fsyncs] == [
        "0.001", "0.002", "0.004", "0.008", "0.016", "0.032", "0.064", "0.128", "0.256", "0.512",
        "1.024", "2.048", "4.096", "8.192", "+Inf",
    ]  # fmt: skip
    seconds = ["0.1", "0.2", "0.4", "0.8", "1.6", "3.2", "6.4", "12.8", "25.6", "51.2", "+Inf"]
    for family, labels in (
        (f"{name}_total_duration_seconds", {"From": "b2"}),
        ("etcd_snap_db_save_total_duration_seconds", {}),
    ):
        buckets = shown.labels(f"{family}_bucket")
        assert [b["le"] for b in buckets if b.items() >= labels.items()] == seconds
        assert shown.value(f"{family}_bucket", **labels, le="+Inf") == 1
        assert twice.value(f"{family}_count", **labels) == 2


def test_snapshots_sent_are_shown_under_etcd_s_names() -> None:
    with ScriptedServer() as server, Transport(1, CLUSTER_ID, FakeRaft()) as transport:
        transport.add_peer(0xB2, [server.url])
        sent = message(MessageType.SNAP, to=0xB2)
        transport.send_snapshot(sent, b"database").result(LONG_TIMEOUT)
        with pytest.raises(SnapshotSourceError):
            transport.send_snapshot(sent, [b"x"], size=2).result(LONG_TIMEOUT)
        server.script = server.hold
        running = transport.send_snapshot(sent, b"x")
        eventually(lambda: running.progress.phase == "answering")
        shown = Exposition(transport.metrics_collector())
        server.release.set()
        running.result(LONG_TIMEOUT)
        transport.remove_peer(0xB2)
        gone = Exposition(transport.metrics_collector())
    name = "etcd_network_snapshot_send"
    for field in ("success", "failures", "inflights_total", "total_duration_seconds_count"):
        assert shown.value(f"{name}_{field}", To="b2") == 1
        assert gone.labels(f"{name}_{field}") == []
    bounds = [labels["le"] for labels in shown.labels(f"{name}_total_duration_seconds_bucket")]
    assert bounds == [
        "0.1", "0.2", "0.4", "0.8", "1.6", "3.2", "6.4", "12.8", "25.6", "51.2", "+Inf",
    ]  # fmt: skip
    assert f"# TYPE {name}_success untyped" in shown.text
    size = sent.byte_size() + len(b"database")
    assert shown.value("etcd_network_peer_sent_bytes_total", To="b2") == size
    assert shown.value("etcd_network_peer_sent_failures_total", To="b2") == 1


def test_transports_of_one_registry_share_a_collector_that_adds_up() -> None:
    one, two = Transport(1, CLUSTER_ID, FakeRaft()), Transport(2, CLUSTER_ID, FakeRaft())
    with one, two:
        for transport in (one, two):
            transport.add_peer(3, ["http://127.0.0.1:1"])
            transport.handlers.received.count_bytes(3, 10)
        shown = Exposition(MetricsCollector([one, two]))
    assert shown.value("etcd_network_peer_received_bytes_total", From="3") == 20
    assert shown.labels("etcd_network_peer_sent_bytes_total") == [{"To": "3"}]
    assert shown.labels("raft_pipeline_queued_messages") == [
        {"Local": "1", "To": "3"},
        {"Local": "2", "To": "3"},
    ]
    assert shown.text.count("# TYPE etcd_network_active_peers ") == 1


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_transports_for_asyncio_share_a_collector_like_others(kinds: tuple[bool, bool]) -> None:
    async def main() -> Exposition:
        made: list[Transport | aio.Transport] = []
        for number, is_aio in enumerate(kinds, 1):
            kind = aio.Transport if is_aio else Transport
            made.append(kind(number, CLUSTER_ID, FakeRaft()))
        async with contextlib.AsyncExitStack() as stack:
            for each in made:
                if isinstance(each, Transport):
                    stack.enter_context(each)
                else:
                    await stack.enter_async_context(each)
                each.add_peer(3, ["http://127.0.0.1:1"])
            return Exposition(MetricsCollector(made, received_failures_by_address=True))

    shown = asyncio.run(main())
    assert shown.labels("raft_pipeline_queued_messages") == [
        {"Local": "1", "To": "3"},
        {"Local": "2", "To": "3"},
    ]


@pytest.mark.parametrize("given", [None, 1, [None], "ab", [FakeRaft()]])
def test_what_is_no_transport_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"^transports: .* is not a "):
        MetricsCollector(given)
    with pytest.raises(UsageError, match=r"^transports: .* is not a "):
        MetricsCollector(Transport(1, CLUSTER_ID, FakeRaft()))  # type: ignore[arg-type]


def test_callback_errors_are_shown_by_peer_and_those_of_none() -> None:
    raft = FakeRaft(process_error=ValueError(), report_error=ValueError())
    with (
        ScriptedServer(always(answer("500 Internal Server Error"))) as server,
        Transport(1, CLUSTER_ID, raft) as transport,
    ):
        transport.add_peer(2, [server.url])
        transport.send([message()])
        url = transport.listen("http://127.0.0.1:0").url
        assert post_heartbeat(url).status == 500
        eventually(lambda: transport.stats()[2].failed == 1)
        shown = Exposition(transport.metrics_collector())
        name = "raft_pipeline_callback_errors_total"
        assert shown.value(name, Local="1", To="2") == 1
        assert shown.value(name, Local="1", To="") == 1
        assert transport.transport_stats().callback_errors == 2
        assert transport.transport_stats().process_failures == 1
        transport.remove_peer(2)
        shown = Exposition(transport.metrics_collector())
        assert shown.labels(name) == [{"Local": "1", "To": ""}]
        assert shown.value(name, Local="1", To="") == 2


def test_lost_lines_of_the_log_are_shown_once_for_the_process() -> None:
    one, two = Transport(1, CLUSTER_ID, FakeRaft()), Transport(2, CLUSTER_ID, FakeRaft())
    before = one.transport_stats().lost_log_lines
    with handler_that_raises("received nothing", RecursionError):
        get_logger("pipeline.tested").warning("received nothing")
    assert one.transport_stats().lost_log_lines == before + 1
    shown = Exposition(MetricsCollector([one, two]))
    assert shown.value("raft_pipeline_lost_log_lines_total") == before + 1


def test_round_trips_are_a_histogram_that_adds_up() -> None:
    name = "etcd_network_peer_round_trip_time_seconds"
    one, two = Transport(1, CLUSTER_ID, FakeRaft()), Transport(2, CLUSTER_ID, FakeRaft())
    with one, two:
        for transport, rtt_s in ((one, 0.0001), (two, 100.0)):
            transport.add_peer(0xB2, ["http://127.0.0.1:1"])
            assert transport._prober is not None
            transport._prober._targets[transport._peers[0xB2].picker].round_trips.observe(rtt_s)
        shown = Exposition(MetricsCollector([one, two]))
        for transport in (one, two):
            transport.remove_peer(0xB2)
        assert Exposition(MetricsCollector([one, two])).labels(f"{name}_count") == []
    assert f"# TYPE {name} histogram" in shown.text
    assert shown.value(f"{name}_count", To="b2") == 2
    assert shown.value(f"{name}_sum", To="b2") == 100.0001
    bounds = [labels["le"] for labels in shown.labels(f"{name}_bucket")]
    assert bounds == [f"{0.0001 * 2**i:.4f}" for i in range(16)] + ["+Inf"]
    assert shown.value(f"{name}_bucket", To="b2", le="0.0001") == 1  # bounds are inclusive
    assert shown.value(f"{name}_bucket", To="b2", le="3.2768") == 1
    assert shown.value(f"{name}_bucket", To="b2", le="+Inf") == 2


def test_without_probing_there_are_no_round_trips() -> None:
    config = TransportConfig(probe_interval_s=0)
    with Transport(1, CLUSTER_ID, FakeRaft(), config=config) as transport:
        transport.add_peer(2, ["http://127.0.0.1:1"])
        shown = Exposition(transport.metrics_collector())
    assert shown.labels("etcd_network_peer_round_trip_time_seconds_count") == []


def test_a_second_collector_is_refused_by_the_registry() -> None:
    one, two = Transport(1, CLUSTER_ID, FakeRaft()), Transport(2, CLUSTER_ID, FakeRaft())
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Exposition(one.metrics_collector(), two.metrics_collector())
    with pytest.raises(UsageError, match="transports"):
        MetricsCollector([])


def test_openmetrics_takes_the_families_too() -> None:
    registry = CollectorRegistry()
    registry.register(Transport(1, CLUSTER_ID, FakeRaft()).metrics_collector())
    text = generate_openmetrics(registry).decode()
    assert 'etcd_network_peer_received_failures_total{From=""} 0' in text
    assert text.endswith("# EOF\n")


def test_without_prometheus_client_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["prometheus_client"] = None
sys.modules["prometheus_client.core"] = None
from unittest.mock import Mock
from pipeline import Transport
try:
    Transport(1, 1, Mock()).metrics_collector()
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    assert result.stdout == "metrics need prometheus-client: pip install 'raft-pipeline[metrics]'\n"


def test_the_page_of_metrics_has_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]+) \|", page, re.MULTILINE)
    assert [
        (name, kind, () if labels == "none" else tuple(labels.split(", ")))
        for name, kind, labels in rows
    ] == [(name, kind, labels) for name, (kind, labels, _) in _FAMILIES.items()]


@pytest.mark.streams
def test_streams_are_shown_by_kind_and_direction() -> None:
    raft = FakeRaft()
    with Transport(0xA1, CLUSTER_ID, raft) as a, Transport(0xB2, CLUSTER_ID, FakeRaft()) as b:
        a.add_peer(0xB2, [b.listen("http://127.0.0.1:0").url])
        b.add_peer(0xA1, [a.listen("http://127.0.0.1:0").url])
        eventually(
            lambda: all(stream.since for stream in streams_of(a, 0xB2) + streams_of(b, 0xA1))
        )
        b.send([message(to=0xA1), Message(type=MessageType.BEAT, to=0xA1)])
        raft.wait_processed(1)
        eventually(lambda: sum(stream.ignored for stream in streams_of(a, 0xB2)) == 1)
        at_a, at_b = (Exposition(node.metrics_collector()) for node in (a, b))
    for kind in ("msgapp", "message"):
        for direction in ("out", "in"):
            labels = {"Local": "a1", "To": "b2", "Kind": kind, "Direction": direction}
            assert at_a.value("raft_pipeline_stream_up", **labels) == 1
            received = kind == "msgapp" and direction == "in"
            assert at_a.value("raft_pipeline_stream_messages_total", **labels) == received
        assert at_a.value("raft_pipeline_stream_dropped_messages_total", **labels) == 0
        ignored = at_a.value("raft_pipeline_stream_ignored_messages_total", **labels)
        assert ignored == (kind == "message")
    # What is sent by streams is in the books, as what is posted.
    assert at_b.value("raft_pipeline_sent_messages_total", Local="b2", To="a1") == 2
    assert at_b.value("etcd_network_peer_sent_bytes_total", To="a1") > 0
    assert at_a.value("etcd_network_peer_received_bytes_total", From=f"{MEMBER:x}") > 0


def test_failures_are_shown_by_verdict_and_the_last_one_with_its_time() -> None:
    config = PipelineConfig(max_queue_age=0.01, connections=1, queue_length=8)
    with (
        ScriptedServer(always(answer("500 Internal Server Error"))) as failing,
        ScriptedServer(always(b"")) as stuck,
        refused_port() as port,
        Transport(1, CLUSTER_ID, FakeRaft(), config=TransportConfig(pipeline=config)) as transport,
    ):
        began = time.time()
        transport.add_peer(2, [failing.url])
        transport.add_peer(3, [f"http://127.0.0.1:{port}"])
        transport.add_peer(4, [stuck.url])
        transport.send([message(to=2), message(to=3)])
        transport.send([message(to=4)] * 3)  # one is in flight, the others wait for too long
        eventually(lambda: transport.stats()[2].failed == transport.stats()[3].failed == 1)
        eventually(lambda: transport.stats()[4].failed == 2)
        shown = Exposition(transport.metrics_collector())
        errors = {peer: transport.peer_stats()[peer].last_error for peer in (2, 3, 4)}
    for peer, verdict, count in (("2", "cannot-process", 1), ("3", "refused", 1)):
        labels = {"Local": "1", "To": peer, "Verdict": verdict}
        assert shown.value("raft_pipeline_peer_errors_total", **labels) == count
        at = shown.value("raft_pipeline_peer_last_error_timestamp_seconds", **labels)
        last = errors[int(peer)]
        assert last is not None
        assert (last.verdict, last.at) == (verdict, at)
        assert began <= at <= time.time()
    labels = {"Local": "1", "To": "4", "Verdict": "too-old"}
    assert shown.value("raft_pipeline_peer_errors_total", **labels) == 2
    assert errors[4] is None  # it says nothing of the peer


def test_each_channel_and_the_node_show_what_waits_and_what_may() -> None:
    config = TransportConfig(
        pipeline=PipelineConfig(connections=1, queue_length=9, queue_bytes=1000),
        stream_queue_length=33,
        queue_bytes=5000,
    )
    with (
        ScriptedServer(always(b"")) as stuck,
        Transport(1, CLUSTER_ID, FakeRaft(), config=config) as transport,
    ):
        transport.add_peer(2, [stuck.url])
        transport.send([message(to=2)] * 3)
        eventually(lambda: transport.stats()[2].in_flight == 1)
        shown = Exposition(transport.metrics_collector())
    size = message(to=2).byte_size()
    labels = {"Local": "1", "To": "2", "Channel": "pipeline"}
    prefix = "raft_pipeline_channel"
    assert shown.value(f"{prefix}_queued_messages", **labels) == 2
    assert shown.value(f"{prefix}_queue_length", **labels) == 9
    assert shown.value(f"{prefix}_queued_bytes", **labels) == 2 * size
    assert shown.value(f"{prefix}_queue_bytes", **labels) == 1000
    assert shown.value(f"{prefix}_sent_messages_total", **labels) == 0
    assert shown.value("raft_pipeline_node_queue_bytes", Local="1") == 5000
    assert shown.value("raft_pipeline_node_queued_bytes", Local="1") >= 2 * size


@pytest.mark.streams
def test_the_channels_add_up_to_the_peer_s_books() -> None:
    raft = FakeRaft()
    with Transport(0xA1, CLUSTER_ID, FakeRaft()) as a, Transport(0xB2, CLUSTER_ID, raft) as b:
        a.add_peer(0xB2, [b.listen("http://127.0.0.1:0").url])
        b.add_peer(0xA1, [a.listen("http://127.0.0.1:0").url])
        eventually(lambda: all(stream.since for stream in streams_of(a, 0xB2)))
        large = bytes(1 << 20)
        kinds = (MessageType.APP, MessageType.PROP, MessageType.VOTE)
        a.send([message(kind, large if kind != MessageType.VOTE else b"", 0xB2) for kind in kinds])
        eventually(lambda: a.stats()[0xB2].sent == 3)
        shown = Exposition(a.metrics_collector())
        books = a.stats()[0xB2]
    for what, total in (("messages", books.sent), ("bytes", books.sent_bytes)):
        name = f"raft_pipeline_channel_sent_{what}_total"
        ways = {it["Channel"]: shown.value(name, **it) for it in shown.labels(name)}
        assert ways.keys() == {"pipeline", "msgapp", "message"}
        assert sum(ways.values()) == total


def test_a_snapshot_is_shown_while_it_is_on_its_way(tmp_path: Path) -> None:
    may_go_on = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield b"x" * 400
        assert may_go_on.wait(LONG_TIMEOUT)
        yield b"x" * 600

    receiver = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path))
    with (
        Transport(1, CLUSTER_ID, FakeRaft()) as sender,
        Transport(2, CLUSTER_ID, FakeRaft(), config=receiver) as taker,
    ):
        sender.add_peer(2, [taker.listen("http://127.0.0.1:0").url])
        transfer = sender.send_snapshot(snapshot(), chunks(), size=1000)
        eventually(lambda: transfer.progress.sent_bytes == 400)
        during = Exposition(sender.metrics_collector())
        may_go_on.set()
        transfer.result(LONG_TIMEOUT)
        eventually(lambda: sender.snapshot().peers[0].snapshots.in_flight == 0)
        after, taken = (Exposition(node.metrics_collector()) for node in (sender, taker))
    labels = {"Local": "1", "To": "2"}
    sent, left = "raft_pipeline_snapshot_sent_bytes_total", "raft_pipeline_snapshot_left_bytes"
    assert during.value(sent, **labels) == 400
    assert during.value(left, **labels) == 600
    assert after.value(sent, **labels) == 1000
    assert after.value(left, **labels) == 0
    assert taken.value("raft_pipeline_snapshot_received_bytes_total", Local="2") == 1000


def test_requests_that_are_refused_are_shown_by_why() -> None:
    with Transport(2, CLUSTER_ID, FakeRaft()) as transport:
        url = transport.listen("http://127.0.0.1:0").url
        body = HEARTBEAT.marshal()
        other = peer_headers(x_etcd_cluster_id="1")
        assert reply_of_socket(url, "POST", "/raft", other, body).status == 412
        assert reply_of_socket(url, "POST", "/raft", peer_headers(), b"\xff").status == 400
        shown = Exposition(transport.metrics_collector())
    name = "raft_pipeline_refused_requests_total"
    refused = {it["Verdict"]: shown.value(name, **it) for it in shown.labels(name)}
    assert refused.keys() == set(REFUSALS)
    assert {verdict for verdict, count in refused.items() if count} == {
        "wrong-cluster",
        "undecodable",
    }


def streams_of(node: Transport, peer_id: int) -> tuple[StreamStats, ...]:
    return node.peer_stats()[peer_id].streams
