"""Credentials: the files of a TLSInfo that are in force, and how others take their place.

Differs from etcd: files are loaded when they change, not at every handshake, and a broken set never
takes the place of a good one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pipeline.arguments import require_instance
from pipeline.config import AnyPath
from pipeline.errors import UsageError
from pipeline.locks import lock_of
from pipeline.logs import get_logger
from pipeline.names import proven_name
from pipeline.threads import LibraryThread
from pipeline.tls._engine import Context, Session, TLSError
from pipeline.tls.info import TLSInfo
from pipeline.tls.rules import can_be_proven, refusal

__all__ = ["HANDSHAKE_TIMEOUT_S", "Credentials"]

logger = get_logger(__name__)

#: A handshake, in either direction, has this long; Go's default.
HANDSHAKE_TIMEOUT_S = 10.0
#: The files are looked at this often.
POLL_INTERVAL_S = 1.0
#: A set that could not be loaded is tried again after this, changed or not: what was wrong may
#: not show in the files' dates, as when descriptors ran out.
RETRY_INTERVAL_S = 10.0


class _Set(NamedTuple):
    """What is made of one state of the files."""

    client_context: Context
    server_context: Context


class _State(NamedTuple):
    """What is in force, and of which state of the files it is, or would be."""

    loaded: _Set
    #: What the files looked like when they were loaded last, with success or without.
    seen: list[tuple[int, ...]]
    #: time.monotonic(); None while the files are those loaded.
    retry_at: float | None = None
    #: Why they could not be loaded, as it was logged.
    failure: str = ""


class Credentials:
    """The loaded files of a :class:`TLSInfo`, replaced as a whole when they change.

    Raises
    ------
    UsageError
        If the files cannot be loaded.

    Notes
    -----
    Thread-safe. ``watch`` starts a thread that polls; without it ``poll`` has to be called.
    """

    def __init__(self, info: TLSInfo) -> None:
        self.info = require_instance("tls", info, TLSInfo)
        self.generation = 0
        self._lock = lock_of(self)  # one load at a time
        self._poll_at = 0.0  # time.monotonic()
        self._subscribers: list[Callable[[], None]] = []
        self._stopping = queue.SimpleQueue[None]()
        self._thread: LibraryThread | None = None
        seen = _seen(info)
        try:
            # Replaced as a whole: a signal's handler may load anew in the middle of a load.
            self._state = _State(_load_unchanged(info, seen), seen)
        except (OSError, ValueError) as error:
            raise UsageError(f"tls: {error}") from error

    @property
    def client_context(self) -> Context:
        """For connections we make."""
        return self._state.loaded.client_context

    @property
    def server_context(self) -> Context:
        """For connections we accept."""
        return self._state.loaded.server_context

    @property
    def not_after(self) -> float:
        """When our certificate expires, seconds since the epoch."""
        return self._state.loaded.client_context.not_after

    def reload(self) -> bool:
        """Load the files again, changed or not. Blocks while they are read.

        Returns
        -------
        bool
            Whether a new set is in force. If the files cannot be loaded that is logged, and the
            last good set stays.
        """
        with self._lock:
            is_loaded = self._load_again()
        if is_loaded:
            self._tell()
        return is_loaded

    def poll(self) -> None:
        """Load the files if they have changed. Looks at them once a second at most."""
        now = time.monotonic()
        if now < self._poll_at or not self._lock.acquire(blocking=False):
            return  # or someone else is at it
        try:
            self._poll_at = now + POLL_INTERVAL_S
            state = self._state
            is_due = state.retry_at is not None and now >= state.retry_at
            is_loaded = (is_due or _seen(self.info) != state.seen) and self._load_again()
        finally:
            self._lock.release()
        if is_loaded:
            self._tell()

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called after each rotation, by the thread that noticed it."""
        self._subscribers.append(callback)

    def unsubscribe(self, callback: Callable[[], None]) -> None:
        """Undo :meth:`subscribe`; nothing if that was done before."""
        with contextlib.suppress(ValueError):
            self._subscribers.remove(callback)

    def name_of(self, host: str) -> str:
        """Return the name that the server at ``host``, of a URL, must prove; also sent as SNI.

        Raises
        ------
        TLSError
            If no certificate can prove it: it is no host's.
        """
        return _name_of(self.info.server_name or host)

    def check_server(self, session: Session) -> None:
        """Apply the rules to the server's certificate, after the handshake that verified it.

        Raises
        ------
        TLSError
            If they refuse it, or it cannot be read.
        """
        refusal = self.refusal(session.certificate or {})
        if refusal:
            raise TLSError(refusal)

    def refusal(self, certificate: Mapping[str, Any]) -> str:
        """Tell why the rules refuse a verified certificate; empty if they do not.

        ``certificate`` is as ``ssl.SSLSocket.getpeercert`` describes it.
        """
        return refusal(self.info, certificate)

    # -- the thread

    def watch(self, name: str) -> None:
        """Poll from a thread of its own, named ``pipeline-tls-<name>``. Once."""
        self._thread = LibraryThread(self._run, f"pipeline-tls-{name}")
        self._thread.start()

    def stop(self, deadline: float) -> None:
        """End the thread; wait for it until ``deadline`` (``time.monotonic()``)."""
        self._stopping.put(None)
        if self._thread is not None:
            self._thread.wait_ended(deadline)

    def forget_after_fork(self) -> None:
        """In a forked child, which has no thread: a later start makes one."""
        self._stopping = queue.SimpleQueue[None]()
        self._thread = None

    def _run(self) -> None:
        while not self._is_stopping(POLL_INTERVAL_S):
            logger.survive("polling TLS files fails", self.poll)

    def _is_stopping(self, timeout_s: float) -> bool:
        try:
            self._stopping.get(timeout=timeout_s)
        except queue.Empty:
            return False
        return True

    # -- loading

    def _load_again(self) -> bool:
        """Replace the set; False, and a line in the log, if it is broken. Under the lock."""
        seen = _seen(self.info)
        try:
            loaded = _load_unchanged(self.info, seen)
        except (OSError, ValueError) as error:
            failure = str(error)
            old = self._state
            self._state = _State(old.loaded, seen, time.monotonic() + RETRY_INTERVAL_S, failure)
            level = logging.DEBUG if failure == old.failure else logging.ERROR
            text = "TLS files not loaded, the last good ones stay: %s"
            logger.log(level, text, failure, reason=failure, verdict="failed")
            return False
        self._state = _State(loaded, seen)
        self.generation += 1
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(loaded.client_context.not_after))
        logger.info("TLS files loaded anew; our certificate is valid until %s", until)
        return True

    def _tell(self) -> None:
        for callback in tuple(self._subscribers):
            logger.survive("a rotation was not followed", callback)


