"""Receive as one subject, in a process of its own, until stdin ends; then print one JSON object.

Subjects: ``core`` (the compiled listener), ``uvicorn`` (``asgi_app`` under uvicorn with httptools
and uvloop if they are installed), ``recv`` (a plain recv into one buffer: what 64 MiB cost at the
least). The load is ``bin/bare_sender --body``. ``core`` speaks TLS when it is given a certificate.
With ``--spin`` the main thread computes in Python all the time (T4); its CPU is in the figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from driver import spin
from harness import (
    CLUSTER_ID,
    add_tls_options,
    cpu_s,
    credentials_of,
    forget_peak,
    status_kib,
)

from pipeline import Listener, Message, ReceiverConfig
from pipeline.identity import Identity
from pipeline.receive.handlers import Handlers
from pipeline.tls import Credentials


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

#: The port of a server, and how many handshakes it has made so far.
Serving = tuple[int, Callable[[], int]]


@contextmanager
def serve_core(handlers: Handlers, credentials: Credentials | None) -> Iterator[Serving]:
    url = f"{'https' if credentials else 'http'}://127.0.0.1:0"
    with Listener(handlers, url, PATIENT, credentials) as listener:
        yield int(listener.url.rpartition(":")[2]), lambda: listener.stats().handshakes


@contextmanager
def serve_uvicorn(handlers: Handlers) -> Iterator[Serving]:
    import uvicorn

    from pipeline.receive.asgi import asgi_app

    with socket.create_server(("127.0.0.1", 0)) as sock:
        app = asgi_app(handlers, ReceiverConfig())
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
        thread.start()
        yield sock.getsockname()[1], lambda: 0
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
        yield sock.getsockname()[1], lambda: 0


def spin_until_told() -> None:
    """Compute in Python, without a rest, until stdin ends."""
    is_told = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        is_told.set()

    threading.Thread(target=listen, daemon=True).start()
    while not is_told.is_set():
        spin(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=("core", "uvicorn", "recv"))
    parser.add_argument("--spin", action="store_true", help="compute in the main thread")
    add_tls_options(parser)
    args = parser.parse_args()
    raft = CountingRaft()
    handlers = Handlers(raft, Identity(1, CLUSTER_ID, (), "3.5.1"))
    serve: Any = {
        "core": lambda: serve_core(handlers, credentials_of(args)),
        "uvicorn": lambda: serve_uvicorn(handlers),
        "recv": lambda: serve_recv(raft),
    }[args.subject]
    with serve() as (port, handshakes):
        before_s, rss_kib = cpu_s(), status_kib("VmRSS")
        forget_peak()
        print(f"listening {port}", flush=True)
        if args.spin:
            spin_until_told()
        else:
            sys.stdin.read()
        took_s, peak_kib = cpu_s() - before_s, status_kib("VmHWM")
        grown_kib = status_kib("VmRSS") - rss_kib
        shaken = handshakes()
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
