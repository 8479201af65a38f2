"""Writing to a peer that is gone, with SIGPIPE as command-line tools set it: it ends the process.

``sigpipe.py PLACE DIRECTORY`` prints "ok". Each place writes once what the peer cannot take any
more: it has ended its side and reset the connection, and the kernel knows.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from pipeline.config import ReceiverConfig
from pipeline.errors import PeerUnreachableError
from pipeline.net._sockets import open_socket
from pipeline.net.dialling import Dialer
from pipeline.net.poller import Poller
from pipeline.net.pool import Pool, PooledConnection
from pipeline.receive.odd_request import OddRequest, Then
from pipeline.send.picker import URLPicker
from pipeline.send.probing import Prober, _Target
from pipeline.snapshot.connections import _Receiving
from pipeline.snapshot.link import Ending, SnapshotLink
from pipeline.snapshot.source import FileSource
from pipeline.stats import Histogram
from pipeline.tls._engine import TLSError
from pipeline.tls.credentials import Credentials
from pipeline.wire.answers import Answer
from tests.support.http import handlers_of
from tests.support.listening import raw_head
from tests.support.raft import FakeRaft
from tests.support.tls import Authority

place, directory = sys.argv[1], Path(sys.argv[2])
authority = Authority(directory)
credentials = Credentials(authority.info())
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
poller = Poller("1")
dialer = Dialer(poller)
poller.start()


def kill(mine: socket.socket, peer: socket.socket) -> None:
    """End ``peer`` in order, then with RST, and wait until our side has heard of both."""
    with contextlib.suppress(OSError):
        socket.socket.send(mine, b"unread", socket.MSG_NOSIGNAL)  # below TLS
    peer.shutdown(socket.SHUT_WR)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    poll = select.poll()
    poll.register(mine, 0)  # POLLERR and POLLHUP come all the same
    found = dict(poll.poll(10_000))[mine.fileno()]
    assert found & select.POLLERR, found


def accept(scheme: str) -> socket.socket:
    """Accept a connection, and shake hands if it is to have TLS."""
    sock, _ = listener.accept()
    if scheme == "https":
        context = authority.server()
        context.num_tickets = 0
        sock = context.wrap_socket(sock, server_side=True)
    return sock


@contextlib.contextmanager
def connection(scheme: str) -> Iterator[tuple[PooledConnection, socket.socket]]:
    """A worker's connection to a peer, and the peer's end."""
    url = f"{scheme}://127.0.0.1:{port}"
    pool = Pool(
        url, b"GET / HTTP/1.1\r\n\r\n", size=1, dead_link_timeout_s=5, credentials=credentials
    )
    found = PooledConnection(200)
    is_done = threading.Event()
    dialer.begin(found.prepare(pool, 10, lambda _: is_done.set()))
    peer = accept(scheme)
    is_done.wait(10)
    found.open()
    yield found, peer
    found.close()


def alert() -> None:
    """A dial tells a server that its hello is none."""
    sock = open_socket(socket.AF_INET, socket.SOCK_STREAM, 0)
    sock.setblocking(True)
    sock.connect(("127.0.0.1", port))
    peer, _ = listener.accept()
    sock.tls = credentials.client_context.session(sock.fileno(), "127.0.0.1")
    assert not sock.tls.shake()
    peer.sendall(b"\x16\x03\x03\x00\x04\x02\x00\x00\x00")
    kill(sock, peer)
    with pytest.raises(TLSError):
        sock.tls.shake()
    sock.close()


def probe(scheme: str) -> None:
    """The prober asks."""
    prober = Prober(Poller("no thread"), dialer, interval_s=1, credentials=credentials)
    target = _Target(2, URLPicker([f"{scheme}://127.0.0.1:{port}"]), 0.0, Histogram((1.0,)))
    target.is_busy = True
    with connection(scheme) as (target.connection, peer):
        kill(target.connection.sock, peer)
        prober._send(target)
        assert "Broken pipe" in target.stats.last_error, target.stats


def snapshot(scheme: str, write: Callable[[SnapshotLink], int]) -> None:
    """A snapshot is sent: bytes, ciphertext, or a file by the kernel."""
    url = f"{scheme}://127.0.0.1:{port}"
    link = SnapshotLink(
        Pool(url, b"", size=1, dead_link_timeout_s=5, credentials=credentials),
        dialer,
        Ending(),
        peer_id=2,
        stall_timeout_s=5,
        dead_link_timeout_s=5,
    )
    accepted: list[socket.socket] = []

    def serve() -> None:
        accepted.append(accept(scheme))

    thread = threading.Thread(target=serve)
    thread.start()
    link.dial(10)
    thread.join()
    assert link._sock is not None
    kill(link._sock, accepted[0])
    with pytest.raises(PeerUnreachableError, match="Broken pipe"):
        write(link)
    link.close()


def file(link: SnapshotLink) -> int:
    path = directory / "database"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDONLY)
    return link.write_file(FileSource(fd, 0, 1 << 20, lambda: os.close(fd)), 0, 1 << 20)


def receiving(scheme: str, write: Callable[[_Receiving], object]) -> None:
    """A snapshot is received, or refused."""
    mine = open_socket(socket.AF_INET, socket.SOCK_STREAM, 0)  # who has dialled does not matter
    mine.setblocking(True)
    mine.connect(("127.0.0.1", port))
    peer, _ = listener.accept()
    if scheme == "https":
        theirs = authority.client(*authority.issue("client"))
        wrapped = theirs.wrap_socket(
            peer, server_hostname="127.0.0.1", do_handshake_on_connect=False
        )
        thread = threading.Thread(target=wrapped.do_handshake)
        thread.start()
        mine.tls = credentials.server_context.session(mine.fileno())
        while not mine.tls.shake():
            select.select([mine], [], [])
        thread.join()
        peer = wrapped
    config = ReceiverConfig(snapshot_dir=directory)
    handlers = handlers_of(FakeRaft(), config)
    odd = OddRequest(handlers, config, "here", lambda *_: False)
    line = "POST /raft/snapshot HTTP/1.1"
    head = raw_head("Expect: 100-continue", "Content-Length: 9", line=line)
    assert odd.feed(head) == (b"", Then.DETACH)
    receiver = _Receiving(mine, odd, odd.move_place(), config)
    kill(mine, peer)
    write(receiver)
    receiver.close()


def go_on(receiver: _Receiving) -> object:
    try:
        return receiver._recv_into(memoryview(bytearray(9)))
    except BrokenPipeError as error:
        return error


PLACES: dict[str, Callable[[], None]] = {
    "a dial's alert": alert,
    "a probe": lambda: probe("http"),
    "a probe over TLS": lambda: probe("https"),
    "a snapshot's bytes": lambda: snapshot(
        "http", lambda link: link.write(memoryview(b"x" * 1024))
    ),
    "a snapshot's file": lambda: snapshot("http", file),
    "a snapshot's ciphertext": lambda: snapshot(
        "https", lambda link: link.write(memoryview(b"x" * 1024))
    ),
    "a snapshot's answer": lambda: receiving("http", lambda to: to.answer(Answer(500))),
    "a snapshot's answer over TLS": lambda: receiving("https", lambda to: to.answer(Answer(500))),
    "a snapshot's 100": lambda: receiving("http", go_on),
    "a snapshot's 100 over TLS": lambda: receiving("https", go_on),
}

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with listener:
        PLACES[place]()
    poller.stop(0.0)
    assert signal.SIGPIPE not in cast(set[int], signal.pthread_sigmask(signal.SIG_BLOCK, []))
    print("ok", flush=True)
