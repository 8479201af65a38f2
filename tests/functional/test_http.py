"""What a peer is answered, from the pure functions and on three fronts (spec section 5).

Not here: limits of time, memory and connections (test_listener.py, test_receiver.py).
The fronts are the compiled listener, ``asgi_app`` under uvicorn and ``wsgi_app`` under waitress.

Upstream: ``http_test.go`` ``TestServeRaftPrefix``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import ANY
from wsgiref.validate import validator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ReceiverConfig
from pipeline.errors import RequestRejected
from pipeline.receive.asgi import asgi_app
from pipeline.receive.handlers import Handlers
from pipeline.receive.listener import Listener
from pipeline.receive.wsgi import wsgi_app
from pipeline.types import MessageType
from pipeline.wire._messages import Entry, Message
from pipeline.wire.answers import Request
from tests.support import LONG_TIMEOUT
from tests.support.callbacks import RudeError, Unawaited
from tests.support.fronts import AsgiFront, WsgiFront, running
from tests.support.http import (
    CLUSTER_ID,
    HEARTBEAT,
    Reply,
    handlers_of,
    peer_headers,
    post_heartbeat,
    reply_of_handlers,
    reply_of_socket,
)
from tests.support.listening import GOOD, dial, raw_head, read_status
from tests.support.logs import handler_that_raises
from tests.support.raft import FakeRaft

CONFIG = ReceiverConfig(max_body_bytes=1000, max_head_bytes=2000, handlers=2)
MESSAGE = HEARTBEAT.marshal()
TEXT_HEADERS = {
    "content-type": "text/plain; charset=utf-8",
    "x-content-type-options": "nosniff",
}

Ask = Callable[[str, str, Mapping[str, str], bytes], Reply]


@pytest.fixture
def raft() -> FakeRaft:
    return FakeRaft()


class SeenSenders:
    """Writes down who is shown to it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[str, ...], str]] = []

    def note(
        self, sender: int, urls: tuple[str, ...], caller: object, *, is_authenticated: bool
    ) -> None:
        assert not is_authenticated
        self.seen.append((sender, urls, str(caller)))

    def is_watched(self, sender: int, *, is_authenticated: bool) -> bool:
        return False


@pytest.fixture
def senders() -> SeenSenders:
    return SeenSenders()


@pytest.fixture
def handlers(raft: FakeRaft, senders: SeenSenders) -> Handlers:
    return handlers_of(raft, CONFIG, senders=senders)


@pytest.fixture
def url(handlers: Handlers) -> Iterator[str]:
    with Listener(handlers, "http://127.0.0.1:0", CONFIG) as listener:
        yield listener.url


@pytest.fixture(scope="module")
def asgi_front() -> Iterator[AsgiFront]:
    with running(AsgiFront) as front:
        yield front


@pytest.fixture(scope="module")
def wsgi_front() -> Iterator[WsgiFront]:
    with running(WsgiFront) as front:
        yield front


@pytest.fixture(params=["handlers", "listener", "asgi", "wsgi"])
def ask(request: pytest.FixtureRequest, handlers: Handlers) -> Iterator[Ask]:
    """Ask the handlers, directly or on a front: (method, path, headers, body) -> Reply."""
    if request.param == "handlers":
        # In a thread, as all servers do, but some WSGI servers.
        with ThreadPoolExecutor(1) as pool:
            yield lambda *arguments: pool.submit(reply_of_handlers, handlers, *arguments).result()
    elif request.param == "listener":
        listener_url = request.getfixturevalue("url")
        yield lambda *arguments: reply_of_socket(listener_url, *arguments)
    elif request.param == "asgi":
        front = request.getfixturevalue("asgi_front")
        front.app = asgi_app(handlers, CONFIG)
        yield lambda *arguments: reply_of_socket(front.url, *arguments)
        drive(front.app, {"type": "lifespan"}, list(LIFESPAN))
    else:
        front = request.getfixturevalue("wsgi_front")
        app = wsgi_app(handlers, CONFIG)

        def ask_wsgi(*arguments: Any) -> Reply:
            # What the server makes of a path that is none is no fault of the application.
            front.app = validator(app) if arguments[1].startswith("/") else app
            reply = reply_of_socket(front.url, *arguments)
            # WSGI has no way to close a connection; what is meant is told by the others.
            reply.close = ANY
            return reply

        yield ask_wsgi


def reply_to(ask: Ask, body: bytes = MESSAGE, **changes: str | None) -> Reply:
    return ask("POST", "/raft", peer_headers(**changes), body)


