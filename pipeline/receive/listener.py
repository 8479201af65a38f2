"""Listener: a node's handlers on TCP ports of their own, served by the compiled receiver."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

from urllib3.util import parse_url

from pipeline.arguments import require_iterable, require_number
from pipeline.config import ReceiverConfig
from pipeline.errors import UsageError
from pipeline.forks import disown
from pipeline.locks import lock_of
from pipeline.logs import get_logger
from pipeline.names import is_wildcard, show_address
from pipeline.net._sockets import OwnSocket, open_socket
from pipeline.receive._receiver import Receiver
from pipeline.receive.detached import BegunRequest
from pipeline.receive.handlers import Connections, Handlers
from pipeline.stats import ReceiverStats
from pipeline.threads import LibraryThread, require_real_threads
from pipeline.tls.credentials import Credentials
from pipeline.wire.protocol import SNAPSHOT_PATH
from pipeline.wire.urls import parse_urls

__all__ = ["Listener"]

logger = get_logger(__name__)

#: Ports that are tried for several addresses of a name: each is free at the first of them.
PORT_TRIES = 100

_all: weakref.WeakSet[Listener] = weakref.WeakSet()  # for fork


class Listener:
    """Where peers reach a node, from ``Transport.listen`` to ``close``. Also a context manager.

    Attributes
    ----------
    url : str
        Where it is served, with the real port; of several the first one given.
    urls : tuple of str
        All of them, in the order given.

    Notes
    -----
    Connections are accepted from the beginning. ``ReceiverConfig.handlers`` Python threads
    (``pipeline-handler-<port>-<n>``, daemons) call Raft. One that has nothing to do reads, decodes
    and writes for all connections, without the GIL; when none is free, a native thread does. One
    more (``pipeline-odd-<port>``) sees to everything that is not a message, and to TLS handshakes.
    With an inbox there are no handler threads, and the native thread does it all.
    Of several handler threads one is never given a MsgProp: proposals may wait for a leader, and a
    leader is elected by messages. Thread-safe.
    """

    def __init__(
        self,
        handlers: Handlers,
        urls: str | Iterable[str],
        config: ReceiverConfig,
        credentials: Credentials | None = None,
        listeners: list[Listener] | None = None,
    ) -> None:
        """Accept connections from when this returns.

        Parameters
        ----------
        handlers : Handlers
            What is served.
        urls : str or iterable of str
            ``http://host:port`` or ``https://host:port``. All addresses of a name are listened at.
            Port 0 takes one that is free at all of them. ``[::]`` takes IPv4 as well.
        config : ReceiverConfig
            Limits and timeouts.
        credentials : Credentials, optional
            What ``https`` is served with; connections end when they are replaced.
        listeners : list, optional
            It is one of them from before it accepts until it is closed.

        Raises
        ------
        UsageError
            If a URL is not valid, neither ``http`` nor ``https``, or ``https`` without credentials.
        OSError
            If a name cannot be resolved, an address cannot be bound, or there are no descriptors
            left: the text has URL and address. If ``config.snapshot_dir`` cannot be made.
        """
        require_real_threads()
        if isinstance(urls, str):
            urls = (urls,)
        # One by one, for parse_urls sorts.
        given = [parse_urls((url,), "url")[0] for url in require_iterable("url", urls, "URLs")]
        if not given:
            raise UsageError("url: at least one URL is needed")
        for url in given:
            if not url.startswith(("http://", "https://")):
                raise UsageError(f"url: {url!r}: only http and https can be listened on")
            if url.startswith("https://") and credentials is None:
                raise UsageError(f"url: {url!r}: https needs a TLSInfo")
        self._snapshots: Connections | None = None
        if handlers.snapshots is not None:
            handlers.snapshots.prepare()
            self._snapshots = handlers.snapshots.connections()
        # Not a method: the receiver is to go with the listener, also when that cannot be made.
        take = partial(_take, handlers, self._snapshots)
        self._receiver = Receiver(handlers, config, handlers.cluster_header, take, credentials)
        bound = _bind(given, config.max_connections)
        ports = [sockets[0].getsockname()[1] for sockets in bound]
        if self._snapshots is not None:
            self._snapshots.name = f"pipeline-snapshot-{ports[0]}"
        self.urls = tuple(
            f"{url.rpartition(':')[0]}:{port}" for url, port in zip(given, ports, strict=True)
        )
        self.url = self.urls[0]
        self._lock = lock_of(self)  # one close at a time
        self._is_closed = False
        self._is_over = False
        self._credentials = credentials
        self._listeners = [] if listeners is None else listeners
        # With an inbox nobody is called.
        handler_threads = config.handlers if handlers.source is None else 0
        self._threads = [
            LibraryThread(self._receiver.serve, f"pipeline-handler-{ports[0]}-{n}")
            for n in range(handler_threads)
        ]
        self._threads.append(
            LibraryThread(self._receiver.serve, f"pipeline-odd-{ports[0]}", (True,))
        )
        listening: dict[bool, list[OwnSocket]] = {False: [], True: []}
        for url, sockets in zip(given, bound, strict=True):
            listening[url.startswith("https://")] += sockets
        try:
            self._listeners.append(self)  # before it runs: whoever closes all of them finds it
            self._receiver.start(listening[False], listening[True])
            for thread in self._threads:
                thread.start()
            if credentials is not None:
                credentials.subscribe(self._retire)
            _all.add(self)
            atexit.register(self.close)
        except BaseException:  # no more threads, or Ctrl-C: those that run end with the receiver
            self._close_again()
            raise
        if self._is_closed:  # meanwhile, by who found it among the others: not all of it ran yet
            self._close_again()

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    def stats(self) -> ReceiverStats:
        """Return what was received and what had to be limited."""
        return self._receiver.stats()

    def close(self, deadline_s: float = 1.0) -> None:
        """Stop accepting, let running requests finish, close every connection.

        Parameters
        ----------
        deadline_s : float
            A request not answered within this many seconds has its connection closed. A call of
            ``raft.process`` that blocks even longer keeps its thread until it returns. A snapshot
            that is still arriving is not waited for: it is ended at once, and its file removed.

        Notes
        -----
        When it returns the ports are free. Streams that peers have got through it go on: they carry
        what the node sends, and are the node's. A second call does what the first, if it was
        interrupted, has not done, and nothing after it. Called from ``raft.process``, it does not
        wait for requests: that call's own could not end first.
        """
        require_number("deadline_s", deadline_s, 0.0, 86400.0)
        # A handler thread that closes its own listener is not waited for: it cannot end first.
        is_own = threading.current_thread() in self._threads
        if self._is_over or (is_own and self._is_closed):
            return
        self._is_closed = True
        deadline = time.monotonic() + deadline_s
        with self._lock:
            self._receiver.begin_close()
            if self._snapshots is not None:
                self._snapshots.begin_close()
            # The last tenth is for idle threads to end in.
            is_whole = self._receiver.wait_closed(0.0 if is_own else 0.9 * deadline_s)
            if self._snapshots is not None:
                is_whole &= self._snapshots.wait_closed(deadline - 0.1 * deadline_s)
            if not is_whole:
                text = "listener at %s closed with requests unanswered"
                logger.warning(text, self.url, url=self.url, reason="process blocks")
            deadline = max(deadline, time.monotonic() + 0.05)
            for thread in self._threads:
                thread.wait_ended(deadline)
            atexit.unregister(self.close)
            if self._credentials is not None:
                self._credentials.unsubscribe(self._retire)
            with contextlib.suppress(ValueError):  # a signal's handler came in between
                self._listeners.remove(self)
            self._is_over = True

    def _close_again(self) -> None:
        self._is_over = False
        self.close(0.0)

    def _retire(self) -> None:
        # Closed also in a forked child, where the receiver's lock may be held for ever.
        if not self._is_closed:
            self._receiver.retire()

    def _forget_after_fork(self) -> None:
        is_open, self._is_closed = not self._is_closed, True
        self._is_over = True
        self._receiver.forget_after_fork()
        if self._snapshots is not None:
            self._snapshots.forget_after_fork()
        if is_open:
            atexit.unregister(self.close)
            disown(self, "listener", ("stats", "__enter__"))

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _take(
    handlers: Handlers,
    snapshots: Connections | None,
    connection: OwnSocket,
    begun: BegunRequest,
) -> None:
    """Hand on a connection that has left the loop. Does not block."""
    if begun.request.path != SNAPSHOT_PATH:
        assert handlers.streams is not None  # or it would have been refused
        handlers.streams.take(connection, begun)
    else:
        assert snapshots is not None
        snapshots.take(connection, begun)


def _bind(urls: Iterable[str], backlog: int) -> list[list[OwnSocket]]:
    """Listen before the loop runs: from here on nobody is refused. One list for each URL."""
    with contextlib.ExitStack() as undo:
        bound: list[list[OwnSocket]] = []
        for url in urls:
            bound.append(_bind_url(url, backlog))
            for sock in bound[-1]:
                undo.enter_context(sock)
        undo.pop_all()
    return bound


def _bind_url(url: str, backlog: int) -> list[OwnSocket]:
    """Listen at all addresses of the URL's host, at one port.

    Differs from etcd: Go's ``net.Listen`` takes one address of a name, and who resolves the name
    to the other one is refused.
    """
    parsed = parse_url(url)
    host = cast(str, parsed.host).strip("[]")  # parse_urls has seen to it
    try:
        found = socket.getaddrinfo(
            host, parsed.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
    except UnicodeError as error:
        raise UsageError(f"url: {url!r}: {host!r} is not a host name: {error}") from error
    except OSError as error:
        raise _blame(error, f"cannot listen at {url}: {host!r} cannot be resolved") from error
    # A name may be given twice in /etc/hosts.
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _ in range(PORT_TRIES):
        sockets = _bind_addresses(url, addresses, backlog)
        if sockets:
            return sockets
    raise OSError(
        errno.EADDRINUSE, f"cannot listen at {url}: no port is free at all of its addresses"
    )


def _bind_addresses(
    url: str, addresses: Sequence[tuple[int, tuple[Any, ...]]], backlog: int
) -> list[OwnSocket]:
    """Listen at the addresses; empty if a port that the kernel chose for one is taken at another.

    What of a name is no address of this machine is passed over, unless nothing is left: where the
    kernel has no IPv6, ``localhost`` may be ``::1`` all the same.
    """
    sockets: list[OwnSocket] = []
    absent: list[tuple[int, str]] = []  # no errors: they would hold this frame, and it them
    chosen: int | None = None
    with contextlib.ExitStack() as undo:
        for family, (host, port, *more) in addresses:
            try:
                sock = _bind_address(family, (host, chosen or port, *more), backlog)
            except OSError as error:
                if chosen is not None and error.errno == errno.EADDRINUSE:
                    return []
                what = f"cannot listen at {url} ({show_address(host, port)})"
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _blame(error, what) from error
                absent.append((error.errno, f"{what}: {error.strerror}"))
                continue
            sockets.append(undo.enter_context(sock))
            if port == 0:
                chosen = sock.getsockname()[1]
        if not sockets:
            raise OSError(*absent[0])
        undo.pop_all()
    for _, text in absent:
        logger.warning("%s", text, url=url, reason=text)
    return sockets


def _bind_address(family: int, address: tuple[Any, ...], backlog: int) -> OwnSocket:
    sock = open_socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # The port of a listener just closed is free although its connections linger.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Both are inherited by what is accepted. An answer is one write, not to be delayed;
        # a caller that is gone is found even when it is not expected to speak.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if family == socket.AF_INET6:
            is_dual = is_wildcard(address[0])  # [::] takes IPv4 as well, as Go's does
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _blame(error: OSError, what: str) -> OSError:
    """Return an error of the same class and number that says what it is about."""
    text = f"{what}: {error.strerror or error}"
    if error.errno is None:
        return OSError(text)
    return (socket.gaierror if isinstance(error, socket.gaierror) else OSError)(error.errno, text)


def _after_fork_in_child() -> None:
    for listener in list(_all):
        listener._forget_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
