"""Snapshots received in a process of its own: ``snapshots.py CASE DIRECTORY`` prints "ok"."""

from __future__ import annotations

import os
import resource
import sys
import threading
import warnings
from pathlib import Path

from pipeline.config import ReceiverConfig
from pipeline.snapshot.receiver import MAX_MESSAGE_BYTES
from tests.support import MIB
from tests.support.listening import ask, chunked, dial, listen, raw_head, read_reply
from tests.support.memory import peak
from tests.support.raft import FakeRaft
from tests.support.snapshots import FILE, LINE, framed, post_snapshot, snapshot
from tests.support.waiting import eventually

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads


def memory(directory: Path) -> None:
    """A database of 256 MiB, of either framing, costs two buffers; what is announced, nothing."""
    listener = listen(FakeRaft(), config=ReceiverConfig(snapshot_dir=directory))
    part = os.urandom(MIB)
    prefix = framed(snapshot())
    pieces = [part[at : at + 32 * 1024] for at in range(0, MIB, 32 * 1024)]
    parts = {"length": part, "chunked": chunked(pieces)[:-5]}
    heads = {
        "length": raw_head(f"content-length: {len(prefix) + 256 * MIB}", line=LINE) + prefix,
        "chunked": raw_head("transfer-encoding: chunked", line=LINE) + chunked([prefix])[:-5],
    }
    ask(listener.url, post_snapshot(framed(snapshot(), part), is_chunked=True))
    (directory / FILE).unlink()
    before = peak()
    for framing, head in heads.items():
        with dial(listener.url) as sock:
            sock.sendall(head)
            for _ in range(256):
                sock.sendall(parts[framing])
            if framing == "chunked":
                sock.sendall(b"0\r\n\r\n")
            assert read_reply(sock).status == 204
        assert (directory / FILE).stat().st_size == 256 * MIB
        (directory / FILE).unlink()
    socks = [dial(listener.url) for _ in range(3)]
    for sock in socks:
        body = MAX_MESSAGE_BYTES.to_bytes(8, "big") + bytes(100)
        sock.sendall(raw_head(f"content-length: {1 << 40}", line=LINE) + body)
    eventually(lambda: listener.stats().accepted == 6 and listener.stats().connections == 0)
    grown = peak() - before
    assert grown < 16 * MIB, f"{grown} bytes"
    for sock in socks:
        sock.close()
    listener.close()


def file_limit(directory: Path) -> None:
    """A file that the system does not let grow is answered 500, and nothing is left."""
    raft = FakeRaft()
    listener = listen(raft, config=ReceiverConfig(snapshot_dir=directory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + 1, MIB + 1))
    for is_chunked in (False, True):
        reply = ask(
            listener.url, post_snapshot(framed(snapshot(), bytes(3 * MIB)), is_chunked=is_chunked)
        )
        assert reply.status == 500, reply
        assert reply.body.startswith(b"failed to save KV snapshot (File too large"), reply
    assert list(directory.iterdir()) == []
    assert raft.processed == []
    assert ask(listener.url, post_snapshot(framed(snapshot(), bytes(MIB)))).status == 204
    listener.close()


def forks(directory: Path) -> None:
    """A child forked in the middle neither ends a receive nor removes its file."""
    listener = listen(FakeRaft(), config=ReceiverConfig(snapshot_dir=directory))
    request = post_snapshot(framed(snapshot(), bytes(100_000)))
    with dial(listener.url) as sock:
        sock.sendall(request[:-1])
        eventually(lambda: len(list(directory.iterdir())) == 1)
        child = os.fork()
        if child == 0:
            listener.close(deadline_s=20)
            sys.exit(0)  # with atexit handlers and all
        assert os.waitpid(child, 0)[1] == 0
        sock.sendall(request[-1:])
        assert read_reply(sock).status == 204
    assert [path.name for path in directory.iterdir()] == [FILE]
    listener.close()


def exits(directory: Path) -> None:
    """The interpreter ends in the middle of a receive, and nothing is left."""
    listener = listen(FakeRaft(), config=ReceiverConfig(snapshot_dir=directory))
    sock = dial(listener.url)
    sock.sendall(post_snapshot(framed(snapshot(), bytes(100_000)))[:-1])
    eventually(lambda: len(list(directory.iterdir())) == 1)
    sock.detach()  # open until the end


def exits_in_process(directory: Path) -> None:
    """The interpreter ends although ``process`` never returns."""
    raft = FakeRaft(gate=threading.Event())
    listener = listen(raft, config=ReceiverConfig(snapshot_dir=directory))
    sock = dial(listener.url)
    sock.sendall(post_snapshot(framed(snapshot(), bytes(100_000))))
    raft.wait_processed(1)
    sock.detach()


CASES = {
    "memory": memory,
    "file limit": file_limit,
    "forks": forks,
    "exits": exits,
    "exits in process": exits_in_process,
}
case, directory = sys.argv[1:]
CASES[case](Path(directory))
print("ok", flush=True)
