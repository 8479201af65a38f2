"""etcd's transport tests under their own names (spec section 12), and its API (spec 4.5)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
import weakref
from pathlib import Path

import pytest

from pipeline import (
    ClusterIDMismatchError,
    EncodedMessage,
    LastError,
    MemberRemovedError,
    Message,
    MessageType,
    PipelineConfig,
    Transport,
    TransportConfig,
    TransportStats,
    UsageError,
    aio,
)
from tests.support import LONG_TIMEOUT
from tests.support.http import CLUSTER_ID, peer_headers, reply_of_socket
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import (
    OK,
    ScriptedServer,
    always,
    answer,
    black_hole,
    in_turn,
    refused_port,
)
from tests.support.tls import Authority
from tests.support.waiting import eventually

ONE = TransportConfig(pipeline=PipelineConfig(connections=1))


# Upstream


def test_transport_send() -> None:
    with ScriptedServer() as one, ScriptedServer() as two:
        with Transport(1, 1, FakeRaft(), config=ONE) as transport:
            transport.add_peer(2, [one.url])
            transport.add_peer(3, [two.url])
            messages = [
                message(to=0),  # a local message
                message(MessageType.PROP, b"a", to=2),
                message(to=9),  # unknown
                message(MessageType.APP, b"b", to=3),
                message(MessageType.APP, b"c", to=2),
            ]
            transport.send(messages)
            got = one.wait_requests(2), two.wait_requests(1)
        assert [request.body for request in got[0]] == [
            messages[1].marshal(),
            messages[4].marshal(),
        ]
        assert [request.body for request in got[1]] == [messages[3].marshal()]


def test_transport_add() -> None:
    with Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, ["http://127.0.0.1:1"])
        assert transport.follower_stats()[2].success == 0
        peer = transport._peers[2]
        transport.add_peer(2, ["http://127.0.0.1:2"])
        assert transport._peers[2] is peer
        assert peer.picker.urls == ("http://127.0.0.1:1",)


def test_transport_remove() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, [server.url])
        transport.send([message()])
        server.wait_requests(1)
        transport.remove_peer(2)
        transport.send([message()])
        assert transport.stats() == {}
        assert transport.follower_stats() == {}
        transport.add_peer(2, [server.url])
        assert transport.stats()[2].offered == 0


def test_transport_remove_is_idempotent(caplog: pytest.LogCaptureFixture) -> None:
    with Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, ["http://127.0.0.1:1"])
        assert transport.remove_peer(2) == 0
        assert transport.remove_peer(2) == 0
        assert "unknown peer" in caplog.text


def test_transport_update() -> None:
    with (
        ScriptedServer() as old,
        ScriptedServer() as new,
        Transport(1, 1, FakeRaft()) as transport,
    ):
        transport.add_peer(2, [old.url])
        transport.send([message()])
        old.wait_requests(1)
        eventually(lambda: transport.stats()[2].sent == 1)
        transport.update_peer(2, [new.url])
        transport.update_peer(9, [new.url])  # unknown: ignored
        transport.send([message()])
        new.wait_requests(1)
        with pytest.raises(UsageError):
            transport.update_peer(2, ["ftp://127.0.0.1:1"])


@pytest.mark.parametrize("wildcard", ["http://0.0.0.0:1", "http://[::]:1"])
def test_a_wildcard_is_refused_where_a_member_is_reached(wildcard: str) -> None:
    """Who is told of it dials itself; ``listen`` takes it."""
    reason = "wildcard address can be listened at but not reached"
    with pytest.raises(UsageError, match=reason):
        Transport(1, 1, FakeRaft(), peer_urls=["http://10.0.0.1:2380", wildcard])
    with Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, ["http://127.0.0.1:1"])
        for use in (
            lambda: transport.add_peer(3, [wildcard]),
            lambda: transport.update_peer(2, [wildcard]),
            lambda: transport.add_remote(4, [wildcard]),
        ):
            with pytest.raises(UsageError, match=reason):
                use()
        assert transport.stats().keys() == {2}
        assert transport.remote_stats() == {}
        with transport.listen("http://0.0.0.0:0"):
            pass


def test_transport_errorc() -> None:
    """The pipeline's half: a 403 to a post is critical, once."""
    critical: list[MemberRemovedError] = []
    with (
        ScriptedServer(always(answer("403 Forbidden"))) as server,
        Transport(1, 1, FakeRaft(), on_critical_error=critical.append) as transport,
    ):
        transport.add_peer(2, [server.url])
        assert critical == []
        transport.send([Message(type=MessageType.HEARTBEAT, to=2)])
        eventually(lambda: transport.stats()[2].failed == 1)
    (error,) = critical
    assert (type(error), error.peer_id) == (MemberRemovedError, 2)


