"""Mutual TLS through haproxy and nginx: passed on as it is, or ended there and begun anew."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline import (
    ConfState,
    Message,
    MessageType,
    PipelineConfig,
    ReceiverConfig,
    Snapshot,
    SnapshotMetadata,
    Transport,
    TransportConfig,
)
from pipeline.examples.etcd import free_port
from pipeline.tls._engine import session_count
from tests.support import LONG_TIMEOUT, MIB
from tests.support.descriptors import open_descriptors
from tests.support.etcd import Cluster, assert_balanced, move_leadership_to_us, puts_in_our_log
from tests.support.proxies import KEEP_ALIVE_MS, PEER_NAME, Way, haproxy, missing, nginx
from tests.support.raft import FakeRaft
from tests.support.tls import Authority
from tests.support.waiting import connections_to, eventually

OURS, THEIRS, CLUSTER = 1, 2, 77
#: Beyond how long the proxies keep an idle connection: it is they who end it.
PIPELINE = PipelineConfig(idle_timeout_s=60.0)
#: Servers that haproxy is to take our listener for; it checks each once in two seconds, and gives
#: up a check that takes longer. No more of them than a busy machine shakes hands with in that time.
SERVERS = 50

Proxy = Callable[..., AbstractContextManager[None]]


def installed(*marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Run a test with each proxy that is here, with marks; one that is not is skipped by name."""
    cases = []
    for name, proxy in (("haproxy", haproxy), ("nginx", nginx)):
        reason = missing(name)
        cases.append(
            pytest.param(proxy, id=name, marks=pytest.mark.skip(reason) if reason else marks)
        )
    return pytest.mark.parametrize("proxy", cases)


