"""Probing: whether peers answer, and how fast. Diagnostic only; nothing here decides anything.

Source: etcd rafthttp/probing_status.go over xiang90/probing. Differs from etcd: one thread for
all peers, and no judgement of clocks.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from typing import NamedTuple

from urllib3.exceptions import HTTPError

from pipeline.logs import get_logger
from pipeline.picker import URLPicker
from pipeline.pool import Line, Pool
from pipeline.protocol import format_id, probe_head
from pipeline.stats import Histogram
from pipeline.threads import LibraryThread
from pipeline.tls import Credentials
from pipeline.tunnel import tls_reason
from pipeline.versions import Versions

__all__ = ["ProbeStats", "Prober"]

logger = get_logger(__name__)

#: To connect, and again to be answered. A probe that takes longer is a failure: round trips
#: beyond this are beyond any election timeout.
STEP_TIMEOUT_S = 1.0
#: Read of a peer at once: an answer has 300 bytes, and whoever sends more waits for the others.
READ_BYTES = 4096
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
    """One peer, in the hands of the prober's thread but for ``stats``, which is replaced."""

    def __init__(self, peer_id: int, picker: URLPicker, due: float, round_trips: Histogram) -> None:
        self.peer_id = peer_id
        self.picker = picker  # for its URLs; which of them is picked is for messages to say
        self.picked = 0
        self.pools: dict[str, Pool] = {}
        self.line = Line(200)
        self.is_open = False  # the line is
        self.is_busy = False
        self.is_sent = False
        self.is_reused = False
        self.is_retired = False  # the line is to be closed before the next probe
        self.due = due  # when idle: of the next probe; otherwise: of giving up
        self.next_due = due
        self.dialled_at = 0.0
        self.connected_at = 0.0
        self.sent_at = 0.0
        self.round_trips = round_trips
        self.stats = ProbeStats()

    @property
    def url(self) -> str:
        urls = self.picker.urls
        return urls[self.picked % len(urls)]


