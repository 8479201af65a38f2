"""Listener: a node's handlers on TCP ports of their own, served by the compiled receiver."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable

from urllib3.util import parse_url

from pipeline._receiver import OwnSocket, Receiver, ReceiverStats, open_socket
from pipeline.arguments import require_iterable, require_number
from pipeline.config import ReceiverConfig
from pipeline.errors import UsageError
from pipeline.handlers import Handlers
from pipeline.logs import get_logger
from pipeline.picker import parse_urls
from pipeline.snapshot_connections import SnapshotConnections
from pipeline.tls import Credentials

__all__ = ["Listener"]

logger = get_logger(__name__)

_all: weakref.WeakSet[Listener] = weakref.WeakSet()  # for fork


class Listener:
    """Serve ``handlers`` at one or more URLs until ``close``. Also a context manager.

    Parameters
    ----------
    handlers : Handlers
        What is served.
    urls : str or iterable of str
        ``http://host:port`` or ``https://host:port``; port 0 takes a free one. ``[::]`` takes
        IPv4 as well.
    config : ReceiverConfig
        Limits and timeouts.
    credentials : Credentials, optional
        What ``https`` is served with; connections end when they are replaced.

    Attributes
    ----------
    url : str
        Where it is served, with the real port; of several the first one given.
    urls : tuple of str
        All of them, in the order given.

    Raises
    ------
    UsageError
        If a URL is not valid, neither ``http`` nor ``https``, or ``https`` without credentials.
    OSError
        If an address cannot be bound, there are no descriptors left, or ``config.snapshot_dir``
        cannot be made.

    Notes
    -----
    When the constructor returns, connections are accepted. ``config.handlers`` Python threads
    (``pipeline-handler-<port>-<n>``, daemons) call Raft. One that has nothing to do reads, decodes
    and writes for all connections, without the GIL; when none is free, a native thread does. One
    more (``pipeline-general-<port>``) sees to everything that is not a message, and to TLS. Of
    several handler threads one is never given a MsgProp: proposals may wait for a leader, and a
    leader is elected by messages. Thread-safe.
    """

    def __init__(
        self,
        handlers: Handlers,
        urls: str | Iterable[str],
        config: ReceiverConfig,
        credentials: Credentials | None = None,
    ) -> None:
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
        if handlers.snapshots.store is not None:
            handlers.snapshots.store.prepare()
        self._snapshots = SnapshotConnections(handlers, config)
        self._receiver = Receiver(
            handlers, config, handlers.cluster_header, self._snapshots.take, credentials
        )
        sockets = _bind(given, config.max_connections)
        ports = [sock.getsockname()[1] for sock in sockets]
        self._snapshots.name = f"pipeline-snapshot-{ports[0]}"
        self.urls = tuple(
            f"{url.rpartition(':')[0]}:{port}" for url, port in zip(given, ports, strict=True)
        )
        self.url = self.urls[0]
        self._lock = threading.Lock()  # one close at a time
        self._is_closed = False
        self._threads = [
            threading.Thread(
                target=self._receiver.serve, name=f"pipeline-handler-{ports[0]}-{n}", daemon=True
            )
            for n in range(config.handlers)
        ]
        self._threads.append(
            threading.Thread(
                target=self._receiver.serve,
                args=(True,),
                name=f"pipeline-general-{ports[0]}",
                daemon=True,
            )
        )
        listening: dict[bool, list[int]] = {False: [], True: []}
        for url, sock in zip(given, sockets, strict=True):
            listening[url.startswith("https://")].append(sock.detach())
        self._receiver.start(listening[False], listening[True])
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no more threads: those that run end with the receiver
            self._receiver.begin_close()
            self._receiver.wait_closed(0.0)
            raise
        if credentials is not None:
            # They outlive us.
            this = weakref.ref(self)

            def retire() -> None:
                # Closed also in a forked child, where the receiver's lock may be held for ever.
                if (listener := this()) is not None and not listener._is_closed:
                    listener._receiver.retire()

            credentials.subscribe(retire)
        _all.add(self)
        atexit.register(self.close)

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
        When it returns the ports are free. A second call does nothing. Called from
        ``raft.process``, it does not wait for requests: that call's own could not end first.
        """
        require_number("deadline_s", deadline_s, 0.0, 86400.0)
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            deadline = time.monotonic() + deadline_s
            self._receiver.begin_close()
            self._snapshots.begin_close()
            # A handler thread that closes its own listener is not waited for: it cannot end first.
            is_own = threading.current_thread() in self._threads
            # The last tenth is for idle threads to end in.
            is_whole = self._receiver.wait_closed(0.0 if is_own else 0.9 * deadline_s)
            if not self._snapshots.wait_closed(deadline - 0.1 * deadline_s) or not is_whole:
                logger.warning("listener at %s closed with requests unanswered", self.url)
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(max(0.05, deadline - time.monotonic()))
            atexit.unregister(self.close)

    def _forget_after_fork(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = True
        self._receiver.forget_after_fork()
        self._snapshots.forget_after_fork()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bind(urls: Iterable[str], backlog: int) -> list[OwnSocket]:
    """Listen before the loop runs: from here on nobody is refused."""
    sockets: list[OwnSocket] = []
    try:
        for url in urls:
            parsed = parse_url(url)
            assert parsed.host is not None  # parse_urls has seen to it
            host = parsed.host.strip("[]")
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, parsed.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )[0]
            sock = open_socket(family, kind, protocol)
            sockets.append(sock)
            # The port of a listener just closed is free although its connections linger.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Both are inherited by what is accepted. An answer is one write, not to be delayed;
            # a caller that is gone is found even when it is not expected to speak.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
            sock.bind(address)
            sock.listen(backlog)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _after_fork_in_child() -> None:
    for listener in list(_all):
        listener._forget_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
