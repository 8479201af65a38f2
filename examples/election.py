"""An election, and nothing that waits: the core of ``selectors_node`` and ``trio_node``.

A third of Raft, as its paper has it (section 5.2): members vote for one of them in each term, and
who has a majority leads until it is no longer heard of. There is no log, so there is nothing to
replicate, and whoever asks may be elected. It is told the time and what has arrived, and returns
what is to be sent, so that any loop can drive it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from pipeline import Message, MessageType
from pipeline.examples.storage import Storage

__all__ = ["Election"]

#: Between two heartbeats of a leader.
HEARTBEAT_S = 0.1
#: Without a leader for so long, up to twice, a member asks to be elected.
ELECTION_S = 1.0


class Election:
    """One member.

    Parameters
    ----------
    member_id : int
    others : iterable of int
        The other members.
    storage : Storage
        Where term and vote are before any message tells of them: a member that comes back does not
        vote twice in a term.
    now : float
        Seconds, of a clock that does not go back; so are all times here.
    tell : callable
        Called with a line when something changes.

    Attributes
    ----------
    due : float
        When ``tick`` is to be called next; earlier does no harm.
    leader : int
        0 while nobody is known to lead.
    """

    def __init__(
        self,
        member_id: int,
        others: Iterable[int],
        storage: Storage,
        now: float,
        tell: Callable[[str], None],
    ) -> None:
        self.id, self.others = member_id, tuple(others)
        self.storage, self.tell = storage, tell
        self.term, self.vote = storage.term, storage.vote
        self.leader = 0
        self.votes = {member_id}
        self.due = now + ELECTION_S * (1 + random.random())

    def __str__(self) -> str:
        return f"member {self.id}: {self.leader or 'nobody'} leads in term {self.term}"

    def tick(self, now: float) -> list[Message]:
        """Do what is due; what is to be sent."""
        if now < self.due:
            return []
        if self.leader == self.id:
            self.due = now + HEARTBEAT_S
            return [self._message(to, MessageType.HEARTBEAT) for to in self.others]
        self._enter(self.term + 1, now, vote=self.id)
        self.votes = {self.id}
        return self._count(now) or [self._message(to, MessageType.VOTE) for to in self.others]

    def step(self, message: Message, now: float) -> list[Message]:
        """Take what another member has sent; what is to be sent."""
        if message.term > self.term:
            self._enter(message.term, now)
        match message.type:
            case MessageType.VOTE:
                is_granted = message.term == self.term and self.vote in (0, message.from_)
                if is_granted and not self.vote:
                    self._enter(self.term, now, vote=message.from_)
                return [self._message(message.from_, MessageType.VOTE_RESP, reject=not is_granted)]
            case MessageType.VOTE_RESP if message.term == self.term and not message.reject:
                self.votes.add(message.from_)
                return self._count(now)
            case MessageType.HEARTBEAT if message.term == self.term:
                self.due = now + ELECTION_S * (1 + random.random())
                self._follow(message.from_)
                return [self._message(message.from_, MessageType.HEARTBEAT_RESP)]
            case MessageType.HEARTBEAT:  # of one that has led: it learns so from our term
                return [self._message(message.from_, MessageType.HEARTBEAT_RESP)]
        return []

    def _count(self, now: float) -> list[Message]:
        """Lead, if a majority wants us to and we do not yet."""
        if self.leader == self.id or 2 * len(self.votes) <= len(self.others) + 1:
            return []
        self._follow(self.id)
        self.due = now
        return self.tick(now)

    def _enter(self, term: int, now: float, *, vote: int = 0) -> None:
        """Begin a term, or vote in it; written before anything is sent."""
        if term > self.term:
            self._follow(0)
        self.term, self.vote = term, vote
        self.storage.save(term, vote, ())
        self.due = now + ELECTION_S * (1 + random.random())

    def _follow(self, leader: int) -> None:
        if leader != self.leader:
            self.leader = leader
            if leader:
                self.tell(str(self))

    def _message(self, to: int, kind: MessageType, *, reject: bool = False) -> Message:
        return Message(type=kind, to=to, from_=self.id, term=self.term, reject=reject)
