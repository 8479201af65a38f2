"""Sending over mutual TLS: whom we talk to, what ends a handshake, and rotation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pipeline.aio
from pipeline import (
    EncodedMessage,
    MemberRemovedError,
    MessageType,
    Pipeline,
    Raft,
    TLSInfo,
    Transport,
    TransportConfig,
    UsageError,
)
from pipeline.net.dialling import Dialer
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT, SHORT_TIMEOUT, ipv6
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
    Connection,
    Request,
    ScriptedServer,
    in_turn,
    once_idle,
    then_close,
)
from tests.support.tls import DAY, Authority, now
from tests.support.waiting import eventually

HEARTBEAT, PROP, SNAP = MessageType.HEARTBEAT, MessageType.PROP, MessageType.SNAP
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def sender(
    server: ScriptedServer | str, info: TLSInfo, raft: Raft | None = None, **config: object
) -> Pipeline:
    return pipeline_to(server, raft, credentials=Credentials(info), **config)


def failure_of(
    server: ScriptedServer | str, info: TLSInfo, caplog: pytest.LogCaptureFixture
) -> str:
    """Send one message that must fail without a request; what the log says of it."""
    caplog.set_level(logging.DEBUG, "pipeline.send.status")
    raft = FakeRaft()
    with sender(server, info, raft, connections=1) as pipeline:
        pipeline.send(message())
        assert raft.wait_unreachable(1) == [PEER]
        books = settle(pipeline)
        assert (books.sent, books.failed) == (0, 1)
    if isinstance(server, ScriptedServer):
        assert server.requests == []
    return "\n".join(caplog.messages)


# What goes through


@pytest.mark.parametrize("version", VERSIONS)
def test_messages_of_any_size_go_over_mutual_tls(
    authority: Authority, version: ssl.TLSVersion
) -> None:
    subjects = []

    def on_connect(connection: Connection) -> None:
        assert isinstance(connection.sock, ssl.SSLSocket)
        assert connection.sock.version() == version.name.replace("TLSv1_", "TLSv1.")
        subjects.append(connection.sock.getpeercert())

    big = bytes(range(256)) * (1 << 18)  # 64 MiB
    bodies = [b"", b"small", big[: 16 * 1024], big[: (1 << 20) + 7], big]
    with (
        ScriptedServer(tls=authority.server(maximum=version), on_connect=on_connect) as server,
        sender(server, authority.info(), connections=1) as pipeline,
    ):
        for body in bodies:
            pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
            settle(pipeline)
        assert [request.body for request in server.requests] == bodies
        assert {request.connection for request in server.requests} == {0}
        assert settle(pipeline).sent_bytes == sum(map(len, bodies))
    assert len(subjects) == 1
    assert subjects[0]


def test_a_gathered_message_arrives_as_it_is(authority: Authority) -> None:
    sent = message(SNAP, bytes(range(256)) * 4096)
    with (
        ScriptedServer(tls=authority.server()) as server,
        sender(server, authority.info()) as pipeline,
    ):
        pipeline.send(sent)
        (request,) = server.wait_requests(1)
        assert request.body == sent.marshal()
        assert request.headers["Host"] == f"127.0.0.1:{server.port}"


def test_four_connections_carry_a_thousand_messages(authority: Authority) -> None:
    with (
        ScriptedServer(tls=authority.server()) as server,
        sender(server, authority.info(), queue_length=1000) as pipeline,
    ):
        for _ in range(1000):
            pipeline.send(message())
        books = settle(pipeline)
        assert (books.sent, books.failed) == (1000, 0)
        assert len(server.connections) <= 4
        assert_balanced(books)


# Whom we talk to


def test_a_server_of_another_authority_is_refused(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    with ScriptedServer(tls=Authority(tmp_path / "other").server()) as server:
        text = failure_of(server, authority.info(), caplog)
    assert "TLS handshake: certificate verify failed: " in text
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # time does not heal it


def test_a_server_with_another_name_is_refused(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(tls=authority.server("other", "10.1.2.3", "peer.test")) as server:
        text = failure_of(server, authority.info(), caplog)
    assert "certificate verify failed: IP address mismatch" in text


def test_server_name_is_what_the_server_must_prove(authority: Authority) -> None:
    with (
        ScriptedServer(tls=authority.server("other", "peer.test")) as server,
        sender(server, authority.info(server_name="peer.test")) as pipeline,
    ):
        pipeline.send(message())
        assert settle(pipeline).sent == 1


@ipv6
def test_an_ipv6_address_is_proven_without_its_brackets(authority: Authority) -> None:
    server = ScriptedServer(host="::1", tls=authority.server("six", "::1"))
    with server, sender(f"https://[::1]:{server.port}", authority.info()) as pipeline:
        pipeline.send(message())
        assert settle(pipeline).sent == 1


@pytest.mark.parametrize("server_name", [None, "node.test."])
@pytest.mark.parametrize("channel", ["message", "snapshot", "probe"])
def test_an_absolute_name_is_proven_without_its_dot(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, channel: str, server_name: str | None
) -> None:
    """RFC 6066 section 3: SNI has none, and certificates have none."""
    context = authority.server("server", "node.test")
    asked: list[str | None] = []
    context.sni_callback = lambda tls, name, context: asked.append(name)
    host = "127.0.0.1" if server_name else "node.test."
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    with ScriptedServer(tls=context) as server:
        found = [(*entry[:4], ("127.0.0.1", server.port)) for entry in found]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        assert failure_by(channel, f"https://{host}:{server.port}", authority, server_name) == ""
    assert asked == ["node.test"]


@pytest.mark.parametrize("channel", ["message", "snapshot", "probe"])
def test_a_certificate_with_a_name_that_is_no_text_is_refused(
    authority: Authority, caplog: pytest.LogCaptureFixture, channel: str
) -> None:
    """OpenSSL verifies it, and Python cannot read it."""
    cert, key = authority.issue("odd", "127.0.0.1", "xx-odd.test")
    authority.rename(cert, b"xx-odd", b"\xff\xfe-odd")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with ScriptedServer(tls=context) as server:
        failure = failure_by(channel, server.url, authority)
        assert server.requests == []
    assert "certificate refused: it cannot be read" in failure
    assert "internal error" not in caplog.text


@pytest.mark.parametrize("name", ["a..test", ".test", f"{'a' * 64}.test"])
@pytest.mark.parametrize("channel", ["message", "snapshot", "probe"])
def test_a_host_that_no_certificate_can_prove_is_a_failure_like_another(
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    channel: str,
    name: str,
) -> None:
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    with ScriptedServer(tls=authority.server()) as server:
        found = [(*entry[:4], ("127.0.0.1", server.port)) for entry in found]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        failure = failure_by(channel, f"https://{name}:{server.port}", authority)
    assert f"'{name}' is not a name that a certificate can prove" in failure
    assert "internal error" not in caplog.text


def failure_by(channel: str, url: str, authority: Authority, server_name: str | None = None) -> str:
    """Say why a message, a snapshot or a probe did not reach ``url``; empty if it did."""
    raft = FakeRaft()
    config = TransportConfig(probe_interval_s=0.01 if channel == "probe" else 0)
    info = authority.info(server_name=server_name)
    with Transport(MEMBER, CLUSTER, raft, tls=info, config=config) as transport:
        transport.add_peer(PEER, [url])
        if channel == "probe":
            eventually(lambda: transport.probe_stats()[PEER].total > 0)
            return transport.probe_stats()[PEER].last_error
        if channel == "snapshot":
            error = transport.send_snapshot(message(SNAP), b"x").future.exception(LONG_TIMEOUT)
            return str(error or "")
        reasons: list[str] = []
        status = transport._peers[PEER].status
        status.deactivate = lambda source, action, reason, url: reasons.append(reason)  # type: ignore[method-assign, assignment, return-value]
        transport.send([message()])

        def is_done() -> bool:
            stats = transport.stats()[PEER]  # at one instant: in between it would be in flight
            return stats.sent + stats.failed == 1

        eventually(is_done)
        return "".join(reasons)


def test_an_expired_certificate_is_refused(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(tls=authority.server(not_after=now() - DAY)) as server:
        text = failure_of(server, authority.info(), caplog)
    assert "certificate verify failed: certificate has expired" in text


def test_a_revoked_certificate_is_refused(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(tls=authority.server("server")) as server:
        crl = authority.revoke(authority.directory / "server.pem")
        text = failure_of(server, authority.info(crl_file=crl), caplog)
    assert "certificate verify failed: certificate revoked" in text


def test_the_rules_hold_for_servers_as_well(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(tls=authority.server()) as server:
        text = failure_of(server, authority.info(allowed_hostnames=("peer.test",)), caplog)
    assert "certificate refused: it is valid for none of the allowed host names" in text


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_that_refuses_our_certificate_says_why(
    authority: Authority,
    tmp_path: Path,
    version: ssl.TLSVersion,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In TLS 1.3 the alert comes when the handshake is over for us, in place of an answer."""
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").info(trusted_ca_file=authority.ca_file)
    with ScriptedServer(tls=authority.server(maximum=version)) as server:
        assert "alert unknown ca" in failure_of(server, stranger, caplog)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_the_next_url_is_taken_when_a_server_fails_verification(authority: Authority) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(tls=authority.server("other", "peer.test")) as bad,
        ScriptedServer(tls=authority.server()) as good,
        pipeline_to(
            [bad.url, good.url], raft, connections=1, credentials=Credentials(authority.info())
        ) as pipeline,
    ):
        while pipeline.picker.pick() != bad.url:
            pipeline.picker.unreachable(good.url)
        pipeline.send(message())
        raft.wait_unreachable(1)
        pipeline.send(message())
        good.wait_requests(1)
        books = settle(pipeline)
        assert (books.sent, books.failed) == (1, 1)


