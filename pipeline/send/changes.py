"""What a peer becomes, told to the application: each change once, one at a time, in order."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pipeline.callbacks import Callbacks
from pipeline.locks import lock_of
from pipeline.wire.protocol import format_id

__all__ = ["PeerChange", "PeerChanges", "PeerState"]

#: Changes that wait while the callback does not return. A peer that flaps for so long is no news.
WAITING_MAX = 64


class PeerState(enum.StrEnum):
    """What a peer has become, as far as what we send it tells."""

    #: It has answered 204.
    ACTIVE = "active"
    #: A message, or a snapshot, was not delivered: refused, reset, timed out, answered otherwise.
    INACTIVE = "inactive"
    #: The same, for a reason that stays until a member is configured anew: it belongs to another
    #: cluster, its version is not compatible with ours, or one of us refuses the other's
    #: certificate. Failures of other kinds leave it so; only a success ends it.
    MISMATCHED = "mismatched"
    #: It says that *we* were removed from the cluster for good (403). Ended as ``MISMATCHED`` is.
    REMOVED = "removed"


class PeerChange(NamedTuple):
    """That a peer has become something else; given to ``on_peer_change``."""

    #: The peer; 64 bits.
    member_id: int
    #: What it is now.
    state: PeerState
    #: The text of the failure, as in the log and in ``PeerStats.last_error``; empty if active.
    reason: str


class PeerChanges:
    """The changes of one peer that are yet to be told, and the telling.

    Parameters
    ----------
    peer_id : int
    on_peer_change : callable
        Called with each ``PeerChange``.
    callbacks : Callbacks
        How the application is called on behalf of this peer.

    Notes
    -----
    Thread-safe. Several dispatcher threads may have news of one peer. Whoever comes while another
    one tells goes on with its own work, and leaves its change to that thread: so they stay in
    order, and a callback that blocks holds up one thread.
    """

    def __init__(
        self,
        peer_id: int,
        on_peer_change: Callable[[PeerChange], None],
        callbacks: Callbacks,
    ) -> None:
        self._peer = format_id(peer_id)
        self._on_peer_change = on_peer_change
        self._callbacks = callbacks
        self._lock = lock_of(self)  # guards what follows
        self._waiting: deque[PeerChange] = deque()
        self._is_telling = False
        self._is_closed = False

    def note(self, change: PeerChange) -> None:
        """Take a change, to be told by the next :meth:`tell`. Calls nothing; never blocks.

        When too many wait, the newest of them and this one cancel each other out, or this one
        takes its place: what is told last is what holds.
        """
        with self._lock:
            if self._is_closed:
                return
            if len(self._waiting) == WAITING_MAX:
                self._waiting.pop()
                if self._waiting[-1].state is change.state:
                    return
            self._waiting.append(change)

    def tell(self) -> None:
        """Call the application with what waits, unless a thread is doing that."""
        while True:
            with self._lock:
                if self._is_telling or not self._waiting:
                    return
                self._is_telling = True
                change = self._waiting.popleft()
            try:
                self._callbacks.call("on_peer_change", self._peer, self._on_peer_change, change)
            finally:
                with self._lock:
                    self._is_telling = False

    def close(self) -> None:
        """Tell no more: the peer is being removed, or everything stopped."""
        with self._lock:
            self._is_closed = True
            self._waiting.clear()
