"""PeerStatus: whether a peer can be reached, as far as its traffic tells."""

from __future__ import annotations

import time
from typing import NamedTuple

from pipeline._core import ActiveFlag
from pipeline.arguments import require_id
from pipeline.errors import STOPPED
from pipeline.locks import lock_of
from pipeline.logs import Fields, get_logger
from pipeline.reasons import explanation_of
from pipeline.send.changes import PeerChange, PeerChanges, PeerState
from pipeline.wire.protocol import (
    CLUSTER_ID_MISMATCH,
    INCOMPATIBLE_VERSION,
    MEMBER_REMOVED,
    format_id,
)

__all__ = ["LastError", "PeerStatus"]

logger = get_logger(__name__)


#: By whom etcd says that it failed, with what a record's ``channel`` calls it.
_CHANNELS = {
    "pipeline": "pipeline",
    "stream MsgApp v2": "msgapp",
    "stream Message": "message",
    "sendMsgSnap": "snapshot",
}


class LastError(NamedTuple):
    """The last failure to send to a peer."""

    #: Why: the reason as the log has it.
    text: str
    #: When it happened last, seconds since the epoch.
    at: float
    #: How often in a row, without a success or another reason in between.
    times: int
    #: What ``raft-pipeline explain`` makes of it, in one word: "refused", "expired" and so on.
    verdict: str


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
    last_error : LastError or None
        The last failure, also after a success; None before the first.
    changes : PeerChanges or None
        Takes each change of what the peer is, in order. Whoever makes a status sets it before it is
        used, and has told what it takes.

    Notes
    -----
    Thread-safe. A change is logged once, and the first failure of a peer that was never active;
    further failures of an inactive peer, and what a stop of ours has ended, are logged at debug.
    What time does not heal, such as another cluster ID, is logged as an error when it comes or
    changes. Differs from etcd: there nothing above debug tells of a peer that never worked.
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
        self.last_error: LastError | None = None
        self.changes: PeerChanges | None = None
        self._state: PeerState | None = None  # nothing is known yet
        self._is_unreachable = False
        self._is_told = False  # whether a change, or that there was none yet, stands in the log
        self._is_in_row = False  # the last error is the last thing heard
        self._mismatch = ""  # the last one since a success, as logged
        self._errors: dict[str, int] = {}  # by verdict, of which there are a few dozen
        # Guards every change. Reentrant and held while logging: lines come in the order of the
        # changes, and a log handler may ask us or even send to the peer.
        self._lock = lock_of(self)
        self._log = logger.about(local=format_id(member_id), peer=format_id(peer_id))

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
            self._is_told = True
            self._is_in_row = False
            self._mismatch = ""
            self.flag.set(True)
            self._become(PeerState.ACTIVE, "")
            self._log.info("peer became active: %s", format_id(self.peer_id))

    def deactivate(self, source: str, action: str, reason: str, *, url: str | None) -> bool:
        """Note a failure.

        Parameters
        ----------
        source, action : str
            Which channel failed at what: ``pipeline`` and ``write``, as etcd's log has them.
        reason : str
            The text of the error.
        url : str or None
            Where the peer was dialled, if we have done so.

        Returns
        -------
        bool
            Whether this is the first failure after a success, or since the start. Of failures at
            the same time one is the first.
        """
        failure = f"failed to {action} {format_id(self.peer_id)} on {source} ({reason})"
        with self._lock:
            is_first, self._is_unreachable = not self._is_unreachable, True
            self._note(reason)
            self._become(_state_after(reason), reason)
            was_active = self.flag.get()
            if was_active:
                self.flag.set(False)
                self.active_since = None
                self.disconnects += 1
                text = "peer became inactive (message send to peer failed): %s"
            elif self._is_told or reason == STOPPED:
                text = "peer deactivated again: %s"
            else:
                text = "peer was never active (message send to peer failed): %s"
            # A stop is our doing, and says nothing of the peer.
            is_news = reason != STOPPED and (was_active or not self._is_told)
            self._is_told = self._is_told or is_news
            about = Fields(reason=reason, channel=_CHANNELS.get(source, source))
            if url:  # none was picked, if that was what failed
                about["url"] = url
            if _is_mismatch(reason) and reason != self._mismatch:
                self._mismatch = reason
                self._log.error(text, failure, **about)
            elif is_news:
                self._log.warning(text, failure, **about)
            else:
                self._log.debug(text, failure, **about)
            return is_first

    def count(self, verdict: str, times: int = 1) -> None:
        """Count failures by their verdict; :meth:`deactivate` has counted its own."""
        with self._lock:
            self._errors[verdict] = self._errors.get(verdict, 0) + times

    def errors(self) -> dict[str, int]:
        """Return how many failures there were, by verdict."""
        with self._lock:
            return self._errors.copy()

    def _become(self, state: PeerState, reason: str) -> None:
        """Have a change told; what time does not heal is ended by a success only."""
        is_lasting = self._state in (PeerState.MISMATCHED, PeerState.REMOVED)
        if state is self._state or (is_lasting and state is PeerState.INACTIVE):
            return
        self._state = state
        if self.changes is not None:
            self.changes.note(PeerChange(self.peer_id, state, reason))

    def _note(self, reason: str) -> None:
        times = 1
        if self.last_error is not None and self._is_in_row and self.last_error.text == reason:
            times += self.last_error.times
        verdict = explanation_of(reason).verdict
        self.last_error = LastError(reason, time.time(), times, verdict)
        self.count(verdict)
        self._is_in_row = True


def _state_after(reason: str) -> PeerState:
    """Tell what a failure makes of a peer."""
    if reason == MEMBER_REMOVED:
        return PeerState.REMOVED
    return PeerState.MISMATCHED if _is_mismatch(reason) else PeerState.INACTIVE


def _is_mismatch(reason: str) -> bool:
    """Tell whether a failure stays until somebody changes the configuration of a member.

    Such are another cluster, a version that is not compatible, a certificate that one of the two
    refuses (412, or an alert of TLS), and that we were removed. Told by the text, which the
    status is given: etcd's, or ours of what OpenSSL says.
    """
    if reason in (MEMBER_REMOVED, CLUSTER_ID_MISMATCH, INCOMPATIBLE_VERSION):
        return True
    text = reason.lower()
    is_refused = text.endswith("when precondition failed")
    return is_refused or "certificate" in text or "unknown ca" in text
