"""A node on a plain ``selectors`` loop: its inbox is one more descriptor, beside its own sockets.

::

    python -m pipeline.examples.selectors_node 1 one.log \\
        http://127.0.0.1:2381 http://127.0.0.1:2382 http://127.0.0.1:2383

The arguments are which of the members this is, the file for its term and vote, and where each
member is reached. The members elect one of them (``pipeline.examples.election``), and whoever
connects to the port that a node prints is told who leads. One thread does all that: it sleeps until
a message has come, a client has, or the election is due. Between two turns the library reads,
decodes and answers without it.

Glue: 19 lines, those of the function ``run`` without blank lines, comments and docstrings.
"""

from __future__ import annotations

import selectors
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

from pipeline import Inbox, SnapshotStatus, Transport
from pipeline.examples.election import Election
from pipeline.examples.storage import Storage

__all__ = ["main", "run"]

CLUSTER_ID = 0x53656C


class Reports:
    """What becomes of messages (``pipeline.RaftReports``): an election is not interested."""

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


def run(election: Election, urls: dict[int, str], clients: socket.socket) -> None:
    """Take part in the election, and answer whoever connects, until a signal ends it."""
    inbox = Inbox()
    own = urls[election.id]
    transport = Transport(election.id, CLUSTER_ID, Reports(), peer_urls=[own], inbox=inbox)
    with transport, selectors.DefaultSelector() as selector:
        transport.listen()
        for member_id in election.others:
            transport.add_peer(member_id, [urls[member_id]])
        selector.register(inbox, selectors.EVENT_READ)
        selector.register(clients, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(max(0.0, election.due - time.monotonic())):
                if key.fileobj is inbox:
                    for message in inbox.take():
                        transport.send(election.step(message, time.monotonic()))
                else:
                    with clients.accept()[0] as client:
                        client.sendall(f"{election}\n".encode())
            transport.send(election.tick(time.monotonic()))


def main() -> None:
    """Run the member that the arguments say."""
    member_id, path, *addresses = sys.argv[1:]
    urls = dict(enumerate(addresses, start=1))
    own = int(member_id)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Storage(Path(path)) as storage, socket.create_server(("127.0.0.1", 0)) as clients:
        print("clients: {}:{}".format(*clients.getsockname()), flush=True)
        tell = partial(print, flush=True)
        election = Election(own, urls.keys() - {own}, storage, time.monotonic(), tell)
        run(election, urls, clients)


if __name__ == "__main__":
    main()
