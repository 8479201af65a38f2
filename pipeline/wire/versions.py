"""What versions peers claim, and whether the one we claim suits theirs.

An etcd leader asks every member for its version and holds the cluster at the lowest: a member that
claims 3.5 keeps a cluster of 3.6 at 3.5, and nobody says so. One that claims more than the leader,
by as little as a patch level, has it warn every 4 s (etcd server/etcdserver/api/membership,
cluster_util.go ``decideClusterVersion``). So it is noticed here, and told once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from pipeline.locks import lock_of
from pipeline.logs import INTERVAL_S, get_logger
from pipeline.wire.protocol import PRODUCT_NAME, SERVER_VERSION, format_id

__all__ = ["Versions"]

logger = get_logger(__name__)

_HEADER = SERVER_VERSION.lower()
_VERSION = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})(-[0-9A-Za-z.-]{1,32})?(?:\+.*)?")


class _Claim(NamedTuple):
    """A version as it is ordered: a pre-release is before its release."""

    major: int
    minor: int
    patch: int
    is_release: bool
    pre_release: str

    @classmethod
    def parse(cls, text: str) -> _Claim | None:
        match = _VERSION.fullmatch(text)
        if match is None:
            return None
        pre_release = match[4] or ""
        return cls(int(match[1]), int(match[2]), int(match[3]), not pre_release, pre_release)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}{self.pre_release}"

    def suiting(self) -> str:
        """Return what a member beside this one is to claim: ``X.Y.0``, or its pre-release."""
        return f"{self.major}.{self.minor}.0{self.pre_release if self.patch == 0 else ''}"


class _Peer(NamedTuple):
    text: str  # as it came
    claim: _Claim
    is_ours: bool  # a member of this library


class Versions:
    """The version that each peer claims.

    Parameters
    ----------
    ours : str
        The version we claim.
    peers : callable
        Returns the IDs of all peers there are now.

    Notes
    -----
    Thread-safe. ``note`` takes no lock when it hears nothing new. It is called for what Python
    sees anyway: heads the core has not learned yet, streams that are dialled, answers that are not
    a plain 204; and for a connection's first 204, if that says it.
    """

    def __init__(self, ours: str, peers: Callable[[], Collection[int]]) -> None:
        claim = _Claim.parse(ours)
        assert claim is not None, ours  # TransportConfig has refused it
        self._ours = claim
        self._peers = peers
        # Guards changes of what follows. Reentrant: a signal handler may remove a peer.
        self._lock = lock_of(self)
        # Replaced, never changed: note and get read it without a lock.
        self._known: dict[int, _Peer] = {}
        self._told: tuple[str, str] | None = None  # what is wrong, and what would be right
        self._tell_at = 0.0  # time.monotonic(): not before
        self._is_late = False  # something is still to be told

    def get(self, member_id: int) -> str | None:
        """Return what a peer claims; None before it has said so."""
        peer = self._known.get(member_id)
        return None if peer is None else peer.text

    def note(self, member_id: int, headers: Mapping[str, str]) -> None:
        """See the headers of a request that says it is of this member, or of its answer.

        Only peers count, and who does not say its version says nothing. Names are in lower case.
        """
        text = headers.get(_HEADER)
        if text is None:
            return
        is_ours = headers.get("user-agent", "").startswith(PRODUCT_NAME)
        old = self._known.get(member_id)
        if old is not None and old.text == text and old.is_ours >= is_ours and not self._is_late:
            return
        claim = _Claim.parse(text)
        if claim is None or member_id not in self._peers():
            return
        is_ours = is_ours or (old is not None and old.is_ours)  # an answer does not say that
        with self._lock:
            self._known = {**self._known, member_id: _Peer(text, claim, is_ours)}
        self._judge()

    def forget(self, member_id: int) -> None:
        """Drop a peer that is one no more."""
        with self._lock:
            self._known = {k: v for k, v in self._known.items() if k != member_id}
        self._judge()

    def _judge(self) -> None:
        """Tell whether our version suits, if that has changed."""
        peers = self._peers()
        with self._lock:
            found = _verdict(self._ours, self._known, peers)
            verdict = None if found is None else found[:2]
            self._is_late = False
            if verdict == self._told:
                return
            # Whoever makes up versions is not to fill the log. It is told at the next occasion.
            now = time.monotonic()
            if now < self._tell_at:
                self._is_late = True
                return
            self._tell_at = now + INTERVAL_S
            self._told = verdict
        if found is None:
            logger.info("server_version %s suits the peers now", self._ours)
        else:
            why, wanted, reason = found
            logger.warning(
                "server_version %s %s (%s): set TransportConfig.server_version to %r",
                self._ours,
                why,
                reason,
                wanted,
                reason=why,
                verdict="wrong-version",
            )


def _verdict(
    ours: _Claim, known: dict[int, _Peer], peers: Collection[int]
) -> tuple[str, str, str] | None:
    """Return what is wrong with our version, what would be right, and who shows it; None if well.

    Members of this library claim what they were told to: where there is an etcd, that decides.
    """
    heard = {k: v for k, v in known.items() if k in peers}
    etcds = {k: v for k, v in heard.items() if not v.is_ours}
    if not (judges := etcds or heard):
        return None
    lowest_id = min(judges, key=lambda k: judges[k].claim)
    lowest = judges[lowest_id].claim
    reason = f"peer {format_id(lowest_id)}, the lowest, is at {lowest}"
    if ours > lowest:
        why = "is above what a peer has, which warns of it whenever it leads"
        return why, lowest.suiting(), reason
    # While a peer has not been heard it may be the one that holds the cluster back, and an etcd
    # does not raise the cluster's version then.
    if ours[:2] < lowest[:2] and len(heard) == len(peers):
        why = f"holds the cluster at version {ours.major}.{ours.minor}"
        return why, lowest.suiting(), reason
    return None