# The rest of spec 4.5


def test_send_takes_every_kind_of_message() -> None:
    from pipeline.raftpb import raft_pb2

    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        transport.add_peer(2, [server.url])
        transport.send(
            [
                message(),
                EncodedMessage(b"encoded", type=3, to=2),
                raft_pb2.Message(type=3, to=2),
                EncodedMessage(b"unknown", type=3, to=5),
                raft_pb2.Message(type=3, to=0),
            ]
        )
        assert len(server.wait_requests(3)) == 3
        transport.send(iter([message()]))
        server.wait_requests(4)


@pytest.mark.parametrize("wrong", [None, b"bytes", object()], ids=["None", "bytes", "object"])
def test_send_refuses_what_is_no_message_after_sending_what_came_before(wrong: object) -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        transport.add_peer(2, [server.url])
        with pytest.raises(UsageError):
            transport.send([message(), wrong, message()])
        server.wait_requests(1)
        assert transport.stats()[2].offered == 1


# What it says of itself


def test_its_repr_says_whose_it_is_what_it_is_at_and_whom_it_reaches(tmp_path: Path) -> None:
    us, cluster = 0x8E9E05C52164694D, 0xCDF818194E3A8C32
    tls = Authority(tmp_path).info()
    transport = Transport(us, cluster, FakeRaft(), config=ONE, tls=tls)
    head = "<pipeline.Transport 8e9e05c52164694d of cluster cdf818194e3a8c32: "
    assert repr(transport) == f"{head}not started, 0 of 0 peers active>"
    with ScriptedServer() as server, transport:
        transport.add_peer(2, [server.url])
        transport.add_peer(3, ["http://127.0.0.1:1"])
        assert repr(transport) == f"{head}running, 0 of 2 peers active>"
        transport.send([message()])
        eventually(lambda: transport.active_peers() == 1)
        urls = ["http://127.0.0.1:0", "https://127.0.0.1:0"]
        one, two = transport.listen(urls), transport.listen(urls[0])
        told = f"{head}running, 1 of 2 peers active, listening at "
        assert repr(transport) == f"{told}{one.urls[0]}, {one.urls[1]}, {two.url}>"
        one.close()
        assert repr(transport) == f"{told}{two.url}>"
    assert repr(transport) == f"{head}stopped, 0 of 0 peers active>"


