"""Receive as one subject, in a process of its own, until stdin ends; then print one JSON object.

Subjects: ``core`` (the compiled listener, which calls ``process``), ``inbox`` (a ``Transport`` with
an ``Inbox``, from which the main thread takes), ``inbox-asyncio`` and ``inbox-uvloop`` (a task of
such a loop takes), ``uvicorn`` (``asgi_app`` under uvicorn with httptools and uvloop if they are
installed), ``recv`` (a plain recv into one buffer: what 64 MiB cost at the least). The load is
``bin/bare_sender --body``. ``core`` and the ones with an inbox speak TLS when they are given a
certificate. With ``--spin`` the main thread computes in Python all the time (T4); with an inbox it
takes what has come every 2 ms or so (I1). That CPU is in the figure. With ``--late`` it takes only
when all has come.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from driver import spin
from harness import (
    CLUSTER_ID,
    MEMBER_ID,
    PEER_ID,
    add_tls_options,
    cpu_s,
    credentials_of,
    forget_peak,
    status_kib,
    tls_of,
)

from pipeline import (
    Inbox,
    Listener,
    Message,
    ReceiverConfig,
    Transport,
    TransportConfig,
    aio,
)
from pipeline.identity import Identity
from pipeline.receive.handlers import Handlers
from pipeline.tls.credentials import Credentials

#: How many messages a node takes at most, and how long it waits for the first: a tick.
BATCH, TICK_S = 256, 0.1
#: What is computed between two takes when the main thread spins: about 2 ms of bytecode, in which
#: an inbox is not nearly full.
SPIN_ITERATIONS, SPIN_BATCH = 70_000, 4096


SUBJECTS = ("core", "inbox", "inbox-asyncio", "inbox-uvloop", "uvicorn", "recv")


class CountingRaft:
    """A node whose ``process`` does nothing but count."""

    def __init__(self) -> None:
        self.messages = 0

    def process(self, message: Message) -> None:
        self.messages += 1

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None:
        pass

    def report_snapshot(self, member_id: int, status: object) -> None:
        pass


#: Nobody is too late under valgrind, on a machine that does something else besides.
PATIENT = ReceiverConfig(head_timeout_s=600.0, stall_timeout_s=600.0, handshake_timeout_s=600.0)


@dataclass(frozen=True)
class Serving:
    """A server: its port, how many handshakes it has made so far, and what the main thread does
    until stdin ends and all that came has been taken.
    """

    port: int
    handshakes: Callable[[], int] = lambda: 0
    run: Callable[[], object] = sys.stdin.read


@contextmanager
def serve_core(
    handlers: Handlers, credentials: Credentials | None, run: Callable[[], object]
) -> Iterator[Serving]:
    url = f"{'https' if credentials else 'http'}://127.0.0.1:0"
    with Listener(handlers, url, PATIENT, credentials) as listener:
        port = int(listener.url.rpartition(":")[2])
        yield Serving(port, lambda: listener.stats().handshakes, run)


@contextmanager
def serve_inbox(
    node: dict[str, Any], url: str, raft: CountingRaft, *, spins: bool, is_late: bool
) -> Iterator[Serving]:
    inbox = Inbox(max_messages=1 << 20 if is_late else 4096)
    with Transport(**node, inbox=inbox) as transport:
        transport.add_peer(MEMBER_ID, [url])
        listener = transport.listen(url)
        port = int(listener.url.rpartition(":")[2])
        run = functools.partial(take_until_told, inbox, raft, spins=spins, is_late=is_late)
        yield Serving(port, lambda: listener.stats().handshakes, run)


def take_until_told(inbox: Inbox, raft: CountingRaft, *, spins: bool, is_late: bool) -> None:
    """Take in batches, as the loop of a node does, until stdin ends and nothing is left."""
    is_told = stdin_ends()
    if is_late:
        is_told.wait()
    is_last = False
    while not is_last:
        is_told_already = is_told.is_set()  # whatever was answered by then is in the inbox
        if spins:
            spin(0, SPIN_ITERATIONS)
            messages = inbox.take(SPIN_BATCH)
        else:
            messages = inbox.take(BATCH, TICK_S)
        raft.messages += len(messages)
        is_last = is_told_already and not messages
        del messages  # not to be held while the next are waited for


@contextmanager
def serve_async(node: dict[str, Any], url: str, raft: CountingRaft, loop: str) -> Iterator[Serving]:
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    inbox = aio.Inbox()
    with asyncio.Runner(loop_factory=factory) as runner:
        transport = aio.Transport(**node, inbox=inbox)
        runner.run(transport.start())
        transport.add_peer(MEMBER_ID, [url])
        listener = runner.run(transport.listen(url))
        port = int(listener.url.rpartition(":")[2])
        yield Serving(
            port,
            lambda: listener.stats().handshakes,
            lambda: runner.run(await_until_told(inbox, raft)),
        )
        runner.run(transport.stop())


async def await_until_told(inbox: aio.Inbox, raft: CountingRaft) -> None:
    """Take in a task until stdin ends and nothing is left."""

    async def consume() -> None:
        async for messages in inbox:
            raft.messages += len(messages)
            del messages

    consumer = asyncio.create_task(consume())
    await asyncio.to_thread(sys.stdin.read)
    while len(inbox) > 0:
        await asyncio.sleep(0.001)
    consumer.cancel()
    with suppress(asyncio.CancelledError):
        await consumer


@contextmanager
def serve_uvicorn(handlers: Handlers) -> Iterator[Serving]:
    import uvicorn

    from pipeline.receive.asgi import asgi_app

    with socket.create_server(("127.0.0.1", 0)) as sock:
        app = asgi_app(handlers, ReceiverConfig())
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
        thread.start()
        yield Serving(sock.getsockname()[1])
        server.should_exit = True
        thread.join()


@contextmanager
def serve_recv(raft: CountingRaft) -> Iterator[Serving]:
    """Read whole requests of one connection into one buffer and answer 204."""

    def run(sock: socket.socket) -> None:
        conn, _ = sock.accept()
        buffer = memoryview(bytearray(1 << 27))
        with conn:
            while n := conn.recv_into(buffer):
                head = bytes(buffer[:n]).partition(b"\r\n\r\n")[0]
                size = int(head.rpartition(b"Content-Length: ")[2]) + len(head) + 4
                while n < size:
                    n += conn.recv_into(buffer[n:size])
                conn.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                raft.messages += 1

    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=run, args=(sock,), daemon=True)
        thread.start()
        yield Serving(sock.getsockname()[1])


def stdin_ends() -> threading.Event:
    """Return what is set when stdin has ended."""
    is_told = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        is_told.set()

    threading.Thread(target=listen, daemon=True).start()
    return is_told


def spin_until_told() -> None:
    """Compute in Python, without a rest, until stdin ends."""
    is_told = stdin_ends()
    while not is_told.is_set():
        spin(0)


def serve(args: argparse.Namespace, raft: CountingRaft) -> AbstractContextManager[Serving]:
    handlers = Handlers(raft, Identity(1, CLUSTER_ID, (), "3.5.1"))
    if args.subject == "core":
        run = spin_until_told if args.spin else sys.stdin.read
        return serve_core(handlers, credentials_of(args), run)
    if args.subject == "uvicorn":
        return serve_uvicorn(handlers)
    if args.subject == "recv":
        return serve_recv(raft)
    # The sender is a peer of the node, who has no streams and is not asked how far away it is.
    config = TransportConfig(receiver=PATIENT, streams=False, probe_interval_s=0)
    node = {"member_id": PEER_ID, "cluster_id": CLUSTER_ID, "raft": raft, "config": config}
    node["tls"] = tls_of(args)
    url = f"{'https' if args.cert else 'http'}://127.0.0.1:0"
    if args.subject == "inbox":
        return serve_inbox(node, url, raft, spins=args.spin, is_late=args.late)
    return serve_async(node, url, raft, args.subject.removeprefix("inbox-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--spin", action="store_true", help="compute in the main thread")
    parser.add_argument("--late", action="store_true", help="with an inbox: take only at the end")
    add_tls_options(parser)
    args = parser.parse_args()
    raft = CountingRaft()
    with serve(args, raft) as serving:
        before_s, rss_kib = cpu_s(), status_kib("VmRSS")
        forget_peak()
        print(f"listening {serving.port}", flush=True)
        serving.run()
        took_s, peak_kib = cpu_s() - before_s, status_kib("VmHWM")
        grown_kib = status_kib("VmRSS") - rss_kib
        shaken = serving.handshakes()
    print(
        json.dumps(
            {
                "total": raft.messages,
                "handshakes": shaken,
                "cpu_s": took_s,
                "cpu_us_per_message": took_s * 1e6 / max(raft.messages, 1),
                "peak_mib": (peak_kib - rss_kib) / 1024,
                "grown_kib": grown_kib,
            }
        )
    )


if __name__ == "__main__":
    main()