def test_https_needs_tls() -> None:
    with pytest.raises(UsageError, match="https needs tls"):
        Pipeline(PEER, ["https://127.0.0.1:2380"], FakeRaft(), member_id=1, cluster_id=1)
    with Transport(1, 1, FakeRaft()) as transport:
        with pytest.raises(UsageError, match="https needs tls"):
            transport.add_peer(2, ["https://127.0.0.1:2380"])
        assert transport.stats() == {}


def test_tls_files_are_needed_at_once(tmp_path: Path) -> None:
    info = TLSInfo(cert_file="no", key_file="such", trusted_ca_file=tmp_path / "file")
    with pytest.raises(UsageError, match=r"cert_file, key_file: .*No such file"):
        Transport(1, 1, FakeRaft(), tls=info)
    with pytest.raises(UsageError, match="is not a TLSInfo"):
        Transport(1, 1, FakeRaft(), tls="certs")  # type: ignore[arg-type]


# What ends a handshake


@contextlib.contextmanager
def silent() -> socket.socket:  # type: ignore[misc]
    """A server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def url_of(listener: socket.socket) -> str:
    return f"https://127.0.0.1:{listener.getsockname()[1]}"


def test_a_handshake_that_is_not_answered_is_given_up(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.net.dialling.HANDSHAKE_TIMEOUT_S", 0.1)
    with silent() as listener:
        assert "TLS handshake: not done within its timeout" in failure_of(
            url_of(listener), authority.info(), caplog
        )


def test_a_handshake_that_trickles_is_given_up_all_the_same(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server sends does not put off the end of the handshake."""
    monkeypatch.setattr("pipeline.net.dialling.HANDSHAKE_TIMEOUT_S", 0.3)
    done = threading.Event()

    def trickle() -> None:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            # The head of a record of 16 KiB, then a byte of it now and then.
            sock.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
            while not done.wait(0.01):
                sock.send(b"\x00")

    with silent() as listener:
        thread = threading.Thread(target=trickle)
        thread.start()
        text = failure_of(url_of(listener), authority.info(), caplog)
        done.set()
        thread.join(LONG_TIMEOUT)
    assert "TLS handshake" in text


