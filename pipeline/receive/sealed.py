"""Connections of an https listener: TLS, and one request after the other.

Sans-I/O, like ``odd_request.py``: the receiving loop reads and writes sealed bytes and keeps the
deadlines; here they are deciphered. Of the plain text, a head like the one accepted last on the
connection is recognised by the core, and the body behind it deciphered into the memory that the
message will keep. Everything else is for ``OddRequest``.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipeline.config import ReceiverConfig
from pipeline.net._budget import BodyShare
from pipeline.net.pace import Pace
from pipeline.receive.handlers import Handlers
from pipeline.receive.odd_request import OddRequest, Then
from pipeline.tls import Credentials, not_after, read_certificate
from pipeline.tls.tunnel import tls_reason
from pipeline.wire.answers import Answer, Request, render

if TYPE_CHECKING:
    from pipeline.net._sockets import OwnSocket

__all__ = ["Sealed", "SealedServer", "SealedSocket"]

#: The plain text of one record (RFC 8446 section 5.1), which is what one read gives at most.
_RECORD_BYTES = 16 * 1024
#: Records deciphered at once, and requests looked at: each takes some 3 us, or some 300, and
#: others wait meanwhile. What the loop reads at once has four, unless somebody makes them small.
_RECORDS_MAX = 64
#: Read from a detached connection at once.
_READ_BYTES = 256 * 1024
#: What Go's server says to a caller that speaks plain HTTP.
_NOT_TLS = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"


class KnownHead(Protocol):
    """A head that was accepted, in the core."""

    def match(self, data: bytes, /) -> tuple[int, int] | None:
        """Return the lengths of head and body if ``data`` starts with one like it, else None."""


class Body(Protocol):
    """Memory for a body, in the core; no memory is taken before bytes arrive."""

    def __len__(self) -> int: ...

    @property
    def missing(self) -> int:
        """How many bytes have not arrived."""

    def append(self, data: bytes, /) -> None:
        """Add what has arrived."""

    def read_from(self, read: Callable[..., Any], /) -> int:
        """Have ``read(n, buffer)`` fill some of what is missing; how much it was."""

    def count(self) -> bool:
        """Count what has arrived in the budget; False when there is no room for it."""


class SealedServer:
    """What the https connections of a listener share. Thread-safe.

    Parameters
    ----------
    handlers : Handlers
    config : ReceiverConfig
    credentials : Credentials
        Each connection takes those in force, and ends when they are replaced.
    make_head : callable
        The core's, of a head's bytes. It raises ``ValueError`` for a head that the core does not
        recognise.
    """

    def __init__(
        self,
        handlers: Handlers,
        config: ReceiverConfig,
        credentials: Credentials,
        *,
        make_head: Callable[[bytes], KnownHead],
    ) -> None:
        self.handlers = handlers
        self.config = config
        self.credentials = credentials
        self.make_head = make_head
        self._no_content = (0, b"")  # of which second; replaced as a whole

    def render(self, answer: Answer | None) -> bytes:
        """Write an answer; None is 204, which is made once a second."""
        if answer is not None:
            return render(answer)
        second, data = self._no_content
        now = int(time.time())
        if now != second:
            data = render(self.handlers.no_content())
            self._no_content = (now, data)
        return data


class SealedNews(NamedTuple):
    """What happened on a connection; see ``ReceiverStats``."""

    #: Bytes of a body, for ``min_body_rate``: what TLS and framing add to them does not count.
    arrived: int = 0

    fast_requests: int = 0
    general_requests: int = 0
    handshakes: int = 0
    handshake_failures: int = 0


_NO_NEWS = SealedNews()


class Sealed:
    """One connection, from its handshake to its end.

    Parameters
    ----------
    server : SealedServer
    remote : object
        Shows ``ip:port`` in logs.
    make_body : callable
        The core's, of a body's size. It raises ``MemoryError`` without address space.

    Notes
    -----
    Used by one thread at a time. Nothing here waits; a handshake takes the CPU for about a
    millisecond, and no call for more than a few, whatever was sent: ``Then.TURN`` says that there
    is more to do of it. A request ends where its framing says. When the connection ends before,
    with a close_notify or without, its message is answered 400.
    """

    def __init__(
        self, server: SealedServer, remote: object, make_body: Callable[[int], Body]
    ) -> None:
        credentials = server.credentials
        self._generation = credentials.generation  # first: if they are replaced now, we are old
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = credentials.server_context.wrap_bio(
            self._incoming, self._outgoing, server_side=True
        )
        self._server = server
        self._make_body = make_body
        self._handlers = server.handlers
        self._remote = remote
        self._certificate: Mapping[str, Any] | None = None
        self._is_shaken = False
        self._has_ended = False  # the caller's close_notify was read
        self._plain = b""  # deciphered and not used
        self._is_idle = False  # nothing has come since the handshake or the last request
        self._due: Then | None = None  # how to go on once what comes before is written
        self._odd: OddRequest | None = None  # reads the request
        self._then = Then.READ_HEAD  # the last instruction of ``_odd``
        self._skip = 0  # bytes of a refused request, before the next one
        self._head: KnownHead | None = None  # the last one that was accepted
        self._request = Request("", "", {}, remote)  # that head, parsed
        self._sender = 0  # whom that head names
        self._body: Body | None = None  # of a request that was recognised
        self._news = _NO_NEWS
        #: Whether the caller has shown a certificate that lets it in, or its last request was let
        #: past: who the connection takes turns with.
        self.is_member = False

    def feed(self, data: bytes | memoryview) -> tuple[bytes, Then]:
        """Take bytes of the connection, or none after ``Then.AGAIN``.

        Returns
        -------
        (bytes, Then)
            What to write, and how to go on then. With ``Then.DELIVER`` and ``Then.DETACH`` there
            is nothing to write.
        """
        if data:
            self._incoming.write(data)
        if self._due is not None:
            due, self._due = self._due, None
            return b"", due
        try:
            then = self._go_on()
        except ssl.SSLError as error:
            then = self._fail(error)
        out = self._outgoing.read()
        if out and then in (Then.DELIVER, Then.DETACH):
            self._due, then = then, Then.AGAIN
        return out, then

    def answer(self, answer: Answer | None) -> tuple[bytes, Then]:
        """Answer the message that was delivered; returns as ``feed``. None is 204."""
        if self._is_old():
            answer = replace(answer or self._handlers.no_content(), close=True)
        if self._odd is None:
            self._tls.write(self._server.render(answer))
            then = Then.CLOSE if answer is not None and answer.close else Then.NEXT
            self._end_request()
        else:
            out, then = self._odd.answer(answer)
            self._tls.write(out)
            then = self._follow(self._odd, then)
        if then is Then.CLOSE:
            return self.end()
        is_more = self._plain or self._incoming.pending or self._tls.pending()
        return self._outgoing.read(), Then.AGAIN if is_more else Then.IDLE

    def broken(self) -> tuple[bytes, Then]:
        """Hear that the rest of the request will not come; returns as ``feed``."""
        then = self._break_off()
        return self._outgoing.read(), then

    def end(self) -> tuple[bytes, Then]:
        """End the connection in good order; returns as ``feed``."""
        then = self._say_goodbye()
        return self._outgoing.read(), then

    @property
    def sender(self) -> int:
        """Whom the request's X-Server-From names; 0 for nobody."""
        return self._sender if self._odd is None else self._odd.sender

    @property
    def share(self) -> BodyShare:
        """What the body of ``take_body`` counts with, if OddRequest has read it."""
        assert self._odd is not None
        return self._odd.share

    def take_body(self) -> Body | bytearray:
        """Return the body, which is the caller's now, and so is what it counts with."""
        if self._odd is not None:
            return self._odd.take_body()
        body, self._body = self._body, None
        assert body is not None
        return body

    def detach(self, sock: OwnSocket) -> tuple[SealedSocket, OddRequest]:
        """Go on without the loop, after ``Then.DETACH``: a connection, and who read the head."""
        odd = self._odd
        assert odd is not None
        return SealedSocket(sock, self._tls, self._incoming, self._outgoing), odd

    def take_news(self) -> SealedNews:
        """Return what happened since the last call."""
        news, self._news = self._news, _NO_NEWS
        return news

    def close(self) -> None:
        """Let go of the request, and of all that was taken for it."""
        self._due = None
        if self._odd is not None:
            self._odd.close()
            self._odd = None
        self._body = None

    # -- TLS

    def _go_on(self) -> Then:
        """Go on with what has come. Raises ``SSLError``."""
        if not self._is_shaken:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                return Then.HANDSHAKE
            if not self._let_in():
                return self._say_goodbye()
        for _ in range(_RECORDS_MAX):
            if self._body is not None:
                then = self._read_body(self._body)
            elif self._odd is not None:
                then = self._read_odd(self._odd)
            else:
                then = self._read_head()
            if then is not Then.NEXT:
                return then
        return Then.TURN

    def _let_in(self) -> bool:
        """Look at who has shaken hands; whether it may stay.

        The rules are applied after the handshake, for ssl refuses no certificate that is valid:
        the caller sees the end of the connection where etcd's sees an alert.
        """
        self._is_shaken = self._is_idle = True
        try:
            self._certificate = read_certificate(self._tls)
        except ssl.SSLError as error:
            self._refuse(tls_reason(error))
            return False
        if self._certificate is not None:
            reason = self._server.credentials.refusal(self._certificate)
            # Of a resumed session the certificate was verified when the session was made. OpenSSL
            # resumes by session ID in TLS 1.2, which Python cannot forbid.
            if self._tls.session_reused and not_after(self._certificate) < time.time():
                reason = "certificate has expired"
            if reason:
                self._refuse(reason)
                return False
        self.is_member = self._certificate is not None
        self._news = self._news._replace(handshakes=self._news.handshakes + 1)
        return True

    def _fail(self, error: ssl.SSLError) -> Then:
        """End a connection that TLS has given up. There may be an alert to be written."""
        if self._is_shaken:
            self._break_off()
        elif isinstance(error, ssl.SSLCertVerificationError):
            self._refuse(error.verify_message)
        else:
            self._refuse(error.reason or str(error))
            if error.reason == "HTTP_REQUEST":
                self._outgoing.read()  # an alert, which the caller does not understand
                self._outgoing.write(_NOT_TLS)
        return Then.CLOSE

    def _refuse(self, reason: str) -> None:
        self._news = self._news._replace(handshake_failures=self._news.handshake_failures + 1)
        self._handlers.handshake_failed(self._remote, reason)

    def _is_old(self) -> bool:
        return self._generation != self._server.credentials.generation

    def _read(self) -> bytes:
        """Decipher what has come, up to one record; nothing when there is no more, or the end."""
        if not (self._incoming.pending or self._tls.pending()):
            return b""
        try:
            data: bytes = self._tls.read(_RECORD_BYTES)
        except ssl.SSLWantReadError:  # a part of a record, or one that is TLS's own
            self._is_idle = False
            return b""
        self._has_ended = not data
        return data

    def _say_goodbye(self) -> Then:
        """Put a close_notify behind what is to be written."""
        self.close()
        if self._is_shaken:
            # It is written in any case; the caller's own, or an error before, is all there is
            # to hear of.
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
        return Then.CLOSE

    # -- plain text

    def _read_head(self) -> Then:
        """Begin with a request, if there is one: then NEXT."""
        data = self._plain or self._read()
        if not data:
            if self._has_ended or self._is_old():
                return self._say_goodbye()
            return Then.IDLE if self._is_idle and not self._skip else Then.READ_HEAD
        if self._skip:
            self._plain = data[self._skip :]
            self._skip -= min(self._skip, len(data))
            return Then.NEXT
        found = None if self._head is None else self._head.match(data)
        if found is None or not self._is_accepted(*found):
            self._plain = data
            self._then = Then.READ_HEAD
            self._odd = OddRequest(
                self._handlers,
                self._server.config,
                self._remote,
                self._learn,
                certificate=self._certificate,
            )
            self._news = self._news._replace(general_requests=self._news.general_requests + 1)
            return Then.NEXT
        head_len, size = found
        try:
            self._body = self._make_body(size)
        except MemoryError:  # no room in the address space
            self._tls.write(render(self._handlers.overloaded(self._request.remote)))
            return self._say_goodbye()
        self._body.append(data[head_len : head_len + size])
        self._plain = data[head_len + size :]
        self.is_member = True
        self._news = self._news._replace(fast_requests=self._news.fast_requests + 1)
        return Then.NEXT

    def _is_accepted(self, head_len: int, size: int) -> bool:
        """Tell whether a head like the known one needs no further look."""
        return (
            head_len <= self._server.config.max_head_bytes
            and size <= self._server.config.max_body_bytes
            and self._handlers.check_member(self._request) is None
        )

    def _learn(self, head: bytes, sender: int) -> bool:
        assert self._odd is not None
        try:
            self._head = self._server.make_head(head)
        except ValueError:
            return False
        self._request = self._odd.request
        self._sender = sender
        return True

    def _read_body(self, body: Body) -> Then:
        """Decipher a body to where it will stay."""
        came = len(body)
        is_busy = False
        for _ in range(_RECORDS_MAX):
            is_busy = bool(body.missing and (self._incoming.pending or self._tls.pending()))
            if not is_busy:
                break
            try:
                self._has_ended = body.read_from(self._tls.read) == 0
            except ssl.SSLWantReadError:
                is_busy = False
                break
            if self._has_ended:
                return self._break_off()
        self._count_arrived(len(body) - came)
        if not body.count():
            self._tls.write(render(self._handlers.overloaded(self._request.remote)))
            return self._say_goodbye()
        if not body.missing:
            return Then.DELIVER
        return Then.TURN if is_busy else Then.READ_BODY

    def _read_odd(self, odd: OddRequest) -> Then:
        """Give the odd request what has come; NEXT when there may be more to do."""
        data = b""
        if self._then is not Then.TURN:
            data, self._plain = self._plain or self._read(), b""
            if not data:
                return self._break_off() if self._has_ended else self._then
        out, then = odd.feed(data)
        if out:
            self._tls.write(out)
        self._count_arrived(odd.arrived)
        odd.arrived = 0
        if odd.is_member is not None:
            self.is_member = odd.is_member
        return self._follow(odd, then)

    def _count_arrived(self, n: int) -> None:
        self._news = self._news._replace(arrived=self._news.arrived + n)

    def _follow(self, odd: OddRequest, then: Then) -> Then:
        """Do what an odd request has answered; NEXT when there may be more to do."""
        if then is Then.CLOSE:
            return self._say_goodbye()
        if then is Then.NEXT:
            self._plain, self._skip = odd.rest, odd.skip
            self._end_request()
            if self._outgoing.pending:
                # Of what was sent ahead one request at a time: others take turns, and the next
                # head has a time of its own.
                return Then.AGAIN
        elif then in (Then.READ_HEAD, Then.READ_BODY, Then.TURN):
            self._then = then
            return then if then is Then.TURN else Then.NEXT
        return then

    def _end_request(self) -> None:
        self.close()
        self._is_idle = True

    def _break_off(self) -> Then:
        """Answer a request that will not be whole, if TLS still lets us."""
        out = b""
        if self._odd is not None:
            out, _ = self._odd.broken()
        elif self._body is not None:
            out = render(self._handlers.read_failed(self._request.remote))
        if out:
            with contextlib.suppress(ssl.SSLError):
                self._tls.write(out)
        return self._say_goodbye()


