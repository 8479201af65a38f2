"""fork() of a node that sends: the child has no copy of what it has open, however far that is.

``fork_sending.py DIRECTORY``, of certificates. Connections that are idle, at a request, at a
handshake, of a probe, of a snapshot, connects under way and names that are being looked up. The
node's end is then heard at once, while the child lives. Prints "ok" or what went wrong.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import MessageType, PipelineConfig, Transport, TransportConfig
from pipeline.net._sockets import own_sockets
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ScriptedServer, black_hole
from tests.support.tls import Authority
from tests.support.waiting import eventually

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads

gate = threading.Event()
real = socket.getaddrinfo


def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
    if host == "gone.test":
        gate.wait(LONG_TIMEOUT)
    return real(host, *args, **kwargs)


socket.getaddrinfo = getaddrinfo
authority = Authority(Path(sys.argv[1]))
servers = [ScriptedServer(), ScriptedServer(tls=authority.server())]
mute = socket.create_server(("127.0.0.1", 0))  # connects, and never shakes hands
hole = black_hole()
config = TransportConfig(
    probe_interval_s=0.01, pipeline=PipelineConfig(connections=2, dial_timeout_s=LONG_TIMEOUT)
)
transport = Transport(1, 1, FakeRaft(), tls=authority.info(), config=config)
transport.start()
for peer, server in enumerate(servers, 2):
    transport.add_peer(peer, [server.url])
    transport.send([message(to=peer)])
    server.wait_requests(1)
    eventually(lambda peer=peer: transport.probe_stats()[peer].is_healthy)  # type: ignore[misc]
    server.script = server.hold
    transport.send([message(to=peer)])
    server.wait_requests(2)
    transport.send_snapshot(message(MessageType.SNAP, to=peer), b"x")
    server.wait_requests(3)
transport.add_peer(10, [f"https://127.0.0.1:{mute.getsockname()[1]}"])
transport.add_peer(11, [f"http://127.0.0.1:{hole.__enter__()}"])
transport.add_peer(12, ["http://gone.test:2380"])
transport.send([message(to=peer) for peer in (10, 11, 12)])
shaking, _ = mute.accept()
eventually(lambda: len(transport._dispatcher.dialer._dials) >= 3)

read, write = os.pipe()
child = os.fork()
if child == 0:
    # The parent's; what the child had closed, nobody else has opened since.
    poller = transport._dispatcher.poller
    assert poller.wake_fd == -1
    assert [sock.fileno() for sock in list(own_sockets) if sock.fileno() >= 0] == []
    os.close(write)
    os.read(read, 1)  # until the parent has seen what it must see while we live
    os._exit(0)
os.close(read)


def links(paths: Iterable[str]) -> set[str]:
    """What descriptors are; some may be closed while we look."""
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(path))
    return found


open_here = links(f"/proc/{os.getpid()}/fd/{sock.fileno()}" for sock in list(own_sockets))
assert len(open_here) >= 2 * 3 + 2, open_here
theirs = f"/proc/{child}/fd"


def is_told() -> bool:
    """The child's copies are gone."""
    return not open_here & links(f"{theirs}/{fd}" for fd in os.listdir(theirs))


eventually(is_told)
transport.stop()
for server in servers:
    server.release.set()
    server.wait_for(lambda server=server: server.ended == len(server.connections))  # type: ignore[misc]
assert select.select([shaking], [], [], LONG_TIMEOUT)[0]
with contextlib.suppress(ConnectionResetError):  # which ends a connection in its handshake
    while shaking.recv(65536):
        pass
assert os.waitpid(child, os.WNOHANG) == (0, 0)
os.close(write)
if os.waitpid(child, 0)[1] != 0:
    sys.exit("the child failed")
gate.set()
for server in servers:
    server.stop()
print("ok", flush=True)
