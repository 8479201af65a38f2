"""The asyncio face: a node with plain and async methods, and what is awaited."""

from collections.abc import Awaitable
from typing import assert_type

from pipeline import (
    MemberRemovedError,
    Message,
    MessageType,
    PeerChange,
    PipelineStats,
    SnapshotStatus,
)
from pipeline.aio import Listener, Raft, Transport


class Node:
    async def process(self, message: Message) -> None:
        pass

    def is_id_removed(self, member_id: int) -> bool:
        return False

    async def report_unreachable(self, member_id: int) -> None:
        pass

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> Awaitable[None] | None:
        return None


class Deaf:
    async def is_id_removed(self, member_id: int) -> bool:
        return False


async def removed(error: MemberRemovedError) -> None:
    pass


async def changed(change: PeerChange) -> None:
    pass


def changed_plainly(change: PeerChange) -> None:
    pass


async def main() -> None:
    node: Raft = Node()
    Transport(1, 1, node, on_peer_change=changed_plainly)
    async with Transport(
        1, 1, node, on_critical_error=removed, on_peer_change=changed
    ) as transport:
        assert_type(await transport.listen(), Listener)
        assert_type(await transport.remove_peer(2), int)
        assert_type(transport.stats(), dict[int, PipelineStats])
        transport.add_peer(2, ["http://127.0.0.1:2380"])
        assert_type(transport.send([Message(type=MessageType.HEARTBEAT, to=2)]), int)
        await transport.send([])  # type: ignore[misc]
        assert_type(await transport.stop(), int)
    Transport(1, 1, Deaf())  # type: ignore[call-overload]
