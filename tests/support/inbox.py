"""A node with an inbox, and members that post to it by hand."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline import Entry, Inbox, Message, MessageType, Transport, TransportConfig
from pipeline.receive.listener import Listener
from tests.support import LONG_TIMEOUT, SHORT_TIMEOUT
from tests.support.http import CLUSTER_ID, peer_headers
from tests.support.listening import ANY, dial, raw_head, read_answers, read_status
from tests.support.waiting import eventually

HEARTBEAT, APP, PROP, SNAP = (
    MessageType.HEARTBEAT,
    MessageType.APP,
    MessageType.PROP,
    MessageType.SNAP,
)


class Reports:
    """A node that has an inbox: it has no ``process``."""

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None: ...

    def report_snapshot(self, member_id: int, status: object) -> None: ...


def body_of(kind: int, index: int = 0, *, size: int = 0, member: int = 1) -> bytes:
    """Encode a message with ``size`` bytes in an entry."""
    entries = [Entry(data=bytes(size))] if size else []
    return Message(type=kind, from_=member, to=2, term=1, index=index, entries=entries).marshal()


def request_of(body: bytes, member: int = 1) -> bytes:
    """Return a whole request of a member."""
    headers = peer_headers(x_server_from=f"{member:x}")
    return raw_head(f"content-length: {len(body)}", headers=headers) + body


class Caller:
    """A member, over one connection."""

    def __init__(
        self, url: str, member: int = 1, tls: ssl.SSLContext | None = None, *, source: str = ""
    ) -> None:
        self.member = member
        self.sock: socket.socket = dial(url, source=source)
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname="127.0.0.1")

    def post(self, kind: int, index: int = 0, *, size: int = 0) -> None:
        """Send a message; the answer is to be read."""
        self.sock.sendall(
            request_of(body_of(kind, index, size=size, member=self.member), self.member)
        )

    def status(self) -> int | None:
        """Wait for the answer."""
        return read_status(self.sock)

    def ask(self, kind: int, index: int = 0, *, size: int = 0) -> int | None:
        """Send a message and wait for the answer."""
        self.post(kind, index, size=size)
        return self.status()

    def answers(self, count: int) -> list[bytes]:
        """Wait for so many answers."""
        return read_answers(self.sock, count)

    def is_answered(self) -> bool:
        """Tell whether an answer has come, or comes in a moment."""
        return bool(select.select([self.sock], [], [], SHORT_TIMEOUT)[0])

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def receiving(
    inbox: Inbox[Any],
    config: TransportConfig | None = None,
    url: str = ANY,
    peers: Iterable[int] = (),
    **settings: Any,
) -> Iterator[tuple[Transport, Listener]]:
    """Run a node that receives into an inbox; settings are Transport's.

    With TLS only the heads of peers are the core's: who is no peer may want to be a remote.
    """
    with Transport(2, CLUSTER_ID, Reports(), inbox=inbox, config=config, **settings) as transport:
        for peer in peers:
            transport.add_peer(peer, ["http://127.0.0.1:9"])
        yield transport, transport.listen(url)


def wait_until_waiting(inbox: Inbox[Any], count: int) -> None:
    """Wait until so many requests are not answered."""
    eventually(lambda: inbox.stats().waiting == count, lambda: f"{count} wait: {inbox.stats()}")


def take_exactly(inbox: Inbox[Any], count: int, batch: int = 256) -> list[Any]:
    """Take until there are so many messages; fails if none comes for long."""
    taken: list[Any] = []
    while len(taken) < count:
        messages = inbox.take(min(batch, count - len(taken)), LONG_TIMEOUT)
        assert messages, f"{len(taken)} of {count}: {inbox.stats()}"
        taken += messages
    return taken


def indexes(messages: list[Any]) -> list[int]:
    return [message.index for message in messages]


def assert_books(inbox: Inbox[Any]) -> None:
    """Nothing is queued, nobody waits, and what was received has become of something."""
    wait_until_waiting(inbox, 0)  # who was let in is counted a moment later
    stats = inbox.stats()
    assert (stats.queued, stats.queued_bytes) == (0, 0), stats
    assert stats.received == stats.taken + stats.dropped, stats


class Running:
    """A function in a thread, and what it returned or raised."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            self.result = function(*args)
        except BaseException as error:
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> Any:
        """Wait for the result."""
        self._thread.join(LONG_TIMEOUT)
        assert not self._thread.is_alive(), "it does not return"
        if self.error is not None:
            raise self.error
        return self.result
