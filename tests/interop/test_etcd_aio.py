"""A real etcd and the asyncio Transport: neither member can commit without the other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pipeline import Message, aio
from pipeline.examples.etcd import put_of
from tests.support import LONG_TIMEOUT
from tests.support.etcd import Cluster, RecordingFollower, assert_balanced

pytestmark = pytest.mark.etcd


class Node:
    """The example member, whose own locks are waited for off the loop."""

    def __init__(self, follower: RecordingFollower) -> None:
        self.follower = follower
        self.is_id_removed = follower.is_id_removed
        self.report_unreachable = follower.report_unreachable
        self.report_snapshot = follower.report_snapshot

    async def process(self, message: Message) -> None:
        await asyncio.to_thread(self.follower.process, message)


def test_etcd_commits_with_a_member_on_an_event_loop(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, campaigns=False)  # nor asks for a vote before etcd listens
    etcd, follower = cluster.etcd, cluster.follower
    written = {b"key %d" % i: b"value %d" % i for i in range(50)}

    def use() -> None:
        etcd.start()
        etcd.wait_ready()
        for key, value in written.items():
            etcd.put(key, value)
        assert etcd.get(b"key 7") == b"value 7"
        assert follower.wait_for(lambda s: s.commit == s.last_index, LONG_TIMEOUT)

    async def main() -> None:
        async with aio.Transport(
            follower.member_id, cluster.our_cluster_id, Node(follower), peer_urls=[cluster.our_url]
        ) as transport:
            transport.add_peer(etcd.id, [etcd.peer_url])
            await transport.listen()
            follower.start(transport.send)
            try:
                await asyncio.to_thread(use)
            finally:
                await asyncio.to_thread(follower.stop)
            stats = transport.stats()[etcd.id]
        assert_balanced(stats)
        assert stats.sent >= len(written)
        assert (stats.failed, stats.refused) == (0, 0)

    try:
        asyncio.run(main())
    finally:
        cluster.stop()
    assert dict(put for entry in follower.committed() if (put := put_of(entry))) == written
