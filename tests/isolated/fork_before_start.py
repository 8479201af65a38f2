"""Transports, one with an inbox, made before a fork and started after it, by parent and child.

Each has threads, descriptors and connections of its own. Prints "ok" or what went wrong.
"""

from __future__ import annotations

import os
import select
import sys
import warnings

from pipeline import Inbox, Transport, TransportConfig
from pipeline.send import probing
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ScriptedServer
from tests.support.waiting import eventually

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads

COUNT = 500

# A busy machine loses no probe.
probing.STEP_TIMEOUT_S = LONG_TIMEOUT

descriptors = set(os.listdir("/proc/self/fd"))
transport = Transport(1, 1, FakeRaft(), config=TransportConfig(probe_interval_s=0.001))
inbox = Inbox()
taking = Transport(2, 1, FakeRaft(), inbox=inbox)
assert set(os.listdir("/proc/self/fd")) == descriptors, "descriptors that a child would share"
server = ScriptedServer()  # only now: its thread opens descriptors of its own


def work() -> None:
    with transport:
        transport.add_peer(2, [server.url])
        for sent in range(1, COUNT + 1):
            transport.send([message()])
            eventually(lambda sent=sent: transport.stats()[2].sent == sent)  # type: ignore[misc]
        eventually(lambda: transport.probe_stats()[2].total > 10)
        assert transport.probe_stats()[2].lost == 0, transport.probe_stats()
        assert transport.stats()[2].failed == 0
        with taking:
            transport.update_peer(2, [taking.listen("http://127.0.0.1:0").url])
            transport.send([message()])
            select.select([inbox], [], [])
            assert len(inbox.take()) == 1
    assert inbox.closed


child = os.fork()
work()
if child == 0:
    sys.exit(0)
if os.waitpid(child, 0)[1] != 0:
    sys.exit("the child failed")
server.stop()
print("ok")
