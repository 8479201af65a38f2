"""Streams between nodes of ours: one of them without streams, rotation, allow_member, fork."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import TLSInfo, Transport, TransportConfig
from tests.functional.test_tls_sending import replace
from tests.support.raft import FakeRaft
from tests.support.streams import (
    KINDS,
    append,
    heartbeat,
    indexes,
    stats_of,
    stream_of,
    wait_all_up,
    wait_up,
)
from tests.support.tls import Authority
from tests.support.waiting import eventually

pytestmark = pytest.mark.streams

CLUSTER = 1


class Node:
    """A member, and the Raft it stands for."""

    def __init__(self, member_id: int, tls: TLSInfo | None = None, *, streams: bool = True) -> None:
        self.raft = FakeRaft()
        config = TransportConfig(probe_interval_s=0, streams=streams)
        self.transport = Transport(member_id, CLUSTER, self.raft, tls=tls, config=config)
        self.transport.start()
        scheme = "http" if tls is None else "https"
        self.listener = self.transport.listen(f"{scheme}://127.0.0.1:0")
        self.url = self.listener.url

    @property
    def member_id(self) -> int:
        return self.transport.member_id

    def joins(self, other: Node) -> None:
        self.transport.add_peer(other.member_id, [other.url])
        other.transport.add_peer(self.member_id, [self.url])

    def states(self, peer_id: int) -> list[str]:
        """What those are at that we receive on from a peer."""
        streams = self.transport._peers[peer_id].streams
        assert streams is not None
        return [reader.state for reader in streams.readers.values()]


@pytest.fixture
def start() -> Iterator[Callable[..., Node]]:
    """Start nodes, which are stopped at the end."""
    nodes: list[Node] = []

    def start(member_id: int, tls: TLSInfo | None = None, **settings: bool) -> Node:
        nodes.append(Node(member_id, tls, **settings))
        return nodes[-1]

    yield start
    for node in nodes:
        node.transport.stop()


def dials(node: Node) -> int:
    """How many connections a node's listener has taken."""
    return node.listener.stats().accepted


def test_a_node_without_streams_is_dialled_once_for_each_and_both_post(
    start: Callable[..., Node],
) -> None:
    has, has_not = start(1), start(2, streams=False)
    has.joins(has_not)
    eventually(lambda: has.states(2) == ["refused", "refused"])
    for index in range(50):
        has.transport.send([heartbeat(index, from_=1, to=2)])
        has_not.transport.send([heartbeat(index, from_=2, to=1)])
    has.raft.wait_processed(50)
    has_not.raft.wait_processed(50)
    assert has.states(2) == ["refused", "refused"]  # still the first dials' answers
    assert dials(has_not) <= 2 + 4  # two streams, and the pipeline's four
    for node, peer_id in ((has, 2), (has_not, 1)):
        stats = stats_of(node.transport, peer_id)
        assert (stats.disconnects, stats.last_error) == (0, None)
        assert stats.active_since is not None
    assert stats_of(has_not.transport, 1).streams == ()
    assert [end.since for end in stats_of(has.transport, 2).streams] == [None] * 4


def test_a_rotation_ends_streams_in_good_order_and_they_are_made_anew(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    info = authority.info("one")
    one, two = start(1, info), start(2, authority.info("two"))
    one.joins(two)
    ends = ((one.transport, 2), (two.transport, 1))
    wait_all_up(*ends)
    disconnects = stats_of(one.transport, 2).disconnects
    before = [end.since for end in stats_of(one.transport, 2).streams]
    replace(authority, info, "rotated")
    one.transport.reload_tls()

    def are_new() -> bool:
        now = [end.since for end in stats_of(one.transport, 2).streams]
        return all(
            later is not None and earlier is not None and later > earlier
            for earlier, later in zip(before, now, strict=True)
        )

    eventually(are_new)
    wait_all_up(*ends)
    # The other one has seen its dialler go, which is a loss to it, as to an etcd.
    assert stats_of(one.transport, 2).disconnects == disconnects
    for index in range(10):
        one.transport.send([heartbeat(index, from_=1, to=2), append(index, from_=1, to=2)])
    received = two.raft.wait_processed(20)
    for kind in (0, 1):
        of_kind = [m for m in received if bool(m.entries) == bool(kind)]
        assert list(indexes(of_kind)) == list(range(10))


def test_whose_certificate_is_another_s_gets_no_stream_and_gives_none(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    """With ``allow_member`` on one side: what the other one dials is refused."""
    authority = Authority(tmp_path)

    def nobody(certificate: object, member_id: int) -> bool:
        return False

    one = start(1, authority.info("one", allow_member=nobody))
    two = start(2, authority.info("two"))
    one.joins(two)
    for kind in KINDS:
        wait_up(one.transport, kind, "in")  # who dials chooses by the name
    eventually(lambda: stats_of(two.transport, 1).last_error is not None)
    error = stats_of(two.transport, 1).last_error
    assert error is not None
    assert "certificate not allowed for this member" in error.text
    assert [stream_of(two.transport, kind, "in", 1).since for kind in KINDS] == [None, None]
    assert [stream_of(one.transport, kind, "out", 2).since for kind in KINDS] == [None, None]


def test_a_forked_child_leaves_streams_to_its_parent(start: Callable[..., Node]) -> None:
    one, two = start(1), start(2)
    one.joins(two)
    wait_all_up((one.transport, 2), (two.transport, 1))
    disconnects = stats_of(one.transport, 2).disconnects
    child = os.fork()
    if child == 0:
        # Neither what it asks nor its end reaches the parent's connections.
        try:
            one.transport.stop()
            two.transport.stop()
            os._exit(0)
        finally:
            os._exit(1)
    try:
        for index in range(100):
            one.transport.send([heartbeat(index, from_=1, to=2)])
        assert list(indexes(two.raft.wait_processed(100))) == list(range(100))
        eventually(lambda: os.waitpid(child, os.WNOHANG) == (child, 0))
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    for kind in KINDS:
        for node, peer_id in ((one, 2), (two, 1)):
            assert stream_of(node.transport, kind, "in", peer_id).since is not None
            assert stream_of(node.transport, kind, "out", peer_id).since is not None
    assert stats_of(one.transport, 2).disconnects == disconnects
