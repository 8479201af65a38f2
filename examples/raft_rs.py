"""Three members of raft-rs in one process: TiKV's Raft, its messages carried by Transports.

::

    python -m pipeline.examples.raft_rs

Raft is ``raft-rs``, in Rust, through ``rraft-py``. Of that there is no wheel for Python 3.11 or
newer; it is imported when the program runs, and built with Rust beforehand (docs/howto/raft-rs.md).

The messages of raft-rs are raftpb's with fields of their own, of which a ``pipeline.Message`` knows
nothing: ``Entry.context``, ``Message.commit_term``, ``priority`` and more. Their bytes are carried
as they are, out as ``EncodedMessage`` and in with ``Inbox(encoded=True)``. The program
proposes entries that have a context, and looks whether every member has each with its own.

Glue: 46 lines, those of the class ``Member`` without blank lines, comments and docstrings.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from pipeline import (
    EncodedMessage,
    Inbox,
    SnapshotStatus,
    Transport,
)

__all__ = ["Member"]

CLUSTER_ID = 0x7261667472730A
MEMBERS = (1, 2, 3)
ENTRIES = 5_000
TICK_S = 0.05
#: The program gives up after this long without all that was proposed.
TIMEOUT_S = 60.0


class Member:
    """A node of raft-rs and the Transport that carries its messages.

    Parameters
    ----------
    member_id : int
    core : rraft.InMemoryRawNode
        One thread at a time uses it, who has the lock.
    decode : callable
        ``rraft.Message.decode``.

    Notes
    -----
    Thread-safe. A node whose log outlives it would write where ``MemStorage`` remembers, and take
    snapshots to cut the log.
    """

    def __init__(self, member_id: int, core: Any, decode: Callable[[bytes], Any]) -> None:
        self.core, self.decode = core, decode
        self.lock = threading.Lock()
        self.applied: list[Any] = []
        self.inbox = Inbox(encoded=True)
        self.transport = Transport(member_id, CLUSTER_ID, self, inbox=self.inbox)

    def report_unreachable(self, member_id: int) -> None:
        with self.lock:
            self.core.report_unreachable(member_id)

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...
    def is_id_removed(self, member_id: int) -> bool:
        return False

    def propose(self, context: bytes, data: bytes) -> None:
        """Propose an entry; what is done with it meanwhile is seen in ``applied``."""
        with self.lock:
            self.core.propose(context, data)
            self.handle_ready()

    def run(self) -> None:
        """Drive the node until its transport is stopped."""
        tick_at = time.monotonic()
        while not self.inbox.closed:
            messages = self.inbox.take(timeout=max(tick_at - time.monotonic(), 0.0))
            with self.lock:
                for message in messages:
                    self.core.step(self.decode(bytes(message.data)))
                if time.monotonic() >= tick_at:
                    self.core.tick()
                    tick_at += TICK_S
                self.handle_ready()

    def send(self, messages: Iterable[Any]) -> None:
        """Send messages of raft-rs."""
        self.transport.send([EncodedMessage.unmarshal(each.encode()) for each in messages])

    def handle_ready(self) -> None:
        """Send, write and apply what is ready, in the order that raft-rs wants. With the lock."""
        if not self.core.has_ready():
            return
        ready, log = self.core.ready(), self.core.store().wl()
        self.send(ready.take_messages())
        self.applied += ready.take_committed_entries()
        log.append(ready.entries())
        if hard_state := ready.hs():
            log.set_hardstate(hard_state)
        self.send(ready.take_persisted_messages())
        rest = self.core.advance(ready.make_ref())
        if commit := rest.commit_index():
            log.hard_state().set_commit(commit)
        self.send(rest.take_messages())
        self.applied += rest.take_committed_entries()
        self.core.advance_apply()


def core_of(rraft: Any, member_id: int) -> Any:
    """Make a member's node, all of them alike: each has the cluster in its empty log."""
    cluster = rraft.ConfState(voters=list(MEMBERS), learners=[])
    storage = rraft.MemStorage.new_with_conf_state(cluster)
    config = rraft.Config(id=member_id, election_tick=10, heartbeat_tick=2)
    config.set_max_inflight_msgs(256)
    config.set_max_size_per_msg(1 << 20)
    return rraft.InMemoryRawNode(config, storage, rraft.default_logger())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"not committed within {TIMEOUT_S:g} s")
        time.sleep(0.01)


def main() -> int:
    """Commit entries on three members; the exit status."""
    try:
        rraft = importlib.import_module("rraft")
    except ImportError:
        print(
            "rraft-py is not installed: docs/howto/raft-rs.md says how it is built", file=sys.stderr
        )
        return 1
    members = [Member(each, core_of(rraft, each), rraft.Message.decode) for each in MEMBERS]
    threads = []
    with contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(member.transport).listen("http://127.0.0.1:0").url
            for member in members
        ]
        for member in members:
            for peer_id, url in zip(MEMBERS, urls, strict=True):
                if peer_id != member.transport.member_id:
                    member.transport.add_peer(peer_id, [url])
            thread = threading.Thread(target=member.run)
            thread.start()
            threads.append(thread)
        result = commit(members)
    for thread in threads:  # which end with their transports
        thread.join()
    return result


def commit(members: list[Member]) -> int:
    """Elect a leader, propose to it, and compare what the members have applied."""
    leader = members[0]
    with leader.lock:
        leader.core.campaign()
    wait_for(lambda: len(leader.applied) > 0)  # what a leader begins its term with
    begin = time.monotonic()
    wanted = [(b"context %d" % n, b"data %d" % n) for n in range(ENTRIES)]
    for context, data in wanted:
        leader.propose(context, data)
    wait_for(lambda: all(len(member.applied) > ENTRIES for member in members))
    seconds = time.monotonic() - begin
    whole = sum(
        all(
            (member.applied[n].get_context(), member.applied[n].get_data()) == wanted[n - 1]
            for member in members
        )
        for n in range(1, ENTRIES + 1)
    )
    print(f"{ENTRIES / seconds:,.0f} commits a second")
    print(f"{whole}/{ENTRIES} entries are in all three, each with its context")
    return 0 if whole == ENTRIES else 1


if __name__ == "__main__":
    sys.exit(main())
