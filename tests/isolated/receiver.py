"""A listener in a process of its own: ``receiver.py CASE`` prints "ok" or what went wrong."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import socket
import ssl
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from pipeline import Entry, Message, MessageType
from pipeline.config import ReceiverConfig
from pipeline.errors import RequestRejected
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT, MIB
from tests.support.http import post_heartbeat
from tests.support.listening import GOOD, dial, is_closed, listen, post, raw_head, read_status
from tests.support.memory import rss
from tests.support.raft import FakeRaft
from tests.support.tls import Authority
from tests.support.waiting import eventually, exit_status_of
from tests.support.wire import span

warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads


def no_descriptors() -> None:
    """Accept without descriptors left neither spins nor ends the listener."""
    raft = FakeRaft(gate=threading.Event())
    listener = listen(raft)
    busy = dial(listener.url)
    busy.sendall(GOOD)  # not idle: it cannot make room
    raft.wait_processed(1)
    clients = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(4)]
    host, port = listener.url.removeprefix("http://").split(":")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    for client in clients:
        client.connect((host, int(port)))
    eventually(lambda: listener.stats().accept_pauses > 0, "accepting is paused")
    pauses, began, began_cpu = listener.stats().accept_pauses, time.monotonic(), time.process_time()
    time.sleep(0.5)
    assert time.process_time() - began_cpu < 0.1, "it spins"
    # It tries again every 100 ms, however long a busy machine makes of this half a second.
    assert listener.stats().accept_pauses - pauses <= 10 * (time.monotonic() - began) + 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    raft.gate.set()  # type: ignore[union-attr]
    assert read_status(busy) == 204
    for client in clients:
        client.settimeout(LONG_TIMEOUT)
        client.sendall(GOOD)
        assert read_status(client) == 204
    listener.close()


def announced() -> None:
    """512 MiB announced and 10 bytes sent cost next to nothing."""
    listener = listen(FakeRaft())
    post_heartbeat(listener.url)
    socks = [dial(listener.url) for _ in range(40)]
    for sock in socks:
        sock.sendall(GOOD)
        assert read_status(sock) == 204
    before = rss()
    for sock in socks:
        sock.sendall(raw_head(f"content-length: {512 * MIB}") + bytes(10))
    post_heartbeat(listener.url)
    grown = rss() - before
    assert grown < 32 * MIB, f"{grown} bytes for {len(socks)} connections"
    listener.close()


def entries() -> None:
    """What waits for a handler holds its bytes, whatever they decode to: 60 of 256 KiB, 15 MiB."""
    gate = threading.Event()
    raft = FakeRaft(gate=gate)
    listener = listen(raft)
    gate.set()
    post_heartbeat(listener.url)
    gate.clear()
    lists = span(0x0A, b"\x01" * 65_536) + span(0x12, b"\x01" * 65_536)
    state = span(0x4A, span(0x12, span(0x0A, lists)))
    rows = {
        "entries": b"\x08\x02" + b"\x3a\x00" * 131_072,
        "IDs": b"\x08\x02" + state + span(0x62, bytes(100_000)),
        "small": b"\x08\x02" + b"\x3a\x00" * 32_000,
    }
    for row, body in rows.items():
        before = rss()
        expected = listener.stats().fast_requests + 60
        socks = [dial(listener.url) for _ in range(60)]
        for sock in socks:
            sock.sendall(post(body))
        eventually(lambda n=expected: listener.stats().fast_requests == n, f"{row} are read")
        # Three are objects, in a handler thread each.
        bound = len(socks) * len(body) + 3 * 20 * MIB
        assert rss() - before < bound, f"{row}: {rss() - before} bytes"
        gate.set()
        for sock in socks:
            assert read_status(sock) == 204
            sock.close()
        gate.clear()
        raft.processed.clear()
    gate.set()
    listener.close()


def exits(state: str, directory: str = "") -> None:
    """The interpreter ends although a listener is open, by https if there is a directory."""
    error = RequestRejected(500, bytes(32 * MIB)) if state == "writing" else None
    gate = threading.Event() if state == "processing" else None
    raft = FakeRaft(process_error=error, gate=gate)
    credentials, context = files_of(directory)
    reader, writer = os.pipe()
    if state == "busy":
        keep_sending(reader, context)
    scheme = "https" if directory else "http"
    listener = listen(raft, f"{scheme}://127.0.0.1:0", credentials=credentials)
    os.write(writer, listener.url.encode())
    if state == "busy":
        raft.wait_processed(200)
        return
    sock = dial(listener.url) if state == "handshake" else call(listener.url, context)
    sent = {"idle": b"", "handshake": b"\x16\x03\x01", "head": GOOD[:9], "body": GOOD[:-1]}
    sock.sendall(sent.get(state, GOOD))
    if state in ("processing", "writing"):
        raft.wait_processed(1)
    else:
        assert post_to(listener.url, context) == 204
    sock.detach()  # open until the end


def files_of(directory: str) -> tuple[Credentials | None, ssl.SSLContext | None]:
    """Return what a listener with TLS has and what a caller of it has; nothing without TLS."""
    if not directory:
        return None, None
    authority = Authority(Path(directory))
    return Credentials(authority.info()), authority.client(*authority.issue("caller"))


def post_to(url: str, context: ssl.SSLContext | None) -> int | None:
    """Send a heartbeat over a connection of its own; what is answered."""
    with call(url, context) as sock:
        sock.sendall(GOOD)
        return read_status(sock)


def call(url: str, context: ssl.SSLContext | None) -> socket.socket:
    """Connect, by TLS if there is a context."""
    sock = dial(url)
    return sock if context is None else context.wrap_socket(sock, server_hostname="127.0.0.1")


def keep_sending(reader: int, context: ssl.SSLContext | None) -> None:
    """Have another process send messages, small and large, as long as we take them.

    It reads from a pipe where. To be called before there are threads.
    """
    if os.fork() > 0:
        return
    url = os.read(reader, 100).decode()
    large = post(Message(type=MessageType.APP, entries=[Entry(data=bytes(3 * MIB))]).marshal())

    def send(request: bytes) -> None:
        with contextlib.suppress(OSError), call(url, context) as sock:
            while True:
                sock.sendall(request)
                read_status(sock)

    threads = [threading.Thread(target=send, args=(data,)) for data in (GOOD, GOOD, large, large)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)


def forks(directory: str = "") -> None:
    """A forked child neither waits for our threads nor keeps the port; the parent goes on."""
    credentials, context = files_of(directory)
    url = "https://127.0.0.1:0" if directory else "http://127.0.0.1:0"
    listener = listen(FakeRaft(), url, credentials=credentials)
    sock = call(listener.url, context)
    sock.sendall(GOOD)
    assert read_status(sock) == 204  # and that handler thread runs the loop from here on
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        began = time.monotonic()
        listener.close(deadline_s=LONG_TIMEOUT)
        assert time.monotonic() - began < LONG_TIMEOUT / 2, "the child waited"
        os.close(writer)
        os.read(reader, 1)  # lives on until the parent is done
        sys.exit(0)  # with atexit handlers and all
    os.close(reader)
    for _ in range(20):
        sock.sendall(GOOD)
        assert read_status(sock) == 204
        assert post_to(listener.url, context) == 204
    url = listener.url
    listener.close()
    again = listen(FakeRaft(), url, credentials=credentials)
    assert post_to(again.url, context) == 204
    again.close()
    os.close(writer)
    assert exit_status_of(child) == 0


def idle_tls(directory: str) -> None:
    """A peer with TLS that is ready and idle costs at most 128 KiB."""
    credentials, context = files_of(directory)
    callers = 100
    urls, answers = os.pipe(), os.pipe()
    child = os.fork()  # while there are no threads
    if child == 0:
        url = os.read(urls[0], 100).decode()
        socks = []
        for number in range(1 + callers):
            socks.append(call(url, context))
            socks[-1].sendall(GOOD)
            assert read_status(socks[-1]) == 204
            if number in (0, callers):
                os.write(answers[1], b".")
                os.read(urls[0], 1)
        os._exit(0)
    raft = FakeRaft()
    listener = listen(raft, "https://127.0.0.1:0", credentials=credentials)
    os.write(urls[1], listener.url.encode())
    os.read(answers[0], 1)
    before = rss()
    os.write(urls[1], b".")
    os.read(answers[0], 1)
    raft.processed.clear()
    grown = (rss() - before) // callers
    assert grown <= 128 * 1024, f"{grown} bytes each"
    os.write(urls[1], b".")
    assert exit_status_of(child) == 0
    listener.close()


def blocked_memory() -> None:
    """While the handlers are blocked, what is sent stays with the senders."""
    gate = threading.Event()
    raft = FakeRaft(gate=gate)
    listener = listen(raft, config=ReceiverConfig(handlers=2))
    socks = [dial(listener.url) for _ in range(2)]
    for sock in socks:
        sock.sendall(GOOD)
    raft.wait_processed(2)
    before = rss()
    large = [dial(listener.url) for _ in range(20)]
    for sock in large:
        sock.settimeout(0.05)
        sock.sendall(raw_head(f"content-length: {16 * MIB}"))
        try:
            for _ in range(16):
                sock.sendall(bytes(MIB))
        except TimeoutError:
            pass
        else:
            sys.exit("the body was read")
    grown = rss() - before
    assert grown < 20 * 256 * 1024, f"{grown} bytes"
    gate.set()
    listener.close()


def idle() -> None:
    """A listener with nothing to do sleeps, whoever leads."""
    gate = threading.Event()
    raft = FakeRaft()
    listener = listen(raft, config=ReceiverConfig(handlers=1))
    for leader in ("a handler thread", "the stand-in"):
        with dial(listener.url) as sock:
            sock.sendall(GOOD)
            raft.wait_processed(1)
            time.sleep(0.1)  # a timer may go off once more
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
            time.sleep(0.5)
            woken = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
            assert woken < 50, f"woken {woken} times in 0.5 s while {leader} leads"
            gate.set()
            assert read_status(sock) == 204
        gate.clear()
        raft.gate = gate
        raft.processed.clear()
    listener.close()


def held_gil() -> None:
    """The loop goes on while the thread that ran it waits for the GIL with a message."""
    port = mmap.mmap(-1, 4)
    caller = os.fork()  # while there are no threads
    if caller == 0:
        while port[:] == bytes(4):
            time.sleep(0.001)
        url = f"http://127.0.0.1:{struct.unpack('=I', port)[0]}"
        with dial(url) as message, dial(url) as late:
            message.sendall(GOOD)
            late.sendall(GOOD[:9])
            os._exit(0 if is_closed(late) and read_status(message) == 204 else 1)
    raft = FakeRaft()
    listener = listen(raft, config=ReceiverConfig(head_timeout_s=0.5))
    with dial(listener.url) as sock:
        sock.sendall(GOOD)
        assert read_status(sock) == 204  # the head is known, and a handler thread leads
    sys.setswitchinterval(1000)
    deadline = time.monotonic() + LONG_TIMEOUT
    port[:] = struct.pack("=I", int(listener.url.rpartition(":")[2]))
    while listener.stats().head_timeouts < 1:  # nothing here gives up the GIL
        if time.monotonic() > deadline:
            sys.exit("the loop stands still")
    assert len(raft.processed) == 1, "the GIL was given up"
    sys.setswitchinterval(0.005)
    assert os.waitpid(caller, 0)[1] == 0
    assert len(raft.processed) == 2
    listener.close()


CASES: dict[str, Callable[..., None]] = {
    "no descriptors": no_descriptors,
    "announced": announced,
    "entries": entries,
    "forks": forks,
    "blocked memory": blocked_memory,
    "idle": idle,
    "idle, TLS": idle_tls,
    "held GIL": held_gil,
}
case, *arguments = sys.argv[1:]
if case == "exits":
    exits(*arguments)
else:
    CASES[case](*arguments)
print("ok", flush=True)
