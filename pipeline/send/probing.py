"""Probing: whether peers answer, and how fast. Diagnostic only; nothing here decides anything.

Source: etcd rafthttp/probing_status.go over xiang90/probing. Differs from etcd: one thread for
all peers, the poller's, and no judgement of clocks.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import time
from functools import partial
from socket import MSG_NOSIGNAL
from typing import NamedTuple

from pipeline.locks import lock_of
from pipeline.logs import get_logger
from pipeline.net.dialling import Dial, Dialer
from pipeline.net.poller import READABLE, Poller
from pipeline.net.pool import Pool, PooledConnection
from pipeline.send.picker import URLPicker
from pipeline.stats import Histogram
from pipeline.tls.credentials import Credentials
from pipeline.wire.protocol import format_id, probe_head
from pipeline.wire.versions import Versions

__all__ = ["ProbeStats", "Prober"]

logger = get_logger(__name__)

#: To connect, again to shake hands, and again to be answered. A probe that takes longer is a
#: failure: round trips beyond this are beyond any election timeout.
STEP_TIMEOUT_S = 1.0
#: The first probe of a peer comes sooner than the interval asks for, since until then nothing is
#: known of it: after a fifth, but not within this, in which a cluster that starts comes up.
FIRST_PROBE_S = 0.2
#: One read takes no more: an answer has 300 bytes.
READ_BYTES = 4096
#: For servers to write the session tickets with which they end a handshake.
TICKETS_S = 0.1
#: Weight of a new round trip in the smoothed one; as TCP (RFC 6298) and xiang90/probing.
RTT_WEIGHT = 0.125
#: Seconds, 0.1 ms to 3.3 s; those of etcd's peer_round_trip_time_seconds.
RTT_BOUNDS = tuple(0.0001 * 2**i for i in range(16))


class ProbeStats(NamedTuple):
    """What probing found out about one peer."""

    #: Whether the last probe was answered; False before the first.
    is_healthy: bool = False
    #: Probes answered or given up.
    total: int = 0
    #: Probes that failed.
    lost: int = 0
    #: Seconds from the request to the whole answer, without connecting; None before the first.
    last_rtt_s: float | None = None
    #: Its moving average, from 0 up as in etcd.
    smoothed_rtt_s: float = 0.0
    #: Why the last probe failed; empty if it did not.
    last_error: str = ""
    #: Seconds to resolve the name and connect, for the connection made last; None before.
    last_dial_s: float | None = None
    #: Seconds of that connection's TLS handshake; None without TLS.
    last_tls_s: float | None = None
    #: Seconds from the request to the first byte of the answer; None before the first.
    last_first_byte_s: float | None = None


class _Target:
    """One peer, in the hands of the poller's thread but for ``stats``, which is replaced."""

    def __init__(self, peer_id: int, picker: URLPicker, due: float, round_trips: Histogram) -> None:
        self.peer_id = peer_id
        self.picker = picker  # for its URLs; which of them is picked is for messages to say
        self.picked = 0
        self.pools: dict[str, Pool] = {}
        self.connection = PooledConnection(200)
        self.is_dialling = False  # the connection is about to be
        self.is_open = False  # the connection is
        self.is_busy = False
        self.is_sent = False
        self.is_reused = False
        self.is_retired = False  # the connection is to be closed before the next probe
        self.due = due  # when idle: of the next probe; otherwise: of giving up
        self.next_due = due
        self.sent_at = 0.0
        self.round_trips = round_trips
        self.stats = ProbeStats()

    @property
    def is_shaken_only(self) -> bool:
        """Whether nothing has come since the TLS handshake, which may not be over for the peer."""
        tls = self.connection.sock.tls if self.is_open else None
        return tls is not None and not tls.has_heard

    @property
    def url(self) -> str:
        urls = self.picker.urls
        return urls[self.picked % len(urls)]


