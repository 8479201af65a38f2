"""The interpreter exits without stop().

``exits.py STATE [DIRECTORY]`` brings a transport into a state, and ends. With a directory, for
certificates, its connections have TLS.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline import EncodedMessage, MessageType, Transport
from tests.support.senders import message
from tests.support.server import ERROR, ScriptedServer, always, black_hole
from tests.support.tls import Authority
from tests.support.waiting import dials_to, eventually

state = sys.argv[1]
authority = Authority(Path(sys.argv[2])) if len(sys.argv) > 2 else None
gate = threading.Event()
called = threading.Event()


class Raft:
    def report_unreachable(self, member_id: int) -> None:
        called.set()
        if state == "in a blocked callback":
            gate.wait()
        if state == "in a callback that sleeps":
            time.sleep(1.5)
        if state == "in a callback that spins":
            while True:
                pass

    def report_snapshot(self, member_id: int, status: int) -> None:
        """Not called."""

    process = is_id_removed = report_unreachable


transport = Transport(1, 1, Raft(), tls=authority and authority.info())
hole = black_hole()
server = ScriptedServer(tls=authority and authority.server())

if state != "made":
    transport.start()
if state == "dialling":
    port = hole.__enter__()
    transport.add_peer(2, [f"http://127.0.0.1:{port}"])
    transport.send([message()] * 10)
    eventually(lambda: dials_to(port) == 4)
elif state == "shaking hands":
    listener = socket.create_server(("127.0.0.1", 0))
    transport.add_peer(2, [f"https://127.0.0.1:{listener.getsockname()[1]}"])
    transport.send([message()] * 10)
    for _ in range(4):
        sock, _ = listener.accept()
        assert sock.recv(1, socket.MSG_PEEK)  # a hello
        sock.detach()
    listener.detach()
elif state not in ("made", "started"):
    transport.add_peer(2, [server.url])
if state == "idle":
    transport.send([message()])
    server.wait_requests(1)
elif state == "reading":
    server.script = server.hold
    transport.send([message()] * 10)
    server.wait_requests(4)
elif state == "writing":
    server.on_head = lambda connection, head: connection.server.release.wait()
    big = EncodedMessage(bytes(32 << 20), type=3, to=2)
    transport.send([big] * 10)
    server.wait_connections(3)
elif state == "reading an odd answer":
    server.script = always(b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n")
    transport.send([message()] * 10)
    pipeline = transport._peers[2].pipeline
    eventually(lambda: pipeline.states() == ["reading odd"] * 4)
elif state.startswith("in a callback") or state == "in a blocked callback":
    server.script = always(ERROR)
    transport.send([message()] * 10)
    called.wait(10)
elif state == "resolving":
    # getaddrinfo cannot be ended.
    socket.getaddrinfo = lambda *args, **kwargs: called.set() or time.sleep(60)  # type: ignore[assignment]
    transport.add_peer(3, ["http://slow.invalid:1"])
    transport.send([message(to=3)])
    called.wait(10)
elif state == "thrown away":
    transport.send([message()] * 10)
    del transport
elif state == "sending a snapshot":
    server.on_head = lambda connection, head: connection.server.release.wait()
    transfer = transport.send_snapshot(message(MessageType.SNAP), bytes(64 << 20))
    eventually(lambda: transfer.progress.sent_bytes > 0)
elif state == "in a snapshot's source":

    def blocked() -> Iterator[bytes]:
        called.set()
        gate.wait()
        yield b"x"

    transport.send_snapshot(message(MessageType.SNAP), blocked(), size=1)
    called.wait(10)
elif state == "failing":
    raise SystemExit(3)
print("exits", flush=True)
