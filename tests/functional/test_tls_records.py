"""Records that no TLS library would write, to an https listener: made from the keys of a client."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tests.support.http import HEARTBEAT
from tests.support.listening import GOOD
from tests.support.tls_listening import Node
from tests.support.waiting import eventually

#: Content types, RFC 8446 section 5.1.
ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23
#: Two bytes each, RFC 8446 section 6: a fatal one, and one that says that nothing follows.
HANDSHAKE_FAILURE, CLOSE_NOTIFY = b"\x02\x28", b"\x01\x00"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


class Forger:
    """A client that has shaken hands by Python's ssl, and then writes records of its own making."""

    def __init__(self, node: Node, tmp_path: Path) -> None:
        context = node.authority.client(*node.files)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        keys = tmp_path / "keys"
        context.keylog_filename = str(keys)
        self.sock = node.dial()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                break
            self._pump()
        self.sock.sendall(self._outgoing.read())
        (line,) = [
            line for line in keys.read_text().splitlines() if line.startswith("CLIENT_TRAFFIC")
        ]
        secret = bytes.fromhex(line.split()[2])
        cipher = self._tls.cipher()
        assert cipher is not None
        name = cipher[0]  # TLS_AES_256_GCM_SHA384 or its like
        self._hash = hashes.SHA384() if name.endswith("384") else hashes.SHA256()
        self._key = self._expand(secret, b"key", 32 if "256_GCM" in name else 16)
        self._iv = self._expand(secret, b"iv", 12)
        self._written = 0

    def _pump(self) -> None:
        self.sock.sendall(self._outgoing.read())
        self._incoming.write(self.sock.recv(65536))

    def _expand(self, secret: bytes, label: bytes, size: int) -> bytes:
        """Return HKDF-Expand-Label, RFC 8446 section 7.1."""
        label = b"tls13 " + label
        info = size.to_bytes(2) + bytes((len(label),)) + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(secret)

    def record(self, kind: int, text: bytes, padding: int = 0) -> bytes:
        """Encrypt a record of a kind, RFC 8446 section 5.2."""
        plain = text + bytes((kind,)) + bytes(padding)
        head = b"\x17\x03\x03" + (len(plain) + 16).to_bytes(2)
        number = self._written.to_bytes(12)
        self._written += 1
        nonce = bytes(a ^ b for a, b in zip(self._iv, number, strict=True))
        return head + AESGCM(self._key).encrypt(nonce, plain, head)

    def read(self) -> bytes:
        """Read something of an answer; nothing at the end, told or not."""
        while True:
            try:
                return self._tls.read(65536)
            except ssl.SSLWantReadError:
                data = self.sock.recv(65536)
                if not data:
                    return b""
                self._incoming.write(data)
            except ssl.SSLError:
                return b""


@pytest.fixture
def forger(node: Node, tmp_path: Path) -> Iterator[Forger]:
    node.listen()
    forger = Forger(node, tmp_path)
    with forger.sock:
        yield forger


def is_gone(node: Node) -> None:
    """Wait until the listener has no connection any more."""
    eventually(lambda: node.listener.stats().connections == 0)


def test_a_forged_record_is_a_record_like_any_other(node: Node, forger: Forger) -> None:
    forger.sock.sendall(forger.record(APPLICATION_DATA, GOOD, padding=100))
    assert forger.read().startswith(b"HTTP/1.1 204")
    assert node.raft.processed == [HEARTBEAT]


def test_empty_records_between_others_are_nothing(node: Node, forger: Forger) -> None:
    for at in range(0, len(GOOD), 40):
        forger.sock.sendall(forger.record(APPLICATION_DATA, b""))
        forger.sock.sendall(forger.record(APPLICATION_DATA, GOOD[at : at + 40]))
    assert forger.read().startswith(b"HTTP/1.1 204")
    assert node.raft.processed == [HEARTBEAT]


@pytest.mark.parametrize("padding", [0, 16_000])
def test_a_flood_of_empty_records_ends_the_connection(
    node: Node, forger: Forger, padding: int
) -> None:
    with contextlib.suppress(ConnectionError):
        for _ in range(20_000):
            forger.sock.sendall(forger.record(APPLICATION_DATA, b"", padding))
            if node.listener.stats().connections == 0:
                break
    is_gone(node)
    assert node.raft.processed == []


@pytest.mark.parametrize("part", [0, 100, len(GOOD) - 1])
@pytest.mark.parametrize("alert", [HANDSHAKE_FAILURE, CLOSE_NOTIFY], ids=["fatal", "close_notify"])
def test_an_alert_in_the_middle_of_a_request_is_its_end(
    node: Node, forger: Forger, part: int, alert: bytes
) -> None:
    """Also when all of the rest comes behind it."""
    before, behind = GOOD[:part], GOOD[part:]
    records = (
        forger.record(APPLICATION_DATA, before),
        forger.record(ALERT, alert),
        forger.record(APPLICATION_DATA, behind),
    )
    forger.sock.sendall(b"".join(records[1 if part == 0 else 0 :]))
    with contextlib.suppress(ConnectionError):
        assert b"204" not in forger.read()
    is_gone(node)
    assert node.raft.processed == []


def test_a_flood_of_warnings_ends_the_connection(node: Node, forger: Forger) -> None:
    user_canceled = b"\x01\x5a"
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            forger.sock.sendall(forger.record(ALERT, user_canceled))
    is_gone(node)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HANDSHAKE, b"\x01\x00\x00\x02\x03\x03"),  # another hello
        (HANDSHAKE, b""),
        (HANDSHAKE, b"\x18\xff\xff\xff"),  # an update of the keys of 16 MiB
        (ALERT, b"\x02"),
        (20, b"\x01"),  # a change of the cipher
        (0, b""),
        (99, b"x"),
    ],
)
def test_a_record_that_has_no_place_there_ends_the_connection(
    node: Node, forger: Forger, kind: int, text: bytes
) -> None:
    forger.sock.sendall(forger.record(kind, text))
    if text.startswith(b"\x18"):  # the rest of it is waited for, as long as for a head
        forger.sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionError):
        assert forger.read() == b""
    is_gone(node)
    assert node.raft.processed == []
    assert node.listener.stats().handshake_failures == 0
