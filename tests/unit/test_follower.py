"""The example member's rules (etcd ``raft.go``): the interop tests lean on them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import (
    Entry,
    Inbox,
    Message,
    MessageType,
    RequestRejected,
    Snapshot,
    SnapshotMetadata,
    SnapshotStatus,
    Transport,
    TransportConfig,
)
from pipeline.examples.follower import CAMPAIGN_TICKS, LEASE_TICKS, Follower, Role
from pipeline.examples.storage import Storage

US, PEER, THIRD = 1, 2, 3


class QuietReports:
    """Of a peer that is no member of ours: nothing is of interest to it."""

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...


class Bench:
    """A member whose messages stay on the bench."""

    def __init__(self, *peers: int, storage: Storage | None = None) -> None:
        self.follower = Follower(US, *(peers or (PEER,)), storage=storage)
        self.out: list[Message] = []
        self.follower.start(self.out.extend, heartbeat_interval_s=3600.0)

    def answer(self, kind: MessageType, **fields: Any) -> Message:
        """Give it one message and return its only answer."""
        self.out.clear()
        self.follower.process(Message(type=kind, to=US, from_=PEER, **fields))
        (message,) = self.out
        return message

    def append(self, *terms: int, at: int = 0, commit: int = 0, term: int = 9) -> Message:
        """Offer entries of these terms behind index ``at``, as a leader whose log fits ours."""
        log_term = self.follower._term_at(at) if at <= self.follower.state().last_index else term
        return self.answer(
            MessageType.APP,
            term=term,
            index=at,
            log_term=log_term,
            commit=commit,
            entries=[Entry(term=t, index=at + 1 + i, data=b"%d" % t) for i, t in enumerate(terms)],
        )

    def give(self, kind: MessageType, from_: int = PEER, **fields: Any) -> list[Message]:
        """Give it one message and return what it says to that."""
        self.out.clear()
        self.follower.process(Message(type=kind, to=US, from_=from_, **fields))
        return list(self.out)

    def hear(self, *messages: Message) -> list[Message]:
        """Give it messages that came together and return what it says to all of them."""
        self.out.clear()
        self.follower._hear(messages)
        return list(self.out)

    def tick(self, times: int) -> list[Message]:
        """Let time pass and return what it says meanwhile."""
        self.out.clear()
        for _ in range(times):
            self.follower.tick()
        return list(self.out)

    def lead(self) -> int:
        """Have it elected; its term."""
        self.tick(2 * CAMPAIGN_TICKS)
        term = self.follower.state().term + 1
        self.give(MessageType.PRE_VOTE_RESP, term=term)
        self.give(MessageType.VOTE_RESP, term=term)
        assert self.follower.state().role is Role.LEADER
        return term

    def terms(self) -> list[int]:
        state = self.follower.state()
        return [self.follower._term_at(i + 1) for i in range(state.last_index)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.follower.stop()


def test_a_poll_is_granted_without_moving_our_term(bench: Bench) -> None:
    answer = bench.answer(MessageType.PRE_VOTE, term=5)
    assert (answer.type, answer.term, answer.reject) == (MessageType.PRE_VOTE_RESP, 5, False)
    assert bench.follower.state().term == 0


def test_a_vote_moves_our_term_and_is_remembered(bench: Bench) -> None:
    answer = bench.answer(MessageType.VOTE, term=5)
    assert (answer.type, answer.term, answer.reject) == (MessageType.VOTE_RESP, 5, False)
    assert (bench.follower.state().term, bench.follower.state().vote) == (5, PEER)


@pytest.mark.parametrize("kind", [MessageType.PRE_VOTE, MessageType.VOTE])
@pytest.mark.parametrize(
    ("log_term", "index", "granted"),
    [(3, 2, True), (3, 1, False), (2, 7, False), (4, 1, True)],
    ids=["same log", "shorter log", "older last term", "newer last term"],
)
def test_only_a_log_as_good_as_ours_gets_our_vote(
    bench: Bench, kind: MessageType, log_term: int, index: int, granted: bool
) -> None:
    bench.append(2, 3)
    bench.tick(LEASE_TICKS)
    answer = bench.answer(kind, term=10, log_term=log_term, index=index)
    assert answer.reject is not granted


def test_an_append_that_does_not_fit_is_refused_with_a_hint(bench: Bench) -> None:
    bench.append(2, 2, 5)
    beyond = bench.answer(MessageType.APP, term=9, index=7, log_term=9)
    assert (beyond.reject, beyond.index, beyond.reject_hint, beyond.log_term) == (True, 7, 3, 5)
    # Nothing of a term above 3 can agree: the hint skips it.
    other_term = bench.answer(MessageType.APP, term=9, index=3, log_term=3)
    assert (other_term.reject, other_term.reject_hint, other_term.log_term) == (True, 2, 2)
    assert bench.terms() == [2, 2, 5]


def test_a_conflicting_tail_is_replaced_and_a_late_append_is_not_taken_for_one(
    bench: Bench,
) -> None:
    bench.append(2, 2, 3, 3)
    assert bench.append(4, at=2).index == 3
    assert bench.terms() == [2, 2, 4]
    assert bench.append(2, at=0).index == 1  # overtaken by the others
    assert bench.terms() == [2, 2, 4]


def test_commit_goes_no_further_than_what_the_append_vouches_for(bench: Bench) -> None:
    bench.append(2, 2, 2)
    bench.append(3, at=0, commit=3)
    assert bench.follower.state().commit == 1


def test_what_is_committed_is_never_taken_back(bench: Bench) -> None:
    bench.append(2, 2, 2, commit=3)
    assert bench.append(4, at=1, commit=3).index == 3
    assert bench.terms() == [2, 2, 2]


def test_a_heartbeat_is_answered_with_its_context(bench: Bench) -> None:
    answer = bench.answer(MessageType.HEARTBEAT, term=1, context=b"\x00\x01")
    assert (answer.type, answer.context) == (MessageType.HEARTBEAT_RESP, b"\x00\x01")


@pytest.mark.parametrize(
    ("kind", "answered"),
    [
        (MessageType.APP, MessageType.APP_RESP),
        (MessageType.HEARTBEAT, MessageType.APP_RESP),
        (MessageType.PRE_VOTE, MessageType.PRE_VOTE_RESP),
    ],
)
def test_an_old_term_is_told_of_ours(
    bench: Bench, kind: MessageType, answered: MessageType
) -> None:
    bench.answer(MessageType.VOTE, term=5)
    answer = bench.answer(kind, term=4)
    assert (answer.type, answer.term) == (answered, 5)


def test_a_snapshot_is_refused_so_that_the_sender_does_not_count_on_it(bench: Bench) -> None:
    with pytest.raises(RequestRejected) as refusal:
        bench.follower.process(Message(type=MessageType.SNAP, to=US, from_=PEER, term=1))
    assert refusal.value.status == 501


def test_a_snapshot_replaces_a_log_that_is_behind_it(bench: Bench) -> None:
    bench.follower.takes_snapshots = True
    bench.append(1, 1, 1, commit=1, term=5)
    snapshot = Snapshot(metadata=SnapshotMetadata(index=10, term=4))
    answer = bench.answer(MessageType.SNAP, term=5, snapshot=snapshot)
    assert (answer.type, answer.index, answer.reject) == (MessageType.APP_RESP, 10, False)
    state = bench.follower.state()
    assert (state.commit, state.last_index, state.leader) == (10, 10, PEER)
    assert bench.follower.committed() == []
    assert bench.append(5, 5, at=10, commit=12, term=5).index == 12
    assert [entry.term for entry in bench.follower.committed()] == [5, 5]
    # One that comes late changes nothing.
    snapshot = Snapshot(metadata=SnapshotMetadata(index=11, term=5))
    assert bench.answer(MessageType.SNAP, term=5, snapshot=snapshot).index == 12
    assert bench.follower.state().last_index == 12


def test_a_stranger_is_not_listened_to(bench: Bench) -> None:
    bench.follower.process(Message(type=MessageType.VOTE, to=US, from_=THIRD, term=5))
    assert bench.out == []
    assert bench.follower.state().term == 0


# Elections


@pytest.fixture
def three() -> Iterator[Bench]:
    """One of three."""
    bench = Bench(PEER, THIRD)
    yield bench
    bench.follower.stop()


def kinds(messages: list[Message]) -> list[tuple[MessageType | int, int, int]]:
    return [(message.type, message.to, message.term) for message in messages]


def test_who_hears_of_no_leader_asks_whether_it_would_be_elected_before_it_campaigns(
    three: Bench,
) -> None:
    assert three.tick(CAMPAIGN_TICKS - 1) == []
    asked = three.tick(CAMPAIGN_TICKS + 1)
    polls = [(MessageType.PRE_VOTE, PEER, 1), (MessageType.PRE_VOTE, THIRD, 1)]
    assert kinds(asked)[:2] == polls
    assert three.follower.state().term == 0
    campaign = three.give(MessageType.PRE_VOTE_RESP, THIRD, term=1)
    assert kinds(campaign) == [(MessageType.VOTE, PEER, 1), (MessageType.VOTE, THIRD, 1)]
    appends = three.give(MessageType.VOTE_RESP, THIRD, term=1)
    assert kinds(appends) == [(MessageType.APP, PEER, 1), (MessageType.APP, THIRD, 1)]
    assert three.follower.state().role is Role.LEADER
    assert three.give(MessageType.VOTE_RESP, PEER, term=1) == []  # one too many


def test_a_poll_that_two_of_three_refuse_changes_nothing(three: Bench) -> None:
    three.tick(2 * CAMPAIGN_TICKS)
    for voter in (PEER, THIRD):
        assert three.follower.state().role is Role.PRE_CANDIDATE
        three.give(MessageType.PRE_VOTE_RESP, voter, term=0, reject=True)
    assert three.follower.state().role is Role.FOLLOWER
    assert three.follower.state().term == 0


def test_a_no_of_one_who_knows_a_higher_term_moves_ours(three: Bench) -> None:
    three.tick(2 * CAMPAIGN_TICKS)
    three.give(MessageType.PRE_VOTE_RESP, term=7, reject=True)
    assert (three.follower.state().role, three.follower.state().term) == (Role.FOLLOWER, 7)


def test_a_leader_s_heartbeats_keep_us_from_campaigning(bench: Bench) -> None:
    for _ in range(4):
        assert bench.tick(CAMPAIGN_TICKS - 1) == []
        bench.give(MessageType.HEARTBEAT, term=1)


def test_campaigns_of_one_that_is_behind_do_not_keep_us_from_ours(three: Bench) -> None:
    """As an etcd 3.4 makes them, which does not poll first, every second."""
    three.append(1, 1, term=1)
    for term in range(2, 2 + 2 * CAMPAIGN_TICKS // LEASE_TICKS):
        said = three.tick(LEASE_TICKS)
        if any(message.type == MessageType.PRE_VOTE for message in said):
            break
        (answer,) = three.give(MessageType.VOTE, THIRD, term=term, index=1, log_term=1)
        assert answer.reject
    else:
        pytest.fail("never campaigned")


def test_who_does_not_campaign_waits_for_ever() -> None:
    follower = Follower(US, PEER, campaigns=False)
    out: list[Message] = []
    follower.start(out.extend, heartbeat_interval_s=3600.0)
    try:
        for _ in range(10 * CAMPAIGN_TICKS):
            follower.tick()
        assert out == []
    finally:
        follower.stop()


@pytest.mark.parametrize("kind", [MessageType.PRE_VOTE, MessageType.VOTE])
def test_nobody_is_voted_for_while_a_leader_is_heard_of(three: Bench, kind: MessageType) -> None:
    three.give(MessageType.HEARTBEAT, term=1)
    three.tick(LEASE_TICKS - 1)
    candidate = {"term": 2, "index": 0, "log_term": 0}
    assert three.give(kind, THIRD, **candidate) == []
    assert three.follower.state().term == 1
    three.tick(1)
    (answer,) = three.give(kind, THIRD, **candidate)
    assert not answer.reject


def test_a_leader_does_not_vote_for_another_either(three: Bench) -> None:
    term = three.lead()
    three.tick(LEASE_TICKS - 1)
    assert three.give(MessageType.VOTE, THIRD, term=term + 1, index=9, log_term=term) == []


def test_who_is_handed_the_leadership_is_voted_for_at_once(three: Bench) -> None:
    three.give(MessageType.HEARTBEAT, term=1)
    (answer,) = three.give(MessageType.VOTE, THIRD, term=2, context=b"CampaignTransfer")
    assert (answer.type, answer.reject) == (MessageType.VOTE_RESP, False)


def test_a_leader_that_hears_of_no_majority_steps_down(three: Bench) -> None:
    three.lead()
    three.tick(LEASE_TICKS)  # they have just voted
    for _ in range(3):
        assert three.follower.state().role is Role.LEADER
        three.give(MessageType.HEARTBEAT_RESP, THIRD, term=1)
        three.tick(LEASE_TICKS)
    three.tick(LEASE_TICKS)
    assert three.follower.state().role is Role.FOLLOWER


# Leading three


def test_two_of_three_commit_and_the_third_is_told(three: Bench) -> None:
    term = three.lead()
    assert three.follower.propose(b"data")
    assert three.follower.state().commit == 0
    told = three.give(MessageType.APP_RESP, THIRD, term=term, index=1)
    assert three.follower.state().commit == 1
    assert [(m.to, m.commit) for m in told] == [(THIRD, 1)]  # PEER's append is on its way
    told = three.give(MessageType.APP_RESP, THIRD, term=term, index=2)
    assert three.follower.state().commit == 2
    three.follower.report_unreachable(PEER)
    (again,) = three.give(MessageType.HEARTBEAT_RESP, PEER, term=term)
    assert (again.to, again.index, again.commit) == (PEER, 0, 2)
    assert len(again.entries) == 2


def test_entries_of_an_older_term_are_not_committed_by_counting_them(three: Bench) -> None:
    """Raft 5.4.2: a majority may hold them, and another leader may still replace them."""
    three.append(1, 1, term=1)
    term = three.lead()
    three.give(MessageType.APP_RESP, THIRD, term=term, index=2)
    assert three.follower.state().commit == 0
    three.give(MessageType.APP_RESP, THIRD, term=term, index=3)
    assert three.follower.state().commit == 3


def test_who_does_not_lead_proposes_nothing(three: Bench) -> None:
    assert not three.follower.propose(b"data")
    assert three.follower.state().last_index == 0


def test_the_leadership_is_handed_to_one_that_holds_the_whole_log(three: Bench) -> None:
    term = three.lead()
    assert not three.follower.transfer_leadership()
    three.give(MessageType.APP_RESP, THIRD, term=term, index=1)
    assert not three.follower.transfer_leadership(PEER)
    three.out.clear()
    assert three.follower.transfer_leadership()
    assert kinds(three.out) == [(MessageType.TIMEOUT_NOW, THIRD, term)]


def test_who_needs_a_snapshot_makes_us_hand_over_to_one_that_sends_them(three: Bench) -> None:
    three.follower.takes_snapshots = True
    snapshot = Snapshot(metadata=SnapshotMetadata(index=10, term=4))
    three.give(MessageType.SNAP, term=4, snapshot=snapshot)
    term = three.lead()
    reject = {"term": term, "index": 10, "reject": True, "reject_hint": 3}
    assert three.give(MessageType.APP_RESP, PEER, **reject) == []
    three.give(MessageType.APP_RESP, THIRD, term=term, index=11)
    told = three.give(MessageType.HEARTBEAT_RESP, PEER, term=term)
    assert kinds(told) == [(MessageType.TIMEOUT_NOW, THIRD, term)]


def read_index(three: Bench, context: bytes, from_: int = PEER) -> list[Message]:
    return three.give(MessageType.READ_INDEX, from_, entries=[Entry(data=context)])


def test_a_read_waits_until_a_majority_says_that_we_lead(three: Bench) -> None:
    term = three.lead()
    assert read_index(three, b"early") == []  # nothing of our term is committed
    three.give(MessageType.APP_RESP, THIRD, term=term, index=1)
    asked = read_index(three, b"one")
    assert [(m.type, m.to, m.context) for m in asked] == [
        (MessageType.HEARTBEAT, PEER, b"one"),
        (MessageType.HEARTBEAT, THIRD, b"one"),
    ]
    read_index(three, b"two", THIRD)
    read_index(three, b"three")
    # What confirms a read confirms those before it.
    told = three.give(MessageType.HEARTBEAT_RESP, THIRD, term=term, context=b"two")
    answers = [m for m in told if m.type == MessageType.READ_INDEX_RESP]
    assert [(m.to, m.index, m.entries[0].data) for m in answers] == [
        (PEER, 1, b"one"),
        (THIRD, 1, b"two"),
    ]
    told = three.give(MessageType.HEARTBEAT_RESP, THIRD, term=term, context=b"one")
    assert [m for m in told if m.type == MessageType.READ_INDEX_RESP] == []


def test_one_of_five_is_no_majority() -> None:
    bench = Bench(2, 3, 4, 5)
    try:
        bench.tick(2 * CAMPAIGN_TICKS)
        term = bench.follower.state().term + 1
        for kind in (MessageType.PRE_VOTE_RESP, MessageType.VOTE_RESP):
            for voter in (2, 3):
                assert bench.follower.state().role is not Role.LEADER
                bench.give(kind, voter, term=term)
        assert bench.follower.state().role is Role.LEADER
        bench.give(MessageType.APP_RESP, 2, term=term, index=1)
        assert bench.follower.state().commit == 0
        bench.give(MessageType.APP_RESP, 3, term=term, index=1)
        assert bench.follower.state().commit == 1
        read_index(bench, b"read")
        confirm = {"term": term, "context": b"read"}
        for _ in range(2):
            told = bench.give(MessageType.HEARTBEAT_RESP, 5, **confirm)
            assert MessageType.READ_INDEX_RESP not in [m.type for m in told]
        told = bench.give(MessageType.HEARTBEAT_RESP, 4, **confirm)
        assert MessageType.READ_INDEX_RESP in [m.type for m in told]
    finally:
        bench.follower.stop()


def test_reads_of_a_leader_that_was_replaced_are_never_answered(three: Bench) -> None:
    term = three.lead()
    three.give(MessageType.APP_RESP, THIRD, term=term, index=1)
    read_index(three, b"read")
    three.give(MessageType.HEARTBEAT, PEER, term=term + 1)
    assert three.give(MessageType.HEARTBEAT_RESP, THIRD, term=term + 1, context=b"read") == []


# Storage


def test_a_member_goes_on_with_what_it_had_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Storage(path) as storage:
        bench = Bench(storage=storage)
        bench.append(2, 2, 3, 3, commit=2)
        bench.append(4, at=2)
        bench.tick(LEASE_TICKS)
        bench.answer(MessageType.VOTE, term=10, index=9, log_term=9)
        before = bench.follower.state()
        bench.follower.stop()
    with Storage(path) as storage:
        again = Follower(US, PEER, storage=storage)
    state = again.state()
    assert (state.term, state.vote, state.last_index) == (10, PEER, before.last_index)
    assert [entry.data for entry in storage.entries] == [b"2", b"2", b"4"]
    assert [again._term_at(i) for i in (1, 2, 3)] == [2, 2, 4]
    assert state.commit == 0  # the leader says anew what is committed


def test_a_vote_in_a_term_that_we_know_is_on_disk(tmp_path: Path) -> None:
    with Storage(tmp_path / "log") as storage:
        bench = Bench(storage=storage)
        bench.give(MessageType.HEARTBEAT_RESP, term=7)
        bench.answer(MessageType.VOTE, term=7)
        bench.follower.stop()
    with Storage(tmp_path / "log") as storage:
        assert (storage.term, storage.vote) == (7, PEER)


def test_a_snapshot_stands_for_the_log_on_disk_as_well(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Storage(path) as storage:
        bench = Bench(storage=storage)
        bench.follower.takes_snapshots = True
        bench.append(1, 1, 1, term=5)
        snapshot = Snapshot(metadata=SnapshotMetadata(index=10, term=4))
        bench.answer(MessageType.SNAP, term=5, snapshot=snapshot)
        bench.append(5, 5, at=10, commit=12, term=5)
        bench.follower.stop()
    with Storage(path) as storage:
        state = Follower(US, PEER, storage=storage).state()
    assert (state.snapshot_index, state.commit, state.last_index) == (10, 10, 12)


def test_nothing_is_said_of_what_is_not_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "log"
    on_disk: list[tuple[int, int, int]] = []

    def send(messages: list[Message]) -> None:
        with Storage(path) as seen:
            on_disk.append((seen.term, seen.vote, len(seen.entries)))

    with Storage(path) as storage:
        follower = Follower(US, PEER, storage=storage)
        follower.start(send, heartbeat_interval_s=3600.0)
        try:
            entry = Entry(term=1, index=1, data=b"x")
            follower.process(
                Message(type=MessageType.APP, to=US, from_=PEER, term=1, entries=[entry])
            )
            for _ in range(2 * CAMPAIGN_TICKS):
                follower.tick()
            follower.process(Message(type=MessageType.PRE_VOTE_RESP, to=US, from_=PEER, term=2))
            follower.process(Message(type=MessageType.VOTE_RESP, to=US, from_=PEER, term=2))
        finally:
            follower.stop()
    assert on_disk[0] == (1, 0, 1)
    assert on_disk[-2:] == [(2, US, 1), (2, US, 2)]


def append_of(index: int, term: int = 1, **fields: Any) -> Message:
    """One entry behind ``index``."""
    entry = Entry(term=term, index=index + 1, data=b"x")
    fields = {"log_term": term if index else 0, "from_": PEER, **fields}
    return Message(type=MessageType.APP, to=US, term=term, index=index, entries=[entry], **fields)


def test_appends_that_come_together_are_acknowledged_once_with_the_furthest(bench: Bench) -> None:
    (answer,) = bench.hear(append_of(0), append_of(1), append_of(2, commit=2))
    assert (answer.type, answer.index, answer.reject) == (MessageType.APP_RESP, 3, False)
    assert (bench.follower.state().last_index, bench.follower.state().commit) == (3, 2)
    assert bench.follower.received[MessageType.APP] == 3


def test_an_append_that_comes_twice_takes_nothing_back_of_what_is_acknowledged(
    bench: Bench,
) -> None:
    (answer,) = bench.hear(append_of(0), append_of(1, commit=1), append_of(0))
    assert answer.index == 2


def test_a_rejection_between_acknowledgements_is_told_and_in_its_place(bench: Bench) -> None:
    answers = bench.hear(append_of(0), append_of(5), append_of(1), append_of(2))
    assert [(each.index, each.reject) for each in answers] == [(1, False), (5, True), (3, False)]


def test_each_heartbeat_is_answered_with_its_own_context(bench: Bench) -> None:
    beats = [
        Message(type=MessageType.HEARTBEAT, to=US, from_=PEER, term=1, context=context)
        for context in (b"a", b"b")
    ]
    answers = bench.hear(append_of(0), *beats, append_of(1))
    assert [each.type for each in answers] == [
        MessageType.APP_RESP,
        MessageType.HEARTBEAT_RESP,
        MessageType.HEARTBEAT_RESP,
        MessageType.APP_RESP,
    ]
    assert [each.context for each in answers[1:3]] == [b"a", b"b"]


def test_what_a_new_leader_is_told_is_not_what_the_old_one_was(three: Bench) -> None:
    newer = append_of(1, term=2, log_term=1, from_=THIRD)
    old, new = three.hear(append_of(0), newer)
    assert [(each.to, each.term, each.index) for each in (old, new)] == [
        (PEER, 1, 1),
        (THIRD, 2, 2),
    ]


def test_with_an_inbox_a_snapshot_that_cannot_be_stored_is_ignored(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = Snapshot(metadata=SnapshotMetadata(index=7, term=1))
    message = Message(type=MessageType.SNAP, to=US, from_=PEER, term=1, snapshot=snapshot)
    assert bench.hear(message) == []
    assert bench.follower.state().commit == 0
    assert "ignored a snapshot" in caplog.text


def test_with_an_inbox_one_thread_takes_what_comes_and_lets_time_pass() -> None:
    inbox: Inbox[Message] = Inbox()
    follower, answers = Follower(US, PEER), Inbox()
    config = TransportConfig(probe_interval_s=0)
    with (
        Transport(US, 9, follower, config=config, inbox=inbox) as ours,
        Transport(PEER, 9, QuietReports(), config=config, inbox=answers) as theirs,
    ):
        ours.add_peer(PEER, [theirs.listen("http://127.0.0.1:0").url])
        theirs.add_peer(US, [ours.listen("http://127.0.0.1:0").url])
        follower.start(ours.send, heartbeat_interval_s=0.01, inbox=inbox)
        for index in range(2):  # one after the other, for posts may overtake one another
            theirs.send([append_of(index)])
            assert follower.wait_for(lambda state, last=index + 1: state.last_index == last, 30.0)
        said: list[Message] = []
        while not any(each.type == MessageType.PRE_VOTE for each in said):  # for want of a leader
            said += answers.take(timeout=30.0)
        assert max(each.index for each in said if each.type == MessageType.APP_RESP) == 2
        follower.stop()


@pytest.mark.parametrize("cut", [1, 9, 20])
def test_what_a_crash_has_cut_short_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log"
    with Storage(path) as storage:
        storage.save(1, 2, [Entry(term=1, index=1, data=b"whole")])
        storage.save(3, 2, [Entry(term=3, index=2, data=b"cut")])
    path.write_bytes(path.read_bytes()[:-cut])
    with Storage(path) as storage:
        assert (storage.term, [e.data for e in storage.entries]) == (3, [b"whole"])
        storage.save(4, 0, [Entry(term=4, index=2)])
    with Storage(path) as storage:
        assert [e.data for e in storage.entries] == [b"whole", None]
        assert storage.term == 4


def test_a_record_that_was_damaged_ends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Storage(path) as storage:
        storage.save(1, 2, [Entry(term=1, index=1, data=b"whole")])
        size = path.stat().st_size
        storage.save(1, 2, [Entry(term=1, index=2, data=b"damaged")])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with Storage(path) as storage:
        assert [e.data for e in storage.entries] == [b"whole"]
    assert path.stat().st_size > size  # its term and vote, written again, are whole


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_members_agree_over_a_network_that_loses_and_reorders(
    seed: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to messages, and whoever dies: no committed entry ever changes, no two lead
    in one term, and the logs end equal."""
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)  # members die here, machines do not
    random.seed(seed)  # the members' patience is by chance as well
    cluster = Lossy(random.Random(seed), range(1, count + 1), tmp_path)
    try:
        for step in range(1000 * count):
            cluster.disturb(step)
        cluster.settle()
    finally:
        cluster.close()
    assert len(cluster.seen) > 10