def test_stop_does_not_wait_for_a_handshake(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.net.dialling.HANDSHAKE_TIMEOUT_S", LONG_TIMEOUT)
    monkeypatch.setattr("pipeline.send.pipeline.STOP_TIMEOUT_S", LONG_TIMEOUT)
    raft = FakeRaft()
    with silent() as listener, sender(url_of(listener), authority.info(), raft) as pipeline:
        for _ in range(10):
            pipeline.send(message())
        accepted = [listener.accept()[0] for _ in range(4)]
        for sock in accepted:
            assert sock.recv(1) == b"\x16"  # the handshake has begun
        before = time.monotonic()
        assert pipeline.stop() == 6
        assert time.monotonic() - before < LONG_TIMEOUT / 2
        assert raft.unreachable == [PEER] * 4
        for sock in accepted:
            sock.close()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",  # an alert: handshake failure
        b"\x16\x03\x03\x00\x05hello",
        bytes(4096),
    ],
    ids=["nothing", "HTTP", "alert", "record", "zeros"],
)
def test_what_is_no_handshake_is_a_failure(
    authority: Authority, caplog: pytest.LogCaptureFixture, said: bytes
) -> None:
    def speak() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65536)
            sock.sendall(said)

    with silent() as listener:
        thread = threading.Thread(target=speak)
        thread.start()
        text = failure_of(url_of(listener), authority.info(), caplog)
        thread.join(LONG_TIMEOUT)
    assert "TLS handshake: " in text


