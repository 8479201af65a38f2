"""Connections of an https listener: TLS, and one request after the other.

Sans-I/O, like ``general.py``: the receiving loop reads and writes sealed bytes and keeps the
deadlines; here they are deciphered. Of the plain text, heads that were accepted before on the
connection are recognised by the core, and the bodies behind them deciphered into the memory that
the message will keep. Everything else is ``General``'s.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from pipeline.config import ReceiverConfig
from pipeline.general import BodyBudget, General, Then, render
from pipeline.handlers import Answer, Handlers, Request
from pipeline.tls import Credentials

__all__ = ["Sealed", "SealedNews"]

#: The plain text of one record (RFC 8446 section 5.1), which is what one read gives at most.
_RECORD_BYTES = 16 * 1024
#: Bodies up to this size are not counted in the budget: they are heartbeats and votes, and as few
#: as connections.
_SMALL_BYTES = 64 * 1024
#: As Go's server says to who speaks plain HTTP to it.
_NOT_TLS = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"


class SealedNews(NamedTuple):
    """What happened on a connection since it was asked last; see ``ReceiverStats``."""

    fast_requests: int
    general_requests: int
    handshakes: int
    handshake_failures: int


_NO_NEWS = SealedNews(0, 0, 0, 0)


class KnownHead(Protocol):
    """A head that was accepted, in the core."""

    def match(self, data: bytes, /) -> tuple[int, int] | None:
        """Return lengths of head and body if ``data`` starts with one like it, else None."""


class Body(Protocol):
    """Memory for a body, in the core; not touched before bytes arrive."""

    def __len__(self) -> int: ...

    @property
    def missing(self) -> int:
        """How many bytes have not arrived."""

    def append(self, data: bytes, /) -> None:
        """Add what has arrived."""

    def read_from(self, read: Callable[[int, memoryview], int], /) -> int:
        """Have ``read`` fill what is missing, or a part of it; how much that was."""


class Sealed:
    """One connection, from its handshake to its end.

    Parameters
    ----------
    handlers : Handlers
    config : ReceiverConfig
    remote : object
        Shows ``ip:port`` in logs.
    budget : BodyBudget
        Shared by all connections.
    credentials : Credentials
        The connection keeps those now in force.
    make_head, make_body : callable
        The core's, of a head's bytes and of a body's size. The first raises ``ValueError`` for
        a head that the core does not recognise.

    Notes
    -----
    Used by one thread at a time. Nothing here blocks; a handshake takes the CPU for about a
    millisecond. Truncation is never the end of a request: a request ends where its framing says,
    and what ends before, with or without a close_notify, is answered 400.
    """

    def __init__(
        self,
        handlers: Handlers,
        config: ReceiverConfig,
        remote: object,
        budget: BodyBudget,
        credentials: Credentials,
        make_head: Callable[[bytes], KnownHead],
        make_body: Callable[[int], Body],
    ) -> None:
        self._handlers = handlers
        self._config = config
        self._remote = remote
        self._budget = budget
        self._credentials = credentials
        self._make_head = make_head
        self._make_body = make_body
        self._generation = credentials.generation  # read first: a rotation between makes it old
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = credentials.server_context.wrap_bio(
            self._incoming, self._outgoing, server_side=True
        )
        self._is_shaken = False
        self._has_ended = False  # the caller's close_notify was read
        self._certificate: Mapping[str, Any] | None = None
        self._plain = b""  # deciphered and not used
        self._is_fresh = False  # nothing has come since the last request or the handshake
        self._is_due = False  # a body is to be delivered once what was written before is out
        self._then = Then.READ_HEAD  # what general wants
        self._general: General | None = None  # reads the request
        self._head: KnownHead | None = None  # the one accepted last, of request
        self._request = Request("", "", {}, remote)
        self._body: Body | None = None  # of a request that was recognised
        self._taken = 0  # of the budget
        self._news = _NO_NEWS

    def feed(self, data: bytes | memoryview) -> tuple[bytes, Then]:
        """Take bytes of the connection, or none after ``Then.AGAIN``.

        Returns
        -------
        (bytes, Then)
            What to write, and how to go on then. With ``Then.DELIVER`` there is nothing to write.
        """
        if data:
            self._incoming.write(data)
        if self._is_due:
            self._is_due = False
            return b"", Then.DELIVER
        try:
            then = self._go_on()
        except ssl.SSLError as error:
            then = self._fail(error)
        out = self._outgoing.read()
        if out and then is Then.DELIVER:
            self._is_due = True
            then = Then.AGAIN
        return out, then

    def answer(self, answer: Answer | None) -> tuple[bytes, Then]:
        """Answer the message that was to be delivered; returns as ``feed``. None is 204."""
        if self._generation != self._credentials.generation:
            answer = replace(answer or self._handlers.no_content(), close=True)
        if self._general is not None:
            out, then = self._general.answer(answer)
            self._tls.write(out)
            then = self._after_general(then)
        else:
            self._tls.write(render(answer or self._handlers.no_content()))
            self.close()
            then = Then.CLOSE if answer is not None and answer.close else Then.NEXT
        if then is Then.CLOSE:
            return self.end()
        is_more = self._plain or self._incoming.pending or self._tls.pending()
        return self._outgoing.read(), Then.AGAIN if is_more else Then.IDLE

    def broken(self) -> tuple[bytes, Then]:
        """Hear that the rest of the request will not come; returns as ``feed``."""
        self._cut_off()
        return self._outgoing.read(), Then.CLOSE

    def end(self) -> tuple[bytes, Then]:
        """End the connection in good order; returns as ``feed``."""
        self._say_goodbye()
        return self._outgoing.read(), Then.CLOSE

    def take_body(self) -> Body | bytearray:
        """Return the body, which is the caller's now; it counts in the budget until ``answer``."""
        if self._general is not None:
            return self._general.take_body()
        body, self._body = self._body, None
        assert body is not None
        return body

    def take_news(self) -> SealedNews:
        """Return what happened since the last call."""
        news, self._news = self._news, _NO_NEWS
        return news

    def close(self) -> None:
        """Let go of the request and of its place in the budget."""
        if self._general is not None:
            self._general.close()
            self._general = None
        self._body = None
        if self._taken:
            self._budget.give(self._taken)
            self._taken = 0

    # -- TLS

    def _go_on(self) -> Then:
        """Go on with what has come. Raises ``SSLError``."""
        if not self._is_shaken:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return Then.HANDSHAKE
            if not self._let_in():
                return Then.CLOSE
        while True:
            if self._body is not None:
                then = self._read_body(self._body)
            elif self._general is not None:
                then = self._feed_general(self._general)
            else:
                then = self._read_head()
            if then is not Then.NEXT:
                return then

    def _let_in(self) -> bool:
        """Look at who has shaken hands; False if it is to go.

        The rules are applied when the handshake is over, for ssl lets us refuse no certificate
        that is valid. The caller sees the end of the connection instead of an alert.
        """
        self._is_shaken = self._is_fresh = True
        self._certificate = self._tls.getpeercert() or None
        reason = "" if self._certificate is None else self._credentials.refusal(self._certificate)
        if reason:
            self._refuse(reason)
            self._say_goodbye()
            return False
        self._news = self._news._replace(handshakes=self._news.handshakes + 1)
        return True

    def _fail(self, error: ssl.SSLError) -> Then:
        """End a connection that TLS has given up; an alert may be on its way."""
        if not self._is_shaken:
            self._refuse(error.verify_message if _is_verification(error) else str(error))
            if error.reason == "HTTP_REQUEST":
                self._outgoing.read()  # an alert, which it would not understand
                self._outgoing.write(_NOT_TLS)
        else:
            self._count_broken()
        self.close()
        return Then.CLOSE

    def _refuse(self, reason: str) -> None:
        self._news = self._news._replace(handshake_failures=self._news.handshake_failures + 1)
        self._handlers.handshake_failed(self._remote, reason)

    def _read(self) -> bytes:
        """Decipher what has come, up to one record; empty when there is no more, or the end."""
        while self._incoming.pending or self._tls.pending():
            try:
                data = self._tls.read(_RECORD_BYTES)
            except ssl.SSLWantReadError:
                break
            self._has_ended = not data
            return data
        return b""

    def _say_goodbye(self) -> None:
        """Put a close_notify at the end of what is to be written."""
        self.close()
        if self._is_shaken:
            try:
                self._tls.unwrap()
            except ssl.SSLError:
                pass  # it is written; the caller's own is not waited for

    # -- plain text

    def _read_head(self) -> Then:
        """Begin with the next request, if there is one; NEXT if there is."""
        data = self._plain or self._read()
        if not data:
            if self._has_ended or self._generation != self._credentials.generation:
                self._say_goodbye()
                return Then.CLOSE
            return Then.IDLE if self._is_fresh else Then.READ_HEAD
        match = None if self._head is None else self._head.match(data)
        if match is None or not self._may_be_recognised(*match):
            self._plain = data
            self._is_fresh = False
            self._news = self._news._replace(general_requests=self._news.general_requests + 1)
            self._then = Then.READ_HEAD
            self._general = General(
                self._handlers,
                self._config,
                self._remote,
                self._budget,
                self._learn,
                self._certificate,
            )
            return Then.NEXT
        head_len, size = match
        self._body = self._make_body(size)
        self._body.append(data[head_len : head_len + size])
        self._plain = data[head_len + size :]
        self._news = self._news._replace(fast_requests=self._news.fast_requests + 1)
        return Then.NEXT

    def _may_be_recognised(self, head_len: int, size: int) -> bool:
        """Tell whether what was checked of the head that is known holds for this one, too."""
        return (
            head_len <= self._config.max_head_bytes
            and size <= self._config.max_body_bytes
            and self._handlers.check_member(self._request) is None
        )

    def _read_body(self, body: Body) -> Then:
        """Decipher a body to where it belongs."""
        before = len(body)
        while body.missing and (self._incoming.pending or self._tls.pending()):
            try:
                self._has_ended = body.read_from(self._tls.read) == 0
            except ssl.SSLWantReadError:
                break
            if self._has_ended:
                break
        ...
