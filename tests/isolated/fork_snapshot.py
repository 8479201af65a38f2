"""fork() in the middle of a snapshot: the parent's goes on, the child has none of it.

Prints "ok" or what went wrong.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial

from pipeline import MessageType, Transport, UsageError
from tests.support import LONG_TIMEOUT
from tests.support.locks import held_elsewhere
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import Connection, ScriptedServer
from tests.support.waiting import eventually

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads

SIZE = 64 << 20


def stuck(connection: Connection, head: bytes) -> bool:
    connection.server.release.wait(LONG_TIMEOUT)
    return True


server = ScriptedServer(on_head=stuck)
transport = Transport(1, 1, FakeRaft())
transport.start()
for peer in (2, 3):
    transport.add_peer(peer, [server.url])
snapshots = [
    transport.send_snapshot(message(MessageType.SNAP, to=to), [bytes(SIZE)], size=SIZE)
    for to in (2, 3)
]
waiting = transport.send_snapshot(message(MessageType.SNAP), b"x")
eventually(lambda: all(snapshot.progress.sent_bytes > 0 for snapshot in snapshots))

# As if another thread were inside at the moment of the fork.
locks = [
    transport._limiter._lock,
    transport._peers[2].snapshots._lock,
    snapshots[0].ending._lock,
]
read, write = os.pipe()
with held_elsewhere(locks):
    child = os.fork()
if child == 0:
    os.close(write)
    for snapshot in (*snapshots, waiting):
        for use in (
            snapshot.result,
            snapshot.cancel,
            snapshot.done,
            partial(getattr, snapshot, "progress"),
        ):
            try:
                use()
            except UsageError:
                continue
            sys.exit("the child's copy does not say whose it is")
        assert isinstance(snapshot.future.exception(0), UsageError)
    assert transport._peers[2].snapshots.counts().in_flight == 1
    transport.stop()
    os.read(read, 1)  # until the parent has seen what it must see while we live
    sys.exit(0)  # with atexit handlers and all
os.close(read)

# The child has no copy of the connection: its end is seen.
snapshots[0].cancel()
server.release.set()
snapshots[1].result(LONG_TIMEOUT)
waiting.result(LONG_TIMEOUT)
server.wait_for(lambda: server.ended == 3)
os.close(write)
if os.waitpid(child, 0)[1] != 0:
    sys.exit("the child failed")
transport.stop()
server.stop()
print("ok")