# Connections that end, and what comes besides answers


def notify_close(connection: Connection) -> None:
    """End the TLS stream in order, as Go does, and the connection after it."""
    assert isinstance(connection.sock, ssl.SSLSocket)
    with contextlib.suppress(OSError):
        connection.sock.unwrap()
    connection.close()


@pytest.mark.parametrize("type_", [HEARTBEAT, PROP])
def test_a_close_notify_at_idle_costs_no_message(authority: Authority, type_: MessageType) -> None:
    with (
        ScriptedServer(once_idle(notify_close), tls=authority.server()) as server,
        sender(server, authority.info(), raft := FakeRaft(), connections=1) as pipeline,
    ):
        for count in range(1, 4):
            pipeline.send(message(type_))
            settle(pipeline)
            server.is_idle.release()
            server.wait_for(lambda ended=count: server.ended == ended)
        assert pipeline.stats().sent == 3
        assert raft.unreachable == []


@pytest.mark.parametrize(
    ("type_", "is_sent_again"), [(HEARTBEAT, True), (SNAP, True), (PROP, False)]
)
def test_a_close_notify_in_place_of_an_answer_is_that_of_a_stale_connection(
    authority: Authority, type_: MessageType, is_sent_again: bool
) -> None:
    """A MsgProp of which a byte may have left is never sent again."""

    def close(connection: Connection, request: Request) -> None:
        notify_close(connection)

    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(OK, close, OK), tls=authority.server()) as server,
        sender(server, authority.info(), raft, connections=1) as pipeline,
    ):
        for _ in range(2):
            pipeline.send(message(type_))
            books = settle(pipeline)
        assert (books.sent, books.failed) == ((2, 0) if is_sent_again else (1, 1))
        assert len(server.requests) == (3 if is_sent_again else 2)


def test_a_close_notify_on_a_new_connection_is_a_failure(authority: Authority) -> None:
    def close(connection: Connection, request: Request) -> None:
        notify_close(connection)

    raft = FakeRaft()
    with (
        ScriptedServer(close, tls=authority.server()) as server,
        sender(server, authority.info(), raft, connections=1) as pipeline,
    ):
        pipeline.send(message())
        assert settle(pipeline).failed == 1
        assert len(server.requests) == 1


def test_an_answer_may_come_in_pieces(authority: Authority) -> None:
    def piecewise(connection: Connection, request: Request) -> None:
        for byte in OK:
            connection.send(bytes([byte]))

    with (
        ScriptedServer(piecewise, tls=authority.server()) as server,
        sender(server, authority.info(), connections=1) as pipeline,
    ):
        for _ in range(3):
            pipeline.send(message())
            settle(pipeline)
        assert pipeline.stats().sent == 3
        assert len(server.connections) == 1


def raw(connection: Connection) -> socket.socket:
    """The TCP connection below the TLS."""
    return socket.socket(fileno=socket.dup(connection.sock.fileno()))


@pytest.mark.parametrize("data", [b"plain text", b"\x17\x03\x03\x00\x20" + bytes(32)])
def test_bytes_that_are_not_of_the_session_end_the_connection(
    authority: Authority, data: bytes
) -> None:
    """At idle that costs no message; in place of an answer it does."""

    def forge(connection: Connection, request: Request) -> None:
        with raw(connection) as sock:
            sock.sendall(data)

    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(OK, OK, forge, OK), tls=authority.server()) as server,
        sender(server, authority.info(), raft, connections=1) as pipeline,
    ):
        pipeline.send(message())
        settle(pipeline)
        forge(server.connections[0], server.requests[0])
        server.wait_for(lambda: server.ended == 1)
        for expected in ((2, 0), (2, 1), (3, 1)):
            pipeline.send(message())
            books = settle(pipeline)
            assert (books.sent, books.failed) == expected
        assert [request.connection for request in server.requests] == [0, 1, 1, 2]


