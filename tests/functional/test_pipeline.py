"""etcd's pipeline tests under their own names (spec section 12), and what surrounds a post."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from pipeline import (
    ClusterIDMismatchError,
    EncodedMessage,
    Entry,
    IncompatibleVersionError,
    MarshalError,
    MemberRemovedError,
    Message,
    MessageType,
    Pipeline,
    SendResult,
    SnapshotStatus,
    UsageError,
)
from pipeline._core import ActiveFlag
from pipeline.send import pipeline as module
from pipeline.send.picker import URLPicker
from pipeline.send.status import PeerStatus
from pipeline.wire import protocol
from tests.support import LONG_TIMEOUT
from tests.support.names import Names
from tests.support.raft import FakeRaft
from tests.support.senders import (
    CLUSTER,
    MEMBER,
    PEER,
    assert_balanced,
    message,
    pipeline_to,
    settle,
)
from tests.support.server import (
    ERROR,
    OK,
    Request,
    ScriptedServer,
    always,
    answer,
    in_turn,
    refused_port,
)
from tests.support.waiting import eventually

ACCEPTED, QUEUE_FULL = SendResult.ACCEPTED, SendResult.QUEUE_FULL


# Upstream


def test_pipeline_send() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        assert pipeline.send(message()) is ACCEPTED
        server.wait_requests(1)
        settle(pipeline)
        pipeline.stop()
        assert pipeline.follower_stats().success == 1
        assert len(server.requests) == 1


def test_pipeline_keep_sending_when_post_error() -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(always(ERROR)) as server,
        pipeline_to(server, raft) as pipeline,
    ):
        for _ in range(50):
            assert pipeline.send(message()) is ACCEPTED
        raft.wait_unreachable(50)
        books = settle(pipeline)
        assert len(server.requests) == 50
        assert (books.sent, books.failed) == (0, 50)


def test_pipeline_exceed_maximum_serving() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        server.script = server.hold
        for _ in range(4):
            assert pipeline.send(message()) is ACCEPTED
        server.wait_requests(4)
        for _ in range(64):
            assert pipeline.send(message()) is ACCEPTED
        assert pipeline.send(message()) is QUEUE_FULL
        books = pipeline.stats()
        assert (books.in_flight, books.queued, books.refused) == (4, 64, 1)
        server.release.set()
        eventually(lambda: pipeline.send(message()) is ACCEPTED)
        assert_balanced(settle(pipeline))


def test_pipeline_send_failed() -> None:
    raft = FakeRaft()
    with refused_port() as port, pipeline_to(f"http://127.0.0.1:{port}", raft) as pipeline:
        pipeline.send(message())
        raft.wait_unreachable(1)
        settle(pipeline)
        pipeline.stop()
        assert pipeline.follower_stats().fail == 1
        assert pipeline.follower_stats().success == 0


def test_pipeline_post() -> None:
    with (
        ScriptedServer() as server,
        Pipeline(
            PEER,
            [server.url],
            FakeRaft(),
            member_id=0x8E9E05C52164694D,
            cluster_id=1,
            peer_urls=["http://10.0.0.1:2380"],
        ) as pipeline,
    ):
        pipeline.send(EncodedMessage(b"some data", type=MessageType.APP, to=PEER))
        (request,) = server.wait_requests(1)
        assert request.line == "POST /raft HTTP/1.1"
        assert request.body == b"some data"
        headers = request.headers
        assert headers["Host"] == f"127.0.0.1:{server.port}"
        assert headers["Content-Type"] == "application/protobuf"
        assert headers["Content-Length"] == "9"
        assert headers["X-Etcd-Cluster-Id"] == "1"
        assert headers["X-Server-From"] == "8e9e05c52164694d"
        assert headers["X-Server-Version"] == "3.5.0"
        assert headers["X-Min-Cluster-Version"] == "3.0.0"
        assert headers["X-Peerurls"] == "http://10.0.0.1:2380"
        assert "X-Raft-To" not in headers
        assert settle(pipeline).sent_bytes == 9


@pytest.mark.parametrize("bad", [None, "200 OK", "201 Created"])
def test_pipeline_post_bad(bad: str | None) -> None:
    raft = FakeRaft()
    script = always(answer(bad or "204 No Content", b"some data"))
    with (
        refused_port() as refused,
        ScriptedServer(script) as server,
        pipeline_to(f"http://127.0.0.1:{server.port if bad else refused}", raft) as pipeline,
    ):
        pipeline.send(message())
        assert raft.wait_unreachable(1) == [PEER]
        books = settle(pipeline)
        assert (books.sent, books.failed) == (0, 1)


def test_pipeline_post_errorc() -> None:
    critical: list[Exception] = []
    with (
        ScriptedServer(always(answer("403 Forbidden"))) as server,
        pipeline_to(server, on_critical_error=critical.append) as pipeline,
    ):
        pipeline.send(message())
        settle(pipeline)
    (error,) = critical
    assert isinstance(error, MemberRemovedError)
    assert (error.peer_id, error.status, error.url) == (PEER, 403, f"{server.url}/raft")


def test_stop_blocked_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    # As long as the server holds its answers: a stop that waited would be noticed.
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", LONG_TIMEOUT)
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        server.script = server.hold
        for _ in range(40):
            assert pipeline.send(message()) is ACCEPTED
        server.wait_requests(4)
        before = time.monotonic()
        assert pipeline.stop() == 36
        assert time.monotonic() - before < LONG_TIMEOUT / 2
        books = pipeline.stats()
        assert (books.failed, books.dropped, books.queued, books.in_flight) == (4, 36, 0, 0)
        assert_balanced(books)


# Side effects, their order (spec section 2.4)


class Recorder:
    """Raft, picker, status and critical-error callback that write into one list."""

    def __init__(self, url: str) -> None:
        self.calls: list[tuple[object, ...]] = []
        calls = self.calls

        class Picker(URLPicker):
            def unreachable(self, url: str) -> None:
                calls.append(("picker", url))
                super().unreachable(url)

        class Status(PeerStatus):
            def activate(self) -> None:
                calls.append(("activate",))
                super().activate()

            def deactivate(
                self, source: str, action: str, reason: str, *, url: str | None = None
            ) -> bool:
                calls.append(("deactivate", source, action, reason))
                return super().deactivate(source, action, reason, url=url)

        self.pipeline = Pipeline(
            PEER,
            (),
            self,
            member_id=MEMBER,
            cluster_id=CLUSTER,
            picker=Picker([url]),
            status=Status(MEMBER, PEER, ActiveFlag()),
            on_critical_error=lambda error: calls.append(("critical", type(error))),
        )

    def report_unreachable(self, member_id: int) -> None:
        self.calls.append(("unreachable", member_id))

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        self.calls.append(("snapshot", member_id, status))

    def process(self, message: Message) -> None:
        raise AssertionError

    def is_id_removed(self, member_id: int) -> bool:
        raise AssertionError


OTHER = 7  # spec 2.4: callbacks name m.To, not the pipeline's peer
REMOVED = "the member has been permanently removed from the cluster"


@pytest.mark.parametrize(
    ("type_", "status", "expected"),
    [
        pytest.param(MessageType.APP, "204 No Content", [("activate",)], id="sent"),
        pytest.param(
            MessageType.SNAP,
            "204 No Content",
            [("activate",), ("snapshot", OTHER, SnapshotStatus.FINISH)],
            id="snapshot-sent",
        ),
        pytest.param(
            MessageType.APP,
            "404 Not Found",
            [
                ("picker", "{url}"),
                (
                    "deactivate",
                    "pipeline",
                    "write",
                    'unexpected http status Not Found while posting to "{url}/raft"',
                ),
                ("unreachable", OTHER),
            ],
            id="failed",
        ),
        pytest.param(
            MessageType.SNAP,
            "403 Forbidden",
            [
                ("picker", "{url}"),
                ("critical", MemberRemovedError),
                ("deactivate", "pipeline", "write", REMOVED),
                ("unreachable", OTHER),
                ("snapshot", OTHER, SnapshotStatus.FAILURE),
            ],
            id="snapshot-and-member-removed",
        ),
    ],
)
def test_side_effects_come_in_etcd_s_order(
    type_: MessageType, status: str, expected: list[tuple[object, ...]]
) -> None:
    data = OK if status.startswith("204") else answer(status)
    with ScriptedServer(always(data)) as server:
        recorder = Recorder(server.url)
        with recorder.pipeline as pipeline:
            pipeline.send(message(type_, to=OTHER))
            settle(pipeline)
        filled = [
            tuple(
                part.replace("{url}", server.url) if isinstance(part, str) else part
                for part in call
            )
            for call in expected
        ]
        assert recorder.calls == filled


def test_a_peer_that_stays_active_is_not_activated_again() -> None:
    with ScriptedServer() as server:
        recorder = Recorder(server.url)
        with recorder.pipeline as pipeline:
            for _ in range(10):
                pipeline.send(message())
                settle(pipeline)
        assert recorder.calls == [("activate",)]
        assert pipeline.follower_stats().success == 10


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"incompatible version\n", IncompatibleVersionError),
        (b"cluster ID mismatch\n", ClusterIDMismatchError),
    ],
)
def test_412_has_its_own_errors(
    body: bytes, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = []
    judge = protocol.check_answer

    def check_answer(*args: object, **kwargs: object) -> Exception | None:
        failures.append(judge(*args, **kwargs))  # type: ignore[arg-type]
        return failures[-1]

    monkeypatch.setattr(protocol, "check_answer", check_answer)
    with ScriptedServer(always(answer("412 Precondition Failed", body))) as server:
        recorder = Recorder(server.url)
        with recorder.pipeline as pipeline:
            pipeline.send(message())
            settle(pipeline)
    assert [type(failure) for failure in failures] == [error]
    assert ("deactivate", "pipeline", "write", body.decode().strip()) in recorder.calls


# URLs


def test_an_unreachable_url_gives_way_to_the_next() -> None:
    raft = FakeRaft()
    with (
        refused_port() as refused,
        ScriptedServer() as server,
        # One worker, so that one message meets the dead URL.
        pipeline_to([f"http://127.0.0.1:{refused}", server.url], raft, connections=1) as pipeline,
    ):
        first_is_dead = pipeline.picker.pick() != server.url
        for _ in range(3):
            pipeline.send(message())
            settle(pipeline)
        assert len(raft.unreachable) == first_is_dead
        assert len(server.requests) == 3 - first_is_dead


def test_an_answer_that_is_a_failure_turns_to_the_next_url() -> None:
    """Spec 2.5: each post picks the URL; a kept connection does not tie a worker to a bad one."""
    with ScriptedServer() as one, ScriptedServer() as two:
        first, second = sorted([one, two], key=lambda server: server.url)
        first.script = always(ERROR)
        with pipeline_to([first.url, second.url], connections=1) as pipeline:
            for _ in range(3):
                pipeline.send(message())
                settle(pipeline)
            assert len(first.requests) == 1
            assert len(second.requests) == 2


def test_all_workers_follow_the_picker() -> None:
    """A worker with a good connection to a URL that another worker found bad leaves it."""
    with ScriptedServer() as one, ScriptedServer() as two:
        first, second = sorted([one, two], key=lambda server: server.url)
        first.script = first.hold
        with pipeline_to([first.url, second.url], connections=2) as pipeline:
            for _ in range(2):
                pipeline.send(message())
            first.wait_requests(2)
            first.release.set()
            settle(pipeline)
            pipeline.picker.unreachable(first.url)
            for _ in range(4):
                pipeline.send(message())
            settle(pipeline)
            assert len(first.requests) == 2
            assert len(second.requests) == 4


def test_update_sends_to_the_new_url_from_the_next_message_on() -> None:
    with ScriptedServer() as old, ScriptedServer() as new, pipeline_to(old) as pipeline:
        pipeline.send(message())
        settle(pipeline)
        pipeline.update([new.url])
        for _ in range(4):
            pipeline.send(message())
            settle(pipeline)
        assert (len(old.requests), len(new.requests)) == (1, 4)


def test_update_with_a_bad_url_changes_nothing() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        with pytest.raises(UsageError):
            pipeline.update(["http://127.0.0.1"])
        assert pipeline.picker.urls == (server.url,)
        pipeline.send(message())
        server.wait_requests(1)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_every_address_of_a_name_is_tried(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        server = ScriptedServer(host=host)
    except OSError:
        pytest.skip(f"no {host} here")
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", server.port, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port)),
    ]
    monkeypatch.setattr("pipeline.net.pool.socket.getaddrinfo", lambda *a, **k: found)
    raft = FakeRaft()
    url = server.url.replace("127.0.0.1", "localhost")
    with server, pipeline_to(url, raft) as pipeline:
        for _ in range(8):
            pipeline.send(message())
        assert settle(pipeline).sent == 8
        assert raft.unreachable == []


def test_a_name_that_does_not_resolve_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    names.of["does-not-exist.invalid"] = socket.gaierror(socket.EAI_NONAME, "Name not known")
    raft = FakeRaft()
    with pipeline_to("http://does-not-exist.invalid:2380", raft) as pipeline:
        pipeline.send(message())
        raft.wait_unreachable(1)
        assert settle(pipeline).failed == 1


# What send takes


def test_send_takes_protobuf_objects_of_ours_and_of_others() -> None:
    from pipeline.raftpb import raft_pb2

    ours = raft_pb2.Message(type=3, to=PEER, term=5)

    class Foreign:
        type = 3
        to = PEER

        def SerializeToString(self) -> bytes:
            return b"foreign"

    with ScriptedServer() as server, pipeline_to(server, connections=1) as pipeline:
        pipeline.send(ours)
        pipeline.send(Foreign())
        first, second = server.wait_requests(2)
        assert raft_pb2.Message.FromString(first.body) == ours
        assert second.body == b"foreign"


class TypeIsText:
    type = "MsgApp"
    to = PEER

    def SerializeToString(self) -> bytes:
        return b""


class ToIsNegative(TypeIsText):
    type = 3
    to = -1


class EncodesToText(TypeIsText):
    type = 3

    def SerializeToString(self) -> str:
        return "text"


class EncodesToBytearray(TypeIsText):
    type = 3

    def SerializeToString(self) -> bytearray:
        return bytearray(40000)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        b"bytes",
        7,
        object(),
        Entry(),
        TypeIsText(),
        ToIsNegative(),
        EncodesToText(),
        EncodesToBytearray(),
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_send_refuses_what_is_no_message(wrong: object) -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        with pytest.raises((UsageError, MarshalError)):
            pipeline.send(wrong)
        assert pipeline.stats().offered == 0


def test_send_before_start_is_a_usage_error_and_after_stop_is_told() -> None:
    with ScriptedServer() as server:
        pipeline = pipeline_to(server)
        with pytest.raises(UsageError):
            pipeline.send(message())
        pipeline.start()
        pipeline.stop()
        assert pipeline.send(message()) is SendResult.STOPPED
        books = pipeline.stats()
        assert (books.offered, books.refused) == (1, 1)


@pytest.mark.parametrize("profile", ["3.5", "3.6", "3.7"])
def test_the_profile_decides_the_encoding(profile: str) -> None:
    with ScriptedServer() as server, pipeline_to(server, profile=profile) as pipeline:
        sent = message(data=b"x")
        pipeline.send(sent)
        (request,) = server.wait_requests(1)
        assert request.body == sent.marshal(profile)


def test_a_message_changed_after_send_is_sent_as_it_was() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        server.script = server.hold
        sent = message(data=b"x")
        expected = sent.marshal()
        for _ in range(5):  # the fifth waits in msgc
            pipeline.send(sent)
        sent.term = 99
        server.release.set()
        assert {request.body for request in server.wait_requests(5)} == {expected}


#: Around what is copied or borrowed (16 KiB), is worth borrowing (4 KiB), is one write (1 MiB).
SIZES = (0, 1, 4095, 4096, 4097, *range(16384 - 64, 16384 + 8), 65536, (1 << 20) - 200, 1 << 20)


def test_bodies_of_every_size_arrive_as_marshal_writes_them() -> None:
    with ScriptedServer() as server, pipeline_to(server, connections=1) as pipeline:
        for count, size in enumerate(SIZES, 1):
            sent = message(data=bytes(range(256)) * (size // 256) + b"z" * (size % 256))
            assert pipeline.send(sent) is ACCEPTED
            request: Request = server.wait_requests(count)[-1]
            assert request.body == sent.marshal(), size


@pytest.mark.parametrize("size", [100, 4096, 5000])
def test_many_entries_are_gathered_in_order(size: int) -> None:
    with ScriptedServer() as server, pipeline_to(server, connections=1) as pipeline:
        for n, count in enumerate((1, 31, 32, 33, 63, 64, 65, 200), 1):
            sent = Message(
                type=MessageType.APP,
                to=PEER,
                entries=[Entry(index=i, data=bytes([i % 256]) * size) for i in range(count)],
                context=b"c" * size,
            )
            pipeline.send(sent)
            assert server.wait_requests(n)[-1].body == sent.marshal(), count


def test_an_empty_body_is_a_message() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        for _ in range(3):
            pipeline.send(EncodedMessage(b"", type=0, to=PEER))
        assert [request.body for request in server.wait_requests(3)] == [b""] * 3
        assert settle(pipeline).sent == 3


def test_connections_are_kept_and_no_more_than_configured() -> None:
    with ScriptedServer() as server, pipeline_to(server, connections=2) as pipeline:
        for _ in range(40):
            pipeline.send(message())
        assert settle(pipeline).sent == 40
        assert len(server.connections) <= 2


def test_follower_statistics_count_appends_only() -> None:
    with ScriptedServer() as server, pipeline_to(server, connections=1) as pipeline:
        server.script = in_turn(OK, ERROR, OK, ERROR, OK)
        for type_ in (
            MessageType.APP,
            MessageType.APP,
            MessageType.HEARTBEAT,
            MessageType.HEARTBEAT,
            MessageType.APP,
        ):
            pipeline.send(message(type_))
            settle(pipeline)
        stats = pipeline.follower_stats()
        assert (stats.success, stats.fail) == (2, 1)
        assert 0 < stats.latency_minimum_ms <= stats.latency_average_ms <= stats.latency_maximum_ms
        assert stats.latency_stddev_ms >= 0


def test_start_is_once() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        with pytest.raises(UsageError):
            pipeline.start()
        pipeline.send(message())
        server.wait_requests(1)


def test_start_after_stop_is_a_usage_error() -> None:
    pipeline = pipeline_to("http://127.0.0.1:1")
    assert pipeline.stop() == 0
    with pytest.raises(UsageError):
        pipeline.start()
    pipeline.stop()


@pytest.mark.parametrize("mistake", [{"urls": []}, {"urls": ["http://a"]}, {"peer_id": -1}])
def test_bad_arguments_are_usage_errors(mistake: dict[str, object]) -> None:
    arguments: dict[str, object] = {"peer_id": PEER, "urls": ["http://127.0.0.1:1"], **mistake}
    with pytest.raises(UsageError):
        Pipeline(**arguments, raft=FakeRaft(), member_id=1, cluster_id=1)  # type: ignore[arg-type]


def test_the_status_follows_the_last_outcome() -> None:
    raft = FakeRaft()
    with ScriptedServer(in_turn(OK, ERROR, OK)) as server, pipeline_to(server, raft) as pipeline:
        seen = []
        for _ in range(3):
            pipeline.send(message())
            settle(pipeline)
            seen.append(pipeline.status.is_active)
        assert seen == [True, False, True]
        assert pipeline.status.disconnects == 1


def test_a_lone_send_wakes_a_sleeping_loop_every_time() -> None:
    with ScriptedServer() as server, pipeline_to(server) as pipeline:
        for count in range(1, 300):
            pipeline.send(message(MessageType.HEARTBEAT))
            server.wait_requests(count)
        assert settle(pipeline).sent == 299


def test_send_may_be_called_from_a_callback() -> None:
    class Resender(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            pipeline.send(message(MessageType.HEARTBEAT))
            super().report_unreachable(member_id)

    raft = Resender()
    with (
        ScriptedServer(in_turn(ERROR, OK)) as server,
        pipeline_to(server, raft) as pipeline,
    ):
        pipeline.send(message())
        raft.wait_unreachable(1)
        server.wait_requests(2)
        assert settle(pipeline).sent == 1
        assert threading.active_count() < 20