class Lossy:
    """Members whose messages and lives are in the hands of chance."""

    def __init__(self, dice: random.Random, ids: range, directory: Path) -> None:
        self.dice = dice
        self.ids = ids
        self.directory = directory
        self.network: list[Message] = []
        self.seen: dict[int, bytes | None] = {}  # index to data, of everything ever committed
        self.leaders: dict[int, int] = {}  # term to who leads in it
        self.storages: dict[int, Storage] = {}
        self.members: dict[int, Follower] = {}
        for member_id in ids:
            self.start(member_id)

    def start(self, member_id: int) -> None:
        self.storages[member_id] = storage = Storage(self.directory / str(member_id))
        peers = [peer_id for peer_id in self.ids if peer_id != member_id]
        self.members[member_id] = member = Follower(member_id, *peers, storage=storage)
        member.start(self.network.extend, heartbeat_interval_s=3600.0)

    def stop(self, member_id: int) -> None:
        self.members.pop(member_id).stop()
        self.storages.pop(member_id).close()

    def close(self) -> None:
        for member_id in list(self.members):
            self.stop(member_id)

    def check(self) -> None:
        for member in self.members.values():
            for entry in member.committed():
                assert self.seen.setdefault(entry.index, entry.data) == entry.data
            state = member.state()
            if state.role is Role.LEADER:
                assert self.leaders.setdefault(state.term, member.member_id) == member.member_id

    def deliver(self, loss: float) -> None:
        message = self.network.pop(self.dice.randrange(len(self.network)))
        if self.dice.random() >= loss:
            self.members[message.to].process(message)
        self.check()

    def disturb(self, step: int) -> None:
        member = self.dice.choice(list(self.members.values()))
        chance = self.dice.random()
        if chance < 0.15:
            member.propose(b"%d" % step)
        elif chance < 0.17:
            member.transfer_leadership()
        elif chance < 0.18:
            self.stop(member.member_id)
            self.start(member.member_id)
        elif chance < 0.3:
            member.tick()
        elif chance < 0.32:
            for _ in range(2 * CAMPAIGN_TICKS):
                member.tick()
        for _ in range(len(self.ids)):
            if self.network:
                self.deliver(loss=0.2)

    def settle(self) -> None:
        def is_settled() -> bool:
            states = [member.state() for member in self.members.values()]
            return (
                len({(state.term, state.commit, state.last_index) for state in states}) == 1
                and states[0].commit == states[0].last_index
                and [state.role for state in states].count(Role.LEADER) == 1
            )

        for _ in range(100 * CAMPAIGN_TICKS):
            while self.network:
                self.deliver(loss=0.0)
            if is_settled():
                return
            for member in list(self.members.values()):
                member.tick()
                while self.network:
                    self.deliver(loss=0.0)
        pytest.fail(f"not settled: {[member.state() for member in self.members.values()]}")
