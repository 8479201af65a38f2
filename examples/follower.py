"""A member of a small cluster: what the demo, the three nodes and the interop tests run.

Example code that shows how a node uses a Transport; **not a Raft implementation**. It keeps its
log in memory, and in a file only if it is given a :class:`~pipeline.examples.storage.Storage`,
sends no snapshot and cannot change the membership. What it does follow etcd's ``raft.go`` in:
polls and votes, the log consistency check, commit by a majority, linearizable reads, taking a
snapshot and handing over the leadership.
"""

from __future__ import annotations

import enum
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline import Entry, Inbox, Message, MessageType, RequestRejected, SnapshotStatus
from pipeline.examples.storage import Storage

__all__ = ["Follower", "Role", "State"]

logger = logging.getLogger(__name__)

#: etcd's default ``--heartbeat-interval``: what a tick is.
HEARTBEAT_INTERVAL_S = 0.1
#: A leader heard of within as many ticks is alive; etcd's default ``--election-timeout``.
LEASE_TICKS = 10
#: Without a leader for as many ticks, up to twice, a member campaigns. etcd does after 10 to 20,
#: so that it leads whenever it may: it has the clients.
CAMPAIGN_TICKS = 30
#: Payload of one MsgApp; etcd ``maxSizePerMsg``. A larger entry travels alone.
MAX_APPEND_BYTES = 1 << 20
#: Reads that wait for a majority; etcd asks again for one that is dropped.
MAX_READS = 1024
#: The context that makes etcd vote although its leader is alive; raft ``campaignTransfer``.
CAMPAIGN_TRANSFER = b"CampaignTransfer"

#: Messages that only a leader sends.
FROM_LEADER = {MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP}
#: Those of somebody who wants to lead.
FROM_CANDIDATE = {MessageType.PRE_VOTE, MessageType.VOTE}

Send = Callable[[list[Message]], object]