proxies = installed()
ways = pytest.mark.parametrize(
    "terminates", [False, True], ids=["passed on", "ended and begun anew"]
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certs", ("127.0.0.1", PEER_NAME))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


class Peers:
    """Two Transports: ``sender`` reaches ``receiver`` by the proxy's port alone."""

    def __init__(
        self, directory: Path, authority: Authority, *, probe_interval_s: float = 0.05
    ) -> None:
        self.raft = FakeRaft()
        self.sender_raft = FakeRaft()
        self.snapshots = directory / "snapshots"
        receiver = TransportConfig(receiver=ReceiverConfig(snapshot_dir=self.snapshots))
        self.receiver = Transport(
            THEIRS, CLUSTER, self.raft, tls=authority.info("theirs"), config=receiver
        )
        sender = TransportConfig(pipeline=PIPELINE, probe_interval_s=probe_interval_s)
        self.sender = Transport(
            OURS, CLUSTER, self.sender_raft, tls=authority.info("ours"), config=sender
        )

    @contextlib.contextmanager
    def running(
        self, proxy: Proxy, directory: Path, authority: Authority, **way: object
    ) -> Iterator[Way]:
        with self.receiver, self.sender:
            self.listener = self.receiver.listen("https://127.0.0.1:0")
            through = Way(port_of(self.listener.url), **way)  # type: ignore[arg-type]
            with proxy(directory, authority, through):
                self.sender.add_peer(THEIRS, [through.url])
                yield through
            assert_balanced(self.sender.stats()[THEIRS])

    def wait_sent(self, count: int) -> None:
        def is_sent() -> bool:
            stats = self.sender.stats()[THEIRS]
            return stats.sent + stats.failed + stats.dropped == count

        eventually(is_sent, lambda: f"{count} messages: {self.sender.stats()[THEIRS]}")
        stats = self.sender.stats()[THEIRS]
        assert (stats.sent, self.sender_raft.unreachable) == (count, [])


def heartbeat(context: bytes = b"") -> Message:
    return Message(type=MessageType.HEARTBEAT, to=THEIRS, from_=OURS, term=1, context=context)


@proxies
@ways
def test_messages_of_any_size_go_through(
    proxy: Proxy, terminates: bool, tmp_path: Path, authority: Authority
) -> None:
    peers = Peers(tmp_path, authority)
    with peers.running(proxy, tmp_path, authority, terminates=terminates):
        sizes = [0, 100, 17_000, MIB + 7, 20 * MIB] * 3
        for size in sizes:
            peers.sender.send([heartbeat(bytes(size))])
        peers.wait_sent(len(sizes))
        assert sorted(len(m.context) for m in peers.raft.processed) == sorted(sizes)
        eventually(lambda: peers.sender.probe_stats()[THEIRS].is_healthy, "a probe comes through")
    assert peers.listener.stats().handshake_failures == 0


@proxies
@ways
def test_a_snapshot_goes_through(
    proxy: Proxy, terminates: bool, tmp_path: Path, authority: Authority
) -> None:
    peers = Peers(tmp_path, authority)
    database = tmp_path / "database"
    database.write_bytes(bytes(range(256)) * (20 * MIB // 256))
    metadata = SnapshotMetadata(index=9, term=1, conf_state=ConfState(voters=(OURS, THEIRS)))
    message = Message(
        type=MessageType.SNAP,
        to=THEIRS,
        from_=OURS,
        term=1,
        snapshot=Snapshot(metadata=metadata),
    )
    with peers.running(proxy, tmp_path, authority, terminates=terminates):
        peers.sender.send_snapshot(message, database).result(LONG_TIMEOUT)
        stored = peers.receiver.snapshot_path(9)
        assert stored is not None
        assert stored.read_bytes() == database.read_bytes()


@proxies
def test_idle_connections_that_the_proxy_ends_cost_no_message(
    proxy: Proxy, tmp_path: Path, authority: Authority
) -> None:
    peers = Peers(tmp_path, authority, probe_interval_s=0)
    with peers.running(proxy, tmp_path, authority, terminates=True) as way:
        for turn in range(1, 4):
            peers.sender.send([heartbeat()] * 4)
            peers.wait_sent(4 * turn)
            eventually(lambda: connections_to(way.url) == 0, "the proxy ends what is idle")


@proxies
def test_connections_that_the_proxy_ends_as_we_send_cost_no_heartbeat(
    proxy: Proxy, tmp_path: Path, authority: Authority
) -> None:
    """The pauses are about as long as it waits: some of its ends and our posts cross."""
    peers = Peers(tmp_path, authority, probe_interval_s=0)
    with peers.running(proxy, tmp_path, authority, terminates=True):
        for turn in range(1, 21):
            peers.sender.send([heartbeat()])
            peers.wait_sent(turn)
            time.sleep((KEEP_ALIVE_MS - 5 + turn % 10) / 1000)


# With etcd


@installed(pytest.mark.etcd)
@ways
def test_etcd_and_we_reach_one_another_through_it(
    proxy: Proxy, terminates: bool, tmp_path: Path, authority: Authority
) -> None:
    cluster = Cluster(tmp_path, authority=authority)
    # etcd knows us by the port of the proxy, and we know etcd by the other one.
    to_us = Way(free_port(), terminates=terminates, port=port_of(cluster.our_url))
    to_etcd = Way(port_of(cluster.etcd.peer_url), terminates=terminates)
    large = bytes(range(256)) * 4096
    try:
        with proxy(tmp_path, authority, to_us, to_etcd):
            cluster.start_ours(listening=False)
            assert cluster.transport is not None
            cluster.transport.update_peer(cluster.etcd.id, [to_etcd.url])
            cluster.listener = cluster.transport.listen(f"https://127.0.0.1:{to_us.to}")
            cluster.etcd.start()
            cluster.wait_until_etcd_leads()
            cluster.etcd.put(b"under etcd", large)
            move_leadership_to_us(cluster)
            cluster.etcd.put(b"under us", large)
            assert puts_in_our_log(cluster) == {b"under etcd": large, b"under us": large}
            assert cluster.listener.stats().handshake_failures == 0
            assert cluster.stats().sent > 0
            cluster.etcd.stop()
            cluster.stop_ours()
    finally:
        cluster.stop()


# Checks of health


def descriptors_besides_tls() -> int:
    """Count the descriptors open but for those of TLS connections, each end of which has one.

    Nor does a name count by which this process has taken a block of ports (``free_port``).
    """
    return len(open_descriptors()) - names() - session_count()


def names() -> int:
    """Count the sockets here that have no address but a name, or none, on this machine."""
    unix = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    links = []
    for number in open_descriptors():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link.startswith("socket:[") and link[8:-1] in unix for link in links)


def settled(count: Callable[[], int]) -> int:
    """Return a count that was the same for a moment: at no instant at which something ends."""
    seen = [count()]

    def is_the_same() -> bool:
        seen.append(count())
        return len(set(seen[-10:])) == 1 and len(seen) > 10

    eventually(is_the_same, lambda: f"{seen[-10:]} is not one number")
    return seen[-1]


@pytest.mark.skipif(bool(missing("haproxy")), reason=missing("haproxy"))
@pytest.mark.parametrize(
    ("check", "options"),
    [
        ("check", ("option tcp-check", "tcp-check connect linger")),
        ("check check-ssl verify none", ()),
        ("check", ("option ssl-hello-chk",)),
        ("check check-ssl verify none", ("option httpchk GET /raft/probing",)),
        ("check check-ssl verify none crt {crt}", ("option httpchk GET /raft/probing",)),
    ],
    ids=["connect", "handshake", "hello", "request", "request with a certificate"],
)
def test_checks_of_health_are_no_flood_and_leave_nothing(
    check: str,
    options: tuple[str, ...],
    tmp_path: Path,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:

    def warnings() -> int:
        return sum(record.levelno >= logging.WARNING for record in caplog.records)

    crt = tmp_path / "check.pem"
    crt.write_bytes(b"".join(path.read_bytes() for path in authority.issue("check")))
    peers = Peers(tmp_path, authority)
    with peers.running(haproxy, tmp_path, authority) as way:
        listener = peers.listener
        eventually(lambda: peers.sender.probe_stats()[THEIRS].is_healthy, "a probe comes through")
        peers.sender.send([heartbeat()] * 20)
        peers.wait_sent(20)
        connections, sessions = listener.stats().connections, session_count()
        held = settled(descriptors_besides_tls)
        begin, accepted = time.monotonic(), listener.stats().accepted
        check = f"{check} inter 2s".format(crt=crt)
        checked = Way(way.to, servers=SERVERS, check=check, options=options)
        (tmp_path / "checks").mkdir()
        with haproxy(tmp_path / "checks", authority, checked):
            eventually(lambda: listener.stats().accepted > accepted + 2 * SERVERS, "it checks")
            peers.sender.send([heartbeat()] * 20)
            peers.wait_sent(40)
            if "crt" in check or "option tcp-check" in options:
                assert (listener.stats().handshake_failures, warnings()) == (0, 0)
            assert warnings() <= time.monotonic() - begin + 1
        eventually(
            lambda: descriptors_besides_tls() <= held,
            lambda: (
                f"{descriptors_besides_tls()} of {held} descriptors are not of a TLS connection"
            ),
        )
        # Other workers may have made their connections since; each end of one has a session.
        workers = PIPELINE.connections
        eventually(lambda: session_count() <= sessions + 2 * workers)
        eventually(lambda: listener.stats().connections <= connections + workers)
