"""``raft-pipeline top``: what nodes say of their peers in /metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, start_http_server

from pipeline import Message, MessageType, Transport, TransportConfig
from pipeline.cli.commands import commands
from pipeline.cli.top import ago, judge, parse
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.server import refused_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.streams


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def expose(transport: Transport, stack: ExitStack) -> str:
    registry = CollectorRegistry()
    registry.register(transport.metrics_collector())
    server, thread = start_http_server(0, "127.0.0.1", registry)
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}"


def top(*arguments: str) -> tuple[list[dict[str, Any]], int]:
    result = CliRunner().invoke(commands, ["top", "--json", "--interval", "0.05", *arguments])
    assert result.exit_code in (0, 1), result.output
    return [json.loads(line) for line in result.output.splitlines()], result.exit_code


def test_a_node_is_shown_with_its_peers(stack: ExitStack) -> None:
    config = TransportConfig(streams=False, probe_interval_s=0.01)
    one = stack.enter_context(Transport(0xA1, 7, FakeRaft(), config=config))
    two = stack.enter_context(Transport(0xB2, 7, FakeRaft()))
    one.add_peer(0xB2, [two.listen("http://127.0.0.1:0").url])
    one.send([Message(type=MessageType.APP, from_=0xA1, to=0xB2, term=1)] * 3)
    eventually(lambda: one.stats()[0xB2].sent == 3)
    eventually(lambda: one.probe_stats()[0xB2].total > 0)
    (first, second), exit_code = top(expose(one, stack), "--count", "2")
    assert exit_code == 0
    (node,) = first["nodes"]
    (row,) = node["rows"]
    assert (row["local"], row["peer"], row["is_active"]) == ("a1", "b2", True)
    assert (row["failed"], row["queued"], row["in_flight"]) == (0, 0, 0)
    assert row["rtt_ms"] > 0
    assert (row["sent_per_s"], row["streams"]) == (None, None)  # one look is no rate
    assert node["notes"] == []
    assert second["nodes"][0]["rows"][0]["sent_per_s"] == 0


def test_an_inactive_peer_and_a_url_that_does_not_answer_are_seen(stack: ExitStack) -> None:
    with refused_port() as port:
        one = stack.enter_context(Transport(0xA1, 7, FakeRaft()))
        one.add_peer(0xB2, [f"http://127.0.0.1:{port}"])
        one.send([Message(type=MessageType.APP, from_=0xA1, to=0xB2, term=1)])
        eventually(lambda: one.stats()[0xB2].failed == 1)
        url = expose(one, stack)
        (look,), exit_code = top(url, f"http://127.0.0.1:{port}", "--count", "1")
        assert exit_code == 1
        sick, dead = look["nodes"]
        assert sick["rows"][0]["is_active"] is False
        assert sick["rows"][0]["failed"] == 1
        assert (sick["rows"][0]["streams_up"], sick["rows"][0]["streams"]) == (0, 4)
        assert "refused" in dead["error"]
        shown = CliRunner().invoke(commands, ["top", url, "--count", "1"], env={"COLUMNS": "180"})
        assert "INACTIVE" in shown.output
        row = sick["rows"][0]
        assert row["last_error"] == "refused"
        assert 0 <= row["last_error_s"] < LONG_TIMEOUT
        assert re.search(r"refused, \d+ s ago", shown.output)


BEFORE = r"""
# HELP etcd_network_active_peers The current number of active peer connections.
etcd_network_active_peers{Local="a1",Remote="b2"} 1
etcd_network_peer_sent_bytes_total{To="b2"} 1e+03
etcd_network_peer_sent_failures_total{To="b2"} 5
etcd_network_peer_round_trip_time_seconds_bucket{To="b2",le="0.1"} 10
etcd_network_peer_round_trip_time_seconds_sum{To="b2"} 1
etcd_network_peer_round_trip_time_seconds_count{To="b2"} 10
something_else{path="a\"b\\c"} NaN
"""
AFTER = BEFORE.replace("1e+03", "3048").replace(
    'failures_total{To="b2"} 5', 'failures_total{To="b2"} 1'
)
AFTER = AFTER.replace('_sum{To="b2"} 1', '_sum{To="b2"} 1.5').replace(
    '_count{To="b2"} 10', '_count{To="b2"} 11'
)


def test_an_etcd_is_shown_by_the_series_it_has() -> None:
    node = judge("http://node", parse(AFTER), parse(BEFORE), 2.0)
    (row,) = node.rows
    assert (row.local, row.peer, row.is_active) == ("a1", "b2", True)
    assert (row.bytes_per_s, row.rtt_ms) == (1024.0, 500.0)
    assert (row.failed, row.failed_per_s) == (1, 0.5)  # it was started anew
    assert row.queued is row.streams is row.sent_per_s is None


def test_what_should_be_zero_is_noted_when_it_is_not() -> None:
    text = 'raft_pipeline_process_failures_total{Local="a1"} 2\n'
    text += 'raft_pipeline_certificate_expiry_days{Local="a1"} 3.25\n'
    notes = judge("http://node", parse(text), None, 0.0).notes
    assert notes == ["2 calls of process raised", "the certificate expires in 3.2 days"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (2e5, "2 d")]
)
def test_the_time_since_the_last_failure_is_said_in_one_unit(seconds: float, shown: str) -> None:
    assert ago(seconds) == shown


def test_labels_are_read_as_they_are_escaped() -> None:
    ((_, labels),) = [key for key in parse(BEFORE) if key[0] == "something_else"]
    assert labels == (("path", 'a"b\\c'),)


def test_what_is_no_url_is_a_wrong_command_line() -> None:
    assert CliRunner().invoke(commands, ["top", "node-1"]).exit_code == 2
