"""A forked child keeps copies of connections that the parent closes; prints "ok".

The kernel goes on reporting them to the parent's epoll set, with pointers to workers that are long
gone. Finds something with the address sanitizer (``make asan``), and by the dial timeout without.
"""

from __future__ import annotations

import gc
import os
import warnings

from pipeline import PipelineConfig, Transport, TransportConfig
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ScriptedServer, always, answer, black_hole
from tests.support.waiting import dials_to, eventually

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads

raft = FakeRaft()
config = TransportConfig(
    pipeline=PipelineConfig(dial_timeout_s=0.5, stall_timeout_s=60.0, response_timeout_s=60.0)
)
server = ScriptedServer()
server.script = server.hold
with black_hole() as port, server, Transport(1, 1, raft, config=config) as transport:
    transport.add_peer(2, [server.url])
    transport.send([message()] * 4)
    server.wait_requests(4)
    child_end, parent_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parent_end)
        os.read(child_end, 1)  # until the parent is done
        os._exit(0)
    # The workers' connections are closed here, and open in the child.
    late = always(answer("500 Oops", b"", "Connection: close"))
    for connection in server.connections:
        connection.send(late(connection, server.requests[0]) or b"")
    raft.wait_unreachable(4)
    transport.remove_peer(2)
    gc.collect()
    # The workers of this peer are likely to get the memory of those.
    transport.add_peer(3, [f"http://127.0.0.1:{port}"])
    transport.send([message(to=3)] * 4)
    eventually(lambda: dials_to(port) == 4)
    for connection in server.connections:
        connection.end()
    raft.wait_unreachable(8)
    os.close(parent_end)
    os.waitpid(child, 0)
print("ok")
