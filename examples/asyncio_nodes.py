"""Two nodes on one event loop exchange messages: an inbox in one task."""

import asyncio

from pipeline import Message, MessageType, SnapshotStatus
from pipeline.aio import Inbox, Transport


class Node:
    """What a node implements that has an inbox (``pipeline.aio.RaftReports``)."""

    def __init__(self) -> None:
        self.inbox = Inbox()

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...
    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


async def main() -> None:
    a, b = Node(), Node()
    async with (
        Transport(1, 0x77, a, inbox=a.inbox) as one,
        Transport(2, 0x77, b, inbox=b.inbox) as two,
    ):
        one.add_peer(2, [(await two.listen("http://127.0.0.1:0")).url])
        one.send([Message(type=MessageType.HEARTBEAT, to=2, from_=1, term=1)])
        print("2 got", *await b.inbox.take())


asyncio.run(main())
