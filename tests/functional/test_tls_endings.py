"""How a TLS connection that we made ends, as the server's OpenSSL sees it: whole or reset.

A connection that is merely closed where TLS has more to come is answered with an alert, and whoever
writes to a closed connection is sent SIGPIPE.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import MessageType, Transport, TransportConfig
from pipeline.net._sockets import OwnSocket, open_socket
from pipeline.send.probing import TICKETS_S
from pipeline.tls._engine import TLSError
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import CLUSTER, MEMBER, PEER, message
from tests.support.tls import Authority

OK = b"HTTP/1.1 204 No Content\r\n\r\n"
HEALTHY = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"OK":true}'


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Server:
    """Serves one connection with ``serve``, and keeps what that came to."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self.outcome: object = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LONG_TIMEOUT)
        self.port: int = self._listener.getsockname()[1]
        self._serve = serve
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            sock, _ = self._listener.accept()
            with sock:
                self.outcome = self._serve(sock)
        except OSError as error:
            self.outcome = error

    def wait(self) -> None:
        """Wait until the connection has ended."""
        self._thread.join()

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._listener.close()


def read_on(sock: socket.socket) -> bytes:
    """Read to the end; over TLS one without a close_notify raises."""
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


@contextlib.contextmanager
def connection_to(server: Server, credentials: Credentials) -> Iterator[OwnSocket]:
    """A connection that has TLS and has not shaken hands."""
    sock = open_socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    with sock:
        sock.setblocking(True)
        sock.connect(("127.0.0.1", server.port))
        sock.setblocking(False)
        name = credentials.name_of("127.0.0.1")
        sock.tls = credentials.client_context.session(sock.fileno(), name)
        yield sock


def shake(sock: OwnSocket, credentials: Credentials) -> None:
    assert sock.tls is not None
    while not sock.tls.shake():
        wait_readable(sock)
    credentials.check_server(sock.tls)


def hear_ticket(sock: OwnSocket) -> None:
    """Read the session ticket with which the server ends the handshake."""
    assert sock.tls is not None
    while not sock.tls.has_heard:
        wait_readable(sock)
        assert sock.tls.is_silent()


def wait_readable(sock: OwnSocket) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(LONG_TIMEOUT * 1000)


def reader(
    authority: Authority,
    before: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
    *,
    below_tls: bool = False,
) -> Callable[[socket.socket], object]:
    """Do what is to be done ``before``, shake hands, do what is to be done ``after``, and read on.

    Below TLS what is read are not records but what they are made of.
    """
    context = authority.server()
    context.num_tickets = 1

    def serve(sock: socket.socket) -> object:
        with context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        ) as tls:
            if before is not None:
                before()
            tls.do_handshake()
            if after is not None:
                after()
            if not below_tls:
                return read_on(tls)
            with socket.socket(fileno=tls.detach()) as raw:
                return read_on(raw)

    return serve


@pytest.mark.parametrize("is_refused", [False, True])
def test_between_records_the_server_is_told_that_nothing_follows(
    authority: Authority, is_refused: bool
) -> None:
    with Server(reader(authority)) as server:
        info = authority.info()
        if is_refused:  # by our rules, of what TLS itself agrees to
            info = authority.info(allowed_cn=("somebody else",))
        credentials = Credentials(info)
        with connection_to(server, credentials) as sock:
            if is_refused:
                with pytest.raises(TLSError, match="certificate refused"):
                    shake(sock, credentials)
            else:
                shake(sock, credentials)
            sock.close()
            assert sock.fileno() == -1
    assert server.outcome == b""


def test_a_server_that_cannot_prove_itself_is_told_why(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger")
    credentials = Credentials(authority.info())
    with Server(reader(stranger)) as server, connection_to(server, credentials) as sock:
        with pytest.raises(TLSError, match="certificate verify failed"):
            shake(sock, credentials)
        sock.close()
    assert isinstance(server.outcome, ssl.SSLError)
    assert server.outcome.reason == "TLSV1_ALERT_UNKNOWN_CA"


@pytest.mark.parametrize("place", ["in the handshake", "in a record"])
def test_in_the_middle_of_something_the_connection_is_reset(
    authority: Authority, place: str
) -> None:
    is_there, is_ended = threading.Event(), threading.Event()

    def wait_for_the_end() -> None:
        is_there.set()
        is_ended.wait(LONG_TIMEOUT)

    before, after = wait_for_the_end, None
    if place == "in a record":
        before, after = after, before  # type: ignore[assignment]
    credentials = Credentials(authority.info())
    with (
        Server(reader(authority, before, after, below_tls=True)) as server,
        connection_to(server, credentials) as sock,
    ):
        assert sock.tls is not None
        if place == "in the handshake":
            assert not sock.tls.shake()
            assert is_there.wait(LONG_TIMEOUT)
        else:
            shake(sock, credentials)
            hear_ticket(sock)
            with contextlib.suppress(BlockingIOError):
                while sock.send(bytes(1 << 20)):
                    pass
        sock.close()
        assert sock.fileno() == -1
        is_ended.set()
    assert isinstance(server.outcome, ConnectionResetError)


@pytest.mark.parametrize("kind", ["messages", "probes", "snapshots"])
def test_whatever_we_send_ends_as_tls_asks(authority: Authority, kind: str) -> None:
    context = authority.server()
    has_answered = threading.Event()

    def serve(sock: socket.socket) -> object:
        with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
            head = b""
            while b"\r\n\r\n" not in head:
                head += tls.recv(65536)
            head, body = head.split(b"\r\n\r\n", 1)
            length = next(
                (
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                ),
                0,
            )
            while len(body) < length:
                body += tls.recv(65536)
            tls.sendall(HEALTHY if head.startswith(b"GET") else OK)
            has_answered.set()
            return read_on(tls)

    config = TransportConfig(probe_interval_s=0.1 if kind == "probes" else 600)
    with (
        Server(serve) as server,
        Transport(MEMBER, CLUSTER, FakeRaft(), tls=authority.info(), config=config) as node,
    ):
        node.add_peer(PEER, [f"https://127.0.0.1:{server.port}"])
        if kind == "messages":
            node.send([message()])
        elif kind == "snapshots":
            source = iter([b"database"])
            snapshot = message(MessageType.SNAP)
            node.send_snapshot(snapshot, source, size=8).result(LONG_TIMEOUT)
        assert has_answered.wait(LONG_TIMEOUT)
    assert server.outcome == b""


@pytest.mark.parametrize("end", ["stop", "remove_peer"])
def test_a_probed_server_that_has_just_shaken_hands_has_time_for_its_tickets(
    authority: Authority, end: str
) -> None:
    """It writes none here, and so the connection stays for as long as it might."""
    context = authority.server()
    context.num_tickets = 0
    is_asked = threading.Event()

    def serve(sock: socket.socket) -> float:
        with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
            assert tls.recv(65536).startswith(b"GET ")
            is_asked.set()
            assert read_on(tls) == b""
            return time.monotonic()

    config = TransportConfig(probe_interval_s=0.1)
    with (
        Server(serve) as server,
        Transport(MEMBER, CLUSTER, FakeRaft(), tls=authority.info(), config=config) as node,
    ):
        node.add_peer(PEER, [f"https://127.0.0.1:{server.port}"])
        assert is_asked.wait(LONG_TIMEOUT)
        began = time.monotonic()
        if end == "stop":
            node.stop()
        else:
            node.remove_peer(PEER)
            server.wait()
    assert isinstance(server.outcome, float), server.outcome
    assert server.outcome - began >= TICKETS_S
