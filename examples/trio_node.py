"""A node on trio: it waits for its inbox as for any descriptor.

::

    python -m pipeline.examples.trio_node 1 one.log \\
        http://127.0.0.1:2381 http://127.0.0.1:2382 http://127.0.0.1:2383

What ``selectors_node`` is, with the same arguments, and a task for each thing that is waited for:
messages, the election, clients. Nodes of both kinds may be members of one cluster. It needs trio.

Glue: 26 lines, those of the functions ``run``, ``take`` and ``tick`` without blank lines, comments
and docstrings.
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import trio

from pipeline import Inbox, SnapshotStatus, Transport
from pipeline.examples.election import Election
from pipeline.examples.storage import Storage

__all__ = ["main", "run"]

CLUSTER_ID = 0x53656C


class Reports:
    """What becomes of messages (``pipeline.RaftReports``): an election is not interested.

    A node that is calls ``trio.from_thread.run_sync`` here, for these are the library's threads.
    """

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


async def take(inbox: Inbox, election: Election, transport: Transport) -> None:
    """Take what has come, until the transport has been stopped."""
    while not inbox.closed:
        await trio.lowlevel.wait_readable(inbox.fileno())
        for message in inbox.take():
            transport.send(election.step(message, trio.current_time()))


async def tick(election: Election, transport: Transport) -> None:
    """Do what is due; what is put off meanwhile is waited for again."""
    while True:
        await trio.sleep_until(election.due)
        transport.send(election.tick(trio.current_time()))


async def run(election: Election, urls: dict[int, str], clients: list[trio.SocketListener]) -> None:
    """Take part in the election, and answer whoever connects, until SIGTERM."""

    async def answer(client: trio.SocketStream) -> None:
        async with client:
            await client.send_all(f"{election}\n".encode())

    inbox = Inbox()
    own = urls[election.id]
    # Its stop blocks, a second at most; nothing else runs then.
    with Transport(election.id, CLUSTER_ID, Reports(), peer_urls=[own], inbox=inbox) as transport:
        transport.listen()
        for member_id in election.others:
            transport.add_peer(member_id, [urls[member_id]])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, inbox, election, transport)
            nursery.start_soon(tick, election, transport)
            nursery.start_soon(trio.serve_listeners, answer, clients)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()


async def main() -> None:
    """Run the member that the arguments say."""
    member_id, path, *addresses = sys.argv[1:]
    urls = dict(enumerate(addresses, start=1))
    own = int(member_id)
    clients = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print("clients: {}:{}".format(*clients[0].socket.getsockname()), flush=True)
    with Storage(Path(path)) as storage:
        tell = partial(print, flush=True)
        election = Election(own, urls.keys() - {own}, storage, trio.current_time(), tell)
        await run(election, urls, clients)


if __name__ == "__main__":
    trio.run(main)