@functools.lru_cache(1024)
def _name_of(host: str) -> str:
    name = proven_name(host)
    if not can_be_proven(name):
        raise TLSError(f"{name!r} is not a name that a certificate can prove")
    return name


def _files(info: TLSInfo) -> Iterable[AnyPath]:
    files = (info.cert_file, info.key_file, info.trusted_ca_file, info.crl_file)
    return (file for file in files if file is not None)


def _seen(info: TLSInfo) -> list[tuple[int, ...]]:
    """Return what shows that a file was replaced or written to, or its permissions changed."""
    seen: list[tuple[int, ...]] = []
    for file in _files(info):
        found: tuple[int, ...] = ()
        with contextlib.suppress(OSError):
            stat = os.stat(file)
            found = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        seen.append(found)
    return seen


def _load_unchanged(info: TLSInfo, seen: list[tuple[int, ...]]) -> _Set:
    loaded = _load(info)
    if _seen(info) != seen:  # half of it may be of one state, half of another
        raise OSError("the files changed while they were read")
    return loaded


def _load(info: TLSInfo) -> _Set:
    """Make a set of the files as they are; OSError or ValueError if one of them is no good."""
    client, server = (
        Context(
            is_server=is_server,
            cert_file=info.cert_file,
            key_file=info.key_file,
            trusted_ca_file=info.trusted_ca_file,
            crl_file=info.crl_file,
            min_version=info.min_version,
            asks_for_certificate=info.client_cert_auth,
        )
        for is_server in (False, True)
    )
    return _Set(client, server)