class Role(enum.Enum):
    """What a member is in its term. A pre-candidate has asked whether it would be voted for, which
    moves nobody's term."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
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


@dataclass(slots=True)
class Progress:
    """What a leader knows of one other member; etcd ``tracker.Progress``."""

    #: The last index it is known to hold, and the next one to send.
    match: int = 0
    next: int = 1
    #: Whether an append is unanswered. One at a time keeps what leaves in order.
    in_flight: bool = False
    #: Whether it has been heard of since the leader last looked.
    is_active: bool = True


@dataclass(slots=True)
class Read:
    """A linearizable read that waits until a majority has confirmed who leads."""

    message: Message
    index: int
    confirmed: set[int] = field(default_factory=set)


class Follower:
    """One member, its log in memory; implements ``pipeline.Raft``, and needs no more of it than
    ``pipeline.RaftReports`` when it takes from an inbox.

    State and log outlive a Transport, as they would on disk: ``stop``, replace it, ``start``.

    Parameters
    ----------
    member_id : int
    *peer_ids : int
        The other members.
    takes_snapshots : bool
        Whether its Transport stores their databases (``ReceiverConfig.snapshot_dir``).
    campaigns : bool
        False: it leads only if the leadership is handed to it.
    storage : Storage, optional
        A file that term, vote and log are in before any message tells of them. Without it a member
        that dies must not come back.

    Attributes
    ----------
    received, sent : Counter of int
        Messages, by type, taken from and handed to the Transport.
    unreachable : int
        How often the Transport reported that a message was not delivered.

    Notes
    -----
    Thread-safe. With an inbox one thread takes what has come, a batch at a time, and lets time
    pass; what all of a batch lead to is saved at once and leaves together. Without one ``process``
    is called from several threads at once, and what is posted arrives out of order. One lock
    guards all state; messages leave after it is released, so that nothing the Transport calls back
    into can wait for it.
    """

    def __init__(
        self,
        member_id: int,
        *peer_ids: int,
        takes_snapshots: bool = False,
        campaigns: bool = True,
        storage: Storage | None = None,
    ) -> None:
        self.member_id = member_id
        self.peer_ids = peer_ids
        self.takes_snapshots = takes_snapshots
        self.campaigns = campaigns
        self.received: Counter[int] = Counter()
        self.sent: Counter[int] = Counter()
        self.unreachable = 0

        self._changed = threading.Condition()  # guards everything below and the counters
        self._outbox: list[Message] = []
        self._send: Send | None = None
        self._thread: threading.Thread | None = None
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

        # Ticks since a leader was heard of, we voted or campaigned, and how many make us campaign.
        self._elapsed = 0
        self._patience = 0
        self._votes: dict[int, bool] = {}  # as candidate of either kind: who has answered what
        # As leader.
        self._progress = {peer_id: Progress() for peer_id in peer_ids}
        self._reads: dict[bytes, Read] = {}  # by context, in the order they came in

        self._storage = storage
        self._saved = (0, 0)  # term and vote as they are in the storage
        self._unsaved = 1  # the first index that is not there as it is here
        if storage is not None:
            self._term, self._vote = self._saved = storage.term, storage.vote
            self._base, self._base_term = storage.base, storage.base_term
            self._log = list(storage.entries)
            self._commit = self._base
            self._unsaved = self._last + 1
        self._reset_patience()

        self._handlers: dict[int, Callable[[Message], None]] = {
            MessageType.APP: self._on_append,
            MessageType.HEARTBEAT: self._on_heartbeat,
            MessageType.SNAP: self._on_snapshot,
            MessageType.PRE_VOTE: self._on_vote,
            MessageType.VOTE: self._on_vote,
            MessageType.TIMEOUT_NOW: self._on_timeout_now,
            MessageType.PRE_VOTE_RESP: self._on_vote_resp,
            MessageType.VOTE_RESP: self._on_vote_resp,
            MessageType.APP_RESP: self._on_append_resp,
            MessageType.HEARTBEAT_RESP: self._on_heartbeat_resp,
            MessageType.PROP: self._on_propose,
            MessageType.READ_INDEX: self._on_read_index,
        }

    # Life and what others may see of it.

    def start(
        self,
        send: Send,
        heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S,
        *,
        inbox: Inbox[Message] | None = None,
    ) -> None:
        """Give messages to ``send`` (``Transport.send``) from now on, and take those that come from
        the Transport's ``inbox``; by default it calls ``process`` with them."""
        with self._changed:
            self._send = send
            self._elapsed = 0
        self._stopping.clear()
        self._thread = threading.Thread(
            target=self._tick_until_stopped if inbox is None else self._take_until_stopped,
            args=(heartbeat_interval_s,) if inbox is None else (heartbeat_interval_s, inbox),
            name="follower",
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop sending. State and log stay."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
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

    def propose(self, *data: bytes) -> bool:
        """Append entries with this data, to be committed by a majority; False unless we lead."""
        with self._changed:
            if self._role is not Role.LEADER:
                return False
            self._append(Entry(data=d) for d in data)
            send, messages = self._leave()
        self._deliver(send, messages)
        return True

    def transfer_leadership(self, to: int | None = None) -> bool:
        """Ask a peer, any by default, to campaign at once; False unless we lead and it holds our
        whole log."""
        with self._changed:
            heirs = [
                peer_id
                for peer_id, progress in self._progress.items()
                if progress.match == self._last and to in (None, peer_id)
            ]
            if self._role is not Role.LEADER or not heirs:
                return False
            self._emit(MessageType.TIMEOUT_NOW, heirs[0])
            send, messages = self._leave()
        self._deliver(send, messages)
        return True

    def tick(self) -> None:
        """Let one heartbeat's time pass.

        A leader sends heartbeats: they keep others from campaigning, and from their answers it
        learns that an append was lost. Who hears of no leader campaigns in the end.
        """
        with self._changed:
            self._elapsed += 1
            if self._role is Role.LEADER:
                self._broadcast_heartbeat()
                if self._elapsed >= LEASE_TICKS:
                    self._check_quorum()
            elif self.campaigns and self._elapsed >= self._patience:
                self._campaign(Role.PRE_CANDIDATE)
            send, messages = self._leave()
        self._deliver(send, messages)

    def _tick_until_stopped(self, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            self.tick()

    def _take_until_stopped(self, interval_s: float, inbox: Inbox[Message]) -> None:
        next_tick = time.monotonic() + interval_s
        while not (self._stopping.is_set() or inbox.closed):
            self._hear(inbox.take(timeout=max(0.0, next_tick - time.monotonic())))
            if time.monotonic() >= next_tick:
                self.tick()
                next_tick = time.monotonic() + interval_s

    def _hear(self, messages: Iterable[Message]) -> None:
        """Take messages in the order they came in, and answer them together."""
        with self._changed:
            for message in messages:
                self.received[message.type] += 1
                if message.from_ in self._progress:
                    self._step(message)
            send, answers = self._leave()
        self._deliver(send, answers)

    # pipeline.Raft

    def process(self, message: Message) -> None:
        """Take one message of a peer. Raises RequestRejected for a snapshot it does not take."""
        if message.type == MessageType.SNAP and not self.takes_snapshots:
            logger.warning("refused a snapshot: there is no directory for its database")
            raise RequestRejected(501, b"this example member takes no snapshots\n")
        self._hear([message])

    def is_id_removed(self, member_id: int) -> bool:
        """Nobody is ever removed from this cluster."""
        return False

    def report_unreachable(self, member_id: int) -> None:
        """An append may be lost: send again at the next occasion."""
        with self._changed:
            self.unreachable += 1
            if member_id in self._progress:
                self._progress[member_id].in_flight = False

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

    @property
    def _majority(self) -> int:
        return (len(self.peer_ids) + 1) // 2 + 1

    def _term_at(self, index: int) -> int:
        return self._log[index - 1 - self._base].term if index > self._base else self._base_term

    def _reset_patience(self) -> None:
        """Begin to wait for a leader anew. By chance, so that not all campaign at once."""
        self._elapsed = 0
        self._patience = random.randrange(CAMPAIGN_TICKS, 2 * CAMPAIGN_TICKS)

    def _emit(self, kind: MessageType, to: int, *, term: int | None = None, **fields: Any) -> None:
        message = Message(
            type=kind,
            to=to,
            from_=self.member_id,
            term=self._term if term is None else term,
            **fields,
        )
        self._outbox.append(message)

    def _leave(self) -> tuple[Send | None, list[Message]]:
        """Save what the messages in the outbox tell others of, and take them out of it."""
        if self._storage is not None:
            is_state_new = self._saved != (self._term, self._vote)
            entries = self._log[self._unsaved - 1 - self._base :]
            if is_state_new or entries:
                self._storage.save(self._term, self._vote, entries)
            self._saved = (self._term, self._vote)
            self._unsaved = self._last + 1
        messages, self._outbox = self._outbox, []
        if self._send is not None:
            self.sent.update(message.type for message in messages)
        self._changed.notify_all()
        return self._send, messages

    @staticmethod
    def _deliver(send: Send | None, messages: list[Message]) -> None:
        """Without the lock. Answers to messages that arrive while stopped are lost."""
        if send is not None and messages:
            send(messages)

    def _become_follower(self, term: int, leader: int) -> None:
        if term > self._term:
            self._term = term
            self._vote = 0
        self._role = Role.FOLLOWER
        self._leader = leader
        self._reads.clear()
        # A campaign that we do not support is no reason to wait longer. Differs from etcd: there a
        # new term is, but all wait alike; here one that is behind us would begin new terms for
        # ever, before we campaign.
        if leader:
            self._reset_patience()

    def _step(self, message: Message) -> None:
        """Terms first, then the message; raft.go ``Step``. Prop and ReadIndex carry no term."""
        kind = message.type
        if message.term > self._term:
            if (
                kind in FROM_CANDIDATE
                and message.context != CAMPAIGN_TRANSFER
                and self._has_lease()
            ):
                return
            # A poll, and a yes to one, do not move anybody's term.
            is_yes = kind == MessageType.PRE_VOTE_RESP and not message.reject
            if kind != MessageType.PRE_VOTE and not is_yes:
                leader = message.from_ if kind in FROM_LEADER else 0
                self._become_follower(message.term, leader)
        elif 0 < message.term < self._term:
            # A leader of an old term must hear of ours, or it would go on for ever.
            if kind in FROM_LEADER:
                self._emit(MessageType.APP_RESP, message.from_)
            elif kind == MessageType.PRE_VOTE:
                self._emit(MessageType.PRE_VOTE_RESP, message.from_, reject=True)
            return
        self._progress[message.from_].is_active = True
        handler = self._handlers.get(kind)
        if handler is not None:
            handler(message)

    def _has_lease(self) -> bool:
        """Tell whether there is a leader, as far as we know: nobody else is voted for then."""
        return self._leader != 0 and self._elapsed < LEASE_TICKS

    # As follower.

    def _on_append(self, message: Message) -> None:
        self._become_follower(message.term, message.from_)
        last = self._last
        if message.index < self._commit:  # late: what it carries is known to be here
            self._acknowledge(message.from_, self._commit)
            return
        if message.index > last or self._term_at(message.index) != message.log_term:
            hint = min(message.index, last)
            while self._term_at(hint) > message.log_term:
                hint -= 1
            self._emit(
                MessageType.APP_RESP,
                message.from_,
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
                self._unsaved = min(self._unsaved, index)
            self._log.append(entry)
        last_new = message.index + len(message.entries)
        self._commit = max(self._commit, min(message.commit, last_new))
        self._acknowledge(message.from_, last_new)

    def _acknowledge(self, leader: int, index: int) -> None:
        """Tell the leader that our log is its own up to ``index``. That goes for all before it,
        too: of several such answers in a row, as to a batch, the furthest says everything."""
        if self._outbox:
            last = self._outbox[-1]
            is_one = last.type == MessageType.APP_RESP and not last.reject
            if is_one and (last.to, last.term) == (leader, self._term):
                index = max(index, last.index)
                self._outbox.pop()
        self._emit(MessageType.APP_RESP, leader, index=index)

    def _on_heartbeat(self, message: Message) -> None:
        self._become_follower(message.term, message.from_)
        self._commit = max(self._commit, min(message.commit, self._last))
        # Linearizable reads wait for this context to come back.
        self._emit(MessageType.HEARTBEAT_RESP, message.from_, context=message.context)

    def _on_snapshot(self, message: Message) -> None:
        """Go on from behind a snapshot; raft.go ``restore``. A node would now open the database
        (``Transport.snapshot_path``), which is in place."""
        self._become_follower(message.term, message.from_)
        if not self.takes_snapshots:  # of an inbox, where it is too late to refuse
            logger.warning("ignored a snapshot: there is no directory for its database")
            return
        assert message.snapshot is not None
        metadata = message.snapshot.metadata
        if metadata.index > self._commit:
            self._base, self._base_term = metadata.index, metadata.term
            self._log.clear()
            self._commit = metadata.index
            self._unsaved = metadata.index + 1
            if self._storage is not None:
                self._storage.save_snapshot(metadata.index, metadata.term)
        self._emit(MessageType.APP_RESP, message.from_, index=self._commit)

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
            self._reset_patience()
        self._emit(
            MessageType.PRE_VOTE_RESP if is_poll else MessageType.VOTE_RESP,
            message.from_,
            term=message.term if granted else self._term,
            reject=not granted,
        )

    def _on_timeout_now(self, message: Message) -> None:
        """The leader hands over: campaign in the next term. A lost MsgVote is not repeated;
        the old leader gives up waiting and the next election is at a higher term."""
        if self._role is Role.FOLLOWER:
            self._campaign(Role.CANDIDATE, context=CAMPAIGN_TRANSFER)

    # As candidate.

    def _campaign(self, role: Role, **fields: Any) -> None:
        """Ask all others for their votes, or first whether we would get them."""
        is_poll = role is Role.PRE_CANDIDATE
        self._role = role
        self._leader = 0
        self._reset_patience()
        if not is_poll:
            self._term += 1
            self._vote = self.member_id
        self._votes = {self.member_id: True}
        last = self._last
        for peer_id in self.peer_ids:
            self._emit(
                MessageType.PRE_VOTE if is_poll else MessageType.VOTE,
                peer_id,
                term=self._term + is_poll,
                index=last,
                log_term=self._term_at(last),
                **fields,
            )

    def _on_vote_resp(self, message: Message) -> None:
        is_poll = message.type == MessageType.PRE_VOTE_RESP
        if self._role is not (Role.PRE_CANDIDATE if is_poll else Role.CANDIDATE):
            return
        self._votes[message.from_] = not message.reject
        answers = Counter(self._votes.values())
        if answers[True] >= self._majority:
            if is_poll:
                self._campaign(Role.CANDIDATE)
            else:
                self._become_leader()
        elif answers[False] >= self._majority:
            self._become_follower(self._term, 0)

    # As leader.

    def _become_leader(self) -> None:
        self._role = Role.LEADER
        self._leader = self.member_id
        self._elapsed = 0
        self._progress = {peer_id: Progress(next=self._last + 1) for peer_id in self.peer_ids}
        # Only an entry of its own term lets a leader commit those before it (Raft 5.4.2).
        self._append([Entry()])

    def _check_quorum(self) -> None:
        """Step down if no majority has been heard of: others may have another leader by now."""
        self._elapsed = 0
        active = 1 + sum(progress.is_active for progress in self._progress.values())
        for progress in self._progress.values():
            progress.is_active = False
        if active < self._majority:
            self._become_follower(self._term, 0)
            self._reset_patience()

    def _broadcast_heartbeat(self, context: bytes | None = None) -> None:
        for peer_id, progress in self._progress.items():
            commit = min(progress.match, self._commit)
            self._emit(MessageType.HEARTBEAT, peer_id, commit=commit, context=context)

    def _append(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._log.append(
                Entry(term=self._term, index=self._last + 1, type=entry.type, data=entry.data)
            )
        for peer_id, progress in self._progress.items():
            if not progress.in_flight:
                self._send_append(peer_id)

    def _send_append(self, peer_id: int) -> None:
        progress = self._progress[peer_id]
        if progress.next <= self._base:
            self._give_up_to_send(peer_id)
            return
        size = 0
        entries: list[Entry] = []
        for entry in self._log[progress.next - 1 - self._base :]:
            size += memoryview(entry.data or b"").nbytes
            if entries and size > MAX_APPEND_BYTES:
                break
            entries.append(entry)
        self._emit(
            MessageType.APP,
            peer_id,
            index=progress.next - 1,
            log_term=self._term_at(progress.next - 1),
            entries=entries,
            commit=self._commit,
        )
        progress.in_flight = bool(entries)

    def _give_up_to_send(self, peer_id: int) -> None:
        """It needs what a snapshot stands for, and we send none: let one lead that does."""
        for other_id, progress in self._progress.items():
            if progress.match == self._last:
                logger.warning("%x needs a snapshot: asked %x to lead", peer_id, other_id)
                self._emit(MessageType.TIMEOUT_NOW, other_id)
                return

    def _on_append_resp(self, message: Message) -> None:
        if self._role is not Role.LEADER:
            return
        progress = self._progress[message.from_]
        progress.in_flight = False
        if message.reject:
            if message.index > progress.match:  # else: an answer that was overtaken
                progress.next = max(progress.match + 1, min(message.index, message.reject_hint + 1))
                self._send_append(message.from_)
            return
        progress.match = max(progress.match, message.index)
        progress.next = progress.match + 1
        matches = sorted((p.match for p in self._progress.values()), reverse=True)
        of_majority = matches[self._majority - 2]  # the first of a majority is us
        if of_majority > self._commit and self._term_at(of_majority) == self._term:
            self._commit = of_majority
            for peer_id, other in self._progress.items():
                if not other.in_flight:
                    self._send_append(peer_id)
        elif progress.match < self._last:
            self._send_append(message.from_)

    def _on_heartbeat_resp(self, message: Message) -> None:
        if self._role is not Role.LEADER:
            return
        if self._progress[message.from_].match < self._last:
            self._send_append(message.from_)
        self._confirm_reads(bytes(message.context or b""), message.from_)

    def _on_propose(self, message: Message) -> None:
        """Proposals that reach us while we do not lead are dropped; etcd's clients time out."""
        if self._role is Role.LEADER:
            self._append(message.entries)

    def _on_read_index(self, message: Message) -> None:
        """Ask a majority whether we still lead; raft ``ReadOnlySafe``. Before an entry of our term
        is committed, drop it: etcd asks again after 500 ms."""
        if self._role is not Role.LEADER or self._term_at(self._commit) != self._term:
            return
        context = bytes(message.entries[0].data or b"")
        self._reads.setdefault(context, Read(message, self._commit))
        while len(self._reads) > MAX_READS:
            del self._reads[next(iter(self._reads))]
        self._broadcast_heartbeat(context)

    def _confirm_reads(self, context: bytes, peer_id: int) -> None:
        """Answer a read that a majority has confirmed, and those that had come before it."""
        read = self._reads.get(context)
        if read is None:
            return
        read.confirmed.add(peer_id)
        if len(read.confirmed) + 1 < self._majority:
            return
        for earlier in list(self._reads):
            answered = self._reads.pop(earlier)
            self._emit(
                MessageType.READ_INDEX_RESP,
                answered.message.from_,
                index=answered.index,
                entries=list(answered.message.entries),
            )
            if earlier == context:
                return
