"""A FastAPI service of several nodes: keys and values over HTTP, an inbox beside uvicorn.

::

    python -m pipeline.examples.fastapi_node 1 one.log 8001 \\
        http://127.0.0.1:2381 http://127.0.0.1:2382 http://127.0.0.1:2383

    curl -X PUT -H 'content-type: application/json' -d '"red"' http://127.0.0.1:8001/keys/colour
    curl http://127.0.0.1:8002/keys/colour

The arguments are which of the members this is, the file for its log, the port of its service, and
where the others reach each member. All runs on one event loop, that of uvicorn; files are written
in threads. It needs FastAPI and uvicorn.

This is no Raft: the first member leads, and while it is away nothing can be written. The rest is
as it should be: an entry is in the file before it counts, a write is answered when a majority has
it, and what is lost, doubled or overtaken on the way is sent again. What is read may be old.

Glue: 100 lines, those of the class ``Node`` and the function ``service`` without blank lines,
comments and docstrings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, HTTPException

from pipeline import Entry, Message, MessageType, SnapshotStatus
from pipeline.aio import Inbox, Transport
from pipeline.examples.storage import Storage

__all__ = ["Node", "main", "service"]

CLUSTER_ID = 0x46617374
LEADER = 1
#: Between two appends to a member that has everything, and until a lost one is found.
TICK_S = 0.1
#: Entries in one message.
BATCH = 256
#: How long a write waits for a majority.
WRITE_TIMEOUT_S = 10.0


class Node:
    """One member; used on the loop. Implements ``pipeline.aio.RaftReports``.

    Attributes
    ----------
    log : list of Entry
        What is in the file.
    values : dict of str to str
        What its entries say, up to ``commit``.
    match, next : dict of int to int
        Of the leader: the last index that each member is known to have, and the next to send it.
    """

    def __init__(self, member_id: int, urls: dict[int, str], storage: Storage) -> None:
        self.id, self.urls, self.storage = member_id, urls, storage
        self.log, self.commit = storage.entries, 0
        self.values: dict[str, str] = {}
        self.others = urls.keys() - {member_id}
        self.match, self.next = dict.fromkeys(urls, 0), dict.fromkeys(urls, len(self.log) + 1)
        self.match[member_id] = len(self.log)
        self.writing = asyncio.Lock()
        self.waiting: dict[int, asyncio.Future[None]] = {}
        self.inbox = Inbox()
        self.transport = Transport(
            member_id, CLUSTER_ID, self, peer_urls=[urls[member_id]], inbox=self.inbox
        )

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...
    def report_unreachable(self, member_id: int) -> None:
        self.next[member_id] = self.match[member_id] + 1  # what was sent ahead may be lost

    async def put(self, key: str, value: str) -> int:
        """Write a value, as the leader; its index, when a majority has it, else TimeoutError."""
        async with self.writing:
            entry = Entry(term=1, index=len(self.log) + 1, data=json.dumps([key, value]).encode())
            await self.append([entry])
            done = self.waiting[entry.index] = asyncio.get_running_loop().create_future()
        self.acknowledge(self.id, entry.index)
        for member_id in self.others:
            self.replicate(member_id)
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await done
        return entry.index

    async def append(self, entries: list[Entry]) -> None:
        await asyncio.to_thread(self.storage.save, 1, 0, entries)
        self.log += entries

    def replicate(self, to: int) -> None:
        """Send a member what it has not been sent; perhaps nothing, which asks what it has."""
        sent = self.next[to] - 1
        entries = self.log[sent : sent + BATCH]
        self.next[to] += len(entries)
        self.send(to, type=MessageType.APP, index=sent, entries=entries, commit=self.commit)

    def send(self, to: int, **fields: Any) -> None:
        self.transport.send([Message(to=to, from_=self.id, term=1, **fields)])

    def acknowledge(self, member_id: int, index: int) -> None:
        """Learn that a member has the log up to an index, and apply what a majority has."""
        self.match[member_id] = max(self.match[member_id], index)
        self.apply(sorted(self.match.values())[(len(self.match) - 1) // 2])

    def apply(self, commit: int) -> None:
        for entry in self.log[self.commit : commit]:
            key, value = json.loads(bytes(entry.data or b""))
            self.values[key] = value
            if (done := self.waiting.pop(entry.index, None)) is not None and not done.done():
                done.set_result(None)
        self.commit = max(self.commit, commit)

    async def take(self) -> None:
        """Take what the others send, in batches, until the transport is stopped."""
        async for batch in self.inbox:
            for message in batch:
                if message.from_ == LEADER and message.type == MessageType.APP:
                    await self.follow(message)
                elif message.from_ in self.others and message.type == MessageType.APP_RESP:
                    self.lead_on(message)

    async def follow(self, message: Message) -> None:
        """Append what the leader has sent; the log is always the beginning of the leader's."""
        missing = message.index - len(self.log)
        if missing <= 0 and (entries := message.entries[-missing:]):
            await self.append(list(entries))
        self.apply(min(message.commit, len(self.log)))
        self.send(LEADER, type=MessageType.APP_RESP, index=len(self.log), reject=missing > 0)

    def lead_on(self, answer: Message) -> None:
        """Go on with a member that has said up to where it has the log."""
        member_id, index = answer.from_, answer.index
        self.acknowledge(member_id, index)
        self.next[member_id] = index + 1 if answer.reject else max(self.next[member_id], index + 1)
        if self.next[member_id] <= len(self.log):
            self.replicate(member_id)

    async def tick(self) -> None:
        while self.id == LEADER:
            for member_id in self.others:
                self.replicate(member_id)
            await asyncio.sleep(TICK_S)


def service(node: Node) -> FastAPI:
    """Return the application: its start and stop are the node's."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with node.transport as transport:
            await transport.listen()
            for member_id in node.others:
                transport.add_peer(member_id, [node.urls[member_id]])
            tasks = [asyncio.create_task(node.take()), asyncio.create_task(node.tick())]
            yield
            for task in tasks:
                task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.put("/keys/{key}")
    async def put(key: str, value: Annotated[str, Body()]) -> int:
        if node.id != LEADER:
            raise HTTPException(421, f"member {LEADER} leads")
        try:
            return await node.put(key, value)
        except TimeoutError:
            raise HTTPException(503, "no majority has it yet; it may still come") from None

    @app.get("/keys/{key}")
    async def get(key: str) -> str:
        if key not in node.values:
            raise HTTPException(404)
        return node.values[key]

    return app


def main() -> None:
    """Run the member that the arguments say."""
    member_id, path, port, *urls = sys.argv[1:]
    with Storage(Path(path)) as storage:
        node = Node(int(member_id), dict(enumerate(urls, start=1)), storage)
        uvicorn.run(service(node), host="127.0.0.1", port=int(port))


if __name__ == "__main__":
    main()
