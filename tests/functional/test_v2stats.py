"""etcd's v2 statistics, as dicts of its shapes."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

import pytest

from pipeline import Message, MessageType, Transport
from pipeline import stats as stats_module
from pipeline.stats import ServerStats
from pipeline.stream._streams import Appends
from tests.support.http import CLUSTER_ID, peer_headers, reply_of_handlers
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import OK, ScriptedServer, answer, in_turn
from tests.support.waiting import eventually


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stats_module, "time", clock)
    return clock


def test_leader_stats_have_etcd_s_shape() -> None:
    with (
        ScriptedServer(in_turn(OK, OK, answer("500 Oops"))) as server,
        Transport(0xA, 1, FakeRaft()) as transport,
    ):
        transport.add_peer(0x2B, [server.url])
        transport.add_peer(3, ["http://127.0.0.1:1"])
        for sent in (1, 2):
            transport.send([message(to=0x2B)])
            eventually(lambda sent=sent: transport.stats()[0x2B].sent == sent)  # type: ignore[misc]
        transport.send([message(to=0x2B)])
        eventually(lambda: transport.stats()[0x2B].failed == 1)
        stats = json.loads(json.dumps(transport.leader_stats()))
    assert stats["leader"] == "a"
    assert set(stats) == {"leader", "followers"}
    assert set(stats["followers"]) == {"2b", "3"}
    follower = stats["followers"]["2b"]
    assert follower["counts"] == {"fail": 1, "success": 2}
    latency = follower["latency"]
    assert set(latency) == {"current", "average", "standardDeviation", "minimum", "maximum"}
    assert 0 < latency["minimum"] <= latency["average"] <= latency["maximum"]
    assert stats["followers"]["3"]["counts"] == {"fail": 0, "success": 0}


def test_server_stats_of_a_node_that_knows_no_leader() -> None:
    before = datetime.now(UTC)
    with Transport(0xA, 1, FakeRaft()) as transport:
        stats = transport.server_stats()
    start = datetime.fromisoformat(str(stats.pop("startTime")))
    assert before <= start <= datetime.now(UTC)
    assert stats == {
        "id": "a",
        "state": "StateFollower",
        "recvAppendRequestCnt": 0,
        "sendAppendRequestCnt": 0,
    }


def test_server_stats_count_appends_sent_to_peers_paused_ones_too() -> None:
    with ScriptedServer() as server, Transport(0xA, 1, FakeRaft()) as transport:
        transport.add_peer(2, [server.url])
        transport.cut_peer(2)
        transport.send([message(), message(MessageType.HEARTBEAT), message(to=9)])
        transport.mend_peer(2)
        transport.send([message()])
        stats = transport.server_stats()
        server.wait_requests(1)
    assert stats["sendAppendRequestCnt"] == 2
    assert stats["state"] == "StateLeader"
    info = stats["leaderInfo"]
    assert isinstance(info, dict)
    assert (info["leader"], set(info)) == ("a", {"leader", "uptime", "startTime"})


def test_server_stats_count_appends_received_and_follow_who_sent_them() -> None:
    with Transport(0xA, CLUSTER_ID, FakeRaft()) as transport:
        for kind in (MessageType.APP, MessageType.HEARTBEAT, MessageType.APP):
            body = Message(type=kind, from_=0xB, to=0xA, term=1).marshal()
            reply = reply_of_handlers(transport.handlers, "POST", "/raft", peer_headers(), body)
            assert reply.status == 204
        stats = transport.server_stats()
    assert stats["recvAppendRequestCnt"] == 2
    assert stats["state"] == "StateFollower"
    assert isinstance(stats["leaderInfo"], dict)
    assert stats["leaderInfo"]["leader"] == "b"


class Sent:
    """MsgApp that were sent, as the core counts them but by the test's clock."""

    is_leading = False

    def __init__(self) -> None:
        self.last: list[float] = []

    def read(self) -> tuple[int, list[float]]:
        return len(self.last), self.last[-200:]


def test_the_core_counts_appends_and_keeps_the_times_of_the_last_200() -> None:
    appends = Appends()
    assert appends.read() == (0, [])
    before = time.monotonic()
    appends.add()
    appends.add(299)
    count, last = appends.read()
    assert (count, len(last)) == (300, 200)
    assert before <= last[0] <= last[-1] <= time.monotonic()


def test_rates_are_of_the_last_200_and_end_after_a_second(clock: Clock) -> None:
    sent = Sent()
    stats = ServerStats(0xA, sent)
    for _ in range(300):
        clock.now += 0.125
        stats.received_append(0xB, 100)
        sent.last.append(clock.now)
    told = stats.to_dict()
    rate = 200 / (199 * 0.125)
    assert told["recvPkgRate"] == told["sendPkgRate"] == pytest.approx(rate)
    assert told["recvBandwidthRate"] == pytest.approx(100 * rate)
    clock.now += 1.5
    told = stats.to_dict()
    assert not {"recvPkgRate", "recvBandwidthRate", "sendPkgRate"} & set(told)
    assert told["recvAppendRequestCnt"] == told["sendAppendRequestCnt"] == 300
    stats.received_append(0xB, 100)
    assert "recvPkgRate" not in stats.to_dict()  # of one there is no rate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0125, "0.0125s"), (61.5, "1m1.5s"), (7200, "2h0m0s"), (-1, "0s")],
)
def test_a_duration_is_written_as_go_reads_it(seconds: float, text: str) -> None:
    assert stats_module._format_duration(seconds) == text