@pytest.mark.parametrize(
    ("method", "body", "cluster_id", "process_error", "status"),
    [
        pytest.param("GET", b"", None, None, 405, id="GET"),
        pytest.param("PUT", b"", None, None, 405, id="PUT"),
        pytest.param("DELETE", b"", None, None, 405, id="DELETE"),
        pytest.param("POST", b"malformed garbage", None, None, 400, id="garbage"),
        pytest.param("POST", MESSAGE, "1", None, 412, id="another cluster"),
        pytest.param("POST", MESSAGE, None, RequestRejected(403), 403, id="hook 403"),
        pytest.param("POST", MESSAGE, None, RequestRejected(500), 500, id="hook 500"),
        pytest.param("POST", MESSAGE, None, RuntimeError("blah"), 500, id="plain error"),
        pytest.param("POST", b"", None, None, 204, id="good empty message"),
    ],
)
def test_serve_raft_prefix(
    *,
    raft: FakeRaft,
    ask: Ask,
    method: str,
    body: bytes,
    cluster_id: str | None,
    process_error: Exception | None,
    status: int,
) -> None:
    raft.process_error = process_error
    headers = peer_headers(x_etcd_cluster_id=cluster_id or f"{CLUSTER_ID:x}")
    assert ask(method, "/raft", headers, body).status == status


def test_serve_raft_prefix_when_the_body_cannot_be_read(handlers: Handlers) -> None:
    request = Request("POST", "/raft", peer_headers(), "127.0.0.1:1")
    assert handlers.check(request) is None
    answer = handlers.read_failed(request.remote)
    assert (answer.status, answer.body) == (400, b"error reading raft message\n")
    assert handlers.received.failures == 1


def test_a_delivered_message_is_answered_204_without_body(raft: FakeRaft, ask: Ask) -> None:
    message = Message(
        type=MessageType.APP, from_=1, to=2, term=3, entries=[Entry(term=3, index=4, data=b"x")]
    )
    reply = reply_to(ask, message.marshal())
    assert (reply.status, reply.body, reply.close) == (204, b"", False)
    assert reply.headers["x-etcd-cluster-id"] == f"{CLUSTER_ID:x}"
    assert "content-length" not in reply.headers
    assert raft.processed == [message]


@pytest.mark.parametrize("profile", ["3.5", "3.6", "3.7"])
def test_takes_messages_of_every_era(raft: FakeRaft, ask: Ask, profile: str) -> None:
    assert reply_to(ask, HEARTBEAT.marshal(profile)).status == 204
    assert raft.processed == [HEARTBEAT]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
def test_another_method_is_answered_before_anything_else_is_checked(ask: Ask, method: str) -> None:
    reply = ask(method, "/raft", {}, b"")
    assert reply.status == 405
    assert reply.headers.items() >= {"allow": "POST", **TEXT_HEADERS}.items()
    assert "x-etcd-cluster-id" not in reply.headers
    if method != "HEAD":
        assert reply.body == b"Method Not Allowed\n"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        pytest.param({"x_server_version": None}, "incompatible version", id="no version"),
        pytest.param({"x_server_version": ""}, "incompatible version", id="empty version"),
        pytest.param({"x_server_version": "2.9.9"}, "incompatible version", id="too old"),
        pytest.param({"x_server_version": "three"}, "incompatible version", id="malformed"),
        pytest.param({"x_min_cluster_version": "3.6.0"}, "incompatible version", id="too new"),
        pytest.param({"x_min_cluster_version": "3..0"}, "incompatible version", id="malformed min"),
        pytest.param({"x_etcd_cluster_id": None}, "cluster ID mismatch", id="no cluster"),
        pytest.param({"x_etcd_cluster_id": "1"}, "cluster ID mismatch", id="another cluster"),
        pytest.param({"x_etcd_cluster_id": f"{CLUSTER_ID:X}"}, "cluster ID mismatch", id="case"),
        pytest.param({"x_etcd_cluster_id": f"0{CLUSTER_ID:x}"}, "cluster ID mismatch", id="zero"),
        pytest.param({"x_etcd_cluster_id": f"0x{CLUSTER_ID:x}"}, "cluster ID mismatch", id="0x"),
        pytest.param(
            {"x_server_version": None, "x_etcd_cluster_id": "1"},
            "incompatible version",
            id="version is checked first",
        ),
        pytest.param(
            {"x_etcd_cluster_id": "1", "content_encoding": "gzip"},
            "cluster ID mismatch",
            id="cluster is checked before the body",
        ),
    ],
)
def test_a_stranger_is_answered_412(
    raft: FakeRaft, ask: Ask, changes: dict[str, str | None], text: str
) -> None:
    reply = reply_to(ask, **changes)
    assert (reply.status, reply.body) == (412, f"{text}\n".encode())
    assert reply.headers.items() >= TEXT_HEADERS.items()
    assert reply.headers["x-etcd-cluster-id"] == f"{CLUSTER_ID:x}"
    assert raft.processed == []