def test_its_repr_says_that_it_stops_and_does_not_raise_for_one_half_made() -> None:
    told = []

    class Looking(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            told.append(repr(transport))

    class Derived(Transport):
        pass

    config = TransportConfig(stop_timeout_s=LONG_TIMEOUT)  # for the callback
    with ScriptedServer() as server, Derived(1, 0x77, Looking(), config=config) as transport:
        server.script = server.hold
        transport.add_peer(2, [server.url])
        transport.send([message()])
        server.wait_requests(1)
        transport.stop()
        server.release.set()
    kind = f"{__name__}.{Derived.__qualname__}"
    assert told == [f"<{kind} 1 of cluster 77: stopping, 0 of 0 peers active>"]
    assert repr(Derived.__new__(Derived)) == f"<{kind}, half made>"
    name = repr(aio.Transport(1, 0x77, FakeRaft())).partition(" ")[0]
    assert name == "<pipeline.aio.Transport"


# What ``send`` returns: how many were not queued


def test_send_counts_no_message_that_was_queued_or_is_for_nobody() -> None:
    with (
        ScriptedServer() as one,
        ScriptedServer() as two,
        Transport(1, 1, FakeRaft(), config=ONE) as transport,
    ):
        transport.add_peer(2, [one.url])
        transport.add_remote(3, [two.url])
        assert transport.send([]) == 0
        assert transport.send(message(to=to) for to in (2, 0, 3, 2, 0)) == 0
        one.wait_requests(2)
        two.wait_requests(1)


@pytest.mark.parametrize("is_peer", [True, False], ids=["peer", "remote"])
@pytest.mark.parametrize(
    "limits", [{"queue_length": 2}, {"queue_bytes": 2 * message().byte_size()}], ids=str
)
def test_send_counts_what_a_full_queue_refuses(is_peer: bool, limits: dict[str, int]) -> None:
    config = TransportConfig(pipeline=PipelineConfig(connections=1, **limits))  # type: ignore[arg-type]
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=config) as transport:
        server.script = server.hold
        (transport.add_peer if is_peer else transport.add_remote)(2, [server.url])
        assert transport.send([message()]) == 0
        server.wait_requests(1)
        assert transport.send([message()] * 5) == 3
        assert transport.send([message(), message(to=0)]) == 1
        books = transport.stats()[2] if is_peer else transport.remote_stats()[2].pipeline
        assert (books.accepted, books.refused) == (3, 4)
        server.release.set()


def test_send_counts_what_the_node_s_bytes_refuse() -> None:
    size = message().byte_size()
    config = TransportConfig(queue_bytes=2 * size, pipeline=PipelineConfig(connections=1))
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=config) as transport:
        server.script = server.hold
        for peer in (2, 3):
            transport.add_peer(peer, [server.url])
            assert transport.send([message(to=peer)]) == 0
        server.wait_requests(2)
        assert transport.send([message(to=2)] * 3) == 1
        # An empty queue takes one message, whatever the other peers' hold.
        assert transport.send([message(to=3)] * 3) == 2
        server.release.set()


def test_send_counts_what_is_for_nobody_it_sends_to() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        transport.add_peer(2, [server.url])
        assert transport.send([message(to=9), message(to=2), message(to=1)]) == 2
        server.wait_requests(1)
        transport.remove_peer(2)
        assert transport.send([message()] * 3) == 3


def test_send_counts_what_is_dropped_while_its_member_is_paused_or_cut_off() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        transport.add_peer(2, [server.url])
        transport.add_remote(3, [server.url])
        to_both = [message(to=2), message(to=3)]
        transport.pause()
        assert transport.send(to_both) == 1
        transport.resume()
        transport.cut_peer(3)
        assert transport.send(to_both) == 1
        transport.mend_peer(3)
        assert transport.send(to_both) == 0
        assert transport.peer_stats()[2].paused_drops == 1
        assert transport.remote_stats()[3].paused_drops == 1


def test_active_since_and_active_peers() -> None:
    with (
        ScriptedServer(in_turn(OK, answer("500 Oops"), OK)) as server,
        Transport(1, 1, FakeRaft(), config=ONE) as transport,
    ):
        transport.add_peer(2, [server.url])
        transport.add_peer(3, ["http://127.0.0.1:1"])
        assert transport.active_since(2) is None
        assert transport.active_since(9) is None
        before = time.time()
        transport.send([message()])
        eventually(lambda: transport.active_peers() == 1)
        since = transport.active_since(2)
        assert since is not None
        assert before <= since <= time.time()
        transport.send([message()])
        eventually(lambda: transport.active_peers() == 0)
        assert transport.active_since(2) is None
        transport.send([message()])
        eventually(lambda: transport.active_peers() == 1)


