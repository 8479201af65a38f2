"""Mutual TLS with a real etcd 3.5.1 that asks its peers for certificates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import Message, MessageType, TLSInfo, Transport, TransportConfig
from pipeline.examples.etcd import EtcdMember, find_etcd, free_port
from tests.support.etcd import wait_until
from tests.support.raft import FakeRaft
from tests.support.tls import Authority

pytestmark = pytest.mark.etcd


def tls_flags(info: TLSInfo) -> list[str]:
    """Return what makes etcd use these files and check its peers' certificates."""
    return [
        "--peer-client-cert-auth",
        f"--peer-trusted-ca-file={info.trusted_ca_file}",
        f"--peer-cert-file={info.cert_file}",
        f"--peer-key-file={info.key_file}",
    ]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "certs").mkdir()
    return Authority(tmp_path / "certs")


@pytest.fixture
def etcd(tmp_path: Path, authority: Authority) -> Iterator[EtcdMember]:
    """A member whose only peer, which is us, does not listen."""
    binary = find_etcd()
    assert binary is not None, "no etcd binary: the `test` extra brings one"
    member = EtcdMember(
        binary,
        tmp_path,
        f"https://127.0.0.1:{free_port()}",
        flags=tls_flags(authority.info("etcd")),
        peer_scheme="https",
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
        wait_until(lambda: transport.probe_stats()[etcd.id].is_healthy, "a probe over TLS")
        for i in range(50):
            transport.send([heartbeat(etcd, bytes(i * 1000))])
        wait_until(lambda: transport.stats()[etcd.id].sent == 50, "etcd answers 204")
        assert transport.reload_tls()
        transport.send([heartbeat(etcd)])
        wait_until(lambda: transport.stats()[etcd.id].sent == 51, "etcd answers after a rotation")
        books = transport.stats()[etcd.id]
        assert (books.failed, raft.unreachable) == (0, [])


def test_etcd_refuses_a_certificate_of_another_authority(
    etcd: EtcdMember, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").info(trusted_ca_file=authority.ca_file)
    raft = FakeRaft()
    with our_transport(etcd, authority.info(), FakeRaft()) as ours:
        wait_until(lambda: ours.probe_stats()[etcd.id].is_healthy, "a probe over TLS")
    with our_transport(etcd, stranger, raft) as transport:
        transport.send([heartbeat(etcd)])
        assert raft.wait_unreachable(1) == [etcd.id]
        wait_until(
            lambda: "alert" in transport.probe_stats()[etcd.id].last_error, "the reason is told"
        )
        assert transport.stats()[etcd.id].sent == 0
