"""fork() of a Transport that probes: the child stops cleanly, the parent goes on probing.

Over TLS when a directory for certificates is given. Prints "ok" or what went wrong.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from pipeline import Transport, TransportConfig
from pipeline.send import probing
from tests.support import LONG_TIMEOUT
from tests.support.locks import held_elsewhere
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ScriptedServer
from tests.support.tls import Authority
from tests.support.waiting import eventually, exit_status_of

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads

# A busy machine loses no probe.
probing.STEP_TIMEOUT_S = LONG_TIMEOUT
authority = Authority(Path(sys.argv[1])) if len(sys.argv) > 1 else None
server = ScriptedServer(tls=authority and authority.server())
transport = Transport(
    1,
    1,
    FakeRaft(),
    tls=authority and authority.info(),
    config=TransportConfig(probe_interval_s=0.01),
)
transport.start()
transport.add_peer(2, [server.url])
transport.add_remote(3, [server.url])
transport.send([message(), message(to=3)])
eventually(lambda: transport.probe_stats()[2].total >= 3)

# As if another thread were inside at the moment of the fork.
locks = (
    *((transport.credentials._lock,) if transport.credentials is not None else ()),
    transport._remotes._lock,
    transport._prober._lock,
    transport._server_stats._lock,
)
with held_elsewhere(locks):
    child = os.fork()
if child == 0:
    transport.stop()  # or the parent gives up waiting
    sys.exit(0)  # with atexit handlers and all

assert exit_status_of(child) == 0

before = transport.probe_stats()[2].total
eventually(lambda: transport.probe_stats()[2].total >= before + 5)
assert transport.probe_stats()[2].lost == 0, transport.probe_stats()
assert {request.connection for request in server.probes} == {server.probes[0].connection}
transport.stop()
server.stop()
print("ok")