@pytest.mark.parametrize(
    "changes",
    [
        {"x_server_version": "3.0.0"},
        {"x_server_version": "3.8.0-alpha.0"},
        {"x_server_version": "v3.5"},
        {"x_min_cluster_version": None},
        {"x_min_cluster_version": "3.5.99"},
        {"x_server_from": None},
        {"x_server_from": "not an id"},
        {"x_peerurls": None},
        {"x_peerurls": "not,urls,,"},
        {"content_type": None},
        {"content_type": "text/html"},
        {"content_encoding": "identity"},
    ],
    ids=str,
)
def test_a_peer_is_let_in_whatever_else_it_says(
    raft: FakeRaft, ask: Ask, changes: dict[str, str | None]
) -> None:
    assert reply_to(ask, **changes).status == 204
    assert raft.processed == [HEARTBEAT]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"malformed garbage", id="garbage"),
        pytest.param(MESSAGE[:-1], id="truncated"),
        pytest.param(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="type -1"),
        pytest.param(b"\x08\x80\x80\x80\x80\x08", id="type -2**31"),
    ],
)
def test_what_is_not_a_message_is_answered_400(
    raft: FakeRaft, handlers: Handlers, ask: Ask, body: bytes
) -> None:
    reply = reply_to(ask, body)
    assert (reply.status, reply.body) == (400, b"error unmarshalling raft message\n")
    assert reply.headers.items() >= TEXT_HEADERS.items()
    assert raft.processed == []
    assert (handlers.received.failures, handlers.received.bytes_by_sender) == (1, {})


@pytest.mark.parametrize("number", [0, 1, 10, 11, 12, 19, 20, 21, 22])
def test_a_process_local_message_is_answered_204_and_not_delivered(
    raft: FakeRaft, handlers: Handlers, ask: Ask, number: int
) -> None:
    assert reply_to(ask, Message(type=number, from_=7).marshal()).status == 204
    assert raft.processed == []
    assert handlers.received.ignored == 1


@pytest.mark.parametrize("number", [24, 2**31 - 1])
def test_a_message_of_a_later_raft_is_answered_204_and_not_delivered(
    *,
    raft: FakeRaft,
    handlers: Handlers,
    ask: Ask,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    body = Message(type=number, from_=7).marshal()
    for _ in range(3):
        assert reply_to(ask, body).status == 204
    assert raft.processed == []
    assert (handlers.received.unknown, handlers.received.ignored, handlers.received.failures) == (
        3,
        0,
        0,
    )
    assert handlers.received.bytes_by_sender == {7: 3 * len(body)}
    (record,) = [record for record in caplog.records if record.name == "pipeline.receive.handlers"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"Raft message of type {number} from member 7 at 127.")


def test_a_message_of_a_later_raft_in_chunks_is_answered_204(
    raft: FakeRaft, handlers: Handlers, url: str
) -> None:
    with dial(url) as sock:
        sock.sendall(raw_head(CHUNKED) + b"2\r\n\x08\x18\r\n0\r\n\r\n")
        assert read_status(sock) == 204
    assert (raft.processed, handlers.received.unknown) == ([], 1)


def test_made_up_types_are_told_of_in_the_log_so_many_times(
    handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(24, 324):
        body = Message(type=number).marshal()
        assert reply_of_handlers(handlers, "POST", "/raft", peer_headers(), body).status == 204
    assert handlers.received.unknown == 300
    assert len(caplog.records) == 32


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 18, 23])
def test_every_other_message_is_delivered(raft: FakeRaft, ask: Ask, number: int) -> None:
    assert reply_to(ask, Message(type=number, from_=7).marshal()).status == 204
    assert [message.type for message in raft.processed] == [number]


def test_an_empty_body_is_a_valid_hup(raft: FakeRaft, handlers: Handlers, ask: Ask) -> None:
    assert reply_to(ask, b"").status == 204
    assert raft.processed == []
    assert handlers.received.ignored == 1


