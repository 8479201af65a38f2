"""The other member of a two-member cluster: what the demo and the interop tests run beside etcd.

Example code that shows how a node uses a Transport; **not a Raft implementation**. It keeps its
log in memory, knows exactly one peer, never campaigns of its own accord, sends no snapshot and
cannot change the membership. What it does follow etcd's ``raft.go`` in: votes, the log consistency
check, commit, taking a snapshot and, when the leader hands its leadership over, leading.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import Entry, Message, MessageType, RequestRejected, SnapshotStatus

__all__ = ["Follower", "Role", "State"]

logger = logging.getLogger(__name__)

#: etcd's default ``--heartbeat-interval``.
HEARTBEAT_INTERVAL_S = 0.1
#: Payload of one MsgApp; etcd ``maxSizePerMsg``. A larger entry travels alone.
MAX_APPEND_BYTES = 1 << 20
#: The context that makes etcd vote although its leader is alive; raft ``campaignTransfer``.
CAMPAIGN_TRANSFER = b"CampaignTransfer"

#: Messages that only a leader sends.
FROM_LEADER = {MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP}


class Role(enum.Enum):
    """What a member is in its term."""

    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class State:
    """Where a member stands at one instant. ``leader``, ``vote`` and ``snapshot_index`` (of the
    last entry that a snapshot stands for) are 0 when there is none."""

    role: Role
    term: int
    vote: int
    leader: int
    commit: int
    last_index: int
    snapshot_index: int


class Follower:
    """One member, its log in memory; implements ``pipeline.Raft``.

    State and log outlive a Transport, as they would on disk: ``stop``, replace it, ``start``.

    Parameters
    ----------
    member_id, peer_id : int
        This member and the only other one.
    takes_snapshots : bool
        Whether its Transport stores their databases (``ReceiverConfig.snapshot_dir``).

    Attributes
    ----------
    received, sent : Counter of int
        Messages, by type, taken from and handed to the Transport.
    unreachable : int
        How often the Transport reported that a message was not delivered.

    Notes
    -----
    Thread-safe: ``process`` is called from several threads at once, and messages arrive out of
    order. One lock guards all state; messages leave after it is released, so that nothing the
    Transport calls back into can wait for it.
    """

    def __init__(self, member_id: int, peer_id: int, *, takes_snapshots: bool = False) -> None:
        self.member_id = member_id
        self.peer_id = peer_id
        self.takes_snapshots = takes_snapshots
        self.received: Counter[int] = Counter()
        self.sent: Counter[int] = Counter()
        self.unreachable = 0

        self._changed = threading.Condition()  # guards everything below and the counters
        self._outbox: list[Message] = []
        self._send: Callable[[list[Message]], object] | None = None
        self._ticker: threading.Thread | None = None
        self._stopping = threading.Event()

        self._role = Role.FOLLOWER
        self._term = 0
        self._vote = 0
        self._leader = 0
        # Index and term of the last entry that a snapshot stands for; the entries behind it.
        self._base = 0
        self._base_term = 0
        self._log: list[Entry] = []  # the entry of index i is _log[i - 1 - _base]
        self._commit = 0

        # As leader, about the peer: the last index it is known to hold, the next one to send,
        # and whether an append is unanswered. One at a time keeps what leaves in order.
        self._match = 0
        self._next = 1
        self._in_flight = False

        self._handlers: dict[int, Callable[[Message], None]] = {
            MessageType.APP: self._on_append,
            MessageType.HEARTBEAT: self._on_heartbeat,
            MessageType.SNAP: self._on_snapshot,
            MessageType.PRE_VOTE: self._on_vote,
            MessageType.VOTE: self._on_vote,
            MessageType.TIMEOUT_NOW: self._on_timeout_now,
            MessageType.VOTE_RESP: self._on_vote_resp,
            MessageType.APP_RESP: self._on_append_resp,
            MessageType.HEARTBEAT_RESP: self._on_heartbeat_resp,
            MessageType.PROP: self._on_propose,
            MessageType.READ_INDEX: self._on_read_index,
        }

    # Life and what others may see of it.

    def start(
        self,
        send: Callable[[list[Message]], object],
        heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        """Give messages to ``send`` (``Transport.send``) from now on."""
        with self._changed:
            self._send = send
        self._stopping.clear()
        self._ticker = threading.Thread(
            target=self._tick_until_stopped, args=(heartbeat_interval_s,), name="follower-tick"
        )
        self._ticker.start()

    def stop(self) -> None:
        """Stop sending. State and log stay."""
        self._stopping.set()
        if self._ticker is not None:
            self._ticker.join()
            self._ticker = None
        with self._changed:
            self._send = None

    def state(self) -> State:
        """Return where this member stands."""
        with self._changed:
            return self._state()

    def committed(self) -> list[Entry]:
        """Return the entries that are committed, from index 1 or from behind the snapshot."""
        with self._changed:
            return self._log[: self._commit - self._base]

    def wait_for(self, condition: Callable[[State], bool], timeout_s: float) -> bool:
        """Block until ``condition`` holds; False if it does not within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self._state()), timeout_s)

    def transfer_leadership(self) -> bool:
        """Ask the peer to campaign at once; False unless we lead and it holds our whole log."""
        with self._changed:
            if self._role is not Role.LEADER or self._match != self._last:
                return False
            self._emit(MessageType.TIMEOUT_NOW)
            send, messages = self._take_outbox()
        self._deliver(send, messages)
        return True

    def tick(self) -> None:
        """Send a heartbeat if we lead: it keeps the peer from campaigning, and from its answer
        we learn that an append was lost."""
        with self._changed:
            if self._role is Role.LEADER:
                self._emit(MessageType.HEARTBEAT, commit=min(self._match, self._commit))
            send, messages = self._take_outbox()
        self._deliver(send, messages)

    def _tick_until_stopped(self, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            self.tick()

    # pipeline.Raft

    def process(self, message: Message) -> None:
        """Take one message of the peer. Raises RequestRejected for a snapshot it does not take."""
        if message.type == MessageType.SNAP and not self.takes_snapshots:
            logger.warning("refused a snapshot: there is no directory for its database")
            raise RequestRejected(501, b"this example member takes no snapshots\n")
        with self._changed:
            self.received[message.type] += 1
            if message.from_ == self.peer_id:
                self._step(message)
            send, messages = self._take_outbox()
            self._changed.notify_all()
        self._deliver(send, messages)

    def is_id_removed(self, member_id: int) -> bool:
        """Nobody is ever removed from this cluster."""
        return False

    def report_unreachable(self, member_id: int) -> None:
        """An append may be lost: send again at the next occasion."""
        with self._changed:
            self.unreachable += 1
            self._in_flight = False

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        """Never called: no snapshot is ever sent."""

    # From here on the lock is held.

    def _state(self) -> State:
        return State(
            self._role,
            self._term,
            self._vote,
            self._leader,
            self._commit,
            self._last,
            self._base,
        )

    @property
    def _last(self) -> int:
        return self._base + len(self._log)

    def _term_at(self, index: int) -> int:
        return self._log[index - 1 - self._base].term if index > self._base else self._base_term

    def _emit(self, kind: MessageType, *, term: int | None = None, **fields: Any) -> None:
        message = Message(
            type=kind,
            to=self.peer_id,
            from_=self.member_id,
            term=self._term if term is None else term,
            **fields,
        )
        self._outbox.append(message)

    def _take_outbox(self) -> tuple[Callable[[list[Message]], object] | None, list[Message]]:
        messages, self._outbox = self._outbox, []
        if self._send is not None:
            self.sent.update(message.type for message in messages)
        return self._send, messages

    @staticmethod
    def _deliver(send: Callable[[list[Message]], object] | None, messages: list[Message]) -> None:
        """Without the lock. Answers to messages that arrive while stopped are lost."""
        if send is not None and messages:
            send(messages)

    def _become_follower(self, term: int, leader: int) -> None:
        if term > self._term:
            self._term = term
            self._vote = 0
        self._role = Role.FOLLOWER
        self._leader = leader

    def _step(self, message: Message) -> None:
        """Terms first, then the message; raft.go ``Step``. Prop and ReadIndex carry no term."""
        if message.term > self._term:
            # A vote that is only a poll does not move anybody's term.
            if message.type != MessageType.PRE_VOTE:
                leader = message.from_ if message.type in FROM_LEADER else 0
                self._become_follower(message.term, leader)
        elif 0 < message.term < self._term:
            # A leader of an old term must hear of ours, or it would go on for ever.
            if message.type in FROM_LEADER:
                self._emit(MessageType.APP_RESP)
            elif message.type == MessageType.PRE_VOTE:
                self._emit(MessageType.PRE_VOTE_RESP, reject=True)
            return
        handler = self._handlers.get(message.type)
        if handler is not None:
            handler(message)

    # As follower.

    def _on_append(self, message: Message) -> None:
        self._become_follower(message.term, message.from_)
        last = self._last
        if message.index < self._commit:  # late: what it carries is known to be here
            self._emit(MessageType.APP_RESP, index=self._commit)
            return
        if message.index > last or self._term_at(message.index) != message.log_term:
            hint = min(message.index, last)
            while self._term_at(hint) > message.log_term:
                hint -= 1
            self._emit(
                MessageType.APP_RESP,
                index=message.index,
                reject=True,
                reject_hint=hint,
                log_term=self._term_at(hint),
            )
            return
        for index, entry in enumerate(message.entries, message.index + 1):
            if index <= self._last:
                if self._term_at(index) == entry.term:
                    continue
                del self._log[index - 1 - self._base :]
            self._log.append(entry)
        last_new = message.index + len(message.entries)
        self._commit = max(self._commit, min(message.commit, last_new))
        self._emit(MessageType.APP_RESP, index=last_new)

    def _on_heartbeat(self, message: Message) -> None:
        self._become_follower(message.term, message.from_)
        self._commit = max(self._commit, min(message.commit, self._last))
        # etcd's linearizable reads wait for this context to come back.
        self._emit(MessageType.HEARTBEAT_RESP, context=message.context)

    def _on_snapshot(self, message: Message) -> None:
        """Go on from behind a snapshot; raft.go ``restore``. A node would now open the database
        (``Transport.snapshot_path``), which is in place."""
        self._become_follower(message.term, message.from_)
        assert message.snapshot is not None
        metadata = message.snapshot.metadata
        if metadata.index > self._commit:
            self._base, self._base_term = metadata.index, metadata.term
            self._log.clear()
            self._commit = metadata.index
        self._emit(MessageType.APP_RESP, index=self._commit)

    def _on_vote(self, message: Message) -> None:
        is_poll = message.type == MessageType.PRE_VOTE
        may_vote = (
            self._vote == message.from_
            or (not self._vote and not self._leader)
            or (is_poll and message.term > self._term)
        )
        last = self._last
        is_up_to_date = (message.log_term, message.index) >= (self._term_at(last), last)
        granted = may_vote and is_up_to_date
        if granted and not is_poll:
            self._vote = message.from_
        self._emit(
            MessageType.PRE_VOTE_RESP if is_poll else MessageType.VOTE_RESP,
            term=message.term if granted else self._term,
            reject=not granted,
        )

    def _on_timeout_now(self, message: Message) -> None:
        """The leader hands over: campaign in the next term. A lost MsgVote is not repeated;
        the old leader gives up waiting and the next election is at a higher term."""
        if self._role is not Role.FOLLOWER:
            return
        self._role = Role.CANDIDATE
        self._term += 1
        self._vote = self.member_id
        self._leader = 0
        last = self._last
        self._emit(
            MessageType.VOTE,
            index=last,
            log_term=self._term_at(last),
            context=CAMPAIGN_TRANSFER,
        )

    # As candidate and leader.

    def _on_vote_resp(self, message: Message) -> None:
        if self._role is not Role.CANDIDATE or message.reject:
            return
        self._role = Role.LEADER
        self._leader = self.member_id
        self._match = 0
        self._next = self._last + 1
        self._in_flight = False
        # Only an entry of its own term lets a leader commit those before it (Raft 5.4.2).
        self._append([Entry()])

    def _append(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._log.append(
                Entry(term=self._term, index=self._last + 1, type=entry.type, data=entry.data)
            )
        if not self._in_flight:
            self._send_append()

    def _send_append(self) -> None:
        size = 0
        entries: list[Entry] = []
        for entry in self._log[self._next - 1 - self._base :]:
            size += memoryview(entry.data or b"").nbytes
            if entries and size > MAX_APPEND_BYTES:
                break
            entries.append(entry)
        self._emit(
            MessageType.APP,
            index=self._next - 1,
            log_term=self._term_at(self._next - 1),
            entries=entries,
            commit=self._commit,
        )
        self._in_flight = bool(entries)

    def _on_append_resp(self, message: Message) -> None:
        if self._role is not Role.LEADER:
            return
        self._in_flight = False
        if message.reject:
            if message.index > self._match:  # else: an answer that was overtaken
                self._next = max(self._match + 1, min(message.index, message.reject_hint + 1))
                self._send_append()
            return
        self._match = max(self._match, message.index)
        self._next = self._match + 1
        may_commit = self._match > self._commit and self._term_at(self._match) == self._term
        if may_commit:
            self._commit = self._match
        if may_commit or self._match < self._last:
            self._send_append()

    def _on_heartbeat_resp(self, message: Message) -> None:
        if self._role is Role.LEADER and self._match < self._last:
            self._send_append()

    def _on_propose(self, message: Message) -> None:
        """Proposals that reach us while we do not lead are dropped; etcd's clients time out."""
        if self._role is Role.LEADER:
            self._append(list(message.entries))

    def _on_read_index(self, message: Message) -> None:
        """Answer at once: of two members none can lead without our vote, so we know that we
        do. Before an entry of our term is committed, drop it: etcd asks again after 500 ms."""
        if self._role is Role.LEADER and self._term_at(self._commit) == self._term:
            self._emit(
                MessageType.READ_INDEX_RESP, index=self._commit, entries=list(message.entries)
            )
