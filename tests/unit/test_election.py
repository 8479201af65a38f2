"""``examples/election.py``: at most one leads in a term, whatever becomes of messages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline import Message, MessageType
from pipeline.examples.election import ELECTION_S, HEARTBEAT_S, Election
from pipeline.examples.storage import Storage

#: Later than any member waits.
LATER = 3 * ELECTION_S


@pytest.fixture
def storages(tmp_path: Path) -> Iterator[dict[int, Storage]]:
    with ExitStack() as stack:
        yield {n: stack.enter_context(Storage(tmp_path / f"{n}.log")) for n in (1, 2, 3)}


def make(storages: dict[int, Storage], member_id: int, now: float = 0.0) -> Election:
    storage = storages[member_id]
    return Election(member_id, storages.keys() - {member_id}, storage, now, lambda line: None)


def vote(from_: int, term: int) -> Message:
    return Message(type=MessageType.VOTE, to=1, from_=from_, term=term)


def answers(messages: list[Message]) -> list[tuple[int, bool]]:
    return [(message.to, message.reject) for message in messages]


def test_a_majority_elects_and_a_minority_does_not(storages: dict[int, Storage]) -> None:
    one = make(storages, 1)
    asked = one.tick(LATER)
    assert {(message.type, message.to, message.term) for message in asked} == {
        (MessageType.VOTE, 2, 1),
        (MessageType.VOTE, 3, 1),
    }
    assert one.leader == 0
    refusal = Message(type=MessageType.VOTE_RESP, to=1, from_=2, term=1, reject=True)
    assert one.step(refusal, LATER) == []
    assert one.leader == 0
    grant = Message(type=MessageType.VOTE_RESP, to=1, from_=3, term=1)
    beats = one.step(grant, LATER)
    assert one.leader == 1
    assert {(beat.type, beat.to) for beat in beats} == {
        (MessageType.HEARTBEAT, 2),
        (MessageType.HEARTBEAT, 3),
    }
    assert one.due == LATER + HEARTBEAT_S


def test_a_member_votes_once_in_a_term_also_when_it_comes_back(
    storages: dict[int, Storage], tmp_path: Path
) -> None:
    one = make(storages, 1)
    assert answers(one.step(vote(2, 5), 0.0)) == [(2, False)]
    assert answers(one.step(vote(2, 5), 0.0)) == [(2, False)]  # it was asked twice
    assert answers(one.step(vote(3, 5), 0.0)) == [(3, True)]
    with Storage(tmp_path / "1.log") as storage:
        back = make({**storages, 1: storage}, 1)
        assert answers(back.step(vote(3, 5), 0.0)) == [(3, True)]
        assert answers(back.step(vote(3, 6), 0.0)) == [(3, False)]


def test_who_has_led_follows_when_it_hears_of_a_later_term(storages: dict[int, Storage]) -> None:
    one = make(storages, 1)
    one.tick(LATER)
    one.step(Message(type=MessageType.VOTE_RESP, to=1, from_=3, term=1), LATER)
    assert one.leader == 1
    (answer,) = one.step(Message(type=MessageType.HEARTBEAT, to=1, from_=2, term=2), LATER)
    assert (answer.type, answer.term) == (MessageType.HEARTBEAT_RESP, 2)
    assert one.leader == 2
    assert one.tick(LATER + HEARTBEAT_S) == []
    # And one that still believes so is told.
    (answer,) = one.step(Message(type=MessageType.HEARTBEAT, to=1, from_=3, term=1), LATER)
    assert answer.term == 2


@pytest.mark.parametrize("seed", range(5))
def test_no_two_lead_in_one_term(storages: dict[int, Storage], seed: int, tmp_path: Path) -> None:
    """Messages are lost, doubled and overtaken; members come back with what is in their files."""
    random.seed(seed)  # what members wait
    chance = random.Random(seed)
    members = {n: make(storages, n) for n in storages}
    on_the_way: list[Message] = []
    led: dict[int, set[int]] = {}
    now = 0.0
    for _ in range(1500):
        now += chance.uniform(0.0, 0.1)
        n = chance.choice(tuple(members))
        on_the_way += members[n].tick(now)
        chance.shuffle(on_the_way)
        for message in [on_the_way.pop() for _ in range(len(on_the_way) // 2)]:
            if chance.random() < 0.9:
                on_the_way += members[message.to].step(message, now)
            if chance.random() < 0.2:
                on_the_way.append(message)
        for member in members.values():
            if member.leader == member.id:
                led.setdefault(member.term, set()).add(member.id)
        if chance.random() < 0.02:
            storages[n].close()
            storages[n] = Storage(tmp_path / f"{n}.log")
            members[n] = make(storages, n, now)
    assert len(led) > 1
    assert all(len(leaders) == 1 for leaders in led.values())