class BrokenRejection(RequestRejected):
    """A subclass that has forgotten its base class."""

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("secret"),
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        RudeError(),
        BrokenRejection(),
    ],
)
def test_a_raising_process_is_answered_500_and_the_connection_closed(
    raft: FakeRaft,
    handlers: Handlers,
    ask: Ask,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    raft.process_error = error
    reply = reply_to(ask)
    assert (reply.status, reply.body) == (500, b"error processing raft message\n")
    assert reply.headers.items() >= TEXT_HEADERS.items()
    assert reply.headers["x-etcd-cluster-id"] == f"{CLUSTER_ID:x}"
    assert reply.close
    assert handlers.received.process_failures == 1
    assert handlers.received.bytes_by_sender == {1: len(MESSAGE)}
    (record,) = [record for record in caplog.records if record.name == "pipeline.receive.handlers"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("failed to process Raft message of 1 from 127.0.0.1:")
    raft.process_error = None
    assert reply_to(ask).status == 204


@pytest.mark.parametrize("log_error", [SystemExit, RecursionError])
def test_no_thread_ends_of_a_process_and_a_log_handler_that_raise_together(
    raft: FakeRaft, handlers: Handlers, ask: Ask, log_error: type[BaseException]
) -> None:
    raft.process_error = RudeError()
    with handler_that_raises("", log_error) as handler:
        for _ in range(CONFIG.handlers + 1):
            assert reply_to(ask).status == 500
        assert ask("POST", "/raft", peer_headers(x_etcd_cluster_id="1"), MESSAGE).status == 412
    assert handler.raised >= CONFIG.handlers + 2
    raft.process_error = None
    assert reply_to(ask).status == 204
    assert handlers.received.process_failures == CONFIG.handlers + 1


def test_a_process_that_only_makes_a_coroutine_has_processed_nothing(
    raft: FakeRaft, handlers: Handlers, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    raft.process = Unawaited()  # type: ignore[method-assign]
    for _ in range(3):
        reply = reply_to(ask)
        assert (reply.status, reply.body) == (500, b"error processing raft message\n")
    assert handlers.received.process_failures == 3
    (text,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert text.startswith("process: returned <coroutine object ")


def test_a_process_that_only_makes_a_coroutine_of_a_chunked_message_is_answered_500(
    raft: FakeRaft, url: str
) -> None:
    raft.process = Unawaited()  # type: ignore[method-assign]
    with dial(url) as sock:
        sock.sendall(raw_head(CHUNKED) + b"2\r\n\x08\x08\r\n0\r\n\r\n")
        assert read_status(sock) == 500


def test_a_server_that_processes_in_its_main_thread_can_be_interrupted(
    raft: FakeRaft, handlers: Handlers
) -> None:
    raft.process_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        reply_of_handlers(handlers, "POST", "/raft", peer_headers(), MESSAGE)
    assert handlers.received.process_failures == 1


@pytest.mark.parametrize(
    ("rejection", "body", "content_type"),
    [
        pytest.param(RequestRejected(503, b"later"), b"later", TEXT_HEADERS["content-type"],
                     id="text"),
        pytest.param(RequestRejected(409, b"{}", "application/json"), b"{}", "application/json",
                     id="json"),
        pytest.param(RequestRejected(204, b"dropped"), b"", None, id="204 has no body"),
        pytest.param(RequestRejected(304, b"dropped"), b"", None, id="304 has no body"),
        pytest.param(RequestRejected(599), b"", TEXT_HEADERS["content-type"], id="no such status"),
    ],
)  # fmt: skip
def test_process_may_choose_the_answer(
    *,
    raft: FakeRaft,
    handlers: Handlers,
    ask: Ask,
    rejection: RequestRejected,
    body: bytes,
    content_type: str | None,
) -> None:
    raft.process_error = rejection
    reply = reply_to(ask)
    assert (reply.status, reply.body, reply.close) == (rejection.status, body, False)
    assert reply.headers.get("content-type") == content_type
    assert reply.headers["x-etcd-cluster-id"] == f"{CLUSTER_ID:x}"
    assert handlers.received.process_failures == 0


def test_a_sender_is_shown_before_its_body_is_looked_at(ask: Ask, senders: SeenSenders) -> None:
    urls = "http://10.0.0.1:2380,http://10.0.0.2:2380"
    assert reply_to(ask, b"malformed garbage", x_server_from="A1", x_peerurls=urls).status == 400
    ((sender, seen, caller),) = senders.seen
    assert (sender, seen) == (0xA1, ("http://10.0.0.1:2380", "http://10.0.0.2:2380"))
    assert caller.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    "changes",
    [
        {"x_server_from": None},
        {"x_server_from": "x"},
        {"x_peerurls": None},
        {"x_peerurls": ""},
        {"x_etcd_cluster_id": "1"},
    ],
    ids=["no id", "malformed id", "no URLs", "empty URLs", "another cluster"],
)
def test_a_sender_is_not_shown(
    ask: Ask, senders: SeenSenders, changes: dict[str, str | None]
) -> None:
    reply_to(ask, **changes)
    assert senders.seen == []


def test_probing_says_we_are_there_and_what_time_it_is(ask: Ask) -> None:
    reply = ask("GET", "/raft/probing", {}, b"")
    assert reply.status == 200
    assert reply.body.endswith(b"\n")
    answer = json.loads(reply.body)
    assert set(answer) == {"OK", "Now"}
    assert answer["OK"] is True
    now = datetime.fromisoformat(answer["Now"])
    assert abs(datetime.now(UTC) - now) < timedelta(minutes=1)
    assert answer["Now"].endswith("Z")


def test_our_version_is_told_as_etcd_tells_its(ask: Ask) -> None:
    reply = ask("GET", "/version", {}, b"")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert json.loads(reply.body) == {"etcdserver": "3.5.1", "etcdcluster": "3.0.0"}


def test_our_version_is_asked_for_with_get(ask: Ask) -> None:
    reply = ask("POST", "/version", {}, b"")
    assert (reply.status, reply.body) == (405, b"Method Not Allowed\n")
    assert reply.headers["allow"] == "GET"


@pytest.mark.parametrize("kind", ["msgapp", "message", "strange"])
def test_a_stream_is_refused_in_the_one_way_that_leaves_the_peer_active(
    ask: Ask, kind: str
) -> None:
    headers = peer_headers(x_raft_to="2")
    reply = ask("GET", f"/raft/stream/{kind}/1", headers, b"")
    assert (reply.status, reply.body, reply.close) == (404, b"404 page not found\n", False)
    assert "x-server-version" not in reply.headers


def test_a_stream_is_asked_for_with_get(ask: Ask) -> None:
    reply = ask("POST", "/raft/stream/message/1", peer_headers(), b"")
    assert (reply.status, reply.body) == (405, b"Method Not Allowed\n")
    assert reply.headers["allow"] == "GET"
    assert "x-server-version" not in reply.headers


@pytest.mark.parametrize(
    ("method", "changes", "status"),
    [
        ("GET", {}, 405),
        ("POST", {"x_server_version": None}, 412),
        ("POST", {"x_etcd_cluster_id": "1"}, 412),
        ("POST", {}, 501),
    ],
)
def test_a_snapshot_is_not_taken_without_a_directory(
    ask: Ask, method: str, changes: dict[str, str | None], status: int
) -> None:
    assert ask(method, "/raft/snapshot", peer_headers(**changes), b"").status == status


def test_a_front_that_cannot_detach_takes_no_snapshot(raft: FakeRaft, tmp_path: Path) -> None:
    config = ReceiverConfig(snapshot_dir=tmp_path)
    handlers = handlers_of(raft, config)
    request = Request("POST", "/raft/snapshot", peer_headers(), "127.0.0.1:54321")
    answer = handlers.check(request)
    assert answer is not None
    assert answer.status == 501
    assert handlers.check(request, can_detach=True) is None


@pytest.mark.parametrize(
    "path",
    ["/", "/version/", "/raft/", "//raft", "/Raft", "/raft/stream", "/raft/probing/", "/raft/x",
     "/%72aft", "/raft%2F", "%2Fraft", "/./raft", "http://test/raft", "*", "/raft;a=b"],
)  # fmt: skip
def test_any_other_path_is_not_found(raft: FakeRaft, ask: Ask, path: str) -> None:
    reply = ask("POST", path, peer_headers(), MESSAGE)
    assert reply.status in ((400, 404) if path in ("*", "%2Fraft") else (404,))
    assert raft.processed == []
    if reply.status == 404:
        assert reply.body == b"404 page not found\n"
        assert reply.headers.items() >= TEXT_HEADERS.items()
        assert "x-etcd-cluster-id" not in reply.headers


def test_the_query_is_not_part_of_the_path(raft: FakeRaft, url: str) -> None:
    assert reply_of_socket(url, "POST", "/raft?x=/y", peer_headers(), MESSAGE).status == 204
    assert raft.processed == [HEARTBEAT]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity", ""])
def test_an_encoded_body_is_answered_415(
    raft: FakeRaft, handlers: Handlers, ask: Ask, encoding: str
) -> None:
    reply = reply_to(ask, content_encoding=encoding)
    assert (reply.status, reply.close) == (415, True)
    assert raft.processed == []
    assert handlers.received.failures == 1


def message_of_size(size_bytes: int) -> bytes:
    """Return an encoded MsgApp of exactly so many bytes."""
    body = Message(
        type=MessageType.APP, from_=1, context=bytes(size_bytes - len(MESSAGE) - 3)
    ).marshal()
    assert len(body) == size_bytes
    return body


def test_the_largest_body_allowed_is_taken(raft: FakeRaft, ask: Ask) -> None:
    assert reply_to(ask, message_of_size(CONFIG.max_body_bytes)).status == 204
    assert len(raft.processed) == 1


def test_a_body_one_byte_too_large_is_answered_413(
    raft: FakeRaft, handlers: Handlers, ask: Ask
) -> None:
    reply = reply_to(ask, message_of_size(CONFIG.max_body_bytes + 1))
    assert (reply.status, reply.close) == (413, True)
    assert raft.processed == []
    assert handlers.received.failures == 1


def test_counts_bytes_by_sender(handlers: Handlers, ask: Ask) -> None:
    other = Message(type=MessageType.APP, from_=2**64 - 1).marshal()
    for body in (MESSAGE, other, MESSAGE):
        reply_to(ask, body)
    assert handlers.received.bytes_by_sender == {1: 2 * len(MESSAGE), 2**64 - 1: len(other)}
    assert handlers.received.bytes_of_others == 0


def test_made_up_senders_cost_a_bounded_number_of_counters(handlers: Handlers) -> None:
    total = 0
    for sender in range(300):
        body = Message(type=MessageType.APP, from_=sender).marshal()
        total += len(body)
        assert reply_of_handlers(handlers, "POST", "/raft", peer_headers(), body).status == 204
    assert len(handlers.received.bytes_by_sender) == 128
    assert handlers.received.bytes_of_others > 0
    assert (
        sum(handlers.received.bytes_by_sender.values()) + handlers.received.bytes_of_others == total
    )


def test_counts_exactly_with_many_threads(raft: FakeRaft, handlers: Handlers) -> None:
    request = Request("POST", "/raft", peer_headers(), "127.0.0.1:1")

    def work() -> None:
        for _ in range(200):
            handlers.deliver(request, MESSAGE)
            handlers.deliver(request, b"\x08")
            handlers.deliver(request, b"")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_TIMEOUT)
    assert len(raft.processed) == 1600
    assert handlers.received.bytes_by_sender == {1: 1600 * len(MESSAGE), 0: 0}
    assert (handlers.received.failures, handlers.received.ignored) == (1600, 1600)


def test_a_flood_of_strangers_is_warned_of_once(
    handlers: Handlers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG, "pipeline.receive.handlers")
    now = 100.0
    monkeypatch.setattr("pipeline.logs.time.monotonic", lambda: now)

    def levels() -> list[str]:
        caplog.clear()
        for changes in ({"x_etcd_cluster_id": "1"}, {"x_server_version": "1.0.0"}) * 2:
            request = Request("POST", "/raft", peer_headers(**changes), "127.0.0.1:1")
            handlers.check(request)
        return [record.levelname for record in caplog.records]

    assert levels() == ["WARNING", "WARNING", "DEBUG", "DEBUG"]
    assert levels() == ["DEBUG"] * 4
    now += 1.0
    assert levels() == ["WARNING", "WARNING", "DEBUG", "DEBUG"]


HEADER_NAMES = ["content-length", "content-encoding", *peer_headers(), "x-raft-to"]


@given(
    method=st.sampled_from(["POST", "GET", ""]) | st.text(),
    path=st.sampled_from(["/raft", "/raft/snapshot", "/raft/probing", "/raft/stream/message/1"])
    | st.text(),
    changes=st.dictionaries(st.sampled_from(HEADER_NAMES), st.none() | st.text()),
    body=st.binary(max_size=64),
)
def test_any_request_is_answered_with_a_known_status_and_clean_headers(
    method: str, path: str, changes: dict[str, str | None], body: bytes
) -> None:
    handlers = handlers_of(FakeRaft(), CONFIG)
    request = Request(method, path, peer_headers(**changes), "127.0.0.1:1")
    answer = handlers.check(request)
    if answer is None:
        answer = handlers.deliver(request, body)
    assert answer.status in (200, 204, 400, 404, 405, 412, 413, 415, 501)
    for name, value in answer.headers:
        assert f"{name}{value}".isascii()
        assert f"{name}{value}".isprintable()


CHUNKED = "transfer-encoding: chunked"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="TLS hello"),
        pytest.param(b"\x00" * 3000, 400, id="zeros"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="HTTP/2 preface"),
        pytest.param(b"POST /raft\r\n\r\n", 400, id="no version"),
        pytest.param(raw_head(line="POST /raft HTTP/1.1 x"), 400, id="four words"),
        pytest.param(raw_head(line="POST\t/raft HTTP/1.1"), 400, id="tab"),
        pytest.param(raw_head(line="POST /ra\x00ft HTTP/1.1"), 400, id="NUL in path"),
        pytest.param(raw_head("x: a\x00b"), 400, id="NUL in header"),
        pytest.param(raw_head("no colon"), 400, id="header without colon"),
        pytest.param(raw_head("name : x"), 400, id="space before colon"),
        pytest.param(b"POST /raft HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(raw_head("content-length: x"), 400, id="length not a number"),
        pytest.param(raw_head("content-length: -1"), 400, id="negative length"),
        pytest.param(raw_head("content-length: +1"), 400, id="signed length"),
        pytest.param(raw_head("content-length: 1", "content-length: 2"), 400, id="two lengths"),
        pytest.param(raw_head("content-length: 1, 2"), 400, id="two lengths in one"),
        pytest.param(raw_head("transfer-encoding: gzip, chunked"), 400, id="transfer encoding"),
        pytest.param(raw_head(CHUNKED) + b"x\r\n", 400, id="chunk size not hex"),
        pytest.param(raw_head(CHUNKED) + b"-1\r\n", 400, id="negative chunk size"),
        pytest.param(raw_head(CHUNKED) + b"1\r\nabc", 400, id="chunk too long"),
        pytest.param(raw_head("x: " + "y" * 3000), 431, id="head too large"),
        pytest.param(raw_head(line="POST /" + "r" * 3000 + " HTTP/1.1"), 431, id="line too long"),
        pytest.param(raw_head(f"content-length: {1 << 62}"), 413, id="huge length"),
        pytest.param(raw_head("content-length: " + "9" * 20), 413, id="length past 64 bits"),
        pytest.param(raw_head(CHUNKED) + b"3e9\r\n" + bytes(1001), 413, id="chunks too large"),
        pytest.param(raw_head("content-encoding: gzip", "content-length: 9"), 415, id="gzip"),
        pytest.param(raw_head("x: " + "y" * 3000)[:2500], 431, id="head too large and unfinished"),
    ],
)
def test_bad_input_is_answered_and_the_listener_goes_on(
    raft: FakeRaft, url: str, sent: bytes, status: int
) -> None:
    with dial(url) as sock:
        sock.sendall(sent)
        assert read_status(sock) == status
    assert raft.processed == []
    assert post_heartbeat(url).status == 204
    assert raft.processed == [HEARTBEAT]


