"""``python -m tests.chaos``: see the package."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from pipeline.examples.etcd import EtcdError, EtcdMember, find_etcd
from tests.chaos.cluster import ChaosError, Cluster, wait_until
from tests.chaos.link import Fault, Network
from tests.chaos.verdict import violations

WRITERS = 6
#: A client's patience with one write. One that fails may have been committed or not.
WRITE_TIMEOUT_S = 3.0
#: One write of so many is this large: of a size that is not copied at ``send``.
LARGE_EVERY, LARGE_BYTES = 500, 300_000

Make = Callable[[], AbstractContextManager[None]]


class Writers:
    """Clients that write new keys through etcd, and read some that were acknowledged.

    Attributes
    ----------
    acknowledged : dict of bytes to bytes
        What etcd said is committed.
    refused : int
        Writes of which nothing is known.
    stale : list of str
        Linearizable reads that did not see an acknowledged write.
    """

    def __init__(self, etcd: EtcdMember) -> None:
        self.etcd = etcd
        self.acknowledged: dict[bytes, bytes] = {}
        self.refused = 0
        self.reads = 0
        self.stale: list[str] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(n,), name=f"chaos-writer-{n}")
            for n in range(WRITERS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _write(self, writer: int) -> None:
        count = 0
        while not self._stopped.is_set():
            count += 1
            key = b"%d/%d" % (writer, count)
            value = b"value of " + key
            if count % LARGE_EVERY == 0:
                value = value.ljust(LARGE_BYTES, b".")
            try:
                self.etcd.put(key, value, timeout_s=WRITE_TIMEOUT_S)
            except EtcdError:
                with self._lock:
                    self.refused += 1
                self._stopped.wait(0.1)
                continue
            with self._lock:
                self.acknowledged[key] = value
            if count % 5 == 0:
                self._read(key, value)

    def _read(self, key: bytes, value: bytes) -> None:
        try:
            found = self.etcd.get(key, timeout_s=WRITE_TIMEOUT_S)
        except EtcdError:
            return
        with self._lock:
            self.reads += 1
            if found != value:
                self.stale.append(f"a read of {key!r} after its acknowledgement found {found!r}")


class Chaos:
    """One run. ``tell`` is given a line for each fault."""

    def __init__(self, cluster: Cluster, dice: random.Random, tell: Callable[[str], None]) -> None:
        self.cluster = cluster
        self.dice = dice
        self.tell = tell
        self.writers = Writers(cluster.etcd)
        self.recoveries: defaultdict[str, list[float]] = defaultdict(list)
        self.leaders: Counter[str] = Counter()

    def run(self, duration_s: float) -> None:
        """Disturb and let recover, in turns, for this long; ChaosError if it does not recover."""
        begin = time.monotonic()
        self.cluster.start()
        self.writers.start()
        try:
            self.wait_progress()
            while time.monotonic() - begin < duration_s:
                self.disturb(begin)
            self.cluster.check()
        finally:
            self.writers.stop()

    def disturb(self, begin: float) -> None:
        """Have one fault, or two at once; how long until writes are acknowledged again."""
        chosen = self.dice.sample(self.faults(), self.dice.choice((1, 1, 2)))
        if len({name.rpartition(": ")[2] for name, _ in chosen}) < len(chosen):
            del chosen[1:]  # both are of one member
        names = " + ".join(sorted(name for name, _ in chosen))
        with ExitStack() as stack:
            for _, make in chosen:
                stack.enter_context(make())
            time.sleep(self.dice.choice((0.3, 1.0, 2.5, 5.0)))
        healed = time.monotonic()
        self.wait_progress()
        took = time.monotonic() - healed
        for name, _ in chosen:
            self.recoveries[name.partition(":")[0]].append(took)
        leader = self.leader()
        self.leaders[leader] += 1
        self.tell(
            f"{healed - begin:6.1f} s  {names}; writes again after {took:.1f} s, {leader} leads, "
            f"{len(self.writers.acknowledged)} acknowledged"
        )
        time.sleep(self.dice.uniform(0.0, 2.0))

    def faults(self) -> list[tuple[str, Make]]:
        """Name everything that can be done to the cluster; made anew, for not all go together."""
        cluster, dice = self.cluster, self.dice
        link, other = dice.choice(cluster.network.links), dice.choice(cluster.names)
        kind = dice.choice((Fault.CUT, Fault.HOLE, Fault.MUTE))
        etcd, ours = "etcd", dice.choice(cluster.ours).name
        killed = "SIGKILL" if cluster.etcd_may_be_killed else "SIGTERM"
        return [
            (f"{killed}: etcd", lambda: cluster.killed(etcd)),
            (f"SIGKILL: {ours}", lambda: cluster.killed(ours)),
            dice.choice(
                [
                    ("SIGSTOP: etcd", lambda: cluster.frozen(etcd)),
                    (f"SIGSTOP: {ours}", lambda: cluster.frozen(ours)),
                ]
            ),
            (f"{kind.value}: {link.name}", lambda: cluster.cut_one(link, kind)),
            (f"{kind.value} all: {other}", lambda: cluster.cut_off(other, kind)),
        ]

    def wait_progress(self) -> None:
        """Block until a write is acknowledged that was begun after now."""

        def is_acknowledged() -> bool:
            self.cluster.check()
            try:
                self.cluster.etcd.put(b"progress/%d" % time.monotonic_ns(), b"", timeout_s=1.0)
            except EtcdError:
                return False
            return True

        wait_until(is_acknowledged, "writes are acknowledged")

    def leader(self) -> str:
        """Name who leads, as far as the members of ours know."""
        names = {self.cluster.etcd.id: "etcd"}
        names |= {member.setting.member_id: member.name for member in self.cluster.ours}
        states = [member.state() for member in self.cluster.ours]
        newest = max(states, key=lambda state: int(state["term"]))
        return names.get(newest["leader"], "nobody")

    def verdict(self) -> list[str]:
        """Let all catch up, stop them and say what does not hold of what they hold."""
        last = self.cluster.settle()
        items = list(self.cluster.etcd.items().items())
        self.cluster.etcd.stop()
        for member in self.cluster.ours:
            member.stop()
        logs = {member.name: member.log(last) for member in self.cluster.ours}
        found = violations(self.writers.acknowledged, items, logs)
        found += self.writers.stale
        if count := self.cluster.unbalanced():
            found.append(f"the books did not balance {count} times")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print the verdict; 0 if every acknowledged write is in all logs."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--duration", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--ours", type=int, choices=(1, 2), default=2, help="members of ours")
    parser.add_argument("--tls", action="store_true", help="mutual TLS between all members")
    parser.add_argument("--etcd", type=Path, metavar="PATH")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="for logs and data")
    asked = parser.parse_args(arguments)

    def tell(text: str) -> None:
        print(text, flush=True)

    binary = asked.etcd or find_etcd()
    with ExitStack() as stack:
        if asked.keep is None:
            temporary = tempfile.TemporaryDirectory(prefix="raft-pipeline-chaos-")
            directory = Path(stack.enter_context(temporary))
        else:
            directory = asked.keep
            directory.mkdir(parents=True)
        network = stack.enter_context(Network())
        cluster = Cluster(binary, directory, network, ours=asked.ours, has_tls=asked.tls)
        stack.callback(cluster.stop)
        tell(
            f"etcd {cluster.etcd.version} and {asked.ours} of ours"
            f"{', mutual TLS' if asked.tls else ''}; {asked.duration:g} s, seed {asked.seed}"
        )
        chaos = Chaos(cluster, random.Random(asked.seed), tell)
        try:
            chaos.run(asked.duration)
            found = chaos.verdict()
        except (ChaosError, EtcdError) as error:
            found = [str(error)]
    for fault, took in sorted(chaos.recoveries.items()):
        tell(
            f"{fault}: {len(took)} times, writes again after {statistics.median(took):.1f} s, "
            f"{max(took):.1f} s at most"
        )
    writers = chaos.writers
    tell(
        f"{len(writers.acknowledged)} writes acknowledged, {writers.refused} not, "
        f"{writers.reads} read back; led after a fault: "
        + ", ".join(f"{name} {count}" for name, count in chaos.leaders.most_common())
    )
    for text in found:
        tell(f"VIOLATION: {text}")
    tell(
        "FAILED"
        if found
        else f"every acknowledged write is in all {1 + asked.ours} logs, once, and in one order"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
