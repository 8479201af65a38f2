"""``python -m tests.soak``: see the package."""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from pipeline import (
    ConfState,
    Entry,
    Message,
    MessageType,
    PipelineStats,
    PostError,
    ReceiverConfig,
    RequestRejected,
    Snapshot,
    SnapshotCancelledError,
    SnapshotMetadata,
    SnapshotSourceError,
    SnapshotStatus,
    TLSInfo,
    Transport,
    TransportConfig,
    aio,
)
from pipeline.examples.etcd import free_port
from tests.soak.verdict import MIB, Sample, fix_malloc, growths
from tests.support.tls import Authority
from tests.support.waiting import eventually

#: For something that must happen on a machine that is not overloaded.
TIMEOUT_S = 60.0
#: Between two small messages of the background, of each pair and direction.
PACE_S = 0.004
#: How often everything is done in a round.
REPEATS = 4
#: From the last message of a round to its sample: idle connections are retired after 4 s, and the
#: memory of large bodies is kept for 2 s.
QUIET_S = 5.0
CLUSTER_ID = 0x5041


class SoakError(Exception):
    """Something did not happen in time, or the books do not balance."""


wait_until = functools.partial(eventually, timeout=TIMEOUT_S, error=SoakError)


def balances(b: PipelineStats) -> bool:
    """Tell whether every message has exactly one place in the books."""
    return (
        b.offered == b.accepted + b.refused
        and b.accepted == b.sent + b.failed + b.dropped + b.queued + b.in_flight
    )


class Node:
    """A member that counts what it is given; implements ``pipeline.Raft``."""

    def __init__(self) -> None:
        self.processed: Counter[int] = Counter()  # by sender
        self.snapshots = 0
        self.refuses = False
        self.transport: Transport | None = None

    def process(self, message: Message) -> None:
        if self.refuses:
            raise RequestRejected(503, b"not now\n")
        if message.snapshot is not None and self.transport is not None:
            path = self.transport.snapshot_path(message.snapshot.metadata.index)
            if path is not None:
                self.snapshots += 1
                path.unlink()
        self.processed[message.from_] += 1

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


class Pair:
    """Two members, 1 and 2, that talk to each other, plain or over mutual TLS."""

    def __init__(self, name: str, directory: Path, tls: tuple[TLSInfo, TLSInfo] | None) -> None:
        self.name = name
        scheme = "http" if tls is None else "https"
        self.urls = {n: f"{scheme}://127.0.0.1:{free_port()}" for n in (1, 2)}
        self.tls = dict(zip((1, 2), tls or (None, None), strict=True))
        self.directory = directory
        self.nodes = {1: Node(), 2: Node()}
        self.transports: dict[int, Transport] = {}
        self.sent: Counter[int] = Counter()  # by sender, in the lives that are over
        for member_id in (1, 2):
            self.start(member_id)

    def start(self, member_id: int) -> None:
        """Start a member where it always listens."""
        receiver = ReceiverConfig(snapshot_dir=self.directory / f"{self.name}-{member_id}")
        transport = Transport(
            member_id,
            CLUSTER_ID,
            self.nodes[member_id],
            peer_urls=[self.urls[member_id]],
            tls=self.tls[member_id],
            config=TransportConfig(receiver=receiver, probe_interval_s=0.5),
        )
        self.nodes[member_id].transport = transport
        transport.start()
        transport.add_peer(3 - member_id, [self.urls[3 - member_id]])
        transport.listen(self.urls[member_id])
        self.transports[member_id] = transport

    def stop(self, member_id: int) -> None:
        """Stop a member at once, whatever is on its way."""
        transport = self.transports.pop(member_id)
        transport.pause()  # so that nothing is sent between the reading of the books and the end
        stats = transport.stats()[3 - member_id]
        transport.stop()
        self.sent[member_id] += stats.sent

    def books(self) -> dict[int, PipelineStats]:
        """Return the books of both, as far as they run."""
        return {
            member_id: transport.stats()[3 - member_id]
            for member_id, transport in list(self.transports.items())
        }

    def send(self, from_: int, message: Message) -> None:
        """Offer a message to the other; nothing if the sender does not run."""
        transport = self.transports.get(from_)
        if transport is not None:
            transport.send([message])

    def is_drained(self) -> bool:
        """Tell whether nothing is on its way."""
        return all(b.queued == 0 and b.in_flight == 0 for b in self.books().values())


