"""Reports of streams: who is told what, once, and in which order (spec 8.3, 8.4).

What is told of messages by the pipeline: ``tests/functional/test_pipeline.py``.
"""

from __future__ import annotations

import pytest

from pipeline import MemberRemovedError
from pipeline._core import ActiveFlag
from pipeline.callbacks import Callbacks
from pipeline.errors import PeerUnreachableError
from pipeline.logs import get_logger
from pipeline.send.changes import PeerChange, PeerChanges, PeerState
from pipeline.send.picker import URLPicker
from pipeline.send.reports import Reports
from pipeline.send.status import PeerStatus
from tests.support.raft import FakeRaft

PEER = 0xB2
URLS = ("http://10.0.0.1:2380", "http://10.0.0.2:2380")


class Bench:
    """Reports, and everybody who hears of them; ``told`` is what they heard, in order."""

    def __init__(self, *, is_every_told: bool) -> None:
        callbacks = Callbacks(get_logger("pipeline.test"))
        self.told: list[object] = []
        self.raft = FakeRaft()
        self.picker = URLPicker(URLS)
        self.status = PeerStatus(1, PEER, ActiveFlag())
        self.status.changes = PeerChanges(PEER, self._changed, callbacks)
        self.reports = Reports(
            PEER,
            self.raft,
            picker=self.picker,
            status=self.status,
            callbacks=callbacks,
            is_every_told=is_every_told,
            on_critical_error=self._critical,
        )

    def _changed(self, change: PeerChange) -> None:
        self.told.append(change.state)

    def _critical(self, error: MemberRemovedError) -> None:
        self.told.append((error.status, self.picker.pick()))

    def lost(self, messages: int) -> None:
        self.reports.stream_down("write", "broken pipe", source="stream Message", messages=messages)

    def refused(self, error: PeerUnreachableError | MemberRemovedError) -> None:
        self.reports.stream_refused(error, source="stream Message")


@pytest.fixture
def bench() -> Bench:
    return Bench(is_every_told=True)


def gone() -> MemberRemovedError:
    return MemberRemovedError(
        "the member has been permanently removed from the cluster",
        peer_id=PEER,
        url=URLS[0],
        status=410,
    )


def test_a_stream_that_comes_up_makes_the_peer_active_and_is_told_after_it(bench: Bench) -> None:
    bench.reports.stream_up()
    assert bench.status.is_active
    assert bench.told == []  # the loop may not show it yet
    bench.reports.tell_changes()
    assert bench.told == [PeerState.ACTIVE]


def test_of_messages_that_fail_with_a_stream_raft_hears_once(bench: Bench) -> None:
    bench.reports.stream_up()
    bench.lost(500)
    assert bench.raft.unreachable == [PEER]
    assert not bench.status.is_active
    assert bench.status.disconnects == 1


def test_a_stream_that_took_no_message_with_it_is_nothing_to_raft(bench: Bench) -> None:
    bench.reports.stream_up()
    bench.lost(0)
    assert bench.raft.unreachable == []
    assert not bench.status.is_active


def test_raft_that_wants_changes_hears_of_the_first_loss_only() -> None:
    bench = Bench(is_every_told=False)
    bench.reports.stream_up()
    bench.lost(3)
    bench.lost(3)
    assert bench.raft.unreachable == [PEER]
    bench.reports.stream_up()
    bench.lost(1)
    assert bench.raft.unreachable == [PEER, PEER]


def test_a_dial_that_fails_turns_to_the_next_url_and_is_nothing_to_raft(bench: Bench) -> None:
    bench.reports.stream_up()
    bench.refused(PeerUnreachableError("connection refused", peer_id=PEER, url=URLS[0]))
    assert bench.picker.pick() == URLS[1]
    assert bench.told == [PeerState.ACTIVE, PeerState.INACTIVE]
    assert bench.raft.unreachable == []
    bench.refused(PeerUnreachableError("connection refused", peer_id=PEER, url=URLS[0]))
    assert bench.picker.pick() == URLS[1]  # of the other stream, which was dialled there as well


def test_that_we_were_removed_is_told_once_after_the_turn_and_before_the_change(
    bench: Bench,
) -> None:
    bench.reports.stream_up()
    bench.reports.tell_changes()
    bench.refused(gone())
    bench.refused(gone())
    assert bench.told == [PeerState.ACTIVE, (410, URLS[1]), PeerState.REMOVED]