def test_garbage_after_an_early_answer_ends_the_connection(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with dial(url) as sock:
        sock.sendall(raw_head(CHUNKED, headers=peer_headers(x_etcd_cluster_id="1")))
        assert read_status(sock) == 412
        sock.sendall(b"zz\r\n")
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    assert post_heartbeat(url).status == 204
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("cluster_id", "failures"), [(f"{CLUSTER_ID:x}", 1), ("1", 0)], ids=["peer", "stranger"]
)
def test_garbage_together_with_a_head_is_answered_once(
    handlers: Handlers,
    url: str,
    caplog: pytest.LogCaptureFixture,
    cluster_id: str,
    failures: int,
) -> None:
    head = raw_head(CHUNKED, headers=peer_headers(x_etcd_cluster_id=cluster_id))
    with dial(url) as sock, sock.makefile("rb") as received:
        sock.sendall(head + b"zz\r\n")
        assert received.read().count(b"HTTP/1.1 ") == 1
    assert post_heartbeat(url).status == 204
    assert handlers.received.failures == failures
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"POST /ra", id="half a line"),
        pytest.param(GOOD[:40], id="half a head"),
        pytest.param(GOOD[:-1], id="body but one byte"),
        pytest.param(raw_head(CHUNKED) + b"5\r\nab", id="half a chunk"),
    ],
)
@pytest.mark.parametrize("ending", ["close", "reset"])
def test_a_caller_that_goes_away_is_forgotten(
    raft: FakeRaft, url: str, sent: bytes, ending: str
) -> None:
    sock = dial(url)
    sock.sendall(sent)
    if ending == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    assert post_heartbeat(url).status == 204
    assert raft.processed == [HEARTBEAT]


