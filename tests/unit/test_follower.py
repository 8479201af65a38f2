"""The example member's rules (etcd ``raft.go``): the interop tests lean on them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline import (
    Entry,
    Message,
    MessageType,
    RequestRejected,
    Snapshot,
    SnapshotMetadata,
)
from pipeline.examples.follower import Follower, Role

US, PEER = 1, 2


class Bench:
    """A member whose messages stay on the bench."""

    def __init__(self, member: int = US, peer: int = PEER) -> None:
        self.follower = Follower(member, peer)
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
    bench.follower.process(Message(type=MessageType.VOTE, to=US, from_=3, term=5))
    assert bench.out == []
    assert bench.follower.state().term == 0


@pytest.mark.parametrize("seed", range(20))
def test_two_members_agree_over_a_network_that_loses_and_reorders(seed: int) -> None:
    """Whatever happens to messages: no committed entry ever changes, and the logs end equal."""
    dice = random.Random(seed)
    network: list[Message] = []
    members = {US: Follower(US, PEER), PEER: Follower(PEER, US)}
    seen: dict[int, bytes | None] = {}  # index to data, of everything ever committed

    def check() -> None:
        for member in members.values():
            for index, entry in enumerate(member.committed(), 1):
                assert seen.setdefault(index, entry.data) == entry.data

    def deliver(loss: float) -> None:
        message = network.pop(dice.randrange(len(network)))
        if dice.random() >= loss:
            members[message.to].process(message)
        check()

    def leader() -> Follower | None:
        leading = [m for m in members.values() if m.state().role is Role.LEADER]
        return max(leading, key=lambda m: m.state().term, default=None)

    def make_somebody_lead() -> None:
        term = max(m.state().term for m in members.values())
        chosen = members[dice.choice([US, PEER])]
        chosen.process(
            Message(
                type=MessageType.TIMEOUT_NOW,
                to=chosen.member_id,
                from_=chosen.peer_id,
                term=term,
            )
        )

    for member in members.values():
        member.start(network.extend, heartbeat_interval_s=3600.0)
    try:
        for step in range(600):
            if (at_top := leader()) is None and dice.random() < 0.1:
                make_somebody_lead()
            elif at_top and dice.random() < 0.2:
                data = b"%d" % step
                at_top.process(
                    Message(
                        type=MessageType.PROP,
                        to=at_top.member_id,
                        from_=at_top.peer_id,
                        entries=[Entry(data=data)],
                    )
                )
            elif at_top and dice.random() < 0.1:
                dice.choice([at_top.tick, at_top.transfer_leadership, make_somebody_lead])()
            if network:
                deliver(loss=0.2)

        def settled() -> bool:
            a, b = (m.state() for m in members.values())
            return a.commit == a.last_index == b.commit == b.last_index and leader() is not None

        for _ in range(1000):
            while network:
                deliver(loss=0.0)
            if settled():
                break
            (at_top := leader()) and at_top.tick()
            if not network:
                make_somebody_lead()
        assert settled()
        assert len(seen) > 10
    finally:
        for member in members.values():
            member.stop()
