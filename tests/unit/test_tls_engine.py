"""Sessions of the TLS engine beside Python's ssl: what they say, what they read, how they end."""

from __future__ import annotations

import contextlib
import datetime
import gc
import ipaddress
import os
import random
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.errors import UsageError
from pipeline.net._sockets import open_socket
from pipeline.tls._engine import Context, Session, TLSError
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT, MIB
from tests.support.openssl import RawClient
from tests.support.tls import DAY, Authority, Onlooker, Pair, shake

HOST = "127.0.0.1"
A_MOMENT_S = 0.1


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def credentials(authority: Authority) -> Credentials:
    return Credentials(authority.info())


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def connect(pair: Pair, credentials: Credentials) -> tuple[Session, Session]:
    """Connect two sessions of ours: the client's end, the server's."""
    client = credentials.client_context.session(pair.ours.fileno(), HOST)
    server = credentials.server_context.session(pair.theirs.fileno())
    shake(client, server)
    return client, server


def for_ever(call: Callable[[], object]) -> NoReturn:
    """Call until it raises."""
    while True:
        call()


# The library


def test_without_openssl_tls_is_an_error_that_says_what_to_install(
    authority: Authority, tmp_path: Path
) -> None:
    """And the rest of the package works: here a library is found that is none."""
    (tmp_path / "libssl.so.3").touch()
    info = authority.info()
    program = (
        "import sys; from pipeline import TLSInfo, Message, UsageError\n"
        "from pipeline.tls.credentials import Credentials\n"
        "Message(type=0).marshal()\n"
        "try: Credentials(TLSInfo(cert_file=sys.argv[1], key_file=sys.argv[2],"
        " trusted_ca_file=sys.argv[3]))\n"
        "except UsageError as error: print(error)\n"
    )
    files = (info.cert_file, info.key_file, info.trusted_ca_file)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "OpenSSL 3 is needed, and libssl.so.3 is not there: install" in done.stdout, done.stderr


# Names


@pytest.mark.parametrize(
    ("identities", "host", "is_proven"),
    [
        (("node.test",), "node.test", True),
        (("node.test",), "NODE.test", True),
        (("*.test.example",), "node.test.example", True),
        (("*.test.example",), "a.node.test.example", False),
        (("127.0.0.1",), "127.0.0.1", True),
        (("127.0.0.2",), "127.0.0.1", False),
        (("127.0.0.1",), "localhost", False),
        (("2001:db8::1",), "2001:db8:0::1", True),
        (("b\u00fccher.test",), "b\u00fccher.test", True),
    ],
)
def test_a_server_proves_the_name_that_was_dialled(
    authority: Authority, pair: Pair, identities: tuple[str, ...], host: str, is_proven: bool
) -> None:
    server = pair.python(authority.server("named", *identities), server_side=True)
    server.context.verify_mode = ssl.CERT_NONE
    session = Credentials(authority.info()).client_context.session(pair.ours.fileno(), host)
    if is_proven:
        shake(session, server)
        assert session.is_established
        return
    with pytest.raises(TLSError, match=rf"mismatch, certificate is not valid for '{host}'"):
        shake(session, server)
    assert session.reason.startswith("certificate verify failed: ")


def test_a_part_of_a_label_is_no_wildcard(authority: Authority, pair: Pair) -> None:
    files = authority.issue("partial", "nx.test.example")
    authority.rename(files[0], b"nx.test", b"n*.test")
    context = authority.server()
    context.load_cert_chain(*files)
    client = Credentials(authority.info()).client_context
    session = client.session(pair.ours.fileno(), "node.test.example")
    with pytest.raises(TLSError, match="hostname mismatch"):
        shake(session, pair.python(context, server_side=True))


def test_a_name_goes_out_as_sni_and_an_address_does_not(
    authority: Authority, credentials: Credentials
) -> None:
    asked: list[str | None] = []
    context = authority.server("both", "node.test", HOST)
    context.verify_mode = ssl.CERT_NONE
    context.sni_callback = lambda _sock, name, _context: asked.append(name)
    for host in ("node.test", HOST):
        with Pair() as pair:
            session = credentials.client_context.session(pair.ours.fileno(), host)
            shake(session, pair.python(context, server_side=True))
    assert asked == ["node.test", None]


