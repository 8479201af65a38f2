"""Remotes: added by hand, and learned from requests under a policy (spec 4.4, 5.4)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline import MessageType, PipelineConfig, Transport, TransportConfig, UsageError
from pipeline import remote as remote_module
from tests.support import LONG_TIMEOUT, ipv6
from tests.support.callbacks import Unawaited
from tests.support.http import (
    CLUSTER_ID,
    HEARTBEAT,
    peer_headers,
    reply_of_handlers,
    reply_of_socket,
)
from tests.support.listening import dial, raw_head, read_status
from tests.support.logs import handler_that_raises
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ScriptedServer
from tests.support.waiting import eventually

ONE = TransportConfig(pipeline=PipelineConfig(connections=1))
NOWHERE = "http://127.0.0.1:1"
BODY = HEARTBEAT.marshal()

Asked = list[tuple[int, tuple[str, ...], str]]


@contextmanager
def learning(*, allows: bool = True, loopback: bool = False) -> Iterator[tuple[Transport, Asked]]:
    """A transport whose policy writes down what it is asked."""
    asked: Asked = []

    def policy(member_id: int, urls: tuple[str, ...], caller: str) -> bool:
        asked.append((member_id, urls, caller))
        return allows

    with Transport(
        2, CLUSTER_ID, FakeRaft(), remote_policy=policy, allow_loopback_remotes=loopback
    ) as transport:
        yield transport, asked


def status_of(transport: Transport, **changes: str | None) -> int:
    """Have the handlers answer a message from 7 at 10.0.0.7, or as ``changes`` say."""
    changes = {"x_server_from": "7", "x_peerurls": "http://10.0.0.7:2380", **changes}
    return reply_of_handlers(
        transport.handlers, "POST", "/raft", peer_headers(**changes), BODY
    ).status


# Added by hand


def test_a_remote_is_sent_to_and_a_peer_of_the_same_id_wins() -> None:
    with (
        ScriptedServer() as remote,
        ScriptedServer() as peer,
        Transport(1, 1, FakeRaft(), config=ONE) as transport,
    ):
        transport.add_remote(2, [remote.url])
        transport.send([message()])
        remote.wait_requests(1)
        transport.add_peer(2, [peer.url])
        transport.send([message()])
        peer.wait_requests(1)
        assert transport.remote_stats()[2].pipeline.offered == 1


def test_what_a_remote_is_not_part_of() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        transport.add_remote(2, [server.url])
        transport.send([message()])
        eventually(lambda: transport.remote_stats()[2].pipeline.sent == 1)
        assert transport.active_since(2) is None
        assert transport.active_peers() == 0
        assert transport.stats() == transport.follower_stats() == transport.peer_stats() == {}
        transport.remove_peer(2)
        transport.remove_all_peers()
        transport.update_peer(2, [NOWHERE])
        assert transport.remote_stats()[2].urls == (server.url,)


def test_a_full_remote_is_warned_of_and_raft_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    raft = FakeRaft()
    config = TransportConfig(pipeline=PipelineConfig(connections=1, queue_length=2))
    with ScriptedServer() as server, Transport(1, 1, raft, config=config) as transport:
        server.script = server.hold
        transport.add_remote(2, [server.url])
        transport.send([message()])
        server.wait_requests(1)
        transport.send([message(MessageType.SNAP)] * 5)
        assert transport.remote_stats()[2].pipeline.refused == 3
        server.release.set()
        server.wait_requests(3)
        eventually(lambda: transport.remote_stats()[2].pipeline.sent == 3)
        assert raft.unreachable == []
    assert caplog.text.count("sending buffer is full") == 1


def test_a_failed_post_of_a_remote_is_reported() -> None:
    raft = FakeRaft()
    with Transport(1, 1, raft, config=ONE) as transport:
        transport.add_remote(2, [NOWHERE])
        transport.send([message()])
        assert raft.wait_unreachable(1) == [2]


def test_add_remote_ignores_who_is_known_and_refuses_what_is_wrong() -> None:
    transport = Transport(1, 1, FakeRaft())
    with pytest.raises(UsageError, match="not started"):
        transport.add_remote(2, [NOWHERE])
    transport.start()
    transport.add_peer(2, [NOWHERE])
    transport.add_remote(2, [NOWHERE])
    transport.add_remote(3, [NOWHERE])
    transport.add_remote(3, ["http://127.0.0.1:2"])
    transport.add_remote(1, [NOWHERE])  # etcd does not reject the local ID either
    assert {k: v.urls for k, v in transport.remote_stats().items()} == {
        3: (NOWHERE,),
        1: (NOWHERE,),
    }
    for urls in ([], ["ftp://127.0.0.1:1"], ["https://127.0.0.1:1"]):
        with pytest.raises(UsageError):
            transport.add_remote(4, urls)
    with pytest.raises(UsageError):
        transport.add_remote(-1, [NOWHERE])
    transport.stop()
    transport.add_remote(5, [NOWHERE])
    assert transport.remote_stats() == {}


def test_a_remote_is_cut_and_mended_but_not_paused() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        transport.add_remote(2, [server.url])
        transport.pause()
        assert not transport.remote_stats()[2].is_paused
        for _ in range(2):  # etcd's remote panics when it is paused twice
            transport.cut_peer(2)
        transport.send([message()])
        assert transport.remote_stats()[2][2:4] == (True, 1)
        transport.mend_peer(2)
        transport.send([message()])
        server.wait_requests(1)
        assert transport.remote_stats()[2].pipeline.offered == 1
        transport.cut_peer(2)  # a transport stops while a remote is cut off; etcd's panics


def test_what_a_remote_has_queued_is_told_at_stop() -> None:
    with ScriptedServer() as server:
        server.script = server.hold
        transport = Transport(1, 1, FakeRaft(), config=ONE)
        transport.start()
        transport.add_remote(2, [server.url])
        transport.send([message()] * 4)
        server.wait_requests(1)
        assert transport.stop() == 3


# Learned from requests


def test_nobody_is_learned_without_a_policy() -> None:
    with Transport(2, CLUSTER_ID, FakeRaft(), allow_loopback_remotes=True) as transport:
        assert status_of(transport) == 204
        assert transport.remote_stats() == {}


@pytest.mark.parametrize("allows", [True, False])
def test_the_policy_decides(allows: bool) -> None:
    with learning(allows=allows) as (transport, asked):
        changes = {"x_peerurls": "http://10.0.0.8:2380,http://10.0.0.7:2380"}
        assert status_of(transport, **changes) == 204
        urls = ("http://10.0.0.7:2380", "http://10.0.0.8:2380")
        assert asked == [(7, urls, "127.0.0.1:54321")]
        stats = transport.remote_stats()
        assert [(k, s.urls, s.is_learned) for k, s in stats.items()] == (
            [(7, urls, True)] if allows else []
        )


@pytest.mark.parametrize(
    "urls",
    [
        "http://127.0.0.1:2380",
        "http://127.1:2380",
        "http://0x7f000001:2380",
        "http://2130706433:2380",
        "http://[::1]:2380",
        "http://[::ffff:127.0.0.1]:2380",
        "http://localhost:2380",
        "http://LOCALHOST.:2380",
        "http://a.localhost:2380",
        "http://169.254.169.254:80",
        "http://[fe80::1]:2380",
        "http://[fe80::1%25lo]:2380",
        "http://[::ffff:169.254.169.254]:80",
        "http://224.0.0.1:2380",
        "http://[ff02::1]:2380",
        "http://255.255.255.255:2380",
        "http://0.0.0.0:2380",
        "http://0:2380",
        "http://[::]:2380",
        "http://[2001:db8::7%25eth0]:2380",
        "http://10.0.0.7:2380,http://127.0.0.1:2380",
        ",".join(f"http://10.0.0.{i}:2380" for i in range(9)),
        "http://10.0.0.7",
        "http://10.0.0.7:2380/",
        "http://10.0.0.7:99999",
        "http://user@10.0.0.7:2380",
        "ftp://10.0.0.7:2380",
        "http://10.0.0.7:2380,",
        ",",
        "nonsense",
    ],
)
def test_the_policy_is_not_asked_about_what_is_never_learned(urls: str) -> None:
    with learning() as (transport, asked):
        assert status_of(transport, x_peerurls=urls) == 204
        assert asked == []
        assert transport.remote_stats() == {}


@pytest.mark.parametrize(
    "urls", ["http://127.0.0.1:2380", "http://[::1]:2380", "http://localhost:2380"]
)
def test_loopback_is_asked_about_when_it_is_allowed(urls: str) -> None:
    with learning(loopback=True) as (transport, asked):
        assert status_of(transport, x_peerurls=urls) == 204
        assert len(asked) == 1
        assert list(transport.remote_stats()) == [7]


@ipv6
def test_a_caller_of_ipv4_is_shown_as_one_by_a_listener_that_takes_both(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the kernel it is ::ffff:127.0.0.1, in which no rule for IPv4 addresses finds it."""
    with learning() as (transport, asked), transport.listen("http://[::]:0") as listener:
        transport.metrics_collector(received_failures_by_address=True)
        port = listener.url.rpartition(":")[2]
        headers = peer_headers(x_server_from="7", x_peerurls="http://10.0.0.7:2380")
        for body, status in ((BODY, 204), (b"no message", 400)):
            length = f"content-length: {len(body)}"
            with dial(f"http://127.0.0.1:{port}") as sock:
                ours = f"127.0.0.1:{sock.getsockname()[1]}"
                sock.sendall(raw_head(length, headers=headers) + body)
                assert read_status(sock) == status
            if status == 204:
                assert [caller for _, _, caller in asked] == [ours]
        assert f"from {ours}" in caplog.text
        assert transport.handlers.received.counts().received_failures == {ours: 1, "": 0}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        pytest.param({"x_server_from": None}, 204, id="no sender"),
        pytest.param({"x_server_from": "seven"}, 204, id="malformed sender"),
        pytest.param({"x_server_from": "0"}, 204, id="nobody"),
        pytest.param({"x_server_from": "2"}, 204, id="ourselves"),
        pytest.param({"x_server_from": "1"}, 204, id="a peer"),
        pytest.param({"x_peerurls": None}, 204, id="no URLs"),
        pytest.param({"x_peerurls": ""}, 204, id="empty URLs"),
        pytest.param({"x_etcd_cluster_id": "1"}, 412, id="another cluster"),
        pytest.param({"x_server_version": "2.0.0"}, 412, id="another version"),
    ],
)
def test_who_is_not_learned(changes: dict[str, str | None], status: int) -> None:
    with learning() as (transport, asked):
        transport.add_peer(1, [NOWHERE])
        assert status_of(transport, **changes) == status
        assert asked == []
        assert transport.remote_stats() == {}