def append(from_: int, size: int) -> Message:
    """Return a MsgApp with one entry of this size."""
    entry = Entry(term=1, index=1, data=bytes(size))
    return Message(type=MessageType.APP, to=3 - from_, from_=from_, term=1, entries=[entry])


def snapshot(from_: int, index: int) -> Message:
    metadata = SnapshotMetadata(index=index, term=1, conf_state=ConfState(voters=(1, 2)))
    return Message(
        type=MessageType.SNAP,
        to=3 - from_,
        from_=from_,
        term=1,
        snapshot=Snapshot(metadata=metadata),
    )


class Soak:
    """The work, in rounds: small messages all the time, and beside them everything else in turn."""

    def __init__(self, directory: Path, dice: random.Random) -> None:
        self.directory = directory
        self.dice = dice
        self.authority = Authority(directory / "certs")
        tls = (self.authority.info("one"), self.authority.info("two"))
        self.pairs = [Pair("plain", directory, None), Pair("tls", directory, tls)]
        self.database = directory / "database"
        self.database.write_bytes(dice.randbytes(4 * MIB))
        self.next_index = 1
        self.works = (
            self.large_messages,
            self.snapshots,
            self.broken_snapshots,
            self.restarts,
            self.refusals,
            self.changes_of_peers,
            self.cuts,
            self.hostile_connections,
            self.statistics,
            self.new_certificates,
            self.asyncio_nodes,
            self.short_lives,
        )
        self.counts: Counter[str] = Counter()
        self._is_quiet = threading.Event()
        self._stopped = threading.Event()
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._background, name="soak-background")
        self._lock = threading.Lock()  # held while a member is stopped or started

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop everything; the counts of both sides must agree."""
        self._stopped.set()
        self._thread.join()
        for pair in self.pairs:
            for member_id in list(pair.transports):
                pair.stop(member_id)

    def check(self) -> None:
        """Raise what the background has found; a member has processed all that was answered."""
        if self.failure is not None:
            raise self.failure
        for pair in self.pairs:
            for from_, books in pair.books().items():
                sent = pair.sent[from_] + books.sent
                processed = pair.nodes[3 - from_].processed[from_]
                if processed < sent:
                    raise SoakError(f"{pair.name}: {sent} sent by {from_}, {processed} processed")

    def round(self) -> Sample:
        """Do everything a few times, in any order, wait until all is quiet and take a sample."""
        self._is_quiet.clear()
        for work in self.dice.sample(self.works * REPEATS, len(self.works) * REPEATS):
            for pair in self.pairs:
                work(pair)
                self.counts[work.__name__] += 1
            if self.failure is not None:
                raise self.failure
        self._is_quiet.set()
        wait_until(lambda: all(pair.is_drained() for pair in self.pairs), "all is drained")
        time.sleep(QUIET_S)
        self.check()
        return Sample.take()

    def _background(self) -> None:
        """Small messages both ways, and a look at the books at any moment."""
        while not self._stopped.wait(PACE_S):
            with self._lock:
                for pair in self.pairs:
                    if not self._is_quiet.is_set():
                        for from_ in (1, 2):
                            pair.send(from_, append(from_, 128))
                    for from_, books in pair.books().items():
                        if not balances(books):
                            self.failure = SoakError(f"{pair.name} {from_}: {books}")
                            return

    # One of everything

    def large_messages(self, pair: Pair) -> None:
        """Borrowed by the sender, and read into memory of their own by the receiver."""
        for size in (100_000, 1 * MIB, 6 * MIB):
            for from_ in (1, 2):
                pair.send(from_, append(from_, size))
        wait_until(pair.is_drained, "large messages are sent")

    def snapshots(self, pair: Pair) -> None:
        """By a file, and by chunks."""
        before = {member_id: node.snapshots for member_id, node in pair.nodes.items()}
        one, two = pair.transports[1], pair.transports[2]
        self.next_index += 2
        transfers = (
            one.send_snapshot(snapshot(1, self.next_index), self.database),
            two.send_snapshot(snapshot(2, self.next_index), [bytes(100_000)] * 10, size=1_000_000),
        )
        for transfer in transfers:
            transfer.result(TIMEOUT_S)
        for member_id, node in pair.nodes.items():
            if node.snapshots != before[member_id] + 1:
                raise SoakError(f"{pair.name}: a snapshot was answered and not processed")

    def broken_snapshots(self, pair: Pair) -> None:
        """The source ends early; another is cancelled."""
        transport = pair.transports[1]
        self.next_index += 2
        broken = transport.send_snapshot(snapshot(1, self.next_index), [b"short"], size=1000)
        try:
            broken.result(TIMEOUT_S)
        except SnapshotSourceError:
            pass
        else:
            raise SoakError("a short source was taken for a whole one")
        transport.set_snapshot_rate_limit(MIB)
        cancelled = transport.send_snapshot(snapshot(1, self.next_index + 1), self.database)
        cancelled.cancel()
        with suppress(SnapshotCancelledError, PostError):
            cancelled.result(TIMEOUT_S)
        transport.set_snapshot_rate_limit(None)

    def restarts(self, pair: Pair) -> None:
        """A member goes away, what is sent to it fails, and it comes back."""
        member_id = self.dice.choice((1, 2))
        other = 3 - member_id
        failed = pair.books()[other].failed
        with self._lock:
            pair.stop(member_id)
        for _ in range(8):
            pair.send(other, append(other, 1000))
        wait_until(lambda: pair.books()[other].failed > failed, "messages to nobody fail")
        with self._lock:
            pair.start(member_id)
        sent = pair.books()[other].sent

        def is_back() -> bool:
            pair.send(other, append(other, 10))
            return pair.books()[other].sent > sent

        wait_until(is_back, "messages arrive again")

    def refusals(self, pair: Pair) -> None:
        """The node refuses what it is given."""
        failed = pair.books()[1].failed
        pair.nodes[2].refuses = True

        def is_refused() -> bool:
            pair.send(1, append(1, 10))
            return pair.books()[1].failed > failed

        wait_until(is_refused, "messages are refused")
        pair.nodes[2].refuses = False

    def changes_of_peers(self, pair: Pair) -> None:
        """Peers and remotes come, change and go."""
        transport = pair.transports[1]
        for member_id in range(10, 20):
            transport.add_peer(member_id, [pair.urls[2]])
            transport.send(
                [
                    Message(type=MessageType.HEARTBEAT, to=member_id, from_=1, term=1)
                    for _ in range(3)
                ]
            )
            transport.update_peer(member_id, [pair.urls[1]])
            transport.add_remote(member_id + 10, [pair.urls[2]])
        for member_id in range(10, 20):
            transport.remove_peer(member_id)
            transport.remove_peer(member_id + 10)

    def cuts(self, pair: Pair) -> None:
        """As the tests of a node cut and mend its peers."""
        transport = pair.transports[2]
        transport.cut_peer(1)
        for _ in range(10):
            pair.send(2, append(2, 10))
        transport.mend_peer(1)
        transport.pause()
        transport.resume()

    def hostile_connections(self, pair: Pair) -> None:
        """Requests that are none, halves of requests, and callers that say nothing."""
        port = int(pair.urls[1].rpartition(":")[2])
        head = b"POST /raft HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        for data in (b"", b"\x16\x03\x01\xff\xff", b"GET / HTTP/1.1\r\n\r\n", head, b"\0" * 5000):
            with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
                try:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1000):
                        pass
                except OSError:
                    pass  # reset, as is right

    def statistics(self, pair: Pair) -> None:
        """Everything that tells of a node."""
        transport = pair.transports[1]
        transport.peer_stats()
        transport.probe_stats()
        transport.remote_stats()
        transport.follower_stats()
        transport.leader_stats()
        transport.server_stats()
        registry = CollectorRegistry()
        registry.register(transport.metrics_collector())
        generate_latest(registry)

    def new_certificates(self, pair: Pair) -> None:
        """Both get new files, and load them."""
        if pair.tls[1] is None:
            return
        for name, member_id in (("one", 1), ("two", 2)):
            self.authority.issue(name)
            if not pair.transports[member_id].reload_tls():
                raise SoakError("new certificates were not loaded")

    def asyncio_nodes(self, pair: Pair) -> None:
        """Two nodes on an event loop, for a moment."""

        async def talk() -> None:
            arrived: asyncio.Queue[Message] = asyncio.Queue()

            class Loop(Node):
                async def process(self, message: Message) -> None:  # type: ignore[override]
                    await arrived.put(message)

            async with (
                aio.Transport(1, CLUSTER_ID, Loop(), tls=pair.tls[1]) as one,
                aio.Transport(2, CLUSTER_ID, Loop(), tls=pair.tls[2]) as two,
            ):
                scheme = pair.urls[1].partition(":")[0]
                listener = await two.listen(f"{scheme}://127.0.0.1:0")
                one.add_peer(2, [listener.url])
                one.send([append(1, 1000) for _ in range(20)])
                async with asyncio.timeout(TIMEOUT_S):
                    for _ in range(20):
                        await arrived.get()

        asyncio.run(talk())

    def short_lives(self, pair: Pair) -> None:
        """Nodes that are stopped with their queues full."""
        for _ in range(3):
            transport = Transport(1, CLUSTER_ID, Node(), tls=pair.tls[1])
            with transport:
                scheme = pair.urls[1].partition(":")[0]
                transport.listen(f"{scheme}://127.0.0.1:0")
                transport.add_peer(2, [f"{scheme}://127.0.0.1:1"])
                transport.send([append(1, 10_000) for _ in range(100)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print the verdict; 0 if all is flat and the books balanced."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--duration", type=float, default=2 * 3600.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    asked = parser.parse_args(arguments)

    def tell(text: str) -> None:
        print(text, flush=True)

    tell(f"{asked.duration:g} s, seed {asked.seed}")
    fix_malloc()
    samples: list[Sample] = []
    begin = time.monotonic()
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="raft-pipeline-soak-")
        soak = Soak(Path(stack.enter_context(temporary)), random.Random(asked.seed))
        stack.callback(soak.stop)
        soak.start()
        try:
            while time.monotonic() - begin < asked.duration:
                sample = soak.round()
                samples.append(sample)
                sent = sum(
                    pair.sent[from_] + books.sent
                    for pair in soak.pairs
                    for from_, books in pair.books().items()
                )
                tell(
                    f"{time.monotonic() - begin:7.0f} s  {sample.resident / MIB:.2f} MiB resident, "
                    f"{sample.allocated / MIB:.2f} allocated, {sample.blocks:,} blocks, "
                    f"{sample.threads} threads, {sample.descriptors} descriptors; {sent:,} sent"
                )
        except SoakError as error:
            tell(f"FAILED: {error}")
            return 1
    try:
        found = growths(samples)
    except ValueError as error:
        tell(f"no verdict: {error}")
        return 1
    for growth in found:
        tell(str(growth))
    is_flat = all(growth.is_flat for growth in found)
    tell(
        f"flat in {len(samples)} rounds, and the books balanced at all times"
        if is_flat
        else "FAILED: it grows"
    )
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