# Certificates


def self_signed(tmp_path: Path) -> tuple[Path, Path]:
    """Write a certificate with something of everything that we describe."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "B\u00fccher & S\u00f6hne"),
            x509.NameAttribute(NameOID.COMMON_NAME, "first"),
            x509.NameAttribute(NameOID.COMMON_NAME, "second"),
            x509.NameAttribute(x509.ObjectIdentifier("1.2.3.4.5"), "of no known kind"),
        ]
    )
    names = x509.SubjectAlternativeName(
        [
            x509.DNSName("*.node.test"),
            x509.IPAddress(ipaddress.ip_address(HOST)),
            x509.UniformResourceIdentifier("spiffe://cluster/member"),
            x509.RFC822Name("root@node.test"),
            x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "in a name")])),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(0x00AB_CDEF_0123)
        .not_valid_before(datetime.datetime(2001, 2, 3, 4, 5, 6))
        .not_valid_after(datetime.datetime(2088, 11, 12, 13, 14, 15))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = tmp_path / "self.pem", tmp_path / "self.key"
    cert_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert_file, key_file


def test_a_certificate_is_described_as_ssl_describes_it(pair: Pair, tmp_path: Path) -> None:
    cert_file, key_file = self_signed(tmp_path)
    context = Context(
        is_server=True,
        cert_file=cert_file,
        key_file=key_file,
        trusted_ca_file=cert_file,
        crl_file=None,
        min_version="1.2",
        asks_for_certificate=True,
    )
    python = ssl.create_default_context(cafile=str(cert_file))
    python.load_cert_chain(cert_file, key_file)
    session = context.session(pair.ours.fileno())
    other = pair.python(python, server_hostname=HOST)
    shake(session, other)
    assert session.certificate == other.getpeercert()
    assert context.not_after == ssl.cert_time_to_seconds("Nov 12 13:14:15 2088 GMT")


# Reading and writing


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_in_any_pieces_is_read_in_any_pieces(
    authority: Authority, pair: Pair, version: str, seed: int
) -> None:
    dice = random.Random(seed)
    credentials = Credentials(authority.info(min_version=version))
    client, server = connect(pair, credentials)
    sent, came = dice.randbytes(2 * MIB), bytearray()
    left = memoryview(sent)
    buffer = bytearray(MIB)
    size = 0
    while len(came) < len(sent):
        if left:
            # What was not taken comes first the next time, and in full.
            size = min(len(left), max(size, dice.choice((1, 100, 16_384, 70_000, MIB))))
            with contextlib.suppress(BlockingIOError):
                n = client.send(left[:size])
                left, size = left[n:], size - n
        with contextlib.suppress(BlockingIOError):
            n = server.recv_into(memoryview(buffer)[: dice.choice((1, 5_000, MIB))])
            came += buffer[:n]
    assert came == sent


def test_a_read_that_is_small_leaves_the_rest_of_the_record(
    pair: Pair, credentials: Credentials
) -> None:
    client, server = connect(pair, credentials)
    client.send(b"ab")
    buffer = bytearray(1)
    assert not server.is_silent()
    assert (server.recv_into(buffer), bytes(buffer)) == (1, b"a")
    assert not server.is_silent()
    assert (server.recv_into(buffer), bytes(buffer)) == (1, b"b")
    assert server.is_silent()
    with pytest.raises(BlockingIOError):
        server.recv_into(buffer)


def test_what_came_with_the_handshake_does_not_hide_what_came_later(
    authority: Authority, credentials: Credentials, pair: Pair
) -> None:
    """Of that the kernel may have told already, and it tells once."""
    client = pair.python(authority.client(*authority.issue("c")), server_hostname=HOST)
    server = credentials.server_context.session(pair.ours.fileno())
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    assert not server.shake()
    client.do_handshake()
    client.send(b"one, ")
    assert server.shake()
    client.send(b"two")
    buffer = bytearray(100)
    assert buffer[: server.recv_into(buffer)] == b"one, two"


def test_what_is_no_plain_text_has_its_turn_and_no_more(
    authority: Authority, credentials: Credentials
) -> None:
    """Updates of the keys by the thousand would keep a loop from all others."""
    files = authority.issue("raw")
    with socket.create_server((HOST, 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
        caller = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    session = credentials.server_context.session(ours.fileno())

    def send() -> None:
        with RawClient(caller, *files) as client:
            for _ in range(6000):  # 27 bytes each
                client.update_key()
            client.send(b"text")

    sender = threading.Thread(target=send)
    sender.start()
    while not session.shake():
        select.select([ours], [], [])
    sender.join()
    buffer, turns = bytearray(100), 0
    while True:
        assert select.select([ours], [], [], LONG_TIMEOUT)[0]
        try:
            assert buffer[: session.recv_into(buffer)] == b"text"
            break
        except BlockingIOError:
            turns += 1
    # One call reads 64 KiB of them and a bit; more calls if the kernel holds some back.
    assert turns >= 2
    caller.close()
    ours.close()


def test_session_tickets_are_no_word_of_the_peers(
    authority: Authority, pair: Pair, credentials: Credentials
) -> None:
    context = authority.server()
    context.num_tickets = 7
    session = credentials.client_context.session(pair.ours.fileno(), HOST)
    other = pair.python(context, server_side=True)
    shake(session, other)
    assert session.is_silent()
    assert session.has_heard
    other.write(b"x")
    assert not session.is_silent()


def test_what_it_has_failed_with_it_goes_on_to_fail_with(
    pair: Pair, credentials: Credentials
) -> None:
    client, _ = connect(pair, credentials)
    pair.theirs.send(b"this is no record of TLS")
    for _ in range(2):
        with pytest.raises(TLSError, match="wrong version number"):
            client.recv_into(bytearray(1))
        with pytest.raises(TLSError, match="wrong version number"):
            client.send(b"x")
    assert not client.is_silent()


class Stuck:
    """A session that cannot go on although its socket is ready: the peer has begun a handshake's
    message, says no more of it, and TLS reads it to its end before it writes.
    """

    def __init__(self, *, wants_to_write: bool) -> None:
        self.wants_to_write = wants_to_write
        self.attempts = 0

    def send(self, data: object) -> int:
        self.attempts += 1
        raise BlockingIOError

    recv_into = send

    def end(self) -> bool:
        return True


@pytest.mark.parametrize("wants_to_write", [False, True])
@pytest.mark.parametrize("way", ["send", "recv_into"])
def test_what_cannot_go_on_is_given_up_in_time(way: str, wants_to_write: bool) -> None:
    """And waits meanwhile, where there is something to wait for."""
    with socket.create_server((HOST, 0)) as listening:
        sock = open_socket(socket.AF_INET, socket.SOCK_STREAM, 0)
        sock.settimeout(A_MOMENT_S)
        sock.connect(listening.getsockname())
        stuck = Stuck(wants_to_write=wants_to_write)
        sock.tls = stuck  # type: ignore[assignment]
        with pytest.raises(TimeoutError):
            getattr(sock, way)(bytearray(1))
        sock.close()
    assert wants_to_write or stuck.attempts <= 3


def test_a_socket_reads_no_more_than_it_is_asked_for(credentials: Credentials) -> None:
    with socket.create_server((HOST, 0)) as listening:
        ours = open_socket(socket.AF_INET, socket.SOCK_STREAM, 0)
        ours.settimeout(LONG_TIMEOUT)
        ours.connect(listening.getsockname())
        theirs, _ = listening.accept()
    theirs.setblocking(False)
    ours.tls = credentials.client_context.session(ours.fileno(), HOST)
    server = credentials.server_context.session(theirs.fileno())
    shake(ours.tls, server)
    assert server.send(b"abcdef") == 6
    buffer = bytearray(6)
    assert ours.recv_into(buffer, 2) == 2
    assert buffer == b"ab\0\0\0\0"
    for count in (-1, 7):
        with pytest.raises(ValueError, match=f"recv_into: nbytes {count} is not in 0..6"):
            ours.recv_into(buffer, count)
    assert ours.recv_into(buffer) == 4
    assert buffer == b"cdef\0\0"
    ours.close()
    theirs.close()


# Ends


def test_the_end_of_a_connection_is_told(pair: Pair, credentials: Credentials) -> None:
    client, server = connect(pair, credentials)
    assert client.end()
    assert server.recv_into(bytearray(1)) == 0
    assert server.has_ended
    assert not server.is_silent()


def test_a_stream_that_is_cut_off_ends_without_having_been_ended(
    pair: Pair, credentials: Credentials
) -> None:
    client, _ = connect(pair, credentials)
    pair.theirs.close()
    assert client.recv_into(bytearray(1)) == 0
    assert not client.has_ended
    with pytest.raises(BrokenPipeError):
        client.send(b"x")


def test_nothing_can_be_told_in_the_middle_of_a_handshake_or_a_record(
    pair: Pair, credentials: Credentials
) -> None:
    client = credentials.client_context.session(pair.ours.fileno(), HOST)
    assert not client.shake()
    assert not client.end()
    server = credentials.server_context.session(pair.theirs.fileno())
    shake(client, server)
    with pytest.raises(BlockingIOError):
        for_ever(lambda: client.send(bytes(MIB)))
    assert not client.end()


def test_a_handshake_that_the_other_leaves_fails(pair: Pair, credentials: Credentials) -> None:
    client = credentials.client_context.session(pair.ours.fileno(), HOST)
    client.shake()
    pair.theirs.close()
    with pytest.raises((TLSError, ConnectionError), match=r"ended during the handshake|reset"):
        for_ever(client.shake)


def test_a_chain_that_fills_the_socket_is_written_when_there_is_room(
    authority: Authority, pair: Pair
) -> None:
    """A handshake may have to wait until it can write."""
    cert, key = authority.issue("long")
    cert.write_bytes(cert.read_bytes() + authority.ca.cert_pem.bytes() * 90)
    context = Credentials(authority.info(cert_file=cert, key_file=key)).server_context
    pair.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    session = context.session(pair.ours.fileno())
    client = ssl.create_default_context(cafile=str(authority.ca_file))
    client.load_cert_chain(*authority.issue("client"))
    other = pair.python(client, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        other.do_handshake()
    assert not session.shake()
    assert session.wants_to_write
    shake(session, other)


# Memory, threads, processes


def test_sessions_leave_nothing_behind(authority: Authority, credentials: Credentials) -> None:
    """Of each kind: never shaken, shaken, failed, with bytes that nobody has read."""
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Pair() as pair:
            client, _ = connect(pair, credentials)
            client.send(b"unread")
        with Pair() as pair, pytest.raises(TLSError):
            shake(
                credentials.client_context.session(pair.ours.fileno(), "elsewhere.test"),
                credentials.server_context.session(pair.theirs.fileno()),
            )
        with Pair() as pair:
            credentials.client_context.session(pair.ours.fileno(), HOST)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_contexts_are_shared_by_threads(authority: Authority, credentials: Credentials) -> None:
    """While the credentials are loaded anew beside them."""
    failures: list[BaseException] = []

    def shake_often() -> None:
        try:
            for _ in range(40):
                with Pair() as pair:
                    client, server = connect(pair, credentials)
                    client.send(b"x")
                    server.recv_into(bytearray(1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=shake_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        credentials.reload()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_forked_child_says_nothing_on_its_parents_connections(
    pair: Pair, credentials: Credentials
) -> None:
    client, server = connect(pair, credentials)
    child = os.fork()
    if child == 0:
        del client, server
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    client.send(b"x")
    buffer = bytearray(2)
    assert (server.recv_into(buffer), buffer[:1]) == (1, b"x")
    assert server.is_silent()


def test_a_reset_is_an_error_of_the_socket(credentials: Credentials) -> None:
    with socket.create_server((HOST, 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    for sock in (ours, theirs):
        sock.setblocking(False)
    client = credentials.client_context.session(ours.fileno(), HOST)
    server = credentials.server_context.session(theirs.fileno())
    shake(client, server)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with pytest.raises(ConnectionResetError), ours:
        for_ever(lambda: client.recv_into(bytearray(1)))


def test_a_certificate_that_has_expired_lets_nobody_in(
    authority: Authority, pair: Pair, credentials: Credentials
) -> None:
    old = authority.issue("old", not_after=datetime.datetime.now(datetime.UTC) - DAY)
    session = credentials.server_context.session(pair.ours.fileno())
    other = pair.python(authority.client(*old), server_hostname=HOST)
    with pytest.raises(TLSError, match="certificate verify failed: certificate has expired"):
        shake(session, other)


# What others in the same thread see


def a_whole_connection(authority: Authority, pair: Pair) -> None:
    credentials = Credentials(authority.info(crl_file=authority.revoke()))
    client, server = connect(pair, credentials)
    assert client.send(b"x") == 1
    assert server.recv_into(bytearray(8)) == 1
    assert client.certificate is not None
    with pytest.raises(BlockingIOError):
        server.recv_into(bytearray(8))
    assert client.end()
    assert server.recv_into(bytearray(8)) == 0


def a_handshake_with_garbage(authority: Authority, pair: Pair) -> None:
    session = Credentials(authority.info()).server_context.session(pair.ours.fileno())
    pair.theirs.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(TLSError):
        session.shake()


def a_server_of_strangers(authority: Authority, pair: Pair) -> None:
    other = Authority(authority.directory / "strangers")
    session = Credentials(other.info()).client_context.session(pair.ours.fileno(), HOST)
    server = pair.python(authority.server(), server_side=True)
    with pytest.raises((TLSError, ssl.SSLError)):
        shake(session, server)
    assert not session.is_established


def a_record_of_garbage(authority: Authority, pair: Pair) -> None:
    _, server = connect(pair, Credentials(authority.info()))
    pair.ours.sendall(b"\x17\x03\x03\x00\x10" + bytes(16))
    with pytest.raises(TLSError):
        server.recv_into(bytearray(8))


def garbage_while_it_is_idle(authority: Authority, pair: Pair) -> None:
    _, server = connect(pair, Credentials(authority.info()))
    pair.ours.sendall(b"\x17\x03\x03\x00\x10" + bytes(16))
    assert not server.is_silent()


def a_socket_that_is_gone(authority: Authority, pair: Pair) -> None:
    client, _ = connect(pair, Credentials(authority.info()))
    pair.theirs.close()
    with pytest.raises(OSError, match="Broken pipe"):
        client.send(b"x")


def a_name_that_is_too_long(authority: Authority, pair: Pair) -> None:
    context = Credentials(authority.info()).client_context
    with pytest.raises(TLSError, match="is not a name"):
        context.session(pair.ours.fileno(), ".".join(["a" * 60] * 5))


def a_certificate_that_is_no_text(authority: Authority, pair: Pair) -> None:
    files = authority.issue("odd", HOST, "xx-odd.test")
    authority.rename(files[0], b"xx-odd", b"\xff\xfe-odd")
    context = authority.server()
    context.load_cert_chain(*files)
    session = Credentials(authority.info()).client_context.session(pair.ours.fileno(), HOST)
    shake(session, pair.python(context, server_side=True))
    with pytest.raises(TLSError, match="it cannot be read"):
        _ = session.certificate


def files_that_are_none(authority: Authority, pair: Pair) -> None:
    garbage = authority.directory / "garbage"
    garbage.write_bytes(b"-----BEGIN CERTIFICATE-----\n!\n")
    _, others_key = authority.issue("other")
    for files in (
        {"cert_file": garbage},
        {"key_file": garbage},
        {"key_file": others_key},
        {"trusted_ca_file": garbage},
        {"crl_file": garbage},
        {"crl_file": authority.ca_file},
    ):
        with pytest.raises(UsageError, match=r"^tls: "):
            Credentials(authority.info(**files))


@pytest.mark.parametrize(
    "do",
    [
        a_whole_connection,
        a_handshake_with_garbage,
        a_server_of_strangers,
        a_record_of_garbage,
        garbage_while_it_is_idle,
        a_socket_that_is_gone,
        a_name_that_is_too_long,
        a_certificate_that_is_no_text,
        files_that_are_none,
    ],
    ids=lambda do: do.__name__,
)
def test_openssl_s_errors_of_ours_are_not_left_to_the_thread(
    authority: Authority, pair: Pair, do: Callable[[Authority, Pair], None]
) -> None:
    """Python's ssl would take them for its own; an application's callback may be next."""
    onlooker = Onlooker(authority)
    do(authority, pair)
    onlooker.look()