def test_a_policy_that_raises_allows_nobody_and_the_message_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def policy(*_: object) -> bool:
        raise ValueError("undecided")

    raft = FakeRaft()
    with Transport(2, CLUSTER_ID, raft, remote_policy=policy) as transport:
        assert status_of(transport) == 204
        assert transport.remote_stats() == {}
        assert len(raft.processed) == 1
    assert "undecided" in caplog.text


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError])
def test_the_thread_that_asks_the_policy_survives_whatever_it_raises(
    error: type[BaseException],
) -> None:
    def policy(*_: object) -> bool:
        raise error

    raft = FakeRaft()
    with Transport(2, CLUSTER_ID, raft, remote_policy=policy) as transport:
        url = transport.listen("http://127.0.0.1:0").url
        headers = peer_headers(x_server_from="7", x_peerurls="http://10.0.0.7:2380")
        with handler_that_raises("remote_policy", RecursionError):
            for _ in range(2):
                assert reply_of_socket(url, "POST", "/raft", headers, BODY).status == 204
        assert transport.remote_stats() == {}
        assert transport.callbacks.errors == 2


def test_a_policy_that_only_makes_a_coroutine_allows_nobody() -> None:
    raft = FakeRaft()
    with Transport(2, CLUSTER_ID, raft, remote_policy=Unawaited(True)) as transport:
        assert status_of(transport) == 204
        assert transport.remote_stats() == {}
        assert transport.callbacks.errors == 1
        assert len(raft.processed) == 1