class Prober:
    """Asks every peer in turn, at intervals, whether it is there.

    Parameters
    ----------
    poller : Poller
        Waits for it.
    dialer : Dialer
    interval_s : float
        Between two probes of a peer. The first comes after a fifth of it.
    member_id : int
        Ours, for the log.
    credentials : Credentials, optional
        For ``https`` URLs.
    versions : Versions, optional
        Shown the answers' headers.

    Notes
    -----
    Thread-safe. All peers are waited for at once, so one that is dead delays no other. A connection
    is kept from probe to probe.
    """

    def __init__(
        self,
        poller: Poller,
        dialer: Dialer,
        *,
        interval_s: float,
        member_id: int = 0,
        credentials: Credentials | None = None,
        versions: Versions | None = None,
    ) -> None:
        self._log = logger.about(local=format_id(member_id))
        self._poller = poller
        self._dialer = dialer
        self._interval_s = interval_s
        self._credentials = credentials
        self._versions = versions
        self._lock = lock_of(self)  # guards the histograms
        # Changed by single operations of dict, by any thread and by signals' handlers.
        self._targets: dict[URLPicker, _Target] = {}
        self._is_stopped = False
        # The poller's thread's own: whom it probes, and whose connections it is yet to close.
        self._known: set[_Target] = set()
        self._leaving: list[_Target] = []
        poller.attach(self)

    def stop(self) -> None:
        """Probe nobody any more, without waiting for the end of that."""
        self._is_stopped = True
        self._targets.clear()
        self._poller.ask(self._follow)

    def set(self, peer_id: int, picker: URLPicker) -> None:
        """Probe a peer at its URLs from now on; of what was known only its histogram stays."""
        old = self._targets.get(picker)
        round_trips = Histogram(RTT_BOUNDS) if old is None else old.round_trips
        wait_s = min(self._interval_s, max(FIRST_PROBE_S, self._interval_s / 5))
        due = time.monotonic() + wait_s
        self._targets[picker] = _Target(peer_id, picker, due, round_trips)
        if self._is_stopped:  # perhaps meanwhile
            self._targets.clear()
        self._poller.ask(self._follow)

    def remove(self, picker: URLPicker) -> None:
        """Probe a peer no more; nothing for an unknown one."""
        self._targets.pop(picker, None)
        self._poller.ask(self._follow)

    def retire_connections(self) -> None:
        """Have every connection made anew for the next probe."""
        for target in list(self._targets.values()):
            target.is_retired = True

    def stats(self) -> dict[int, ProbeStats]:
        """What is known of each peer."""
        return {target.peer_id: target.stats for target in list(self._targets.values())}

    def round_trips(self) -> dict[int, Histogram]:
        """Round trips of each peer since it was added, in seconds.

        Differs from etcd: each is counted once. etcd counts the smoothed one at intervals.
        """
        with self._lock:
            return {
                target.peer_id: target.round_trips.copy() for target in list(self._targets.values())
            }

    def forget_after_fork(self) -> None:
        """In a forked child, which has none of the threads: probe nobody."""
        if not self._poller.is_started:
            return  # it may yet be started here
        self._is_stopped = True
        self._targets.clear()
        self._known = set()
        self._leaving = []

    # What follows runs in the poller's thread.

    def next_due(self) -> float:
        """When the next probe is, or is given up."""
        return min((target.due for target in (*self._known, *self._leaving)), default=math.inf)

    def check_time(self, now: float) -> None:
        """Begin probes, and give up others."""
        self._close_left(now)
        for target in self._known:
            if target.due <= now:
                if target.is_busy:
                    self._fail(target, f"no answer in {STEP_TIMEOUT_S:g} s")
                else:
                    self._begin(target)

    def end(self) -> None:
        """Close every connection."""
        self._is_stopped = True
        self._targets.clear()
        self._follow()
        if self._leaving:
            time.sleep(max(0.0, self._leaving[-1].due - time.monotonic()))
            self._close_left(math.inf)

    def _follow(self) -> None:
        """Go by the targets as they are now."""
        targets = set(list(self._targets.values()))  # noqa: C414 - at one instant, see locks.py
        for target in self._known - targets:
            if target.is_shaken_only:
                # OpenSSL writes one session ticket after the other, and its process is sent SIGPIPE
                # for the second if the first finds the connection closed.
                target.due = time.monotonic() + TICKETS_S
                self._leaving.append(target)
            else:
                self._close(target)
        self._known = targets

    def _close_left(self, now: float) -> None:
        for target in [target for target in self._leaving if target.due <= now]:
            self._leaving.remove(target)
            self._close(target)

    def _begin(self, target: _Target) -> None:
        target.is_busy = True
        target.next_due = time.monotonic() + self._interval_s
        if target.is_retired:
            target.is_retired = False
            self._close(target)
        target.is_reused = target.is_open
        if target.is_open:
            self._send(target)
        else:
            self._dial(target)

    def _dial(self, target: _Target) -> None:
        target.is_sent = False
        target.is_dialling = True
        target.due = math.inf  # the dialer gives up in time
        url = target.url
        pool = target.pools.get(url)
        if pool is None:
            pool = target.pools[url] = Pool(
                url,
                probe_head(url),
                size=1,
                dead_link_timeout_s=STEP_TIMEOUT_S,
                credentials=self._credentials,
                handshake_timeout_s=STEP_TIMEOUT_S,
            )
        self._dialer.begin(
            target.connection.prepare(pool, STEP_TIMEOUT_S, partial(self._opened, target))
        )

    def _opened(self, target: _Target, dial: Dial) -> None:
        if target.connection.dial is not dial:  # it was closed meanwhile
            return
        target.is_dialling = False
        try:
            target.connection.open()
            self._poller.watch(target.connection.sock, READABLE, partial(self._read, target))
        except OSError as error:  # also a DialError
            self._fail(target, str(error))
            return
        target.is_open = True
        target.stats = target.stats._replace(last_dial_s=dial.took_s, last_tls_s=dial.tls_s)
        self._send(target)

    def _send(self, target: _Target) -> None:
        target.is_sent = True
        target.sent_at = time.monotonic()
        target.due = target.sent_at + STEP_TIMEOUT_S
        try:
            # Some 100 bytes, and nothing was left unsent before: they fit.
            target.connection.sock.send(target.connection.head, MSG_NOSIGNAL)
        except OSError as error:
            self._broken(target, str(error))

    def _read(self, target: _Target) -> None:
        """Read what there is of an answer."""
        # TLS may have taken more from the socket than one call returns, and the poller does not
        # see that.
        while (data := self._receive(target)) is not None and self._take(target, data):
            pass

    def _receive(self, target: _Target) -> bytes | None:
        """Return what came, b"" at the end of the stream; None if that was no part of an answer."""
        try:
            return target.connection.sock.recv(READ_BYTES)
        except BlockingIOError:  # session tickets, or a part of a record
            return None
        except OSError as error:
            self._broken(target, str(error))
            return None

    def _take(self, target: _Target, data: bytes) -> bool:
        """Take some of an answer; True when there may be more of it."""
        if not target.is_busy:
            self._close(target)  # between probes there is nothing to be said
            return False
        if not data and not target.connection.odd.has_begun:
            self._broken(target, "the connection ended before an answer")
            return False
        if not target.connection.odd.has_begun:
            first_byte_s = time.monotonic() - target.sent_at
            target.stats = target.stats._replace(last_first_byte_s=first_byte_s)
        try:
            answer = target.connection.odd.feed(data, is_ended=not data, is_written=True)
        except (http.client.HTTPException, ValueError) as error:
            self._fail(target, f"malformed or incomplete answer: {error!r}")
            return False
        if answer is None:
            return bool(data)
        if self._versions is not None:
            self._versions.note(target.peer_id, answer.headers)
        if answer.status != 200:
            self._fail(target, f"answered with status {answer.status}")
        elif not _says_ok(answer.body):
            self._fail(target, "answered without OK")
        else:
            if not answer.keep:
                self._close(target)
            self._succeed(target, time.monotonic() - target.sent_at)
        return False

    def _broken(self, target: _Target, reason: str) -> None:
        """Fail, unless the connection was an old one, which may have ended meanwhile."""
        if not target.is_busy or not target.is_reused or target.connection.odd.has_begun:
            self._fail(target, reason)
            return
        target.is_reused = False
        self._close(target)
        self._dial(target)

    def _succeed(self, target: _Target, rtt_s: float) -> None:
        old = target.stats
        target.stats = old._replace(
            is_healthy=True,
            total=old.total + 1,
            last_rtt_s=rtt_s,
            smoothed_rtt_s=(1 - RTT_WEIGHT) * old.smoothed_rtt_s + RTT_WEIGHT * rtt_s,
            last_error="",
        )
        with self._lock:
            target.round_trips.observe(rtt_s)
        self._done(target)
        if not old.is_healthy:
            peer = format_id(target.peer_id)
            self._log.info(
                "peer %s answers probes at %s", peer, target.url, peer=peer, url=target.url
            )

    def _fail(self, target: _Target, reason: str) -> None:
        self._close(target)
        if not target.is_busy:
            return
        old, url = target.stats, target.url
        target.stats = old._replace(
            is_healthy=False, total=old.total + 1, lost=old.lost + 1, last_error=reason
        )
        target.picked += 1
        self._done(target)
        is_change = old.is_healthy or old.total == 0
        level = logging.WARNING if is_change else logging.DEBUG
        peer = format_id(target.peer_id)
        text = "probe of peer %s at %s: %s"
        self._log.log(level, text, peer, url, reason, peer=peer, url=url, reason=reason)

    def _done(self, target: _Target) -> None:
        target.is_busy = False
        target.due = max(target.next_due, time.monotonic())

    def _close(self, target: _Target) -> None:
        if target.is_dialling:
            target.is_dialling = False
            assert target.connection.dial is not None
            self._dialer.cancel(target.connection.dial)
        if target.is_open:
            target.is_open = False
            self._poller.unwatch(target.connection.sock)
        target.connection.close()
        target.connection.odd.clear()


def _says_ok(body: bytes) -> bool:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and answer.get("OK") is True