class Prober:
    """Asks every peer in turn, at intervals, whether it is there.

    Parameters
    ----------
    name : str
        Goes into the thread's name, ``pipeline-probe-<name>``.
    interval_s : float
        Between two probes of a peer, and before the first.
    credentials : Credentials, optional
        For ``https`` URLs.
    versions : Versions, optional
        Shown the answers' headers.

    Notes
    -----
    Thread-safe. The thread waits for all peers at once, so one that is dead delays no other; only
    resolving a host name blocks it. A connection is kept from probe to probe.
    """

    def __init__(
        self,
        name: str,
        *,
        interval_s: float,
        credentials: Credentials | None = None,
        versions: Versions | None = None,
    ) -> None:
        self._interval_s = interval_s
        self._credentials = credentials
        self._versions = versions
        self._lock = threading.RLock()  # guards the descriptor and the histograms
        # Changed by single operations of dict, by any thread and by signals' handlers.
        self._targets: dict[URLPicker, _Target] = {}
        self._is_stopped = False
        self._wake = -1
        self._thread = LibraryThread(self._run, f"pipeline-probe-{name}")
        # The thread's own. Made by ``start``: processes that were forked before it and share one
        # would be told of each other's connections.
        self._selector: selectors.BaseSelector
        self._known: set[_Target] = set()

    def start(self) -> None:
        """Start the thread. Once."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread.start()  # ends at once if we are stopped already

    def stop_begin(self) -> None:
        """End the thread, without waiting for it."""
        self._is_stopped = True
        self._targets.clear()
        self._wake_up()

    def stop_end(self, deadline: float) -> None:
        """Wait until ``deadline`` (``time.monotonic()``) for the thread, if it was started."""
        self._thread.wait_ended(deadline)

    def set(self, peer_id: int, picker: URLPicker) -> None:
        """Probe a peer at its URLs from now on; of what was known only its histogram stays."""
        old = self._targets.get(picker)
        round_trips = Histogram(RTT_BOUNDS) if old is None else old.round_trips
        due = time.monotonic() + self._interval_s
        self._targets[picker] = _Target(peer_id, picker, due, round_trips)
        if self._is_stopped:  # perhaps meanwhile
            self._targets.clear()
        self._wake_up()

    def remove(self, picker: URLPicker) -> None:
        """Probe a peer no more; nothing for an unknown one."""
        self._targets.pop(picker, None)
        self._wake_up()

    def retire_connections(self) -> None:
        """Have every connection made anew for the next probe."""
        for target in tuple(self._targets.values()):
            target.is_retired = True

    def stats(self) -> dict[int, ProbeStats]:
        """What is known of each peer."""
        return {target.peer_id: target.stats for target in tuple(self._targets.values())}

    def round_trips(self) -> dict[int, Histogram]:
        """Round trips of each peer since it was added, in seconds.

        Differs from etcd: each is counted once. etcd counts the smoothed one at intervals.
        """
        with self._lock:
            return {
                target.peer_id: target.round_trips.copy()
                for target in tuple(self._targets.values())
            }

    def forget_after_fork(self) -> None:
        """In a forked child, which has no thread: close its copies of the descriptors."""
        self._lock = threading.RLock()
        if self._thread.ident is None:
            return  # it may yet be started here
        self._is_stopped = True
        self._targets.clear()
        for target in list(self._known):
            target.line.forget_after_fork()
        self._selector.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _wake_up(self) -> None:
        with self._lock:  # or it is closed meanwhile
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # What follows runs in the thread.

    def _run(self) -> None:
        while not self._is_stopped:
            if not logger.survive("probing fails", self._turn):
                time.sleep(STEP_TIMEOUT_S)  # not in a busy loop
        for target in self._known:
            self._close(target)
        with self._lock:
            os.close(self._wake)
            self._wake = -1
        self._selector.close()

    def _turn(self) -> None:
        targets = set(self._targets.values())
        for target in self._known - targets:
            self._close(target)
        self._known = targets
        for target in targets:
            if target.due <= time.monotonic():
                if target.is_busy:
                    self._fail(target, f"no answer in {STEP_TIMEOUT_S:g} s")
                else:
                    self._begin(target)
        next_due = min((target.due for target in targets), default=None)
        timeout = None if next_due is None else max(0.0, next_due - time.monotonic())
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                os.eventfd_read(self._wake)
            elif key.data.is_sent or key.data.line.tunnel is not None:
                self._read(key.data)
            else:
                self._connected(key.data)

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
        target.dialled_at = time.monotonic()
        target.due = target.dialled_at + STEP_TIMEOUT_S
        url = target.url
        try:
            pool = target.pools.get(url)
            if pool is None:
                pool = target.pools[url] = Pool(
                    url,
                    probe_head(url),
                    size=1,
                    dead_link_timeout_s=STEP_TIMEOUT_S,
                    credentials=self._credentials,
                )
            target.line.dial(pool, STEP_TIMEOUT_S)
        except HTTPError as error:
            self._fail(target, str(error))
            return
        target.is_open = True
        self._selector.register(target.line.fileno(), selectors.EVENT_WRITE, target)

    def _connected(self, target: _Target) -> None:
        sock = target.line.sock
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not error:
            self._selector.modify(sock, selectors.EVENT_READ, target)
            dial_s = time.monotonic() - target.dialled_at
            target.stats = target.stats._replace(last_dial_s=dial_s)
            if target.line.is_sealed:
                target.connected_at = time.monotonic()
                target.due = target.connected_at + STEP_TIMEOUT_S
                self._begin_tls(target)
            else:
                self._send(target)
            return
        self._selector.unregister(sock)
        try:
            target.line.dial_next(OSError(error, os.strerror(error)))
        except (HTTPError, OSError) as failure:
            target.is_open = False
            self._fail(target, str(failure))
            return
        self._selector.register(target.line.fileno(), selectors.EVENT_WRITE, target)

    def _begin_tls(self, target: _Target) -> None:
        try:
            target.line.begin_tls()
        except ssl.SSLError as error:
            self._fail(target, f"TLS handshake: {tls_reason(error)}")
        else:
            self._shake(target, b"")

    def _shake(self, target: _Target, data: bytes) -> None:
        tunnel = target.line.tunnel
        assert tunnel is not None
        try:
            is_done = tunnel.shake(data)
        except ssl.SSLError as error:
            target.line.say_why()
            self._fail(target, f"TLS handshake: {tls_reason(error)}")
            return
        if is_done:
            tls_s = time.monotonic() - target.connected_at
            target.stats = target.stats._replace(last_tls_s=tls_s)
            self._send(target)
            return
        try:
            # A few KB: they fit.
            target.line.sock.send(target.line.take_outgoing(), socket.MSG_NOSIGNAL)
        except OSError as error:
            self._broken(target, str(error))

    def _send(self, target: _Target) -> None:
        target.is_sent = True
        target.sent_at = time.monotonic()
        target.due = target.sent_at + STEP_TIMEOUT_S
        data = target.line.head
        if target.line.tunnel is not None:
            target.line.tunnel.seal(data)
            data = target.line.take_outgoing()
        try:
            # Some 100 bytes, or with the end of a handshake a few KB; and nothing else was ever
            # left unsent: they fit.
            target.line.sock.send(data, socket.MSG_NOSIGNAL)
        except OSError as error:
            self._broken(target, str(error))

    def _read(self, target: _Target) -> None:
        try:
            data = self._receive(target)
        except (OSError, ValueError) as error:  # also what ssl raises
            self._broken(target, str(error))
            return
        if data is None:
            return
        if not target.is_busy:
            self._close(target)  # between probes there is nothing to be said
            return
        if not data and not target.line.odd.has_begun:
            self._broken(target, "the connection ended before an answer")
            return
        if not target.line.odd.has_begun:
            first_byte_s = time.monotonic() - target.sent_at
            target.stats = target.stats._replace(last_first_byte_s=first_byte_s)
        try:
            answer = target.line.odd.feed(data, is_ended=not data, is_written=True)
        except (http.client.HTTPException, ValueError) as error:
            self._fail(target, f"malformed or incomplete answer: {error!r}")
            return
        if answer is None:
            return
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

    def _receive(self, target: _Target) -> bytes | None:
        """Return what came, b"" at the end of the stream; None if that was no part of an answer."""
        data = target.line.sock.recv(READ_BYTES)
        tunnel = target.line.tunnel
        if tunnel is None or not data:
            return data
        if not tunnel.is_established:
            self._shake(target, data)
            return None
        data = tunnel.open(data)
        return data if data or tunnel.is_ended else None  # or it was session tickets

    def _broken(self, target: _Target, reason: str) -> None:
        """Fail, unless the connection was an old one, which may have ended meanwhile."""
        if not target.is_busy or not target.is_reused or target.line.odd.has_begun:
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
            logger.info("peer %s answers probes at %s", format_id(target.peer_id), target.url)

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
        logger.log(level, "probe of peer %s at %s: %s", format_id(target.peer_id), url, reason)

    def _done(self, target: _Target) -> None:
        target.is_busy = False
        target.due = max(target.next_due, time.monotonic())

    def _close(self, target: _Target) -> None:
        if target.is_open:
            target.is_open = False
            self._selector.unregister(target.line.sock)
            target.line.close()
        target.line.odd.clear()


def _says_ok(body: bytes) -> bool:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and answer.get("OK") is True
