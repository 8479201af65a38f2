"""https listeners: who is let in, what arrives, and how connections end.

Also the limits of time and memory that test_listener.py and test_receiver.py show without TLS: over
TLS other code keeps them.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from pipeline import (
    Entry,
    Message,
    MessageType,
    ReceiverConfig,
    Snapshot,
    SnapshotMetadata,
    Transport,
    TransportConfig,
    UsageError,
)
from pipeline.errors import RequestRejected
from pipeline.receive.listener import Listener
from pipeline.receive.odd_request import OddRequest
from pipeline.tls._engine import session_count
from pipeline.tls.credentials import Credentials
from pipeline.wire.answers import Answer, Request
from tests.support import LONG_TIMEOUT, MIB, SHORT_TIMEOUT
from tests.support.callbacks import Unawaited
from tests.support.descriptors import open_descriptors
from tests.support.http import CLUSTER_ID, HEARTBEAT, peer_headers
from tests.support.listening import (
    A_SECOND,
    GOOD,
    dial,
    listener_threads,
    post,
    raw_head,
    read_status,
)
from tests.support.logs import handler_that_raises
from tests.support.memory import rss
from tests.support.openssl import RawClient
from tests.support.raft import FakeRaft
from tests.support.tls import Authority, Onlooker
from tests.support.tls_listening import ANY, Node
from tests.support.waiting import eventually, until_read

PROBE = raw_head(line="GET /raft/probing HTTP/1.1")
#: A message that is not the core's to read.
ODD = post(HEARTBEAT.marshal(), is_chunked=True)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()
    assert listener_threads() == []


def append_of(size: int) -> Message:
    return Message(type=MessageType.APP, from_=1, entries=[Entry(data=b"x" * size)])


def end_of(sock: ssl.SSLSocket) -> str:
    """Read until the end, and tell how it came."""
    try:
        while sock.recv(65536):
            pass
    except ssl.SSLEOFError:
        return "cut off"
    except ssl.SSLError as error:
        return str(error.reason)
    except ConnectionError:
        return "reset"
    return "close_notify"


def raw_of(sock: ssl.SSLSocket) -> socket.socket:
    """Take the TCP connection away from TLS, which says no goodbye then."""
    raw = socket.socket(fileno=sock.detach())
    raw.settimeout(LONG_TIMEOUT)
    return raw


# Messages


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("size", [0, 128, 70_000, 3 * MIB])
def test_a_message_arrives(node: Node, version: str, size: int) -> None:
    node.listen()
    message = append_of(size)
    sock = node.call(version=version)
    assert sock.version() == f"TLSv{version}"
    for _ in range(3):
        sock.sendall(post(message.marshal()))
        assert read_status(sock) == 204
    assert node.raft.processed == [message] * 3


def test_a_message_of_64_mib_is_one_copy(node: Node) -> None:
    listener = node.listen()
    data = append_of(64 * MIB).marshal()
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    before = rss()
    peak = 0
    sock.sendall(raw_head(f"content-length: {len(data)}"))
    for at in range(0, len(data), MIB):
        sock.sendall(data[at : at + MIB])
        peak = max(peak, rss() - before)
    assert read_status(sock) == 204
    peak = max(peak, rss() - before)
    received = node.raft.processed[1].entries[0].data
    assert received == b"x" * (64 * MIB)
    assert peak < 64 * MIB + 16 * MIB
    assert listener.stats().fast_requests == 2


def test_a_listener_that_cannot_bind_leaves_nothing_open(node: Node) -> None:
    """Also before the garbage collector comes: it would be a cycle that holds it."""
    url = node.listen().url
    gc.collect()
    gc.disable()
    try:
        before = len(open_descriptors())
        for _ in range(5):
            with pytest.raises(OSError, match="in use"):
                Listener(node.handlers, url, node.config, node.credentials)
        assert len(open_descriptors()) <= before
    finally:
        gc.enable()


def test_memory_of_a_large_body_is_used_again_and_holds_the_new_one(node: Node) -> None:
    node.listen()
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204

    def receive(fill: bytes) -> int:
        """Receive 32 MiB of ``fill``; by how much that let us grow. The last one is freed."""
        data = fill * (32 * MIB)
        body = Message(type=MessageType.APP, from_=1, entries=[Entry(data=data)]).marshal()
        request = post(body)
        del body
        node.raft.processed.clear()
        before = rss()
        sock.sendall(request)
        assert read_status(sock) == 204
        grown = rss() - before
        assert node.raft.processed[-1].entries[0].data == data
        return grown

    receive(b"a")
    # It is kept for two seconds; this may be a busy machine, but not each time.
    assert min(receive(b"%d" % n) for n in range(5)) < 8 * MIB


def test_requests_on_one_connection_go_past_h11_but_for_the_first(node: Node) -> None:
    listener = node.listen()
    sock = node.call()
    for _ in range(100):
        sock.sendall(GOOD)
        assert read_status(sock) == 204
    stats = listener.stats()
    assert (stats.accepted, stats.handshakes) == (1, 1)
    assert (stats.general_requests, stats.fast_requests) == (1, 100)


def test_requests_sent_ahead_are_answered_one_after_the_other(node: Node) -> None:
    """In records of their own and in shared ones, recognised and not."""
    node.listen()
    sock = node.call()
    large = post(append_of(100_000).marshal())
    requests = [GOOD, PROBE, GOOD, large, PROBE, large, GOOD] * 10
    for request in requests:
        sock.sendall(request)
    sock.sendall(b"".join(requests))
    answers = b""
    expected = 2 * len(requests)
    while answers.count(b"HTTP/1.1 ") < expected or not answers.endswith((b"\r\n\r\n", b"}\n")):
        answers += sock.recv(65536)
    statuses = [int(answer[:3]) for answer in answers.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200 if request is PROBE else 204 for request in requests] * 2
    assert len(node.raft.processed) == statuses.count(204)


def test_one_byte_in_each_record_is_a_request_all_the_same(node: Node) -> None:
    node.listen()
    sock = node.call()
    for _ in range(2):
        for byte in GOOD:
            sock.sendall(bytes([byte]))
        assert read_status(sock) == 204
    assert node.raft.processed == [HEARTBEAT] * 2


def test_records_cut_anywhere_are_put_together(node: Node) -> None:
    """Byte by byte on TCP, from the hello on."""
    node.listen()
    sock = node.dial()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = node.authority.client(*node.files).wrap_bio(
        incoming, outgoing, server_hostname="127.0.0.1"
    )

    def drip() -> None:
        for byte in outgoing.read():
            sock.sendall(bytes([byte]))

    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            drip()
            incoming.write(sock.recv(65536))
    tls.write(GOOD)
    drip()
    incoming.write(sock.recv(65536))
    assert tls.read(12) == b"HTTP/1.1 204"


@pytest.mark.parametrize("way", ["chunked", "expecting to be told to go on", "in two parts"])
def test_what_the_core_leaves_to_h11_works_as_without_tls(node: Node, way: str) -> None:
    node.listen()
    sock = node.call()
    body = append_of(50_000).marshal()
    for _ in range(2):
        if way == "chunked":
            sock.sendall(raw_head("transfer-encoding: chunked"))
            sock.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        elif way == "in two parts":
            sock.sendall(post(body)[:100])
            until_read(sock)
            sock.sendall(post(body)[100:])
        else:
            sock.sendall(raw_head(f"content-length: {len(body)}", "expect: 100-continue"))
            assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(body)
        assert read_status(sock) == 204
    assert len(node.raft.processed) == 2


def test_a_message_of_a_later_raft_is_answered_204_and_not_delivered(node: Node) -> None:
    node.listen()
    sock = node.call()
    for request in (
        post(b"\x08\x18"),
        post(b"\x08\x18"),
        raw_head("transfer-encoding: chunked") + b"2\r\n\x08\x18\r\n0\r\n\r\n",
    ):
        sock.sendall(request)
        assert read_status(sock) == 204
    assert (node.raft.processed, node.handlers.received.unknown) == ([], 3)


@pytest.mark.parametrize(
    ("error", "status"), [(RequestRejected(404, b"no"), 404), (ValueError("boom"), 500)]
)
def test_what_process_raises_is_the_answer(node: Node, error: Exception, status: int) -> None:
    node.raft.process_error = error
    node.listen()
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == status
    if status == 500:
        assert end_of(sock) == "close_notify"
    else:
        sock.sendall(GOOD)
        assert read_status(sock) == status


def test_http_and_https_are_served_side_by_side(node: Node) -> None:
    node.listen()
    urls = ["https://127.0.0.1:0", "http://127.0.0.1:0", "https://localhost:0"]
    with Listener(node.handlers, urls, node.config, node.credentials) as listener:
        assert [url.rpartition(":")[0] for url in listener.urls] == [url[:-2] for url in urls]
        with dial(listener.urls[1]) as plain:
            plain.sendall(GOOD)
            assert read_status(plain) == 204
        for url in listener.urls[0], listener.urls[2]:
            context = node.authority.client(*node.files)
            with context.wrap_socket(dial(url), server_hostname="127.0.0.1") as sock:
                sock.sendall(GOOD)
                assert read_status(sock) == 204


def test_https_needs_credentials(node: Node) -> None:
    with Transport(1, 1, FakeRaft()) as transport, pytest.raises(UsageError, match="TLSInfo"):
        transport.listen(ANY)


def test_a_transport_listens_with_its_tls(node: Node) -> None:
    info = node.authority.info()
    with Transport(2, CLUSTER_ID, node.raft, tls=info) as transport:
        node.listener = transport.listen(ANY)
        assert node.listener.url.startswith("https://127.0.0.1:")
        sock = node.call()
        sock.sendall(GOOD)
        assert read_status(sock) == 204
        plain = transport.listen("http://127.0.0.1:0")
        with dial(plain.url) as http:
            http.sendall(GOOD)
            assert read_status(http) == 204


# Who is let in


def refused(node: Node, context: ssl.SSLContext) -> str:
    """Call with ``context``; how the connection ends, unanswered."""
    try:
        sock = node.shake(context)
        sock.sendall(GOOD)
    except ssl.SSLError as error:
        end = str(error.reason)
    except ConnectionError:
        end = "reset"
    else:
        end = end_of(sock)
    eventually(lambda: node.listener.stats().handshake_failures == 1)
    eventually(lambda: node.listener.stats().connections == 0)
    assert node.listener.stats().handshakes == 0
    assert node.raft.processed == []
    return end


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_caller_without_a_certificate_is_refused(
    node: Node, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    node.listen()
    end = refused(node, node.authority.client(version=version))
    assert end in ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_HANDSHAKE_FAILURE")
    assert "rejected connection from 127.0.0.1:" in caplog.text


def test_a_certificate_of_another_authority_is_refused(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.listen()
    context = node.authority.client()
    context.load_cert_chain(*Authority(node.directory / "other").issue("other"))
    assert refused(node, context) == "TLSV1_ALERT_UNKNOWN_CA"
    assert "unable to get local issuer certificate" in caplog.text


def test_a_revoked_certificate_is_refused(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    revoked = node.authority.issue("revoked")
    node.listen(crl_file=node.authority.revoke(revoked[0]))
    assert refused(node, node.authority.client(*revoked)) == "SSLV3_ALERT_CERTIFICATE_REVOKED"
    assert "certificate revoked" in caplog.text
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204


def test_without_client_cert_auth_no_certificate_is_asked_for(node: Node) -> None:
    node.listen(client_cert_auth=False)
    sock = node.shake(node.authority.client())
    sock.sendall(GOOD)
    assert read_status(sock) == 204


RULES = [
    ("allowed_cn", ("a", "etcd-1"), "common name"),
    ("allowed_hostnames", ("a.example", "b.example"), "host names"),
    ("allowed_uris", ("spiffe://cluster/1",), "URIs"),
]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_certificate_with_a_name_that_is_no_text_is_refused(
    node: Node, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """OpenSSL verifies it, and Python cannot read it."""
    node.listen()
    files = node.authority.issue("odd", "127.0.0.1", "xx-odd.test")
    node.authority.rename(files[0], b"xx-odd", b"\xff\xfe-odd")
    assert end_of(node.call(*files, version=version)) == "close_notify"
    assert node.listener.stats().handshake_failures == 1
    assert "certificate refused: it cannot be read" in caplog.text
    assert "internal error" not in caplog.text


@pytest.mark.parametrize(("rule", "allowed", "reason"), RULES, ids=[rule[0] for rule in RULES])
def test_the_rules_for_names_choose_among_valid_certificates(
    node: Node,
    rule: str,
    allowed: tuple[str, ...],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node.listen(**{rule: allowed})
    issue = node.authority.issue
    named = issue("a", "b.example", common_name="etcd-1", uri="spiffe://cluster/1")
    other = issue("b", "c.example", common_name="etcd-2", uri="spiffe://cluster/2")
    assert refused(node, node.authority.client(*other)) == "close_notify"
    assert reason in caplog.text
    sock = node.call(*named)
    sock.sendall(GOOD)
    assert read_status(sock) == 204


def test_a_member_is_bound_to_its_certificate_by_a_callback(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, int]] = []

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        name = dict(part[0] for part in certificate["subject"])["commonName"]
        asked.append((name, member_id))
        return bool(name == f"member-{member_id}")

    node.listen(allow_member=allow)
    sock = node.call(*node.authority.issue("member", common_name="member-1"))
    # The second is recognised by the core; the callback is asked all the same.
    for _ in range(2):
        sock.sendall(GOOD)
        assert read_status(sock) == 204
    assert asked.count(("member-1", 1)) >= 2
    before = len(node.raft.processed)

    body = HEARTBEAT.marshal()
    head = raw_head(f"content-length: {len(body)}", headers=peer_headers(x_server_from="2"))
    sock.sendall(head + body)
    answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 412 ")  # never 403, which shuts an etcd down
    assert answer.endswith(b"certificate not allowed for this member\n")
    sock.sendall(GOOD)  # politely: the connection stays
    assert read_status(sock) == 204
    head = raw_head(f"content-length: {len(body)}", headers=peer_headers(x_server_from=None))
    sock.sendall(head + body)
    assert read_status(sock) == 412
    assert len(node.raft.processed) == before + 1
    assert asked[-1] == ("member-1", 1)
    assert "not the certificate of '2'" in caplog.text


def test_callbacks_find_none_of_openssl_s_errors_of_others(node: Node) -> None:
    """In their threads handshakes and records of other callers have failed before."""
    onlookers = queue.SimpleQueue[Onlooker]()
    for _ in range(8):  # made here: to make one throws such errors away
        onlookers.put(Onlooker(node.authority))
    seen: list[BaseException | None] = []

    def look() -> None:
        onlooker = onlookers.get(timeout=LONG_TIMEOUT)
        try:
            onlooker.look()
        except BaseException as error:
            seen.append(error)
        else:
            seen.append(None)
        onlookers.put(onlooker)

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        look()
        return True

    process = node.raft.process
    node.raft.process = lambda message: (look(), process(message))[1]  # type: ignore[method-assign]
    node.listen(allow_member=allow)
    urls = [ANY, "http://127.0.0.1:0"]
    with Listener(node.handlers, urls, node.config, node.credentials) as node.listener:
        good = node.call()
        plain = dial(node.listener.urls[1])
        good.sendall(GOOD)
        assert read_status(good) == 204
        for _ in range(5):
            with dial(node.listener.urls[0]) as no_tls:
                no_tls.sendall(GOOD)
                assert no_tls.recv(65536).startswith(b"HTTP/1.0 400 ")
            good.sendall(ODD)
            assert read_status(good) == 204
            raw = raw_of(node.call())
            raw.sendall(b"\x17\x03\x03\x00\x10" + bytes(16))
            assert raw.recv(65536)
            raw.close()
            plain.sendall(GOOD)
            assert read_status(plain) == 204
        good.close()
        plain.close()
    assert len(seen) >= 10
    assert set(seen) == {None}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_head_accepted_of_one_caller_lets_no_other_past(node: Node, scheme: str) -> None:
    """The same bytes, from whoever has not shown that member's certificate."""

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        name = dict(part[0] for part in certificate["subject"])["commonName"]
        return bool(name == f"member-{member_id}")

    node.listen(allow_member=allow)
    urls = [ANY, "http://127.0.0.1:0"]
    with Listener(node.handlers, urls, node.config, node.credentials) as listener:
        node.listener = listener
        with contextlib.ExitStack() as stack:
            if scheme == "http":
                first = stack.enter_context(dial(listener.urls[1]))
            else:
                first = node.call(*node.authority.issue("one", common_name="member-1"))
            other = node.call(*node.authority.issue("two", common_name="member-2"))
            for _ in range(3):
                first.sendall(GOOD)
                assert read_status(first) == 204
                other.sendall(GOOD)
                assert read_status(other) == 412
    assert len(node.raft.processed) == 3


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError])
def test_a_callback_for_certificates_that_raises_lets_nobody_in_and_ends_no_thread(
    node: Node, error: type[BaseException]
) -> None:
    is_failing = True

    def allow(*_: object) -> bool:
        if is_failing:
            raise error
        return True

    node.listen(allow_member=allow)
    sock = node.call()
    with handler_that_raises("", RecursionError) as handler:
        for _ in range(3):
            sock.sendall(GOOD)
            assert read_status(sock) == 412
    assert handler.raised > 0
    is_failing = False
    sock.sendall(GOOD)
    assert read_status(sock) == 204