def test_remove_all_peers_drops_and_goes_on() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft()) as transport:
        server.script = server.hold
        for peer in (2, 3, 4):
            transport.add_peer(peer, [server.url])
            transport.send([message(to=peer)] * 10)
        server.wait_requests(12)
        assert transport.remove_all_peers() == 18
        assert transport.stats() == {}
        server.release.set()
        transport.add_peer(2, [server.url])
        transport.send([message()])
        server.wait_requests(13)


def test_stop_is_once_and_what_comes_after_is_told() -> None:
    transport = Transport(1, 1, FakeRaft())
    with pytest.raises(UsageError, match="not started"):
        transport.add_peer(2, ["http://127.0.0.1:1"])
    with pytest.raises(UsageError, match="send: the transport was not started"):
        transport.send([message()])
    transport.start()
    with pytest.raises(UsageError):
        transport.start()
    transport.add_peer(2, ["http://127.0.0.1:1"])
    transport.stop()
    assert transport.stop() == 0
    with pytest.raises(UsageError, match="transport stopped"):
        transport.add_peer(2, ["http://127.0.0.1:1"])
    with pytest.raises(UsageError, match="transport stopped"):
        transport.listen("http://127.0.0.1:0")
    for messages in ([message()], [], None):
        with pytest.raises(UsageError, match="send: transport stopped"):
            transport.send(messages)  # type: ignore[arg-type]
    assert transport.active_peers() == 0


def test_one_that_is_stopped_before_it_was_started_sends_nothing() -> None:
    transport = Transport(1, 1, FakeRaft())
    transport.stop()
    with pytest.raises(UsageError, match="send: transport stopped"):
        transport.send([message()])


