"""Dialling: from a host and a port to a connected socket, for messages, snapshots and probes.

With TLS the handshake is a part of it, in the same thread, which lets go of the GIL for it: whoever
is given a socket may send.

The poller waits for all connects, so a host that swallows what is sent to it costs no thread. Names
are looked up by ``getaddrinfo``, which blocks and cannot be ended, so each look-up has a thread of
its own for as long as it takes; a name is looked up once at a time, for all who wait for it. The
addresses of a name are raced (RFC 8305): the next one is tried when those before it have failed,
or have not answered in 250 ms, and the first that connects wins.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any, TypeAlias, TypeVar

from urllib3.util.connection import allowed_gai_family

from pipeline.errors import STOPPED
from pipeline.logs import get_logger
from pipeline.names import literal_address, show_address
from pipeline.net._sockets import OwnSocket, open_socket
from pipeline.net.poller import READABLE, WRITABLE, Poller
from pipeline.threads import LibraryThread
from pipeline.tls._engine import TLSError
from pipeline.tls.credentials import HANDSHAKE_TIMEOUT_S, Credentials

__all__ = ["Dial", "DialError", "Dialer"]

logger = get_logger(__name__)

#: Until the next address of a name is tried beside those before it; RFC 8305 section 8.
ATTEMPT_DELAY_S = 0.25
#: Names that are looked up at once. A cluster has 3 to 7 members, and up to 16 remotes are
#: learned; so a name that hangs keeps none of theirs waiting.
LOOKUPS_MAX = 32
#: Names of which the address that answered last is remembered, and hosts that are addresses.
REMEMBERED_MAX = 1024

#: As of ``getaddrinfo``: family, and address with the port.
Found: TypeAlias = tuple[int, tuple[Any, ...]]


T = TypeVar("T")


class DialError(OSError):
    """No connection; the text says why, of each address that was tried."""


class Dial:
    """One way to a host: its name, its addresses, the first that connects.

    Parameters
    ----------
    host : str
        As in a URL: a name, or an address; IPv6 in brackets or not, with a zone or not.
    port : int
    timeout_s : float
        For all of it, the name included.
    options : sequence
        Arguments of ``setsockopt`` for each socket.
    on_done : callable
        Called with this once it has ended, by the poller: it must neither block nor raise.
    credentials : Credentials, optional
        For TLS.
    handshake_timeout_s : float, optional
        For the handshake, from the connect on; ``HANDSHAKE_TIMEOUT_S`` without it.

    Notes
    -----
    Made, then given to :meth:`Dialer.begin`. What it came to is for one thread to take.
    """

    __slots__ = (
        "_came_to",
        "_is_unwanted",
        "_on_done",
        "_options",
        "addresses",
        "attempts",
        "began_at",
        "credentials",
        "deadline",
        "failure",
        "failures",
        "handshake_timeout_s",
        "host",
        "is_done",
        "is_resolved",
        "is_room_wanted",
        "next_at",
        "port",
        "securing",
        "timeout_s",
        "tls_began_at",
        "tls_s",
        "took_s",
    )

    def __init__(
        self,
        host: str,
        port: int,
        timeout_s: float,
        options: Sequence[tuple[int, int, int | bytes]],
        on_done: Callable[[Dial], object],
        *,
        credentials: Credentials | None = None,
        handshake_timeout_s: float | None = None,
    ) -> None:
        self.host = host.strip("[]")
        self.port = port
        self.timeout_s = timeout_s
        self.began_at = time.monotonic()
        self.deadline = self.began_at + timeout_s
        #: Set last, when it has ended.
        self.is_done = False
        #: Seconds it took to connect, or until it was given up.
        self.took_s = 0.0
        #: Seconds of the TLS handshake; None without one.
        self.tls_s: float | None = None
        self.credentials = credentials
        self.handshake_timeout_s = (
            HANDSHAKE_TIMEOUT_S if handshake_timeout_s is None else handshake_timeout_s
        )
        self._options = options
        self._on_done = [on_done]  # popped, and so called, by the one who ends the dial
        self._came_to: list[OwnSocket] = []  # the socket, until whoever pops it
        #: Why there is no connection, once it has ended; empty if there is one.
        self.failure = ""
        self._is_unwanted = False
        # The poller's thread's own.
        self.is_resolved = False
        self.addresses: deque[Found] = deque()  # not tried yet
        self.attempts: dict[OwnSocket, Found] = {}  # under way
        self.failures: list[str] = []
        self.next_at = math.inf  # when the next address is tried
        self.securing: OwnSocket | None = None  # connected, and shaking hands
        self.is_room_wanted = False  # the handshake goes on when there is room to write
        self.tls_began_at = 0.0

    def take(self) -> OwnSocket:
        """Return the connected socket, which is the caller's now and does not block.

        Raises
        ------
        DialError
            If there is none.
        """
        try:
            return self._came_to.pop()
        except IndexError:
            raise DialError(self.failure) from None

    def discard(self) -> None:
        """Close what it came to, if nobody has taken it, or will come to."""
        self._is_unwanted = True
        with contextlib.suppress(IndexError):
            self._came_to.pop().close()

    # What follows is for the dialler.

    def connect(self, found: Found) -> OwnSocket:
        """Begin to connect to an address. Raises ``OSError``."""
        family, address = found
        sock = open_socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            for option in self._options:
                sock.setsockopt(*option)
            with contextlib.suppress(BlockingIOError):  # EINPROGRESS
                sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    def begin_tls(self, sock: OwnSocket, credentials: Credentials) -> None:
        """Go on to the handshake, on a connected socket. Raises ``TLSError``."""
        self.tls_began_at = time.monotonic()
        self.deadline = self.tls_began_at + self.handshake_timeout_s
        self.next_at = math.inf
        self.addresses.clear()
        self.securing = sock
        credentials.poll()
        name = credentials.name_of(self.host)
        sock.tls = credentials.client_context.session(sock.fileno(), name)

    def finish(self, sock: OwnSocket | None, failure: str = "") -> None:
        """End it with a socket or with a failure; only the first end counts."""
        try:
            on_done = self._on_done.pop()
        except IndexError:
            return
        self.failure = failure
        if sock is not None:
            self._came_to.append(sock)
        if not self.took_s:
            self.took_s = time.monotonic() - self.began_at
        if self._is_unwanted:  # by now
            self.discard()
        self.is_done = True
        logger.survive("the end of a dial was not told", on_done, self)


class Dialer:
    """Dials for all of a node.

    Parameters
    ----------
    poller : Poller
        Waits for it.

    Notes
    -----
    ``begin`` and ``cancel`` are thread-safe, also for a signal handler, and do not block. The
    threads that look names up are daemons, ``pipeline-resolve-<host>``. One that hangs outlives
    the dialer, and nobody waits for it.
    """

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._has_ended = False
        # The poller's thread's own.
        self._dials: dict[Dial, None] = {}  # not ended, in the order they began
        self._waiting: dict[str, dict[Dial, None]] = {}  # by the name they wait for
        self._lookups = 0  # under way
        self._lookups_due: deque[str] = deque()  # names for which there is no thread yet
        self._answered: dict[tuple[str, int], Found] = {}  # last, of names with several addresses
        self._literals: dict[tuple[str, int], list[Found]] = {}  # of hosts that are addresses
        poller.attach(self)

    def begin(self, dial: Dial) -> None:
        """Begin to dial."""
        self._poller.ask(partial(self._begin, dial))

    def cancel(self, dial: Dial) -> None:
        """End a dial, soon, with ``stopped``; nothing if it has ended."""
        if not dial.is_done:
            self._poller.ask(partial(self._fail, dial, STOPPED))

    # What follows runs in the poller's thread.

    def next_due(self) -> float:
        """When a dial ends for want of time, or goes on to its next address."""
        return min((min(d.next_at, d.deadline) for d in self._dials), default=math.inf)

    def check_time(self, now: float) -> None:
        """End dials for want of time, or go on to their next address."""
        for dial in list(self._dials):
            if now >= dial.deadline:
                self._fail(dial, self._lateness(dial))
            elif now >= dial.next_at:
                self._connect_next(dial)

    def end(self) -> None:
        """End every dial with ``stopped``, and those that come later."""
        self._has_ended = True
        for dial in list(self._dials):
            self._fail(dial, STOPPED)

    # -- names

    def _begin(self, dial: Dial) -> None:
        if dial.is_done:  # cancelled
            return
        if self._has_ended:
            self._fail(dial, STOPPED)
            return
        self._dials[dial] = None
        literal = self._literal(dial.host, dial.port)
        if literal is not None:
            self._race((dial,), literal, dial.port)
            return
        if dial.host not in self._waiting:
            self._waiting[dial.host] = {}
            self._lookups_due.append(dial.host)
        self._waiting[dial.host][dial] = None
        self._start_lookups()

    def _literal(self, host: str, port: int) -> list[Found] | str | None:
        """Return what a host that is an address stands for; None if it is a name."""
        found: list[Found] | str | None = self._literals.get((host, port))
        if found is None and literal_address(host) is not None:
            # Asks nobody; the kernel's number for a zone, which may change, is in the answer.
            found = _look_up(host, port, socket.AI_NUMERICHOST)
            if isinstance(found, list) and "%" not in host:
                _remember(self._literals, (host, port), found)
        return found

    def _start_lookups(self) -> None:
        while self._lookups_due and self._lookups < LOOKUPS_MAX:
            host = self._lookups_due.popleft()
            if not self._waiting[host]:
                del self._waiting[host]  # nobody has waited for it that long
                continue
            port = next(iter(self._waiting[host])).port
            thread = LibraryThread(self._resolve, f"pipeline-resolve-{host}", (host, port))
            try:
                thread.start()
            except RuntimeError as error:  # no more threads to be had
                self._race(self._waiting.pop(host), str(error), port)
            else:
                self._lookups += 1

    def _resolve(self, host: str, port: int) -> None:
        """Look a name up; in a thread of its own."""
        found = _look_up(host, port)
        self._poller.ask(partial(self._resolved, host, found, port))

    def _resolved(self, host: str, found: list[Found] | str, port: int) -> None:
        if self._has_ended:
            return
        self._lookups -= 1
        waiting = self._waiting.pop(host)
        self._start_lookups()
        self._race(waiting, found, port)

    # -- addresses

    def _race(self, dials: Iterable[Dial], found: list[Found] | str, port: int) -> None:
        """Try the addresses of a host for all who wait for it; or tell them why there are none.

        It was looked up with ``port``; another one takes its place in the addresses.
        """
        for dial in dials:
            if isinstance(found, str):
                self._fail(dial, f"cannot resolve {dial.host!r}: {found}")
                continue
            dial.is_resolved = True
            addresses = _interleaved(
                found
                if dial.port == port
                else ((family, (host, dial.port, *more)) for family, (host, _, *more) in found)
            )
            last = self._answered.get((dial.host, dial.port))
            if last is not None and last in addresses:
                addresses.remove(last)
                addresses.insert(0, last)
            dial.addresses.extend(addresses)
            self._connect_next(dial)

    def _connect_next(self, dial: Dial) -> None:
        """Try the next address; end the dial when there is none and none is under way."""
        dial.next_at = math.inf
        while dial.addresses:
            found = dial.addresses.popleft()
            try:
                sock = dial.connect(found)
                try:
                    self._poller.watch(sock, WRITABLE, partial(self._connected, dial, sock))
                except BaseException:
                    sock.close()
                    raise
            except OSError as error:
                dial.failures.append(_reason(found, error))
                continue
            dial.attempts[sock] = found
            if dial.addresses:
                dial.next_at = time.monotonic() + ATTEMPT_DELAY_S
            return
        if not dial.attempts:
            self._fail(dial, "; ".join(dial.failures))

    def _connected(self, dial: Dial, sock: OwnSocket) -> None:
        """Take what an attempt came to."""
        found = dial.attempts[sock]
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._forget(dial, sock)
        if error:
            sock.close()
            dial.failures.append(_reason(found, OSError(error, os.strerror(error))))
            self._connect_next(dial)
            return
        is_one_of_several = bool(dial.addresses or dial.attempts or dial.failures)
        dial.took_s = time.monotonic() - dial.began_at
        if dial.credentials is not None:
            self._forget_attempts(dial)
            self._begin_tls(dial, sock, dial.credentials)
        else:
            self._end(dial)
            dial.finish(sock)
        if is_one_of_several:
            self._answers(dial.host, dial.port, found)

    def _answers(self, host: str, port: int, found: Found) -> None:
        """Try this address first from now on, and at once for who waits for others."""
        _remember(self._answered, (host, port), found)
        for dial in list(self._dials):
            if (dial.host, dial.port) == (host, port) and found in dial.addresses:
                dial.addresses.remove(found)
                dial.addresses.appendleft(found)
                self._connect_next(dial)

    # -- TLS

    def _begin_tls(self, dial: Dial, sock: OwnSocket, credentials: Credentials) -> None:
        shake = partial(self._shake, dial, sock, credentials)
        try:
            self._poller.watch(sock, READABLE, shake)
        except OSError as error:
            sock.close()
            self._fail(dial, f"TLS handshake: {error}")
            return
        try:
            dial.begin_tls(sock, credentials)
        except TLSError as error:
            self._fail(dial, f"TLS handshake: {error}")
        else:
            shake()

    def _shake(self, dial: Dial, sock: OwnSocket, credentials: Credentials) -> None:
        """Go on with the handshake, as far as it goes without a wait."""
        assert sock.tls is not None
        try:
            if not sock.tls.shake():
                if sock.tls.wants_to_write != dial.is_room_wanted:
                    dial.is_room_wanted = sock.tls.wants_to_write
                    events = WRITABLE if dial.is_room_wanted else READABLE
                    shake = partial(self._shake, dial, sock, credentials)
                    self._poller.rewatch(sock, events, shake)
                return
            credentials.check_server(sock.tls)
        except OSError as error:  # also a TLSError
            self._fail(dial, f"TLS handshake: {error.strerror or error}")
            return
        dial.tls_s = time.monotonic() - dial.tls_began_at
        self._poller.unwatch(sock)
        dial.securing = None
        self._end(dial)
        dial.finish(sock)

    def _lateness(self, dial: Dial) -> str:
        if dial.securing is not None:
            return "TLS handshake: not done within its timeout"
        if not dial.is_resolved:
            return f"dial timeout: {dial.host!r} was not resolved in {dial.timeout_s:g} s"
        silent = ", ".join(show_address(*address[:2]) for _, address in dial.attempts.values())
        failures = "".join(f"; {failure}" for failure in dial.failures)
        return f"dial timeout: no answer from {silent} in {dial.timeout_s:g} s{failures}"

    def _fail(self, dial: Dial, reason: str) -> None:
        if not dial.is_done:
            self._end(dial)
            dial.finish(None, reason)

    def _end(self, dial: Dial) -> None:
        """Forget a dial, and close what it has tried."""
        self._dials.pop(dial, None)
        self._waiting.get(dial.host, {}).pop(dial, None)
        self._forget_attempts(dial)
        sock, dial.securing = dial.securing, None
        if sock is not None:
            self._poller.unwatch(sock)
            sock.close()

    def _forget_attempts(self, dial: Dial) -> None:
        for sock in list(dial.attempts):
            self._forget(dial, sock)
            sock.close()

    def _forget(self, dial: Dial, sock: OwnSocket) -> None:
        del dial.attempts[sock]
        self._poller.unwatch(sock)


def _remember(known: dict[tuple[str, int], T], key: tuple[str, int], value: T) -> None:
    """Put a value in, as the latest, and let the oldest go if there are too many."""
    known.pop(key, None)
    known[key] = value
    if len(known) > REMEMBERED_MAX:
        del known[next(iter(known))]


def _look_up(host: str, port: int, flags: int = 0) -> list[Found] | str:
    """Ask ``getaddrinfo`` for the addresses of a host; in words, why there are none."""
    try:
        found = socket.getaddrinfo(
            host, port, allowed_gai_family(), socket.SOCK_STREAM, socket.IPPROTO_TCP, flags
        )
        return [(family, address) for family, _, _, _, address in found] or "no address"
    except Exception as error:  # a UnicodeError is one as well, and whatever a substitute raises
        text = error.strerror if isinstance(error, OSError) else None
        return text or str(error) or type(error).__name__


def _interleaved(found: Iterable[Found]) -> list[Found]:
    """Return the addresses with their families in turn, the first one's first; each once.

    Source: RFC 8305 section 4.
    """
    families: dict[int, list[Found]] = {}
    for each in dict.fromkeys(found):
        families.setdefault(each[0], []).append(each)
    turns = chain.from_iterable(zip_longest(*families.values()))
    return [each for each in turns if each is not None]


def _reason(found: Found, error: OSError) -> str:
    return f"{show_address(*found[1][:2])}: {error.strerror or error}"
