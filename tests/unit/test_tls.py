"""TLSInfo and Credentials: rules, loading, and what is kept when loading fails."""

from __future__ import annotations

import datetime
import logging
import os
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import TLSInfo, UsageError
from pipeline.tls._engine import Context, Session, TLSError
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT
from tests.support.logs import handler_that_raises
from tests.support.tls import DAY, Authority, Pair, shake
from tests.support.waiting import eventually

FILES = {"cert_file": "c", "key_file": "k", "trusted_ca_file": "t"}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def overwrite(path: Path, data: bytes) -> None:
    """Replace a file's content, and its date for certain."""
    old = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(old + 1_000_000_000, old + 1_000_000_000))


# Settings


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cert_file": ""}, "cert_file: '' is not a path"),
        ({"key_file": None}, "key_file: None is not a path"),
        ({"crl_file": 7}, "crl_file: 7 is not a path"),
        ({"trusted_ca_file": None}, "trusted_ca_file: is needed for client_cert_auth"),
        (
            {"trusted_ca_file": None, "client_cert_auth": False, "crl_file": "x"},
            "trusted_ca_file: is needed for crl_file",
        ),
        ({"allowed_cn": "etcd"}, "allowed_cn: 'etcd' is not a tuple of names"),
        ({"allowed_uris": ("",)}, "allowed_uris: .* is not a tuple of names"),
        (
            {"allowed_cn": ("a",), "allowed_hostnames": ("b",)},
            "allowed_cn: cannot be given together with allowed_hostnames",
        ),
        ({"allowed_cn": ("a",), "client_cert_auth": False}, "allowed_cn: needs client_cert_auth"),
        (
            {"allow_member": print, "client_cert_auth": False},
            "allow_member: needs client_cert_auth",
        ),
        ({"allow_member": 1}, "allow_member: 1 is not callable"),
        ({"server_name": ""}, "server_name: '' is not a name"),
        ({"server_name": ".etcd"}, "server_name: '.etcd' is not a host name"),
        ({"server_name": "a..b"}, "server_name: 'a..b' is not a host name"),
        ({"server_name": "a\0b"}, "server_name: 'a.x00b' is not a host name"),
        ({"min_version": "1.1"}, "min_version: '1.1' is not one of 1.2, 1.3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        TLSInfo(**{**FILES, **changes})


# Loading


def test_a_client_offers_no_alpn_and_a_server_gives_no_tickets(authority: Authority) -> None:
    credentials = Credentials(authority.info())
    python = authority.server()
    python.set_alpn_protocols(["h2"])
    with Pair() as pair:
        session = credentials.client_context.session(pair.ours.fileno(), "127.0.0.1")
        other = pair.python(python, server_side=True)
        shake(session, other)
        assert other.selected_alpn_protocol() is None
    with Pair() as pair:
        session = credentials.server_context.session(pair.ours.fileno())
        other = pair.python(
            authority.client(*authority.issue("client")), server_hostname="127.0.0.1"
        )
        shake(session, other)
        session.send(b"x")
        assert other.read(1) == b"x"
        assert other.session is None or not other.session.has_ticket


def test_a_listener_asks_for_a_certificate_unless_it_is_told_not_to(authority: Authority) -> None:
    stranger = Credentials(Authority(authority.directory / "other").info()).info
    for is_asking in (True, False):
        credentials = Credentials(authority.info(client_cert_auth=is_asking))
        client = authority.client()
        client.load_cert_chain(stranger.cert_file, stranger.key_file)
        with Pair() as pair:
            session = credentials.server_context.session(pair.ours.fileno())
            other = pair.python(client, server_hostname="127.0.0.1")
            if is_asking:
                with pytest.raises(TLSError, match="certificate verify failed"):
                    shake(session, other)
            else:
                shake(session, other)
                assert session.certificate is None


def handshake(
    client: Context, server: Context | ssl.SSLContext, host: str = "127.0.0.1"
) -> Session:
    """Connect two contexts; the client's end. What either side refuses with is raised."""
    with Pair() as pair:
        session = client.session(pair.ours.fileno(), host)
        if isinstance(server, Context):
            shake(session, server.session(pair.theirs.fileno()))
        else:
            shake(session, pair.python(server, server_side=True))
        return session


def test_min_version_is_asked_of_the_other(authority: Authority) -> None:
    credentials = Credentials(authority.info(min_version="1.3"))
    old = authority.server(maximum=ssl.TLSVersion.TLSv1_2)
    with pytest.raises(
        (TLSError, ssl.SSLError), match=r"(?i)protocol.version|unsupported.protocol"
    ):
        handshake(credentials.client_context, old)
    assert handshake(credentials.client_context, authority.server()).version == "TLSv1.3"


def test_a_common_name_proves_no_host(authority: Authority) -> None:
    cert, key = authority.issue("named", "node@example.com", common_name="localhost")
    client = Credentials(authority.info()).client_context
    server = Credentials(authority.info(cert_file=cert, key_file=key)).server_context
    with pytest.raises(TLSError, match="not valid for 'localhost'"):
        handshake(client, server, "localhost")


def test_an_intermediate_in_the_ca_file_is_an_anchor(authority: Authority, tmp_path: Path) -> None:
    pytest.importorskip("trustme")
    middle = authority.ca.create_child_ca()
    (tmp_path / "middle.pem").write_bytes(middle.cert_pem.bytes())
    issued = middle.issue_cert("127.0.0.1")
    with issued.private_key_and_cert_chain_pem.tempfile() as file:
        both = {"cert_file": file, "key_file": file, "trusted_ca_file": tmp_path / "middle.pem"}
        credentials = Credentials(TLSInfo(**both))
    handshake(credentials.client_context, credentials.server_context)


def test_not_after_is_the_own_certificates(authority: Authority) -> None:
    end = datetime.datetime(2038, 1, 19, 3, 14, 7, tzinfo=datetime.UTC)
    cert, key = authority.issue("dated", not_after=end)
    credentials = Credentials(authority.info(cert_file=cert, key_file=key))
    assert credentials.not_after == end.timestamp() == 2**31 - 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cert_file", None),
        ("cert_file", b""),
        ("key_file", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
        ("trusted_ca_file", b"no PEM"),
        ("crl_file", b"no PEM"),
    ],
)
def test_what_cannot_be_loaded_at_first_is_an_error_that_names_the_setting(
    authority: Authority, tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / "broken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"tls: .*{name}.*: "):
        Credentials(authority.info(**{name: path}))


def test_an_encrypted_key_is_refused_and_not_asked_a_password_for(authority: Authority) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    _, path = authority.issue("locked")
    key = load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(UsageError, match="the key is encrypted"):
        Credentials(authority.info(key_file=path))


# Revocation


def test_a_revoked_certificate_fails_in_both_directions(authority: Authority) -> None:
    good, bad = authority.info("good"), authority.info("bad")
    crl = authority.revoke(Path(bad.cert_file))
    checking = Credentials(authority.info("checking", crl_file=crl))
    revoked = Credentials(bad)
    with pytest.raises(TLSError, match="certificate revoked"):
        handshake(checking.client_context, revoked.server_context)
    with pytest.raises(TLSError, match="certificate revoked"):
        handshake(revoked.client_context, checking.server_context)
    handshake(Credentials(good).client_context, checking.server_context)


def test_a_revocation_list_that_has_expired_lets_nobody_in(authority: Authority) -> None:
    crl = authority.revoke(next_update=-DAY)
    checking = Credentials(authority.info(crl_file=crl))
    with pytest.raises(TLSError, match="CRL has expired"):
        handshake(checking.client_context, checking.server_context)


def test_certificates_among_the_revocation_lists_are_not_trusted(
    authority: Authority, tmp_path: Path
) -> None:
    crl = authority.revoke()
    crl.write_bytes(crl.read_bytes() + Authority(tmp_path).ca.cert_pem.bytes())
    with pytest.raises(UsageError, match="crl_file: holds certificates"):
        Credentials(authority.info(trusted_ca_file=Authority(tmp_path).ca_file, crl_file=crl))


@pytest.mark.parametrize("cut", [30, 200])
def test_a_damaged_list_behind_a_good_one_is_no_end_of_the_file(
    authority: Authority, cut: int
) -> None:
    """Left out, it would let in whom it revokes: as when the disk was full in the middle of it."""
    bad = authority.info("bad")
    whole = authority.revoke().read_bytes()
    newer = authority.revoke(Path(bad.cert_file))
    newer.write_bytes(whole + newer.read_bytes()[:-cut])
    with pytest.raises(UsageError, match="crl_file: "):
        Credentials(authority.info(crl_file=newer))


# Rules

CERTIFICATE = {
    "subject": ((("organizationName", "o"),), (("commonName", "first"),), (("commonName", "cn"),)),
    "subjectAltName": (
        ("DNS", "*.Example.com"),
        ("DNS", "plain.test"),
        ("IP Address", "10.0.0.1"),
        ("IP Address", "2001:DB8:0:0:0:0:0:1"),
        ("URI", "spiffe://cluster/member"),
    ),
}


@pytest.mark.parametrize(
    ("rules", "is_allowed"),
    [
        ({}, True),
        ({"allowed_cn": ("other", "cn")}, True),
        ({"allowed_cn": ("first",)}, False),  # as in Go, the last one counts
        ({"allowed_hostnames": ("node.example.com",)}, True),
        ({"allowed_hostnames": ("NODE.example.com.",)}, True),
        ({"allowed_hostnames": ("a.node.example.com",)}, False),
        ({"allowed_hostnames": ("example.com",)}, False),
        ({"allowed_hostnames": (".example.com",)}, False),
        ({"allowed_hostnames": ("other", "plain.test")}, True),
        ({"allowed_hostnames": ("cn",)}, False),  # a common name is no host name
        ({"allowed_hostnames": ("10.0.0.1",)}, True),
        ({"allowed_hostnames": ("[2001:db8::1]",)}, True),
        ({"allowed_hostnames": ("10.0.0.2",)}, False),
        ({"allowed_uris": ("spiffe://cluster/member",)}, True),
        ({"allowed_uris": ("spiffe://cluster/",)}, False),
        ({"allowed_uris": ("spiffe://cluster/member",), "allowed_cn": ("other",)}, False),
    ],
)
def test_rules(authority: Authority, rules: dict[str, Any], is_allowed: bool) -> None:
    refusal = Credentials(authority.info(**rules)).refusal(CERTIFICATE)
    assert (refusal == "") is is_allowed
    assert is_allowed or refusal.startswith("certificate refused: ")


def test_a_certificate_with_nothing_in_it_satisfies_no_rule(authority: Authority) -> None:
    for rule in ("allowed_cn", "allowed_hostnames", "allowed_uris"):
        assert Credentials(authority.info(**{rule: ("x",)})).refusal({}) != ""


# Reloading


def test_a_changed_file_is_noticed_and_told(authority: Authority) -> None:
    info = authority.info()
    credentials = Credentials(info)
    told = threading.Event()
    credentials.subscribe(told.set)
    before = credentials.client_context, credentials.server_context, credentials.not_after
    credentials.watch("test")
    try:
        cert, key = authority.issue("new", not_after=datetime.datetime(2040, 1, 1))
        overwrite(Path(info.cert_file), cert.read_bytes())
        overwrite(Path(info.key_file), key.read_bytes())
        assert told.wait(LONG_TIMEOUT)
    finally:
        credentials.stop(time.monotonic() + LONG_TIMEOUT)
    after = credentials.client_context, credentials.server_context, credentials.not_after
    assert not set(before) & set(after)
    assert credentials.generation == 1


def test_reload_loads_on_call_and_says_so(authority: Authority) -> None:
    credentials = Credentials(authority.info())
    context = credentials.client_context
    assert credentials.reload()
    assert credentials.client_context is not context
    assert credentials.generation == 1


@pytest.mark.parametrize("name", ["cert_file", "key_file", "trusted_ca_file"])
@pytest.mark.parametrize("content", [b"", b"broken", None])
def test_a_broken_set_is_told_once_and_the_last_good_one_kept(
    authority: Authority, caplog: pytest.LogCaptureFixture, name: str, content: bytes | None
) -> None:
    info = authority.info()
    credentials = Credentials(info)
    told: list[None] = []
    credentials.subscribe(lambda: told.append(None))
    kept = credentials.client_context
    path = Path(getattr(info, name))
    good = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        overwrite(path, content)
    caplog.set_level(logging.ERROR, "pipeline.tls")
    for _ in range(3):
        assert not credentials.reload()
    assert credentials.client_context is kept
    assert (credentials.generation, told) == (0, [])
    (line,) = caplog.messages
    assert name in line
    path.write_bytes(good)
    assert credentials.reload()
    assert credentials.generation == 1


def test_a_key_of_another_certificate_is_a_broken_set(authority: Authority) -> None:
    """A rotation replaces one file after the other: between the two nothing is to happen."""
    info = authority.info()
    credentials = Credentials(info)
    cert, key = authority.issue("new")
    overwrite(Path(info.cert_file), cert.read_bytes())
    assert not credentials.reload()
    overwrite(Path(info.key_file), key.read_bytes())
    assert credentials.reload()


def test_a_subscriber_that_raises_does_not_keep_others_from_hearing(authority: Authority) -> None:
    credentials = Credentials(authority.info())
    told: list[None] = []
    credentials.subscribe(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    credentials.subscribe(lambda: told.append(None))
    assert credentials.reload()
    assert told == [None]


@pytest.mark.parametrize("log_error", [SystemExit, RecursionError])
def test_the_thread_that_polls_survives_a_log_handler_that_raises(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, log_error: type[BaseException]
) -> None:
    monkeypatch.setattr("pipeline.tls.credentials.POLL_INTERVAL_S", 0.01)
    info = authority.info()
    credentials = Credentials(info)
    path = Path(info.trusted_ca_file or "")
    good = path.read_bytes()
    credentials.watch("test")
    try:
        with handler_that_raises("TLS files", log_error) as handler:
            for count in (1, 2):
                overwrite(path, b"broken")
                # Two lines more for each round: not loaded, loaded anew.
                eventually(lambda count=count: handler.raised >= 2 * count - 1)  # type: ignore[misc]
                overwrite(path, good)
                eventually(lambda count=count: credentials.generation == count)  # type: ignore[misc]
        assert handler.raised >= 3
    finally:
        credentials.stop(time.monotonic() + LONG_TIMEOUT)


def test_poll_looks_at_the_files_once_a_second(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = authority.info()
    credentials = Credentials(info)
    now = [1000.0]
    monkeypatch.setattr("pipeline.tls.credentials.time.monotonic", lambda: now[0])
    credentials.poll()
    path = Path(info.trusted_ca_file or "")
    overwrite(path, path.read_bytes())
    credentials.poll()
    assert credentials.generation == 0
    now[0] += 1.0
    credentials.poll()
    assert credentials.generation == 1
    now[0] += 1.0
    credentials.poll()  # nothing has changed since
    assert credentials.generation == 1


def test_a_set_that_failed_is_tried_again_though_its_files_did_not_change(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = Credentials(authority.info())
    now = [1000.0]
    monkeypatch.setattr("pipeline.tls.credentials.time.monotonic", lambda: now[0])

    def no_descriptors(*_: object) -> None:
        raise OSError("Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.tls.credentials._load", no_descriptors)
        assert not credentials.reload()
    now[0] += 5.0
    credentials.poll()
    assert credentials.generation == 0
    now[0] += 5.0
    credentials.poll()
    assert credentials.generation == 1
