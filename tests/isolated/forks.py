"""fork() in the middle of things: ``forks.py`` prints "ok" or what went wrong.

The child has none of our threads: its send says so, its stop returns, it ends cleanly. The
parent goes on as if nothing had happened.
"""

from __future__ import annotations

import os
import sys
import warnings

from pipeline import Pipeline, UsageError
from tests.support.raft import FakeRaft
from tests.support.senders import message, settle
from tests.support.server import OK, Connection, Request, ScriptedServer, always, answer
from tests.support.waiting import exit_status_of, until_read

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads

how = sys.argv[1]


def in_two_parts(connection: Connection, request: Request) -> None:
    """An odd answer of which a dispatcher thread must wait for the rest."""
    connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    until_read(connection.sock)
    connection.send(OK)


raft = FakeRaft()
server = ScriptedServer()
pipeline = Pipeline(2, [server.url], raft, member_id=1, cluster_id=1)
pipeline.start()
for _ in range(8):
    pipeline.send(message())
settle(pipeline)
if how == "in flight":
    server.script = server.hold
    for _ in range(20):
        pipeline.send(message())
    server.wait_requests(12)

child = os.fork()
if child == 0:
    try:
        pipeline.send(message())
    except UsageError:
        pass
    else:
        sys.exit("the child's send says nothing")
    if how != "exits":
        assert pipeline.stop() == 0  # or the parent gives up waiting
    sys.exit(0)  # with atexit handlers and all

assert exit_status_of(child) == 0

server.release.set()
settle(pipeline)
sent = pipeline.stats().sent
assert raft.unreachable == [], raft.unreachable
for script in (
    always(OK),
    # Those that need a dispatcher thread and the stop descriptor, which the child has, too.
    always(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"),
    in_two_parts,
):
    server.script = script
    for _ in range(5):
        pipeline.send(message())
    books = settle(pipeline)
    sent += 5
    assert books.sent == sent, f"{books}, expected {sent} sent"
failures: list[str] = []
pipeline.status.deactivate = lambda source, action, reason, *, url: failures.append(reason)  # type: ignore[method-assign]
server.script = always(answer("404 Not Found"))
pipeline.send(message())
settle(pipeline)
assert "Not Found" in failures[0], failures
pipeline.stop()
server.stop()
print("ok")
