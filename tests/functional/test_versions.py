"""Peers of other versions than the one we claim: what they send and answer is noticed, once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from pipeline import Message, MessageType, PipelineConfig, TLSInfo, Transport, TransportConfig
from pipeline.send.pipeline import PeerPipeline
from tests.support import LONG_TIMEOUT
from tests.support.http import CLUSTER_ID, HEARTBEAT, peer_headers, reply_of_socket
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ScriptedServer, always, answer
from tests.support.tls import Authority
from tests.support.waiting import eventually

PEER = 2
CONFIG = TransportConfig(pipeline=PipelineConfig(connections=1), probe_interval_s=0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(params=["http", "https"])
def tls(request: pytest.FixtureRequest, authority: Authority) -> TLSInfo | None:
    return authority.info() if request.param == "https" else None


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of ``server_version``."""
    caplog.set_level(logging.DEBUG, "pipeline.wire.versions")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "pipeline.wire.versions" and record.levelno >= logging.WARNING
    ]


def version(text: str, status: str = "204 No Content", body: bytes = b"") -> bytes:
    return answer(status, body, f"X-Server-Version: {text}")


@pytest.fixture
def listening() -> Iterator[tuple[Transport, str]]:
    with Transport(1, CLUSTER_ID, FakeRaft(), config=CONFIG) as transport:
        transport.add_peer(PEER, ["http://127.0.0.1:1"])
        yield transport, transport.listen("http://127.0.0.1:0").url


STREAM = "/raft/stream/msgapp/2"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/raft"), ("GET", STREAM)], ids=["message", "stream"]
)
@pytest.mark.parametrize(
    ("theirs", "wanted"), [("3.4.23", "3.4.0"), ("3.6.16", "3.6.0"), ("3.7.3", "3.7.0")]
)
def test_a_peer_of_another_version_that_sends_is_told_of_once(
    *,
    listening: tuple[Transport, str],
    said: Callable[[], list[str]],
    method: str,
    path: str,
    theirs: str,
    wanted: str,
) -> None:
    transport, url = listening
    headers = peer_headers(x_server_from=f"{PEER:x}", x_server_version=theirs)
    body = HEARTBEAT.marshal() if method == "POST" else b""
    for _ in range(3):
        assert reply_of_socket(url, method, path, headers, body).status in (204, 404)
    assert len(said()) == 1
    assert said()[0].endswith(f"set TransportConfig.server_version to {wanted!r}")
    assert transport.peer_stats()[PEER].server_version == theirs


@pytest.mark.parametrize(
    "changes",
    [
        {"x_server_from": "9"},
        {"x_etcd_cluster_id": "1"},
        {"x_server_from": None},
        {"x_server_version": "3.5.35"},
        {"x_server_version": None},
        {"x_server_version": "3.6"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/raft", STREAM])
def test_who_is_no_peer_or_has_our_version_is_not_told_of(
    listening: tuple[Transport, str],
    said: Callable[[], list[str]],
    changes: dict[str, str | None],
    path: str,
) -> None:
    _, url = listening
    given = {"x_server_from": f"{PEER:x}", "x_server_version": "3.6.16", **changes}
    method, body = ("POST", HEARTBEAT.marshal()) if path == "/raft" else ("GET", b"")
    reply_of_socket(url, method, path, peer_headers(**given), body)
    assert said() == []


def test_a_peer_that_was_upgraded_is_told_of_again(
    listening: tuple[Transport, str],
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.wire.versions.INTERVAL_S", 0.0)
    _, url = listening
    for theirs in ("3.5.9", "3.6.16", "3.6.16", "3.6.17", "3.7.3"):
        headers = peer_headers(x_server_from=f"{PEER:x}", x_server_version=theirs)
        assert reply_of_socket(url, "GET", STREAM, headers, b"").status == 404
    assert [line.rpartition(" ")[2] for line in said()] == ["'3.6.0'", "'3.7.0'"]


def test_a_removed_peer_does_not_count(
    listening: tuple[Transport, str], said: Callable[[], list[str]]
) -> None:
    transport, url = listening
    transport.add_peer(3, ["http://127.0.0.1:1"])
    headers = peer_headers(x_server_from=f"{PEER:x}", x_server_version="3.6.16")
    reply_of_socket(url, "GET", STREAM, headers, b"")
    assert said() == []  # peer 3 has not been heard
    transport.remove_peer(3)
    assert len(said()) == 1


@pytest.mark.parametrize(
    ("theirs", "wanted"), [("3.4.23", "3.4.0"), ("3.6.16", "3.6.0"), ("3.7.3", "3.7.0")]
)
@pytest.mark.parametrize("status", ["204 No Content", "500 Internal Server Error"])
def test_a_peer_of_another_version_that_answers_is_told_of_once(
    *,
    authority: Authority,
    tls: TLSInfo | None,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    theirs: str,
    wanted: str,
    status: str,
) -> None:
    judged = []
    judge = PeerPipeline._judge

    def counting(self: PeerPipeline, *args: object, **more: object) -> None:
        judged.append(args)
        judge(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(PeerPipeline, "_judge", counting)
    context = None if tls is None else authority.server()
    script = always(version(theirs, status))
    with (
        ScriptedServer(script, tls=context) as server,
        Transport(1, 1, FakeRaft(), config=CONFIG, tls=tls) as transport,
    ):
        transport.add_peer(PEER, [server.url])
        for n in range(1, 6):
            transport.send([message()])
            eventually(lambda n=n: sum(transport.stats()[PEER][3:5]) == n)  # type: ignore[misc]
        assert len(said()) == 1
        assert said()[0].endswith(f"set TransportConfig.server_version to {wanted!r}")
        assert transport.peer_stats()[PEER].server_version == theirs
        if status.startswith("204"):
            assert len(server.connections) == 1
            assert len(judged) == 1  # the first answer; the core takes the others by itself
            assert transport.stats()[PEER].sent == 5


def test_the_answer_to_a_snapshot_and_to_a_probe_tells_as_well(
    said: Callable[[], list[str]],
) -> None:
    with (
        ScriptedServer(always(version("3.6.16"))) as server,
        Transport(1, 1, FakeRaft(), config=CONFIG) as transport,
    ):
        transport.add_peer(PEER, [server.url])
        snapshot = Message(type=MessageType.SNAP, to=PEER, from_=1)
        transport.send_snapshot(snapshot, b"x").result(LONG_TIMEOUT)
        assert len(said()) == 1
    with ScriptedServer() as server:
        server.on_probe = always(version("3.6.16", "200 OK", b'{"OK":true}'))
        config = TransportConfig(probe_interval_s=0.01)
        with Transport(1, 1, FakeRaft(), config=config) as transport:
            transport.add_peer(PEER, [server.url])
            eventually(lambda: transport.probe_stats()[PEER].total >= 3)
            assert transport.peer_stats()[PEER].server_version == "3.6.16"
    assert len(said()) == 2  # of two transports


def test_two_transports_of_this_library_with_one_version_are_content(
    said: Callable[[], list[str]],
) -> None:
    raft = FakeRaft()
    with (
        Transport(1, CLUSTER_ID, FakeRaft(), config=CONFIG) as one,
        Transport(PEER, CLUSTER_ID, raft, config=CONFIG) as two,
    ):
        one.add_peer(PEER, [two.listen("http://127.0.0.1:0").url])
        two.add_peer(1, [one.listen("http://127.0.0.1:0").url])
        one.send([message()])
        raft.wait_processed(1)
        assert two.peer_stats()[1].server_version == "3.5.0"
        assert said() == []