def test_a_chunked_body_is_put_together(raft: FakeRaft, url: str) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in MESSAGE)
    with dial(url) as sock:
        sock.sendall(raw_head(CHUNKED) + chunks + b"0\r\n\r\n")
        assert read_status(sock) == 204
    assert raft.processed == [HEARTBEAT]


def test_a_body_that_comes_byte_by_byte_is_put_together(raft: FakeRaft, url: str) -> None:
    with dial(url) as sock:
        for at in range(len(GOOD)):
            sock.sendall(GOOD[at : at + 1])
        assert read_status(sock) == 204
    assert raft.processed == [HEARTBEAT]


def test_requests_sent_ahead_are_answered_in_order(raft: FakeRaft, url: str) -> None:
    bad = raw_head("content-length: 1") + b"\x08"
    with dial(url) as sock, sock.makefile("rb") as lines:
        sock.sendall(GOOD + bad + GOOD)
        statuses = []
        while len(statuses) < 3:
            line = lines.readline()
            assert line, "the connection was closed"
            if line.startswith(b"HTTP/1.1 "):
                statuses.append(int(line.split()[1]))
    assert statuses == [204, 400, 204]
    assert raft.processed == [HEARTBEAT] * 2


def test_continue_is_sent_to_a_peer_and_not_to_a_stranger(raft: FakeRaft, url: str) -> None:
    expect = ("expect: 100-continue", f"content-length: {len(MESSAGE)}")
    with dial(url) as sock, sock.makefile("rb") as lines:
        sock.sendall(raw_head(*expect))
        assert lines.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert lines.readline() == b"\r\n"
        sock.sendall(MESSAGE)
        assert lines.readline().startswith(b"HTTP/1.1 204 ")
    assert raft.processed == [HEARTBEAT]
    with dial(url) as sock:
        sock.sendall(raw_head(*expect, headers=peer_headers(x_server_version=None)))
        assert read_status(sock) == 412


