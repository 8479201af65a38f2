"""What is made when it is first needed, by eight threads at once, in a process that has made none.

``first_use.py DIRECTORY`` prints "ok", or raises; the directory is for certificates.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline import Inbox, Transport, TransportConfig
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT
from tests.support.inbox import Reports
from tests.support.tls import Authority

THREADS = 8
T = TypeVar("T")


def by_many(make: Callable[[], T]) -> list[T]:
    """Call it in many threads from one instant on; what it returns to each."""
    begin = threading.Barrier(THREADS)
    made: list[T] = []

    def call() -> None:
        begin.wait(LONG_TIMEOUT)
        made.append(make())

    threads = [threading.Thread(target=call) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_TIMEOUT)
    assert len(made) == THREADS, f"{THREADS - len(made)} threads have failed"
    return made


def main(directory: Path) -> None:
    info = Authority(directory).info()
    # The first of them loads OpenSSL.
    for credentials in by_many(lambda: Credentials(info)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            client = credentials.client_context.session(ours.fileno(), "127.0.0.1")
            server = credentials.server_context.session(theirs.fileno())
            while not (client.shake() and server.shake()):
                server.shake()
            assert client.version == server.version == "TLSv1.3"
    inbox = Inbox()
    assert len(set(by_many(inbox.fileno))) == 1
    config = TransportConfig(probe_interval_s=0)
    with Transport(1, 1, Reports(), inbox=inbox, config=config, tls=info) as node:
        assert len(set(map(id, by_many(lambda: node.asgi_app)))) == 1
        assert set(by_many(node.reload_tls)) == {True}
    print("ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