def test_a_callback_for_certificates_that_only_makes_a_coroutine_lets_nobody_in(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.listen(allow_member=Unawaited(True))
    sock = node.call()
    for _ in range(2):
        sock.sendall(GOOD)
        assert read_status(sock) == 412
    assert node.raft.processed == []
    assert caplog.text.count("allow_member: returned <coroutine") == 1


def test_a_member_refused_later_is_refused_on_the_connection_it_has(node: Node) -> None:
    allowed = {1}
    node.listen(allow_member=lambda certificate, member_id: member_id in allowed)
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    allowed.clear()
    sock.sendall(GOOD)
    assert read_status(sock) == 412


def test_a_callback_that_raises_lets_nobody_in(node: Node) -> None:
    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        raise RuntimeError("boom")

    node.listen(allow_member=allow)
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 412


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_no_session_is_resumed(node: Node, version: str) -> None:
    """Each handshake is to verify the certificate of that day."""
    node.listen()
    context = node.authority.client(*node.files, version=version)
    first = node.shake(context)
    first.sendall(GOOD)
    assert read_status(first) == 204
    session = first.session
    assert session is None or not session.has_ticket
    second = node.shake(context, session)
    assert not second.session_reused
    second.sendall(GOOD)
    assert read_status(second) == 204


def test_who_has_shown_a_certificate_is_learned_as_a_remote(node: Node) -> None:
    info = node.authority.info()
    headers = peer_headers(x_server_from="7", x_peerurls="http://10.0.0.7:2380")
    request = raw_head(f"content-length: {len(HEARTBEAT.marshal())}", headers=headers)
    request += HEARTBEAT.marshal()
    with Transport(2, CLUSTER_ID, node.raft, tls=info) as transport:
        plain = transport.listen("http://127.0.0.1:0")
        with dial(plain.url) as http:
            http.sendall(request)
            assert read_status(http) == 204
        assert transport.remote_stats() == {}
        node.listener = transport.listen(ANY)
        sock = node.call()
        sock.sendall(request)
        assert read_status(sock) == 204
        assert transport.remote_stats()[7].is_learned


def test_a_policy_is_asked_about_those_who_have_shown_a_certificate_as_well(node: Node) -> None:
    info = node.authority.info()
    headers = peer_headers(x_server_from="7", x_peerurls="http://10.0.0.7:2380")
    request = raw_head("content-length: 0", headers=headers)
    with Transport(2, CLUSTER_ID, node.raft, tls=info, remote_policy=lambda *_: False) as transport:
        node.listener = transport.listen(ANY)
        sock = node.call()
        sock.sendall(request)
        assert read_status(sock) == 204
        assert transport.remote_stats() == {}


# Handshakes


def test_handshakes_that_do_not_end_are_ended_and_disturb_nobody(node: Node) -> None:
    listener = node.listen(ReceiverConfig(handshake_timeout_s=2 * A_SECOND))
    good = node.call()
    silent = [node.dial() for _ in range(20)]
    begun = [node.dial() for _ in range(20)]
    for sock in begun:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
    while listener.stats().handshake_timeouts < 40:
        good.sendall(GOOD)
        assert read_status(good) == 204
    for sock in (*silent, *begun):
        assert sock.recv(1) == b""
    assert listener.stats().connections == 1


def test_handshakes_take_turns_with_those_who_are_through(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    is_held, held, gate = (threading.Event() for _ in range(3))

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        order.append("request")
        if is_held.is_set():
            held.set()
            gate.wait(LONG_TIMEOUT)
        return True

    def shake(credentials: Credentials) -> ssl.SSLContext:
        order.append("handshake")
        return credentials._state.loaded.server_context

    node.listen(allow_member=allow)
    urls = [ANY, "http://127.0.0.1:0"]
    with contextlib.ExitStack() as stack:
        listener = Listener(node.handlers, urls, node.config, node.credentials)
        node.listener = stack.enter_context(listener)
        plain = stack.enter_context(dial(listener.urls[1]))
        first, second = node.call(), node.call()
        for sock in plain, first, second:
            sock.sendall(GOOD)
            assert read_status(sock) == 204
        order.clear()
        monkeypatch.setattr(Credentials, "server_context", property(shake))
        is_held.set()
        first.sendall(ODD)
        assert held.wait(LONG_TIMEOUT)
        for _ in range(20):
            node.dial().sendall(b"\x16\x03\x01\x02\x00\x01")
        second.sendall(ODD)
        for _ in range(2):  # the loop has seen what was sent before
            plain.sendall(GOOD)
            assert read_status(plain) == 204
        gate.set()
        eventually(lambda: len(order) == 22)
        assert "request" in order[1:4]
        assert read_status(second) == 204


def test_strangers_take_turns_with_members_and_with_probes(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    is_held, held, gate = (threading.Event() for _ in range(3))

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        order.append("member")
        if is_held.is_set():
            held.set()
            gate.wait(LONG_TIMEOUT)
        return True

    node.listen(allow_member=allow)
    check = node.handlers.check

    def checking(request: Request, *, can_detach: bool = False) -> Answer | None:
        answer = check(request, can_detach=can_detach)
        if answer is not None:
            order.append({200: "probe", 412: "stranger"}[answer.status])
        return answer

    refused = raw_head("transfer-encoding: chunked", headers=peer_headers(x_etcd_cluster_id="1"))
    urls = [ANY, "http://127.0.0.1:0"]
    with contextlib.ExitStack() as stack:
        listener = Listener(node.handlers, urls, node.config, node.credentials)
        node.listener = stack.enter_context(listener)
        plain, probing, *strangers = (
            stack.enter_context(dial(listener.urls[1])) for _ in range(32)
        )
        first, second = node.call(), node.call()
        for sock in plain, first, second:
            sock.sendall(GOOD)
            assert read_status(sock) == 204
        order.clear()
        monkeypatch.setattr(node.handlers, "check", checking)
        is_held.set()
        first.sendall(ODD)
        assert held.wait(LONG_TIMEOUT)
        for sock in strangers:
            sock.sendall(refused + b"1\r\nx\r\n" * 1000)
        second.sendall(ODD)
        probing.sendall(PROBE)
        for _ in range(2):  # the loop has seen what was sent before
            plain.sendall(GOOD)
            assert read_status(plain) == 204
        gate.set()
        assert read_status(second) == 204
        assert read_status(probing) == 200
        for sock in strangers:
            assert read_status(sock) == 412
        eventually(lambda: len(order) == 33)
        assert order.count("stranger") == len(strangers) == 30
        assert "member" in order[1:5]
        assert "probe" in order[1:5]


def test_a_refused_body_in_pieces_leaves_the_connection_to_the_next_request(node: Node) -> None:
    node.listen()
    sock = node.call()
    for size in (1, 5000, 200_000):
        sock.sendall(
            raw_head(f"content-length: {size}", headers=peer_headers(x_etcd_cluster_id="1"))
        )
        assert read_status(sock) == 412
        sock.sendall(b"x" * (size // 2))
        sock.sendall(b"x" * (size - size // 2) + GOOD)
        assert read_status(sock) == 204


@pytest.mark.parametrize("framing", ["content-length: 50000", "transfer-encoding: chunked"])
def test_what_tls_adds_to_a_body_does_not_make_up_for_its_rate(node: Node, framing: str) -> None:
    listener = node.listen(ReceiverConfig(stall_timeout_s=0.3, min_body_rate=500))
    sock = node.call()
    sock.sendall(GOOD)  # so that its head is known
    assert read_status(sock) == 204
    sock.sendall(raw_head(framing))
    # Some 20 ms between two bytes: a record of 23 bytes each, which is twice the least rate.
    part = b"x" if "length" in framing else b"1\r\nx\r\n"
    while not select.select([sock], [], [], 0.02)[0]:
        sock.sendall(part)
    assert read_status(sock) == 400
    assert listener.stats().body_timeouts == 1


def test_thousands_of_tiny_records_are_a_message_all_the_same(node: Node) -> None:
    """It takes many turns of the thread that decrypts them."""
    node.listen()
    message = append_of(5000)
    body = message.marshal()
    requests = [
        post(body),
        post(body),
        raw_head("transfer-encoding: chunked")
        + b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in body)
        + b"0\r\n\r\n",
    ]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = node.authority.client(*node.files).wrap_bio(
        incoming, outgoing, server_hostname="127.0.0.1"
    )
    sock = node.dial()
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))
    for request in requests:
        for byte in request:
            tls.write(bytes([byte]))
        sock.sendall(outgoing.read())
        incoming.write(sock.recv(65536))
        assert tls.read(12) == b"HTTP/1.1 204"
        tls.read(65536)
    assert node.raft.processed == [message] * 3


def test_updates_of_the_keys_by_the_thousand_disturb_nobody(node: Node) -> None:
    listener = node.listen()
    other = node.call()
    with RawClient(node.dial(), *node.files) as client:
        for asks in (False, True):
            for _ in range(5000):
                client.update_key(asks=asks)
            other.sendall(GOOD)
            assert read_status(other) == 204
            client.send(GOOD[:50])
            for _ in range(5000):
                client.update_key(asks=asks)
            client.send(GOOD[50:])
            assert client.recv().startswith(b"HTTP/1.1 204 ")
    assert len(node.raft.processed) == 4
    assert listener.stats().handshakes == 2


def test_a_connection_that_only_updates_its_keys_is_idle(node: Node) -> None:
    listener = node.listen(ReceiverConfig(idle_timeout_s=0.3))
    with RawClient(node.dial(), *node.files) as client:
        client.send(GOOD)
        assert client.recv().startswith(b"HTTP/1.1 204 ")
        eventually(lambda: client.update_key() or listener.stats().idle_timeouts == 1)
        assert client.recv() == b""


def test_after_its_close_notify_a_caller_is_heard_no_more(node: Node) -> None:
    """Whatever TCP still brings."""
    node.listen()
    sock = node.dial()
    with RawClient(sock, *node.files) as client:
        client.send(GOOD)
        assert client.recv().startswith(b"HTTP/1.1 204 ")
        client.say_goodbye()
        sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        assert client.recv() == b""
    eventually(lambda: node.listener.stats().connections == 0)
    assert len(node.raft.processed) == 1
    assert node.handlers.received.failures == 0


@pytest.mark.parametrize("request_", [GOOD, ODD, PROBE], ids=["to the core", "to h11", "a probe"])
@pytest.mark.parametrize("how", ["with a close_notify", "of TCP"])
def test_a_caller_that_ends_its_side_is_answered(node: Node, how: str, request_: bytes) -> None:
    node.listen()
    sock = node.dial()
    with RawClient(sock, *node.files) as client:
        client.send(GOOD)
        assert client.recv().startswith(b"HTTP/1.1 204 ")
        client.send(request_)
        if how == "with a close_notify":
            client.say_goodbye()
        else:
            sock.shutdown(socket.SHUT_WR)
        assert client.recv().startswith(b"HTTP/1.1 20")
    eventually(lambda: node.listener.stats().connections == 0)
    assert node.handlers.received.failures == 0


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_chains_of_a_hundred_certificates_are_written_and_read(node: Node, version: str) -> None:
    """The handshake waits until there is room for ours, and until all of the caller's have come."""
    cert, key = node.authority.issue("long")
    cert.write_bytes(cert.read_bytes() + node.authority.ca.cert_pem.bytes() * 99)
    node.listen(cert_file=cert, key_file=key)
    context = node.authority.client(cert, key, version=version)
    parts = urlsplit(node.listener.url)
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        plain.settimeout(LONG_TIMEOUT)
        plain.connect((parts.hostname, parts.port))
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            sock.sendall(GOOD)
            assert read_status(sock) == 204


@pytest.mark.parametrize(
    "hello",
    [b"\x00" * 100, b"\xff" * 5000, b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"SSH-2.0-x\r\n"],
    ids=["zeros", "ones", "a record too large", "another protocol"],
)
def test_garbage_instead_of_a_hello_ends_the_connection(node: Node, hello: bytes) -> None:
    listener = node.listen()
    sock = node.dial()
    sock.sendall(hello)
    with contextlib.suppress(ConnectionError):
        while sock.recv(4096):
            pass
    eventually(lambda: listener.stats().handshake_failures == 1)
    good = node.call()
    good.sendall(GOOD)
    assert read_status(good) == 204


def test_a_caller_that_goes_in_the_middle_of_a_handshake_is_counted(node: Node) -> None:
    listener = node.listen()
    sock = node.dial()
    sock.sendall(b"\x16\x03\x01\x02\x00\x01")
    sock.close()
    eventually(lambda: listener.stats().handshake_failures == 1)
    node.dial().close()  # as a load balancer does to see whether we are there
    eventually(lambda: listener.stats().connections == 0)
    assert listener.stats().handshake_failures == 1


def test_plain_http_to_an_https_port_is_told_so(node: Node) -> None:
    listener = node.listen()
    sock = node.dial()
    sock.sendall(GOOD)
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(4096):
            received += data
    assert received.startswith(b"HTTP/1.0 400 Bad Request\r\n")
    assert listener.stats().handshake_failures == 1


def test_a_hello_to_an_http_port_ends_the_connection(node: Node) -> None:
    node.listen()
    with (
        Listener(node.handlers, "http://127.0.0.1:0", node.config) as listener,
        dial(listener.url) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        node.authority.client(*node.files).wrap_socket(sock, server_hostname="127.0.0.1")


# How connections end


def test_an_idle_connection_ends_with_a_close_notify(node: Node) -> None:
    listener = node.listen(ReceiverConfig(idle_timeout_s=A_SECOND))
    assert end_of(node.call()) == "close_notify"
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    assert end_of(sock) == "close_notify"
    assert listener.stats().idle_timeouts == 2


@pytest.mark.parametrize(
    ("sent", "counter", "config"),
    [
        (GOOD[:20], "head_timeouts", ReceiverConfig(head_timeout_s=A_SECOND)),
        (GOOD[:-1], "body_timeouts", ReceiverConfig(stall_timeout_s=0.1)),
    ],
    ids=["a head", "a body"],
)
def test_a_part_of_a_request_is_waited_for_so_long(
    node: Node, sent: bytes, counter: str, config: ReceiverConfig
) -> None:
    listener = node.listen(config)
    for count in (1, 2):
        sock = node.call()
        if count == 2:  # behind a head that is known
            sock.sendall(GOOD)
            assert read_status(sock) == 204
        sock.sendall(sent)
        assert end_of(sock) == "close_notify"
        assert getattr(listener.stats(), counter) == count
    assert listener.stats().idle_timeouts == 0


def test_a_part_of_a_record_is_not_idle(node: Node) -> None:
    listener = node.listen(ReceiverConfig(head_timeout_s=A_SECOND))
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    with raw_of(sock) as raw:
        raw.sendall(b"\x17\x03\x03\x01")
        eventually(lambda: listener.stats().head_timeouts == 1)


@pytest.mark.parametrize("known", [False, True], ids=["to h11", "to the core"])
@pytest.mark.parametrize("how", ["cut off", "in good order"])
def test_a_body_that_ends_early_is_never_taken_for_a_whole_one(
    node: Node, known: bool, how: str
) -> None:
    node.listen()
    sock = node.call()
    if known:
        sock.sendall(GOOD)
        assert read_status(sock) == 204
    # What has come is a message in itself.
    body = HEARTBEAT.marshal()
    extra = f"content-length: {2 * len(body)}" if known else "transfer-encoding: chunked"
    sock.sendall(raw_head(extra) + (body if known else b"%x\r\n%b\r\n" % (len(body), body)))
    if how == "in good order":
        with pytest.raises(ssl.SSLError, match="APPLICATION_DATA_AFTER_CLOSE_NOTIFY"):
            sock.unwrap()  # the answer, 400
    else:
        raw_of(sock).close()
    eventually(lambda: node.handlers.received.failures == 1)
    eventually(lambda: node.listener.stats().connections == 0)
    assert len(node.raft.processed) == known


def test_a_damaged_record_ends_the_connection_and_its_message(node: Node) -> None:
    node.listen()
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    sock.sendall(GOOD[:-1])
    with raw_of(sock) as raw:
        raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        while raw.recv(4096):
            pass
    assert node.handlers.received.failures == 1
    assert len(node.raft.processed) == 1


def test_a_caller_that_says_goodbye_is_answered_so(node: Node) -> None:
    node.listen()
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    sock.unwrap().close()


def test_at_a_rotation_old_connections_end_and_new_ones_have_the_new_certificate(
    node: Node,
) -> None:
    gate = threading.Event()
    node.raft.gate = gate
    node.listen()
    idle, busy = node.call(), node.call()
    busy.sendall(GOOD)
    node.raft.wait_processed(1)
    old = idle.getpeercert(binary_form=True)
    node.files = node.authority.issue("node")
    assert node.credentials.reload()

    assert end_of(idle) == "close_notify"
    gate.set()
    answer = busy.recv(65536)
    assert answer.startswith(b"HTTP/1.1 204 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert end_of(busy) == "close_notify"
    fresh = node.call()
    assert fresh.getpeercert(binary_form=True) != old
    fresh.sendall(GOOD)
    assert read_status(fresh) == 204


def test_a_rotation_after_the_end_is_ignored(node: Node) -> None:
    listener = node.listen()
    listener.close()
    # In a forked child, where a listener is closed as well, the receiver must not be touched.
    reached: list[str] = []
    receiver = SimpleNamespace(retire=lambda: reached.append("retire"))
    listener._receiver = receiver  # type: ignore[assignment]
    assert node.credentials.reload()
    assert reached == []


def test_close_does_not_wait_for_handshakes(node: Node) -> None:
    listener = node.listen()
    idle = node.call()
    for _ in range(10):
        node.dial()
        node.dial().sendall(b"\x16\x03\x01\x02\x00\x01")
    eventually(lambda: listener.stats().accepted == 21)
    begin = time.monotonic()
    listener.close(deadline_s=LONG_TIMEOUT)
    assert time.monotonic() - begin < LONG_TIMEOUT / 2
    assert end_of(idle) == "close_notify"
    assert listener_threads() == []


def test_close_in_the_middle_of_a_message_ends_at_the_deadline(node: Node) -> None:
    gate = threading.Event()
    node.raft.gate = gate
    listener = node.listen()
    sock = node.call()
    sock.sendall(GOOD)
    node.raft.wait_processed(1)
    listener.close(deadline_s=SHORT_TIMEOUT)
    assert end_of(sock) in ("cut off", "reset")  # no plain 503 between the records
    gate.set()


def test_an_idle_connection_makes_room_for_another(node: Node) -> None:
    listener = node.listen(ReceiverConfig(max_connections=2))
    first = node.call()
    first.sendall(GOOD)
    assert read_status(first) == 204
    second, third = node.call(), node.call()
    for sock in second, third:
        sock.sendall(GOOD)
        assert read_status(sock) == 204
    assert listener.stats().closed_for_room == 1
    assert end_of(first) == "close_notify"


# Memory


def hello() -> bytes:
    """What a client begins a handshake with."""
    outgoing = ssl.MemoryBIO()
    tunnel = ssl.create_default_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname="stranger"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        tunnel.do_handshake()
    return outgoing.read()


def test_whoever_only_says_hello_does_not_put_an_idle_member_out(node: Node) -> None:
    listener = node.listen(ReceiverConfig(max_connections=4))
    member = node.call()
    member.sendall(GOOD)
    assert read_status(member) == 204
    said = hello()
    strangers = []
    for _ in range(20):
        stranger = node.dial()
        with contextlib.suppress(OSError):  # it may have had to make room already
            stranger.sendall(said)
        strangers.append(stranger)
    eventually(lambda: listener.stats().closed_for_room >= 16)
    member.sendall(GOOD)
    assert read_status(member) == 204
    for stranger in strangers:
        stranger.close()
    other = node.call()  # and there is room for another member
    other.sendall(GOOD)
    assert read_status(other) == 204


def test_a_body_over_the_budget_waits_and_a_small_one_does_not(node: Node) -> None:
    gate = threading.Event()
    node.raft.gate = gate
    listener = node.listen(ReceiverConfig(max_buffered_bytes=4 * MIB))
    gate.set()
    large, other, small = node.call(), node.call(), node.call()
    for sock in large, other, small:
        sock.sendall(GOOD)
        assert read_status(sock) == 204
    gate.clear()
    large.sendall(post(append_of(5 * MIB).marshal()))
    node.raft.wait_processed(4)
    sender = threading.Thread(target=other.sendall, args=(post(append_of(3 * MIB).marshal()),))
    sender.start()
    eventually(lambda: listener.stats().body_pauses > 0)
    small.sendall(GOOD)
    node.raft.wait_processed(5)
    gate.set()
    assert read_status(large) == read_status(small) == read_status(other) == 204
    sender.join(LONG_TIMEOUT)


def test_nothing_is_kept_of_a_connection_that_has_ended(node: Node) -> None:
    listener = node.listen(
        ReceiverConfig(handshake_timeout_s=2.0, idle_timeout_s=A_SECOND, stall_timeout_s=0.1)
    )
    sessions = session_count()
    for _ in range(3):
        node.dial().sendall(b"\x16\x03\x01")
        node.dial().sendall(GOOD)
        node.call().sendall(GOOD)
        node.call().sendall(GOOD[:-1])
        raw_of(node.call()).close()
        node.call().unwrap()
    eventually(lambda: listener.stats().connections == 0)
    eventually(lambda: session_count() == sessions)
    eventually(lambda: not any(type(kept) is OddRequest for kept in gc.get_objects()))


def test_an_announced_length_is_no_memory(node: Node) -> None:
    listener = node.listen()
    callers = [node.call() for _ in range(8)]
    before = rss()
    for sock in callers:
        sock.sendall(GOOD)
        assert read_status(sock) == 204
        sock.sendall(raw_head(f"content-length: {512 * MIB}") + b"x")
    other = node.call()
    other.sendall(GOOD)
    assert read_status(other) == 204
    assert listener.stats().fast_requests == 9  # none of the eight is whole
    assert rss() - before < 32 * MIB


def test_a_body_too_large_is_answered_413(node: Node) -> None:
    node.listen(ReceiverConfig(max_body_bytes=MIB))
    sock = node.call()
    sock.sendall(GOOD)
    assert read_status(sock) == 204
    sock.sendall(raw_head(f"content-length: {MIB + 1}"))
    assert read_status(sock) == 413


# Snapshots


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_snapshot_is_received_on_a_connection_that_has_left_the_loop(
    node: Node, tmp_path: Path, framing: str
) -> None:
    directory = tmp_path / "snapshots"
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=directory))
    message = Message(
        type=MessageType.SNAP,
        from_=1,
        to=2,
        term=1,
        snapshot=Snapshot(metadata=SnapshotMetadata(index=7, term=1)),
    ).marshal()
    database = bytes(range(256)) * (12 * 1024)
    body = len(message).to_bytes(8, "big") + message + database
    with Transport(2, CLUSTER_ID, node.raft, tls=node.authority.info(), config=config) as transport:
        node.listener = transport.listen(ANY)
        sock = node.call()
        sock.sendall(PROBE)
        assert read_status(sock) == 200
        extra = f"content-length: {len(body)}"
        if framing == "chunked":
            extra = "transfer-encoding: chunked"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        head = raw_head(extra, line="POST /raft/snapshot HTTP/1.1")
        sock.sendall(head + body[:1000])
        sock.sendall(body[1000:])
        assert read_status(sock) == 204
        assert end_of(sock) == "close_notify"
    assert (directory / f"{7:016x}.snap.db").read_bytes() == database
    assert [m.type for m in node.raft.processed] == [MessageType.SNAP]


def test_a_refused_snapshot_is_answered_and_ended_in_good_order(node: Node, tmp_path: Path) -> None:
    """Before all of it has come, and whatever else comes."""
    node.listen(ReceiverConfig(snapshot_dir=tmp_path / "snapshots"))
    sock = node.call()
    size = 64 * MIB
    sock.sendall(raw_head(f"content-length: {size}", line="POST /raft/snapshot HTTP/1.1"))
    sock.sendall(b"\xff" * MIB)  # a message longer than any
    assert read_status(sock) == 400
    assert end_of(sock) == "close_notify"


def test_a_snapshot_whose_record_drips_is_given_up(node: Node, tmp_path: Path) -> None:
    """However slowly a record may come, its place is for others in the end."""
    node.listen(ReceiverConfig(snapshot_dir=tmp_path / "snapshots", stall_timeout_s=SHORT_TIMEOUT))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = node.authority.client(*node.files).wrap_bio(
        incoming, outgoing, server_hostname="127.0.0.1"
    )
    sock = node.dial()
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    sock.sendall(outgoing.read())
    while outgoing.pending == 0:
        incoming.write(sock.recv(65536))
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
    client.write(raw_head("content-length: 9000", line="POST /raft/snapshot HTTP/1.1"))
    sock.sendall(outgoing.read())
    client.write(b"x" * 9000)
    give_up = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in outgoing.read():
                sock.sendall(bytes([byte]))
                if give_up.wait(SHORT_TIMEOUT / 10):
                    return

    dripper = threading.Thread(target=drip)
    dripper.start()
    try:
        incoming.write(sock.recv(65536))
    finally:
        give_up.set()
        dripper.join(LONG_TIMEOUT)
    reply = client.read(65536)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert reply.endswith(b"failed to decode raft message (i/o timeout)\n")


def test_a_snapshot_that_cannot_leave_the_loop_gives_its_place_back(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.listen(ReceiverConfig(snapshot_dir=tmp_path / "snapshots", snapshot_receives=1))

    def no_memory(*_: object) -> None:
        raise MemoryError

    head = raw_head("content-length: 9", line="POST /raft/snapshot HTTP/1.1")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.receive._receiver.OwnSocket", no_memory)
        lost = node.call()
        lost.sendall(head)
        assert end_of(lost) == "cut off"
    sock = node.call()
    sock.sendall(head + bytes(9))
    assert read_status(sock) == 400


def test_a_part_of_a_head_that_comes_with_the_end_of_a_handshake_has_the_time_of_a_head(
    node: Node,
) -> None:
    listener = node.listen(ReceiverConfig(head_timeout_s=0.1, handshake_timeout_s=86400.0))
    sock = node.dial()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = node.authority.client(*node.files).wrap_bio(
        incoming, outgoing, server_hostname="127.0.0.1"
    )
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))
    tls.write(GOOD[:20])
    sock.sendall(outgoing.read())
    eventually(lambda: listener.stats().head_timeouts == 1)