class SealedSocket:
    """A connection that has left the loop: a socket whose bytes are deciphered.

    Blocks as the timeout says. Used by one thread; another one may ``shutdown`` reading, or both
    directions.
    """

    def __init__(
        self,
        sock: OwnSocket,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        self._sock = sock
        self._tls = tls
        # The stubs know no read into a buffer, which returns how much it was.
        self._read: Callable[..., Any] = tls.read
        self._incoming = incoming
        self._outgoing = outgoing
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._timeout_s = 0.0
        self._is_said = False  # our close_notify
        self._pace = Pace()

    def recv_into(self, buffer: memoryview, /) -> int:
        """Read some bytes, of 64 records at most; 0 at the end, with a close_notify or without.

        ``TimeoutError`` also when all that has come in that time is a part of a record, or no plain
        text. After ``shutdown(SHUT_WR)`` what is read means nothing.
        """
        if self._is_said:
            return self._sock.recv_into(buffer)
        deadline = time.monotonic() + self._timeout_s
        n = 0
        while n == 0:
            records = 0
            while records < _RECORDS_MAX:
                if n == len(buffer) or not (self._incoming.pending or self._tls.pending()):
                    break
                try:
                    got = self._read(len(buffer) - n, buffer[n:])
                except ssl.SSLWantReadError:
                    break
                if got == 0:
                    return n
                n += got
                records += 1
            self._pace.took(records, n)
            self._flush()  # an answer of TLS's own, to an update of the keys
            if n == 0:
                if time.monotonic() > deadline:
                    raise TimeoutError
                got = self._sock.recv_into(self._buffer)
                if got == 0:
                    break
                self._incoming.write(self._buffer[:got])
        return n

    def sendall(self, data: bytes, _flags: int = 0, /) -> None:
        """Write all of ``data``, as ``MSG_NOSIGNAL`` does."""
        self._tls.write(data)
        self._flush()

    def settimeout(self, value: float, /) -> None:
        """Let reading and writing wait for so many seconds."""
        self._timeout_s = value
        self._sock.settimeout(value)

    def shutdown(self, how: int, /) -> None:
        """Shut the socket; for ``SHUT_WR`` with a close_notify first."""
        if how == socket.SHUT_WR:
            self._say_goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close the socket, after a close_notify if there is room for it."""
        with contextlib.suppress(OSError):
            self._sock.setblocking(False)
            self._say_goodbye()
        self._sock.close()

    def _say_goodbye(self) -> None:
        if not self._is_said:
            self._is_said = True
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._sock.sendall(self._outgoing.read(), socket.MSG_NOSIGNAL)
