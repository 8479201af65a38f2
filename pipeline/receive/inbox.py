"""Inbox: what has arrived, for a node that takes messages when it is ready for them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, cast, overload

from pipeline.arguments import require_bool, require_number, require_whole
from pipeline.errors import UsageError
from pipeline.forks import disown, public_names
from pipeline.locks import lock_of
from pipeline.receive._arrivals import Arrivals, Source
from pipeline.stats import InboxStats

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from pipeline.wire._messages import EncodedMessage, Message

    #: What is taken.
    Taken = TypeVar("Taken", default=Message)
else:
    from typing import TypeVar  # which takes a default from Python 3.13 on

    Taken = TypeVar("Taken")

__all__ = ["Inbox", "Taken"]

_all: weakref.WeakSet[Inbox[Any]] = weakref.WeakSet()  # for fork


class Inbox(Generic[Taken]):
    """What has arrived, decoded, until the node takes it.

    Given to a ``Transport``, whose ``raft.process`` is not called then: received messages are put
    here and answered 204 at once, without the GIL, however busy the interpreter is. The node takes
    them in batches from a thread of its own.

    Parameters
    ----------
    max_messages : int
        How many messages fit into each of its four lanes: heartbeats, votes, answers and the like;
        MsgApp; MsgProp; and whatever is larger than 64 KiB or has more than 1,024 entries. So none
        of these shuts out another.
    max_bytes : int
        How many bytes fit into each of them. One message is let in, however large, when there is
        none in its lane.
    encoded : bool
        Whether they are taken as they were received, as ``EncodedMessage``; what
        ``ReceiverConfig.encoded`` says does not matter then.

    Raises
    ------
    UsageError
        If an argument is not valid.

    Notes
    -----
    Thread-safe: one consumer or many. Messages come in the order in which they arrived, whatever
    their lane. One inbox may serve several transports; it is closed when the last of them, started
    or not, has been stopped, and then it cannot be given to another.

    When a lane is full nothing is dropped: the answer is withheld, and so the connection is not
    read; other connections and lanes go on, and members take turns when there is room again.
    Acknowledging before the node has a message changes what 204 means, which is fine for what Raft
    sends again. A MsgProp and a MsgSnap are answered when they are taken. Received bytes, the
    MsgApp of ``server_stats`` and ``unknown_fields`` are counted as messages are taken.

    Source: etcd rafthttp/peer.go, ``recvc`` and ``propc``, of 4,096 messages each. Differs from
    etcd: there only streams use them, and what they have no room for is dropped.
    """

    @overload
    def __init__(
        self: Inbox[Message],
        *,
        max_messages: int = ...,
        max_bytes: int = ...,
        encoded: Literal[False] = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Inbox[EncodedMessage],
        *,
        max_messages: int = ...,
        max_bytes: int = ...,
        encoded: Literal[True],
    ) -> None: ...
    def __init__(
        self, *, max_messages: int = 4096, max_bytes: int = 64 << 20, encoded: bool = False
    ) -> None:
        require_whole("max_messages", max_messages, 1, 1 << 30)
        require_whole("max_bytes", max_bytes, 1, 1 << 50)
        require_bool("encoded", encoded)
        #: Whether messages are taken as they were received.
        self.encoded = encoded
        self._arrivals = Arrivals(max_messages, max_bytes, encoded)
        self._lock = lock_of(self)  # guards what follows
        self._sources: weakref.WeakSet[Source] = weakref.WeakSet()
        _all.add(self)

    def take(self, max_messages: int = 256, timeout: float | None = 0.0) -> list[Taken]:
        """Take what has arrived, the oldest first.

        Parameters
        ----------
        max_messages : int
            How many at most.
        timeout : float or None
            Seconds to wait, without the GIL, when there is nothing; it returns at the first
            message. None waits for ever, or until the inbox is closed.

        Returns
        -------
        list of Message, or of EncodedMessage
            Empty when nothing came in time, and always once the inbox is closed.

        Raises
        ------
        UsageError
            If an argument is not valid. Nothing is taken.
        OSError
            If it has to wait, for the first time, and there are no descriptors left.
        """
        require_whole("max_messages", max_messages, 1, 1 << 30)
        if timeout is not None:
            require_number("timeout", timeout, 0.0, 1e9)
        timeout_s = -1.0 if timeout is None else timeout
        return cast("list[Taken]", self._arrivals.take(max_messages, timeout_s))

    def fileno(self) -> int:
        """Return a descriptor that is readable while there is something to take, and when closed.

        For ``selectors``, ``asyncio``'s ``add_reader``, trio's ``wait_readable``, epoll. It is the
        same one each time; do not read or close it. ``OSError`` if there are no descriptors left.
        """
        return self._arrivals.fileno()

    @property
    def closed(self) -> bool:
        """Whether the last transport that it was given to has been stopped."""
        return self._arrivals.closed

    def stats(self) -> InboxStats:
        """Return the books at this instant."""
        return InboxStats(*self._arrivals.stats())

    def __len__(self) -> int:
        """How many messages are there."""
        return len(self._arrivals)

    def __bool__(self) -> bool:
        """An inbox is one, also when it is empty."""
        return True

    def __repr__(self) -> str:
        stats = self.stats()
        state = "closed" if self.closed else f"{stats.queued} queued, {stats.waiting} waiting"
        return f"<Inbox: {state}>"

    def open_source(self, on_taken: Callable[[int, int, int, bool, int], None]) -> Source:
        """Return what a node puts messages in with. For the library."""
        with self._lock:
            if self.closed:
                raise UsageError("inbox: closed, for its transports have been stopped")
            source = Source(self._arrivals, on_taken)
            self._sources.add(source)
        return source

    def close_source(self, source: Source) -> None:
        """Drop what came from a node, which has been stopped. For the library."""
        source.close()
        with self._lock:
            self._sources.discard(source)
            if not self._sources:
                self._arrivals.close()

    def disown_after_fork(self) -> None:
        """In a forked child: refuse every use, for a node that ran has it. For the library."""
        disown(self, "inbox", (*public_names(Inbox), "__len__"))


def _after_fork_in_child() -> None:
    for inbox in list(_all):
        inbox._arrivals.forget_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