def test_what_is_sent_while_a_stop_waits_is_dropped() -> None:
    """A node may send until it has been told, and from the callbacks that a stop waits for."""
    results: list[int | BaseException] = []

    class Sending(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            super().report_unreachable(member_id)
            if transport._is_stopped:
                try:
                    results.append(transport.send([message(), message()]))
                except BaseException as error:
                    results.append(error)

    raft = Sending()
    config = TransportConfig(stop_timeout_s=LONG_TIMEOUT)  # for the callback
    with ScriptedServer() as server, Transport(1, 1, raft, config=config) as transport:
        server.script = server.hold
        transport.add_peer(2, [server.url])
        transport.send([message()])
        server.wait_requests(1)
        transport.stop()
        server.release.set()
    assert raft.unreachable == [2]
    assert results == [2]


def test_start_after_stop_is_a_usage_error() -> None:
    transport = Transport(1, 1, FakeRaft())
    transport.stop()
    with pytest.raises(UsageError):
        transport.start()
    transport.stop()


@pytest.mark.parametrize("peer_id", [-1, 1 << 64, "2", None, True])
def test_a_bad_id_is_a_usage_error(peer_id: object) -> None:
    with Transport(1, 1, FakeRaft()) as transport, pytest.raises(UsageError):
        transport.add_peer(peer_id, ["http://127.0.0.1:1"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "urls",
    [[], ["127.0.0.1:1"], ["https://127.0.0.1:1"], ["unix:///tmp/x"], "http://127.0.0.1:1"],
)
def test_a_bad_url_is_a_usage_error_and_adds_nothing(urls: list[str]) -> None:
    with Transport(1, 1, FakeRaft()) as transport:
        with pytest.raises(UsageError):
            transport.add_peer(2, urls)
        assert transport.stats() == {}


def test_two_transports_exchange_messages() -> None:
    one, two = FakeRaft(), FakeRaft()
    with Transport(1, 7, one) as first, Transport(2, 7, two) as second:
        first.add_peer(2, [second.listen("http://127.0.0.1:0").url])
        second.add_peer(1, [first.listen("http://127.0.0.1:0").url])
        sent = [message(MessageType.APP, bytes([i]) * (i * 1000), to=2) for i in range(20)]
        first.send(sent)
        got = two.wait_processed(20)
        assert sorted(m.marshal() for m in got) == sorted(m.marshal() for m in sent)
        second.send([message(MessageType.APP_RESP, to=1)])
        (reply,) = one.wait_processed(1)
        assert reply.type == MessageType.APP_RESP
        eventually(lambda: first.stats()[2].sent == 20 and second.stats()[1].sent == 1)
    assert one.unreachable == two.unreachable == []


def test_every_method_may_be_called_from_a_callback() -> None:
    class Busy(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            if not self.unreachable:
                transport.send([message(to=3)])
                transport.add_peer(4, ["http://127.0.0.1:1"])
                transport.update_peer(2, ["http://127.0.0.1:1"])
                transport.remove_peer(4)
                transport.stats()
                transport.active_peers()
                begin = time.monotonic()
                transport.remove_peer(2)
                self.took_s = time.monotonic() - begin
            super().report_unreachable(member_id)

    raft = Busy()
    with (
        ScriptedServer(always(answer("500 Oops"))) as bad,
        ScriptedServer() as good,
        Transport(1, 1, raft, config=TransportConfig(stop_timeout_s=LONG_TIMEOUT)) as transport,
    ):
        transport.add_peer(2, [bad.url])
        transport.add_peer(3, [good.url])
        transport.send([message()])
        raft.wait_unreachable(1)
        good.wait_requests(1)
        # It does not wait for the callback it is called from.
        assert raft.took_s < LONG_TIMEOUT / 2
        assert list(transport.stats()) == [3]


def test_peers_are_added_by_many_threads_at_once() -> None:
    with Transport(1, 1, FakeRaft()) as transport:
        barrier = threading.Barrier(8)

        def add(base: int) -> None:
            barrier.wait()
            for peer in range(base, base + 8):
                transport.add_peer(peer, ["http://127.0.0.1:1"])
                transport.add_peer(999, ["http://127.0.0.1:1"])

        threads = [threading.Thread(target=add, args=(base * 100,)) for base in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_TIMEOUT)
        assert len(transport.stats()) == 65


# What an operator sees of a peer that never worked


def log_of_status(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "pipeline.send.status" and record.levelno > logging.DEBUG
    ]


def last_error(transport: Transport) -> LastError:
    error = transport.peer_stats()[2].last_error
    assert error is not None
    return error


@pytest.mark.parametrize("kind", ["message", "snapshot"])
def test_a_node_of_another_cluster_is_told_of_as_an_error_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = time.time()
    config = TransportConfig(probe_interval_s=0)
    with Transport(2, 77, FakeRaft()) as other, Transport(1, 99, FakeRaft(), config=config) as one:
        one.add_peer(2, [other.listen("http://127.0.0.1:0").url])
        for failed in range(1, 6):
            if kind == "message":
                one.send([message()])
                eventually(lambda failed=failed: one.stats()[2].failed == failed)  # type: ignore[misc]
            else:
                with pytest.raises(ClusterIDMismatchError):
                    one.send_snapshot(message(MessageType.SNAP), b"x").result(LONG_TIMEOUT)
        error = last_error(one)
    assert (error.text, error.times) == ("cluster ID mismatch", 5)
    assert before <= error.at <= time.time()
    ((level, text),) = log_of_status(caplog)
    assert level == "ERROR"
    assert text.startswith("peer was never active (message send to peer failed): failed to ")
    assert text.endswith("(cluster ID mismatch)")


def test_a_peer_that_was_never_there_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with refused_port() as port, Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, [f"http://127.0.0.1:{port}"])
        transport.add_remote(3, [f"http://127.0.0.1:{port}"])
        assert transport.peer_stats()[2].last_error is None
        for failed in range(1, 4):
            transport.send([message(), message(to=3)])
            eventually(lambda failed=failed: transport.stats()[2].failed == failed)  # type: ignore[misc]
            eventually(
                lambda failed=failed: transport.remote_stats()[3].pipeline.failed == failed  # type: ignore[misc]
            )
        assert last_error(transport).times == 3
        assert "refused" in last_error(transport).text
        remote_error = transport.remote_stats()[3].last_error
        assert remote_error is not None
        assert remote_error.times == 3
    told = log_of_status(caplog)
    assert [level for level, _ in told] == ["WARNING", "WARNING"]
    assert all(text.startswith("peer was never active ") for _, text in told)
    names = {
        text.partition("failed to write ")[2].partition(" on pipeline (")[0] for _, text in told
    }
    assert names == {"2", "3"}


def test_a_stop_is_no_failure_of_a_peer_that_was_not_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with black_hole() as port, Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, [f"http://127.0.0.1:{port}"])
        transport.send([message()])
        eventually(lambda: transport.stats()[2].in_flight == 1)
        transport.stop()
    assert log_of_status(caplog) == []


def test_a_stop_with_messages_on_the_way_to_a_peer_that_is_there_warns_of_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with ScriptedServer() as server, Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, [server.url])
        transport.send([message()])
        eventually(lambda: transport.stats()[2].sent == 1)
        server.script = server.hold
        transport.send([message()] * 5)
        server.wait_requests(5)  # on four connections, of which one was answered before
        assert transport.stop() == 1
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", "dropped 1 queued messages to peer 2 at stop") in told
    assert [line for line in told if line[0] != "INFO"] == []