def test_an_answer_before_the_body_went_is_judged(authority: Authority) -> None:
    early = b"HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 0\r\n\r\n"

    def refuse(connection: Connection, head: bytes) -> bool:
        connection.send(early)
        connection.server.release.wait(LONG_TIMEOUT)
        return False

    raft = FakeRaft()
    with (
        ScriptedServer(on_head=refuse, tls=authority.server()) as server,
        sender(server, authority.info(), raft, connections=1) as pipeline,
    ):
        pipeline.send(EncodedMessage(bytes(64 << 20), type=MessageType.APP, to=PEER))
        raft.wait_unreachable(1)
        server.release.set()
        assert settle(pipeline).failed == 1


def test_an_answer_is_read_to_its_end_though_the_rest_of_the_body_cannot_go(
    authority: Authority,
) -> None:
    """It comes behind two session tickets, more than is read at once, and then the reset."""
    body = bytes(20_000)

    def refuse(connection: Connection, head: bytes) -> bool:
        connection.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        connection.sock.close()  # with bytes unread: a reset
        return False

    told: list[Exception] = []
    with (
        ScriptedServer(on_head=refuse, tls=authority.server()) as server,
        pipeline_to(
            server,
            on_critical_error=told.append,
            credentials=Credentials(authority.info()),
            connections=1,
        ) as pipeline,
    ):
        pipeline.send(EncodedMessage(bytes(64 << 20), type=MessageType.APP, to=PEER))
        assert settle(pipeline).failed == 1
        assert [type(error) for error in told] == [MemberRemovedError]


def test_an_idle_worker_keeps_nothing_of_what_it_sent(authority: Authority) -> None:
    credentials = Credentials(authority.info())
    with (
        ScriptedServer(script=in_turn(OK, ERROR), tls=authority.server()) as server,
        pipeline_to(server, credentials=credentials, connections=1) as pipeline,
    ):
        body = bytes(4 << 20)
        ours = sys.getrefcount(body)
        for sent, failed in ((1, 0), (1, 1)):
            pipeline.send(EncodedMessage(body, type=MessageType.APP, to=PEER))
            books = settle(pipeline)
            assert (books.sent, books.failed) == (sent, failed)
            eventually(lambda: sys.getrefcount(body) == ours)
        assert len({request.connection for request in server.requests}) == 1


def test_a_peer_that_stops_reading_is_given_up(authority: Authority) -> None:
    """It may send session tickets all the while: in TLS 1.3 two come at once."""

    def stall(connection: Connection, head: bytes) -> bool:
        connection.server.release.wait(LONG_TIMEOUT)
        return False

    raft = FakeRaft()
    with (
        ScriptedServer(on_head=stall, tls=authority.server()) as server,
        sender(server, authority.info(), raft, connections=1, stall_timeout_s=0.2) as pipeline,
    ):
        pipeline.send(EncodedMessage(bytes(64 << 20), type=MessageType.SNAP, to=PEER))
        raft.wait_unreachable(1)
        assert settle(pipeline).failed == 1


def test_a_peer_that_does_not_answer_is_given_up(authority: Authority) -> None:
    with (
        ScriptedServer(tls=authority.server()) as server,
        sender(server, authority.info(), connections=1, response_timeout_s=0.1) as pipeline,
    ):
        server.script = server.hold
        pipeline.send(message())
        assert settle(pipeline).failed == 1


def test_an_answer_that_ends_the_connection_is_the_last_on_it(authority: Authority) -> None:
    with (
        ScriptedServer(in_turn(then_close(OK), OK), tls=authority.server()) as server,
        sender(server, authority.info(), connections=1) as pipeline,
    ):
        for _ in range(2):
            pipeline.send(message())
            settle(pipeline)
            server.wait_for(lambda: server.ended == 1)
        assert pipeline.stats().sent == 2
        assert [request.connection for request in server.requests] == [0, 1]


# Rotation


def replace(authority: Authority, info: TLSInfo, common_name: str) -> None:
    """Put a new certificate and its key where the old ones are."""
    cert, key = authority.issue("new", common_name=common_name)
    key.replace(info.key_file)
    cert.replace(info.cert_file)


