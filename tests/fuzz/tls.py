"""A TLS session of ours, from a script of what the other side sends.

The first byte of a script chooses what is sent, the next two a place in it, the rest is written
over that place, or takes all of its place where nothing is there to write over:

0, 1    in place of a hello, to a server, to a client
2, 3    a client's first flight, to a server; a server's, to a client
4, 5    the client's second flight, to a server; a record of it, once hands are shaken
6       as 5, and it is cut where the place is; the peer is gone after it
7       nothing is written over: records, each of so many bytes as the next byte says
"""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
import tempfile
from pathlib import Path

from pipeline.tls._engine import Context, Session
from pipeline.tls.credentials import Credentials
from tests.support.tls import Authority, Pair

HOST = "127.0.0.1"


@functools.cache
def _contexts() -> tuple[Context, Context, ssl.SSLContext, ssl.SSLContext]:
    """Make what both sides work with: ours for both, Python's for both."""
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        credentials = Credentials(authority.info())
        client = authority.client(*authority.issue("client"))
        return credentials.client_context, credentials.server_context, client, authority.server()


def _over(data: bytes, at: int, piece: bytes) -> bytes:
    at %= max(1, len(data))
    return data[:at] + piece + data[at + len(piece) :]


class _Peer:
    """The other side: Python's TLS, whose bytes are ours to change."""

    def __init__(self, sock: socket.socket, *, is_server: bool) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        _, _, client, server = _contexts()
        self.tls = (server if is_server else client).wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=is_server,
            server_hostname=None if is_server else HOST,
        )

    def shake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._incoming.write(self._sock.recv(1 << 16))
        with contextlib.suppress(ssl.SSLError):
            self.tls.do_handshake()

    def flight(self) -> bytes:
        """Take what is to be sent."""
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # gone, or more than fits
            self._sock.send(data)


def _shake(session: Session) -> bool:
    """Go on with the handshake; whether it is over. A failure stays one."""
    try:
        return session.shake()
    except OSError as error:
        reason = str(error)
    assert reason
    with contextlib.suppress(OSError):
        assert not session.shake()
    return False


def _read_all(session: Session) -> bytes:
    """Read what there is. What has failed says why, and fails for ever."""
    came = bytearray()
    buffer = bytearray(40_000)
    while True:
        try:
            n = session.recv_into(buffer)
        except BlockingIOError:
            assert session.is_silent() or session.reason
            return bytes(came)
        except OSError:
            assert session.reason
            assert not session.is_silent()
            with contextlib.suppress(OSError):
                assert session.recv_into(buffer) == 0
            return bytes(came)
        if n == 0:
            assert not session.is_silent()
            return bytes(came)
        came += buffer[:n]


def run(data: bytes) -> None:
    """Play a script. Nothing that is sent crashes us, or is read although it was not written."""
    if len(data) < 3:
        return
    kind, at, piece = data[0] % 8, int.from_bytes(data[1:3]), data[3:]
    with Pair() as pair:
        _play(pair, kind, at, piece)


def _play(pair: Pair, kind: int, at: int, piece: bytes) -> None:
    ours_is_client = kind in (1, 3)
    client, server, _, _ = _contexts()
    session = (client if ours_is_client else server).session(
        pair.ours.fileno(), HOST if ours_is_client else None
    )
    peer = _Peer(pair.theirs, is_server=ours_is_client)
    written = b""
    if kind in (0, 1):
        _shake(session)
        peer.send(piece)
        _shake(session)
    elif kind in (2, 3):
        _shake(session)
        peer.shake()
        peer.send(_over(peer.flight(), at, piece))
        _shake(session)
    else:
        peer.shake()
        peer.send(peer.flight())
        _shake(session)
        peer.shake()
        flight = peer.flight()
        peer.send(_over(flight, at, piece) if kind == 4 else flight)
        is_done = _shake(session)
        assert is_done or kind == 4
        if is_done and kind != 4:
            for size in piece if kind == 7 else (len(piece) or 1,):
                written += bytes((size & 0xFF,)) * size
                if size:
                    peer.tls.write(bytes((size & 0xFF,)) * size)
            records = peer.flight()
            if kind == 5:
                records = _over(records, at, piece)
            elif kind == 6:
                records = records[: at % (len(records) + 1)]
            peer.send(records)
    if kind == 6:
        pair.theirs.close()
    if session.is_established:
        came = _read_all(session)
        assert written.startswith(came)
        assert kind != 7 or came == written
        with contextlib.suppress(OSError):
            session.send(b"answer")
    session.end()