def test_what_concerns_the_whole_transport_is_told_in_one_place() -> None:
    raft = FakeRaft(process_error=ValueError())
    with Transport(1, CLUSTER_ID, raft) as transport:
        assert transport.transport_stats()[:6] == (0, 0, 0, 0, 0, 0)
        url = transport.listen("http://127.0.0.1:0").url
        for body, status in (
            (Message(type=MessageType.HEARTBEAT).marshal(), 500),
            (b"\xff", 400),
            (Message(type=MessageType.HUP).marshal(), 204),
            (Message(type=99).marshal() + b"\x78\x01", 204),
        ):
            assert reply_of_socket(url, "POST", "/raft", peer_headers(), body).status == status
        with ScriptedServer() as server:
            server.script = server.hold
            transport.add_peer(2, [server.url])
            transport.send([message()] * 5)
            server.wait_requests(4)
            stats = transport.transport_stats()
            server.release.set()
    assert stats._replace(lost_log_lines=0) == TransportStats(
        callback_errors=1,
        process_failures=1,
        received_failures=1,
        ignored=1,
        unknown=1,
        unknown_fields=1,
        queued_bytes=message().byte_size(),
        lost_log_lines=0,
    )


# What is closed


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("is_aio", [False, True], ids=["threads", "asyncio"])
def test_a_listener_that_is_closed_is_kept_by_nobody(
    tmp_path: Path, scheme: str, *, is_aio: bool
) -> None:
    info = Authority(tmp_path).info()
    url = f"{scheme}://127.0.0.1:0"
    kept: list[weakref.ref[object]] = []

    def check(transport: Transport | aio.Transport) -> None:
        assert transport.credentials is not None
        assert transport._listeners == []
        assert transport.credentials._subscribers == [transport._retire_connections]

    async def on_the_loop() -> None:
        async with aio.Transport(1, 1, FakeRaft(), tls=info) as transport:
            for _ in range(3):
                listener = await transport.listen(url)
                kept.append(weakref.ref(listener._listener))
                await listener.close()
                del listener
            check(transport)

    if is_aio:
        asyncio.run(on_the_loop())
    else:
        with Transport(1, 1, FakeRaft(), tls=info) as transport:
            for _ in range(3):
                listener = transport.listen(url)
                kept.append(weakref.ref(listener))
                listener.close()
                del listener
            check(transport)
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_a_listener_that_closes_in_a_callback_is_forgotten_as_well() -> None:
    class Closing(FakeRaft):
        def process(self, message: Message) -> None:
            listener.close()
            super().process(message)

    raft = Closing()
    with Transport(1, CLUSTER_ID, raft) as transport:
        listener = transport.listen("http://127.0.0.1:0")
        body = Message(type=MessageType.HEARTBEAT).marshal()
        with contextlib.suppress(OSError):
            reply_of_socket(listener.url, "POST", "/raft", peer_headers(), body)
        raft.wait_processed(1)
        assert transport._listeners == []