def name_of(connection: Connection) -> str:
    """The common name of a connection's client."""
    assert isinstance(connection.sock, ssl.SSLSocket)
    subject = (connection.sock.getpeercert() or {})["subject"]
    return next((value for rdn in subject for kind, value in rdn if kind == "commonName"), "")


def transport_of(info: TLSInfo, **settings: float) -> Transport:
    settings.setdefault("probe_interval_s", 0)
    return Transport(
        MEMBER,
        CLUSTER,
        FakeRaft(),
        tls=info,
        config=TransportConfig(**settings),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("notice", [Transport.reload_tls, lambda _: None], ids=["call", "watch"])
def test_a_rotation_retires_connections(
    authority: Authority, notice: Callable[[Transport], object]
) -> None:
    """Those at idle at once, the others when they have carried their message."""
    info = authority.info()
    names: list[str] = []
    with (
        ScriptedServer(
            tls=authority.server(), on_connect=lambda c: names.append(name_of(c))
        ) as server,
        transport_of(info) as transport,
    ):
        transport.add_peer(PEER, [server.url])
        transport.send([message()])
        server.wait_requests(1)
        server.script = server.hold
        transport.send([message()])
        server.wait_requests(2)
        replace(authority, info, "rotated")
        notice(transport)
        assert transport.credentials is not None
        eventually(lambda: transport.credentials.generation > 0)  # type: ignore[union-attr]
        server.release.set()
        server.wait_for(lambda: server.ended == len(server.connections))
        transport.send([message()])
        server.wait_requests(3)
        eventually(lambda: transport.stats()[PEER].sent == 3)
        assert names[-1] == "rotated"
        assert set(names[:-1]) == {""}


def at_work(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Semaphore, Callable[[], None]]:
    """Have handshakes keep the thread that shakes them: what tells of one, and what ends it."""
    begun, gate, shake = threading.Semaphore(0), threading.Event(), Dialer._shake

    def slow(*args: Any) -> None:
        begun.release()
        gate.wait(LONG_TIMEOUT)
        shake(*args)

    monkeypatch.setattr(Dialer, "_shake", slow)
    return begun, gate.set


def not_answered(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Semaphore, Callable[[], None]]:
    """Have handshakes not begin, as if peers did not answer them."""
    begun, gate, shake = threading.Semaphore(0), threading.Event(), Dialer._shake
    held: list[tuple[Any, ...]] = []

    def silent(*args: Any) -> None:
        if gate.is_set():
            shake(*args)
        else:
            held.append(args)
            begun.release()

    def go_on() -> None:
        gate.set()
        for args in held:
            args[0]._poller.ask(partial(shake, *args))

    monkeypatch.setattr(Dialer, "_shake", silent)
    return begun, go_on


@pytest.mark.parametrize(("hold", "count"), [(at_work, 1), (not_answered, 4 * 16)])
def test_a_rotation_of_many_peers_holds_up_no_message_to_another(
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    hold: Callable[[pytest.MonkeyPatch], tuple[threading.Semaphore, Callable[[], None]]],
    count: int,
) -> None:
    """All of their workers wait for handshakes; one peer's connection is made anew before."""
    others = range(PEER + 1, PEER + 17)
    with (
        ScriptedServer(tls=authority.server()) as server,
        ScriptedServer(tls=authority.server()) as lone,
        transport_of(authority.info()) as transport,
    ):
        server.script = server.hold  # so that a peer's four messages take its four workers
        for peer in others:
            transport.add_peer(peer, [server.url])
        transport.add_peer(PEER, [lone.url])
        transport.send([message(to=peer) for peer in others for _ in range(4)])
        server.wait_requests(4 * 16)
        server.release.set()
        eventually(lambda: all(transport.stats()[peer].sent == 4 for peer in others))
        assert transport.reload_tls()
        transport.send([message(HEARTBEAT)])
        eventually(lambda: transport.stats()[PEER].sent == 1)

        begun, go_on = hold(monkeypatch)
        server.release.clear()
        transport.send([message(to=peer) for peer in others for _ in range(4)])
        for _ in range(count):
            assert begun.acquire(timeout=LONG_TIMEOUT)
        for sent in range(2, 52):
            transport.send([message(HEARTBEAT)])
            eventually(lambda sent=sent: transport.stats()[PEER].sent == sent)  # type: ignore[misc]
        assert len(server.requests) == 4 * 16
        assert {request.connection for request in lone.requests} == {0}
        go_on()
        server.wait_requests(8 * 16)
        server.release.set()
        eventually(lambda: all(transport.stats()[peer].sent == 8 for peer in others))
        assert transport.stats()[PEER].sent == 51


def test_a_broken_rotation_retires_nothing(authority: Authority) -> None:
    info = authority.info()
    with ScriptedServer(tls=authority.server()) as server, transport_of(info) as transport:
        transport.add_peer(PEER, [server.url])
        transport.send([message()])
        eventually(lambda: transport.stats()[PEER].sent == 1)
        Path(info.key_file).write_bytes(b"broken")
        assert not transport.reload_tls()
        transport.send([message()])
        eventually(lambda: transport.stats()[PEER].sent == 2)
        assert {request.connection for request in server.requests} == {0}


def test_when_the_certificate_expires_is_told(authority: Authority) -> None:
    end = now() + 30 * DAY
    cert, key = authority.issue("dated", not_after=end)
    with transport_of(authority.info(cert_file=cert, key_file=key)) as transport:
        assert transport.certificate_expires_at == int(end.timestamp())
    with Transport(1, 1, FakeRaft()) as plain:
        assert plain.certificate_expires_at is None
        assert plain.reload_tls() is False


def test_reload_from_a_callback_works(authority: Authority) -> None:
    class Reloading(FakeRaft):
        def report_unreachable(self, member_id: int) -> None:
            assert transport.reload_tls()
            super().report_unreachable(member_id)

    raft = Reloading()
    config = TransportConfig(dispatchers=1, probe_interval_s=0)
    with (
        ScriptedServer(in_turn(ERROR, OK), tls=authority.server()) as server,
        Transport(MEMBER, CLUSTER, raft, tls=authority.info(), config=config) as transport,
    ):
        transport.add_peer(PEER, [server.url])
        transport.send([message()])
        assert raft.wait_unreachable(1) == [PEER]
        transport.send([message()])
        server.wait_requests(2)
        eventually(lambda: transport.stats()[PEER].sent == 1)


def test_aio_has_tls(authority: Authority) -> None:
    info = authority.info()

    async def main() -> None:
        async with pipeline.aio.Transport(MEMBER, CLUSTER, FakeRaft(), tls=info) as transport:
            transport.add_peer(PEER, [server.url])
            transport.send([message()])
            await asyncio.to_thread(server.wait_requests, 1)
            assert transport.certificate_expires_at is not None
            assert await transport.reload_tls()

    with ScriptedServer(tls=authority.server()) as server:
        asyncio.run(main())


# Probing


def test_probes_go_over_one_tls_connection(authority: Authority) -> None:
    info = authority.info()
    with (
        ScriptedServer(tls=authority.server()) as server,
        transport_of(info, probe_interval_s=0.01) as transport,
    ):
        transport.add_peer(PEER, [server.url])
        eventually(lambda: transport.probe_stats()[PEER].total >= 5)
        stats = transport.probe_stats()[PEER]
        assert (stats.is_healthy, stats.lost) == (True, 0)
        assert stats.last_tls_s is not None
        assert stats.last_tls_s > 0
        assert {probe.connection for probe in server.probes} == {0}
        assert transport.reload_tls()
        server.wait_for(lambda: server.probes[-1].connection == 1)
        assert transport.probe_stats()[PEER].lost == 0


def test_a_probe_says_why_a_handshake_failed(authority: Authority) -> None:
    with (
        ScriptedServer(tls=authority.server("other", "peer.test")) as server,
        transport_of(authority.info(), probe_interval_s=0.01) as transport,
    ):
        transport.add_peer(PEER, [server.url])
        eventually(lambda: transport.probe_stats()[PEER].lost > 0)
        assert "IP address mismatch" in transport.probe_stats()[PEER].last_error


def test_a_probe_s_handshake_is_bounded(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.send.probing.STEP_TIMEOUT_S", SHORT_TIMEOUT)
    with silent() as listener, transport_of(authority.info(), probe_interval_s=0.01) as transport:
        transport.add_peer(PEER, [url_of(listener)])
        eventually(lambda: transport.probe_stats()[PEER].lost > 0)
        assert "TLS handshake: not done" in transport.probe_stats()[PEER].last_error
