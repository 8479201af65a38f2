"""Remotes: nodes we answer without having them as peers, and who may become one by asking.

A node whose log lags behind does not know the newest members; they tell it where they are in the
headers of what they send. etcd dials whatever a request says; here that is off by default, and
bounded when it is on. Source: etcd rafthttp/remote.go, ``addRemoteFromRequest`` in http.go.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from urllib3.util import parse_url

from pipeline.callbacks import Callbacks
from pipeline.errors import UsageError
from pipeline.locks import lock_of
from pipeline.logs import About, Throttle, get_logger
from pipeline.names import literal_address
from pipeline.send.pipeline import STOP_TIMEOUT_S, PeerPipeline
from pipeline.send.sendable import Sendable
from pipeline.send.status import LastError
from pipeline.stats import PipelineStats
from pipeline.threads import Once
from pipeline.types import SendResult
from pipeline.wire.protocol import format_id
from pipeline.wire.urls import parse_urls

__all__ = ["Remote", "RemotePolicy", "RemoteStats", "Remotes"]

logger = get_logger(__name__)

#: Who may become a remote by a request: (X-Server-From, X-PeerURLs, the caller's ``ip:port``).
RemotePolicy = Callable[[int, tuple[str, ...], str], bool]

#: Learned remotes. A cluster has 3 to 7 members, and few of them at a time are unknown to one.
REMOTES_MAX = 16
#: A learned remote that nothing was sent to for this long is forgotten.
UNUSED_S = 600.0
#: URLs of one learned remote.
URLS_MAX = 8


class RemoteStats(NamedTuple):
    """What there is to tell of a remote."""

    #: Where it is, sorted.
    urls: tuple[str, ...]
    #: Whether it came from a request rather than ``add_remote``.
    is_learned: bool
    #: Whether messages to it are dropped (``Transport.cut_peer``).
    is_paused: bool
    #: Messages dropped because it was cut off; not in the books.
    paused_drops: int
    #: Its books. ``refused`` are those a full buffer turned away, of which Raft is not told.
    pipeline: PipelineStats
    #: The last failure to send to it; None before the first.
    last_error: LastError | None


class Remote:
    """A pipeline to a node that is not a peer. Thread-safe.

    Differs from etcd: pausing drops what is sent. There it stops the pipeline, which loses what
    is queued and panics when done twice.
    """

    def __init__(self, pipeline: PeerPipeline, *, is_learned: bool) -> None:
        self.pipeline = pipeline
        self.is_learned = is_learned
        self.used_at = time.monotonic()
        self._lock = lock_of(self)  # guards what follows
        self._is_paused = False
        self._paused_drops = 0
        identity = pipeline.identity
        self._throttle = Throttle(
            logger.about(local=format_id(identity.member_id), peer=format_id(pipeline.peer_id))
        )

    def send(self, message: Sendable) -> SendResult | None:
        """Offer a message without waiting; None if it was dropped while cut off.

        Raft is not told when the buffer is full.

        Source: etcd ``remote.send``. A post that fails later is told, by the pipeline.
        """
        if self._is_paused:
            with self._lock:
                self._paused_drops += 1
            return None
        self.used_at = time.monotonic()
        result = self.pipeline.send(message)
        if result is SendResult.QUEUE_FULL:
            self._throttle.warning(
                "dropped Raft message since sending buffer is full (overloaded network): "
                "type %s, to remote %s",
                message.type,
                format_id(self.pipeline.peer_id),
                channel="pipeline",
                reason="sending buffer is full",
            )
        return result

    def pause(self) -> None:
        """Drop what is sent from now on. Twice is once."""
        self._is_paused = True

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        self._is_paused = False

    def stats(self) -> RemoteStats:
        """Return what there is to tell."""
        with self._lock:
            paused, drops = self._is_paused, self._paused_drops
        urls = self.pipeline.picker.urls
        books, last_error = self.pipeline.stats(), self.pipeline.status.last_error
        return RemoteStats(urls, self.is_learned, paused, drops, books, last_error)


class Remotes:
    """All remotes of a transport, and the rules by which requests add to them.

    Parameters
    ----------
    member_id : int
        Ours; no request makes a remote of it.
    make : callable
        Makes a pipeline, not started, of an ID and URLs; ``UsageError`` for a bad URL.
    is_peer : callable
        Tells whether an ID is a peer's: peers are not learned.
    call_soon : callable
        Runs a function in another thread (``Dispatcher.call_soon``).
    policy : RemotePolicy or None
        Asked about every sender that is not a peer, after the rules here. None allows those who
        have shown a certificate that we trust, and nobody else.
    allow_loopback : bool
        Whether loopback URLs may be learned.
    callbacks : Callbacks
        How the policy is called.

    Notes
    -----
    Thread-safe. ``note`` calls the policy and holds no lock meanwhile.
    """

    def __init__(
        self,
        member_id: int,
        make: Callable[[int, Iterable[str]], PeerPipeline],
        *,
        is_peer: Callable[[int], bool],
        call_soon: Callable[[Callable[[], None]], None],
        policy: RemotePolicy | None,
        allow_loopback: bool,
        callbacks: Callbacks,
    ) -> None:
        self._member_id = member_id
        self._make = make
        self._is_peer = is_peer
        self._call_soon = call_soon
        self._policy = policy
        self._callbacks = callbacks
        self._allow_loopback = allow_loopback
        self._lock = lock_of(self)  # one is learned at a time
        # Changed by single operations of dict and set, also by a signal's handler in between.
        self._remotes: dict[int, Remote] = {}
        self._live: set[Remote] = set()  # those that are not seen to their end
        self._beginning = Once()
        self._ending = Once()
        self._log = logger.about(local=format_id(member_id))
        self._throttle = Throttle(self._log)

    def open(self) -> None:
        """Take remotes from now on."""
        self._beginning.take()

    def close(self) -> list[Remote]:
        """Take no more; show those there are, to be stopped and then forgotten."""
        self._ending.take()
        self._remotes.clear()
        return list(self._live)

    def forget(self, remote: Remote) -> None:
        """Let go of one that has stopped."""
        self._live.discard(remote)

    def get(self, member_id: int) -> Remote | None:
        """Return the remote with this ID, or None. No lock."""
        return self._remotes.get(member_id)

    def stats(self) -> dict[int, RemoteStats]:
        """What there is to tell, by ID."""
        return {member_id: remote.stats() for member_id, remote in list(self._remotes.items())}

    def add(self, member_id: int, urls: Iterable[str], *, is_learned: bool = False) -> bool:
        """Add one; False if it is there already, closed, or one learned too many."""
        with self._lock:
            if not self._is_open() or member_id in self._remotes:
                return False
            if is_learned and self._count_learned() >= REMOTES_MAX:
                return False
            remote = Remote(self._make(member_id, urls), is_learned=is_learned)
            self._live.add(remote)
            try:
                remote.pipeline.start()
                is_added = self._remotes.setdefault(member_id, remote) is remote
            except BaseException as error:
                self._end(remote)
                if isinstance(error, UsageError) and not self._is_open():
                    return False  # closed meanwhile
                raise
            if not self._is_open():  # closed meanwhile, perhaps before it could be seen
                self._remotes.pop(member_id, None)
                is_added = False
            if not is_added:
                self._end(remote)
                return False
        peer = format_id(member_id)
        self._log.info("added remote %s at %s", peer, remote.pipeline.picker.urls, peer=peer)
        return True

    def is_watched(self, sender: int, *, is_authenticated: bool) -> bool:
        """Tell whether the next request of this sender is to be shown to ``note`` as well."""
        if self._policy is None and not is_authenticated:
            return False
        remote = self._remotes.get(sender)
        return not self._is_peer(sender) and (remote is None or remote.is_learned)

    def note(
        self, sender: int, urls: tuple[str, ...], caller: object, *, is_authenticated: bool = False
    ) -> None:
        """Look at who sent a request, and maybe remember where it is reached. Never raises.

        Parameters
        ----------
        sender : int
            Its X-Server-From.
        urls : tuple of str
            Its X-PeerURLs, as they came.
        caller : object
            Shows its ``ip:port``.
        is_authenticated : bool
            Whether it has shown a certificate that we trust.
        """
        if sender in (0, self._member_id) or self._is_peer(sender):
            return
        if self._policy is None and not is_authenticated:
            return
        self._forget_unused()
        if sender in self._remotes:
            return
        if self._count_learned() >= REMOTES_MAX:
            self._not_learned(sender, caller, f"there are {REMOTES_MAX}")
            return
        try:
            checked = parse_urls(urls)
            reason = _refusal(checked, allow_loopback=self._allow_loopback)
        except UsageError as error:
            reason = str(error)
        if reason is not None:
            self._not_learned(sender, caller, reason)
            return
        if self._policy is not None:
            about, ask = f"{format_id(sender)} at {caller}", self._callbacks.ask
            fields = About(peer=format_id(sender), address=str(caller))
            asked = (sender, checked, str(caller))
            if not ask("remote_policy", about, self._policy, *asked, fields=fields):
                return
        try:
            self.add(sender, checked, is_learned=True)
        except UsageError as error:  # https, not to be dialled
            self._not_learned(sender, caller, str(error))

    def _not_learned(self, sender: int, caller: object, reason: str) -> None:
        self._throttle.warning(
            "did not learn remote %s from %s: %s",
            format_id(sender),
            caller,
            reason,
            peer=format_id(sender),
            address=str(caller),
            reason=reason,
        )

    def retire_connections(self) -> None:
        """Have every remote dial anew before its next message."""
        for remote in list(self._remotes.values()):
            remote.pipeline.retire_connections()

    def _is_open(self) -> bool:
        return self._beginning.is_taken() and not self._ending.is_taken()

    def _count_learned(self) -> int:
        return sum(remote.is_learned for remote in list(self._remotes.values()))

    def _end(self, remote: Remote) -> None:
        """Stop one, and have its end waited for in another thread."""
        remote.pipeline.stop_begin()
        deadline = time.monotonic() + STOP_TIMEOUT_S

        def wait() -> None:
            remote.pipeline.stop_end(deadline)
            self._live.discard(remote)

        self._call_soon(wait)

    def _forget_unused(self) -> None:
        limit = time.monotonic() - UNUSED_S
        with self._lock:
            unused = {
                member_id: remote
                for member_id, remote in list(self._remotes.items())
                if remote.is_learned and remote.used_at < limit
            }
            for member_id in unused:
                self._remotes.pop(member_id, None)
        for member_id, remote in unused.items():
            peer = format_id(member_id)
            self._log.info("forgot remote %s: unused for %g s", peer, UNUSED_S, peer=peer)
            self._end(remote)


def _refusal(urls: tuple[str, ...], *, allow_loopback: bool) -> str | None:
    """Tell why no request may make us dial these; None if the policy is to decide."""
    if len(urls) > URLS_MAX:
        return f"more than {URLS_MAX} URLs"
    for url in urls:
        host = parse_url(url).host or ""
        address = literal_address(host)
        if address is None:
            name = host.lower().rstrip(".")
            is_loopback = name == "localhost" or name.endswith(".localhost")
        else:
            is_loopback = address.is_loopback
        if is_loopback and not allow_loopback:
            return f"{url} is loopback"
        if address is None:
            continue  # what a name stands for is for the policy to know
        if "%" in host:
            return f"{url} has a zone, which is one of its sender's interfaces and not of ours"
        if address.is_link_local or address.is_multicast or address.is_unspecified:
            return f"{url} is link-local, multicast or unspecified"
        if address == ipaddress.IPv4Address("255.255.255.255"):
            return f"{url} is broadcast"
    return None
