"""A node that Prometheus scrapes: an election, and its numbers at ``/metrics``.

::

    python -m pipeline.examples.metrics_node 1 one.log 9101 \\
        http://127.0.0.1:2381 http://127.0.0.1:2382 http://127.0.0.1:2383

    curl http://127.0.0.1:9101/metrics

The arguments are which of the members this is, the file for its term and vote, the port of its
metrics (0 for any), and where each member is reached. The members elect one of them, which then
sends heartbeats (``pipeline.examples.election``): so there is something to count. The registry is
prometheus_client's own, which has ``process_*`` as well: CPU, memory, descriptors. The folder
``operations/`` has a dashboard and alerts for what is shown here.

Glue: 21 lines, those of the function ``run`` without blank lines, comments and docstrings.
"""

from __future__ import annotations

import signal
import sys
import time
from functools import partial
from pathlib import Path

from prometheus_client import REGISTRY, start_http_server

from pipeline import Inbox, SnapshotStatus, Transport
from pipeline.examples.election import Election
from pipeline.examples.storage import Storage

__all__ = ["main", "run"]

CLUSTER_ID = 0x4D6574


class Reports:
    """What becomes of messages (``pipeline.RaftReports``): an election is not interested."""

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


def run(election: Election, urls: dict[int, str], port: int) -> None:
    """Take part in the election, and show the numbers, until a signal ends it."""
    inbox = Inbox()
    own = urls[election.id]
    transport = Transport(election.id, CLUSTER_ID, Reports(), peer_urls=[own], inbox=inbox)
    collector = transport.metrics_collector()
    with transport:
        transport.listen()
        for member_id in election.others:
            transport.add_peer(member_id, [urls[member_id]])
        REGISTRY.register(collector)
        server, thread = start_http_server(port, "127.0.0.1")
        print(f"metrics: http://127.0.0.1:{server.server_port}/metrics", flush=True)
        try:
            while True:
                for message in inbox.take(timeout=max(0.0, election.due - time.monotonic())):
                    transport.send(election.step(message, time.monotonic()))
                transport.send(election.tick(time.monotonic()))
        finally:
            server.shutdown()
            thread.join()
            REGISTRY.unregister(collector)  # it keeps the transport alive


def main() -> None:
    """Run the member that the arguments say."""
    member_id, path, port, *addresses = sys.argv[1:]
    urls = dict(enumerate(addresses, start=1))
    own = int(member_id)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Storage(Path(path)) as storage:
        tell = partial(print, flush=True)
        election = Election(own, urls.keys() - {own}, storage, time.monotonic(), tell)
        run(election, urls, int(port))


if __name__ == "__main__":
    main()
