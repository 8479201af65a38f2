"""What becomes of a member of ours and an etcd whose ways to each other are cut, and healed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from unittest import mock

from pipeline import MessageType, PeerChange, PeerState
from pipeline.examples.etcd import EtcdError, EtcdMember
from pipeline.net.dialling import Dialer
from pipeline.stream.reader import RETRY_S
from tests.support.etcd import (
    Cluster,
    assert_balanced,
    out_of_order,
    posts,
    puts_in_our_log,
    streams,
    wait_for_streams,
)
from tests.support.waiting import eventually

#: Longer than an etcd and we listen to silence.
CUT_S = 8.0


def go_through(
    cluster: Cluster, cut: Callable[[], object], heal: Callable[[], object], cut_s: float = CUT_S
) -> None:
    """Write, cut what ``cut`` cuts for some seconds, heal it, and look at all there is to see."""
    changes: list[PeerChange] = []
    cluster.on_peer_change = changes.append
    dials: list[float] = []
    begin = Dialer.begin

    def counted(*args: Any) -> None:
        dials.append(time.monotonic())
        begin(*args)

    with mock.patch.object(Dialer, "begin", counted):
        cluster.start()
        wait_for_streams(cluster)
        written = {b"before %d" % n: b"%d" % n for n in range(20)}
        for put in written.items():
            cluster.etcd.put(*put)
        dialled = len(dials)
        before = since(cluster)

        cut()
        until = time.monotonic() + cut_s
        try:
            is_felt = not does_commit(cluster, b"cut")
            while time.monotonic() < until:
                for end in streams(cluster).values():
                    if end.books is not None:
                        assert_balanced(end.books)
                assert_balanced(cluster.stats())
                is_felt |= since(cluster) != before
                time.sleep(0.01)
        finally:
            heal()
        assert is_felt, "nothing was cut"
        # Two streams, each dialled ten times a second if that is refused at once, and for each
        # the messages that are posted meanwhile.
        assert len(dials) - dialled < 3 * cut_s / RETRY_S

        cluster.etcd.wait_ready()
        wait_for_streams(cluster)

    check_steady(cluster, written)
    # Told once each, the last of them of a peer that is there.
    states = [change.state for change in changes]
    assert all(before != after for before, after in pairwise(states)), states
    assert states[-1] is PeerState.ACTIVE


def check_steady(cluster: Cluster, written: dict[bytes, bytes]) -> None:
    """Write more: nothing is posted, dialled, out of order, lost or without an outcome."""
    eventually(lambda: do_posts_rest(cluster), "all goes by streams")
    puts_in_our_log(cluster)
    begun, offered = len(cluster.follower.messages), posts(cluster)
    accepted = cluster.listener.stats().accepted
    more = {b"after %d" % n: b"%d" % n for n in range(200)}
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda put: cluster.etcd.put(*put), more.items()):
            pass
    held = puts_in_our_log(cluster)
    held.pop(b"cut", None)  # it was not said to be committed, and may be
    assert held == {**written, b"healed": b"", **more}
    appends = [m for m in cluster.follower.messages[begun:] if m.type == MessageType.APP]
    assert out_of_order(appends) == []
    assert posts(cluster) == offered
    assert cluster.listener.stats().accepted - accepted <= 2  # probes of an etcd

    assert_balanced(cluster.stats())
    eventually(lambda: cluster.stats().queued + cluster.stats().in_flight == 0, "each has its end")


def since(cluster: Cluster) -> list[float | None]:
    """When each of our four ends came up."""
    return [end.since for end in streams(cluster).values()]


def does_commit(cluster: Cluster, key: bytes) -> bool:
    """Tell whether a write is committed within half a second."""
    try:
        EtcdMember.put(cluster.etcd, key, b"", 0.5)
    except EtcdError:
        return False
    return True


def do_posts_rest(cluster: Cluster) -> bool:
    """Tell whether a write goes without a post of either: etcd has its streams again as well."""
    offered, received = posts(cluster), cluster.listener.stats().fast_requests
    cluster.etcd.put(b"healed", b"")
    return posts(cluster) == offered and cluster.listener.stats().fast_requests == received
