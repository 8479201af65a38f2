"""A node that receives forks a worker, and then stops or is killed: its callers hear so at once.

``fork_listener.py stops|killed directory`` prints "ok" or what went wrong. It runs a node in a
process of its own, has connections in every state there, plain and TLS, and has the node fork.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

from pipeline import Message, MessageType, ReceiverConfig, TLSInfo, Transport, TransportConfig
from tests.support import LONG_TIMEOUT
from tests.support.http import CLUSTER_ID
from tests.support.listening import GOOD, dial, post, raw_head
from tests.support.raft import FakeRaft
from tests.support.snapshots import LINE, framed, snapshot
from tests.support.tls import Authority
from tests.support.waiting import eventually

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads

PROPOSAL = Message(type=MessageType.PROP, from_=1, to=2).marshal()
BLOCKED = post(PROPOSAL)
BODY = raw_head("content-length: 100000")
SNAPSHOT = raw_head("content-length: 10000000", line=LINE) + framed(snapshot(), b"database")

# What is sent on a connection of each kind, and how many answers come first.
STATES = {
    "nothing sent": (b"", 0),
    "part of a head": (GOOD[:20], 0),
    "part of another head": (b"GET /raft HT", 0),
    "idle": (GOOD, 1),
    "in a body": (GOOD + BODY + b"x" * 1000, 1),
    "in a chunked body": (raw_head("transfer-encoding: chunked") + b"5\r\nab", 0),
    "with a handler": (GOOD + BLOCKED, 1),
    "in a snapshot": (SNAPSHOT, 0),
}


class Node(FakeRaft):
    """Has no leader: its ``process`` of a proposal blocks."""

    def process(self, message: Message) -> None:
        super().process(message)
        if message.type is MessageType.PROP:
            threading.Event().wait(LONG_TIMEOUT)


def descriptors() -> set[tuple[str, str]]:
    """Return what this process has open, but for the pipes to whoever runs it."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return {(name, what) for name, what in found if int(name) > 2 and "/fd" not in what}


def node(files: Path, end: int) -> None:
    """Serve, and do what the lines from standard input say; a child lives until ``end`` ends."""
    before = descriptors()
    raft = Node()
    directory = files / "snapshots"
    receiver = ReceiverConfig(snapshot_dir=directory, handlers=4)
    tls = TLSInfo(
        cert_file=files / "node.pem",
        key_file=files / "node.key",
        trusted_ca_file=files / "ca.pem",
    )
    config = TransportConfig(receiver=receiver)
    transport = Transport(2, CLUSTER_ID, raft, tls=tls, config=config)
    transport.start()
    listener = transport.listen(["http://127.0.0.1:0", "https://127.0.0.1:0"])
    print(*listener.urls, flush=True)
    for line in sys.stdin:
        if line == "fork\n":
            # All of them have been read from, and what is to block does.
            eventually(lambda: sum(m.type is MessageType.PROP for m in raft.processed) == 2)
            eventually(
                lambda: [file.stat().st_size > 0 for file in directory.iterdir()] == [True] * 2
            )
            if os.fork() == 0:
                left = sorted(what for _, what in descriptors() - before)
                print("open in the child:", *left, flush=True)
                signal.alarm(int(LONG_TIMEOUT))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.read(end, 1)  # not standard input: the next line there is for its parent
                os._exit(0)
        else:
            transport.stop()
            print("stopped", flush=True)


def main(how: str, directory: Path) -> None:
    """Call the node, and see what its callers see of its end."""
    authority = Authority(directory)
    authority.issue("node")
    context = authority.client(*authority.issue("caller"))
    end, keep = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", __file__, "node", str(directory), str(end)],
        pass_fds=[end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    urls = process.stdout.readline().split()
    callers: dict[str, socket.socket] = {}
    for url in urls:
        for state, (sent, answers) in STATES.items():
            sock = dial(url)
            if url.startswith("https"):
                sock = context.wrap_socket(sock, server_hostname="127.0.0.1")
            callers[f"{state}, {url.partition(':')[0]}"] = sock
            sock.sendall(sent)
            received = b""
            while received.count(b"\r\n\r\n") < answers:
                received += sock.recv(4096)
                assert received, state
    callers["in a handshake, https"] = dial(urls[1])
    callers["in a handshake, https"].sendall(b"\x16\x03\x01")
    process.stdin.write("fork\n")
    process.stdin.flush()
    assert (line := process.stdout.readline()) == "open in the child:\n", line
    if how == "killed":
        process.kill()
        process.wait()
    else:
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.stdout.readline() == "stopped\n"
    for state, sock in callers.items():
        sock.settimeout(LONG_TIMEOUT / 2)  # the child lives for LONG_TIMEOUT
        try:
            while sock.recv(65536):
                pass
        except TimeoutError:
            sys.exit(f"{state}: the connection has not ended")
        except OSError:
            pass
        sock.close()
    for url in urls:
        with contextlib.suppress(ConnectionRefusedError):
            dial(url)
            sys.exit(f"{url} still takes connections")
    process.stdin.close()
    os.close(keep)
    process.wait(LONG_TIMEOUT)
    print("ok")


if sys.argv[1] == "node":
    node(Path(sys.argv[2]), int(sys.argv[3]))
else:
    main(sys.argv[1], Path(sys.argv[2]))