def drive(app: Any, scope: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run an ASGI application as a server would; return what it sent."""
    sent = []

    async def receive() -> dict[str, Any]:
        if not events:
            await asyncio.Event().wait()
        return events.pop(0)

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    async def run() -> None:
        await asyncio.wait_for(app(scope, receive, send), LONG_TIMEOUT)

    asyncio.run(run())
    return sent


LIFESPAN = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]


def http_scope(**changes: Any) -> dict[str, Any]:
    headers = [(name.encode(), value.encode()) for name, value in peer_headers().items()]
    return {
        "type": "http", "method": "POST", "path": "/raft", "raw_path": b"/raft",
        "headers": headers, "client": ("::1", 5), **changes,
    }  # fmt: skip


@pytest.fixture
def app(handlers: Handlers) -> Iterator[Any]:
    app = asgi_app(handlers, CONFIG)
    yield app
    drive(app, {"type": "lifespan"}, list(LIFESPAN))


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_asgi_delivers(raft: FakeRaft, app: Any) -> None:
    start, body = drive(app, http_scope(), [part(MESSAGE[:3], more=True), part(MESSAGE[3:])])
    assert start["status"] == 204
    assert all(name == name.lower() for name, _ in start["headers"])
    assert body["body"] == b""
    assert raft.processed == [HEARTBEAT]


def test_asgi_serves_servers_that_give_no_raw_path_and_no_client(raft: FakeRaft, app: Any) -> None:
    start, _ = drive(app, http_scope(raw_path=None, client=None), [part(MESSAGE)])
    assert start["status"] == 204
    assert raft.processed == [HEARTBEAT]


def test_asgi_shows_a_caller_of_ipv4_as_one(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    drive(app, http_scope(client=("::ffff:10.0.0.9", 5)), [part(b"no message")])
    assert "from 10.0.0.9:5" in caplog.text


def test_asgi_takes_the_first_of_repeated_headers_as_go_does(app: Any) -> None:
    scope = http_scope()
    scope["headers"].append((b"x-etcd-cluster-id", b"1"))
    assert drive(app, scope, [part(MESSAGE)])[0]["status"] == 204
    scope["headers"].insert(0, (b"x-etcd-cluster-id", b"1"))
    assert drive(app, scope, [part(MESSAGE)])[0]["status"] == 412


def test_asgi_counts_a_disconnect_mid_body_and_answers_nobody(
    raft: FakeRaft, handlers: Handlers, app: Any
) -> None:
    events = [part(MESSAGE[:3], more=True), {"type": "http.disconnect"}]
    assert drive(app, http_scope(), events) == []
    assert handlers.received.failures == 1
    assert raft.processed == []


def test_asgi_answers_a_stalled_body_400(raft: FakeRaft, handlers: Handlers) -> None:
    app = asgi_app(handlers, ReceiverConfig(stall_timeout_s=0.01))
    start, body = drive(app, http_scope(), [part(MESSAGE[:3], more=True)])
    assert (start["status"], body["body"]) == (400, b"error reading raft message\n")
    assert (b"connection", b"close") in start["headers"]
    assert handlers.received.failures == 1
    assert raft.processed == []


def test_asgi_answers_a_body_that_drips_400(raft: FakeRaft, handlers: Handlers) -> None:
    app = asgi_app(handlers, ReceiverConfig(stall_timeout_s=0.3, min_body_rate=100_000))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)  # never for as long as a stall may last
        return part(b"x", more=True)

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    async def serve() -> None:
        async with asyncio.timeout(LONG_TIMEOUT):
            await app(http_scope(), receive, send)

    asyncio.run(serve())
    assert sent[0]["status"] == 400
    assert handlers.received.failures == 1
    assert raft.processed == []


def test_asgi_logs_ipv6_callers_with_brackets(
    raft: FakeRaft, app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    raft.process_error = RuntimeError("blah")
    drive(app, http_scope(), [part(MESSAGE)])
    assert "from [::1]:5" in caplog.text


def test_asgi_refuses_what_is_neither_http_nor_lifespan(app: Any) -> None:
    with pytest.raises(ValueError, match="websocket"):
        drive(app, {"type": "websocket"}, [])


def test_asgi_answers_lifespan_and_serves_again_after_it(raft: FakeRaft, app: Any) -> None:
    for round_ in (1, 2):
        sent = drive(app, {"type": "lifespan"}, list(LIFESPAN))
        assert [event["type"] for event in sent] == [
            "lifespan.startup.complete",
            "lifespan.shutdown.complete",
        ]
        assert drive(app, http_scope(), [part(MESSAGE)])[0]["status"] == 204
        assert len(raft.processed) == round_


def test_asgi_survives_a_handler_that_fails(
    app: Any, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(handlers, "deliver", no_memory)
        for _ in range(2 * CONFIG.handlers):
            with pytest.raises(Exception, match="MemoryError"):
                drive(app, http_scope(), [part(MESSAGE)])
    assert drive(app, http_scope(), [part(MESSAGE)])[0]["status"] == 204
