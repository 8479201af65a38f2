"""PeerStatus: whether a peer can be reached, as far as its traffic tells."""

from __future__ import annotations

import threading
import time

from pipeline._core import ActiveFlag
from pipeline.arguments import require_id
from pipeline.logs import get_logger
from pipeline.protocol import format_id

__all__ = ["PeerStatus"]

logger = get_logger(__name__)


class PeerStatus:
    """Active or not, since when, and how often the peer went away. Starts inactive.

    Parameters
    ----------
    member_id : int
        Ours.
    peer_id : int
        The peer's.
    flag : ActiveFlag
        What the I/O loop reads, without the GIL, after every answer. Set by this object only,
        after ``active_since``.

    Attributes
    ----------
    active_since : float or None
        When the peer last became active, seconds since the epoch; None while it is inactive.
    disconnects : int
        Changes from active to inactive (``etcd_network_disconnected_peers_total``).

    Notes
    -----
    Thread-safe. A change is logged once; failures of an inactive peer are logged at debug.
    Source: etcd ``rafthttp/peer_status.go``.
    """

    def __init__(self, member_id: int, peer_id: int, flag: ActiveFlag) -> None:
        require_id("member_id", member_id)
        require_id("peer_id", peer_id)
        self.member_id = member_id
        self.peer_id = peer_id
        self.active_since: float | None = None
        self.disconnects = 0
        self.flag = flag
        self._is_unreachable = False
        # Guards every change. Reentrant and held while logging: lines come in the order of the
        # changes, and a log handler may ask us or even send to the peer.
        self._lock = threading.RLock()

    @property
    def is_active(self) -> bool:
        """Whether the last thing heard was a success."""
        return self.flag.get()

    @property
    def is_unreachable(self) -> bool:
        """Whether the last thing heard was a failure; unlike activity, not so at the start."""
        return self._is_unreachable

    def activate(self) -> None:
        """Note a success. Cheap while the peer is active: one read of the flag, no lock."""
        if self.flag.get():
            return
        with self._lock:
            if self.flag.get():
                return
            self.active_since = time.time()
            self._is_unreachable = False
            self.flag.set(True)
            logger.info("peer became active: %s", format_id(self.peer_id))

    def deactivate(self, source: str, action: str, reason: str) -> bool:
        """Note a failure.

        Parameters
        ----------
        source, action : str
            Which channel failed at what: ``pipeline`` and ``write`` (spec section 3.3).
        reason : str
            The text of the error.

        Returns
        -------
        bool
            Whether this is the first failure after a success, or since the start. Of failures at
            the same time one is the first.
        """
        failure = f"failed to {action} {format_id(self.peer_id)} on {source} ({reason})"
        with self._lock:
            is_first, self._is_unreachable = not self._is_unreachable, True
            if not self.flag.get():
                logger.debug("peer deactivated again: %s", failure)
                return is_first
            self.flag.set(False)
            self.active_since = None
            self.disconnects += 1
            logger.warning("peer became inactive (message send to peer failed): %s", failure)
            return is_first