def test_learned_remotes_are_bounded_and_the_unused_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with learning() as (transport, _):
        transport.add_remote(3, [NOWHERE])
        for sender in range(0x100, 0x120):
            status_of(transport, x_server_from=f"{sender:x}")
        assert list(transport.remote_stats()) == [3, *range(0x100, 0x110)]
        monkeypatch.setattr(remote_module, "UNUSED_S", -1.0)  # all are unused for long enough
        status_of(transport, x_server_from="999", x_peerurls="http://10.0.0.9:2380")
        assert list(transport.remote_stats()) == [3, 0x999]
        monkeypatch.undo()
        status_of(transport, x_server_from="999", x_peerurls="http://10.0.0.10:2380")
        assert transport.remote_stats()[0x999].urls == ("http://10.0.0.9:2380",)


def test_a_stranger_can_be_answered_where_it_says_it_is() -> None:
    with ScriptedServer() as stranger, learning(loopback=True) as (transport, _):
        assert status_of(transport, x_peerurls=stranger.url) == 204
        transport.send([message(MessageType.HEARTBEAT_RESP, to=7)])
        assert stranger.wait_requests(1)[0].line == "POST /raft HTTP/1.1"


def test_the_compiled_receiver_shows_every_request_of_a_stranger_until_it_is_a_peer() -> None:
    """It remembers heads; what a stranger's says must be seen as often as it comes."""
    with learning(allows=False) as (transport, asked):
        listener = transport.listen("http://127.0.0.1:0")
        request = (
            raw_head(f"content-length: {len(BODY)}", headers=peer_headers(x_server_from="7")) + BODY
        )
        with dial(listener.url) as sock:
            for _ in range(3):
                exchange(sock, request)
            assert len(asked) == 3
            assert asked[0][2] == "{}:{}".format(*sock.getsockname())
            transport.add_peer(7, [NOWHERE])
            before = listener.stats().fast_requests
            for _ in range(3):
                exchange(sock, request)
            assert len(asked) == 3
            assert listener.stats().fast_requests - before >= 2


def exchange(sock: socket.socket, request: bytes) -> None:
    sock.settimeout(LONG_TIMEOUT)
    sock.sendall(request)
    assert read_status(sock) == 204
