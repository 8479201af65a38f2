"""The receiver's general path: whatever is not the one request the core recognises.

Sans-I/O: the receiving loop reads and writes, h11 parses, ``handlers.py`` answers. What h11 is
lenient about is refused before it (RFC 9112 sections 2.2, 5.1, 5.2, 6.1): bare CR or LF, folded
lines, space before a colon, control characters, two lengths, a length beside a transfer coding.
"""

from __future__ import annotations

import enum
import re
import threading
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import h11

from pipeline.config import ReceiverConfig
from pipeline.handlers import Answer, Handlers, Request
from pipeline.protocol import SNAPSHOT_PATH

__all__ = ["BodyBudget", "General", "Then", "render"]

_HEAD = re.compile(
    rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [!-~]+ HTTP/1\.[01]\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n"
)
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LENGTH = re.compile(rb"\r\nContent-Length[ \t]*:([^\r]*)", re.IGNORECASE)
_DIGITS = re.compile(rb"[ \t]*[0-9]+[ \t]*")
_CODING = re.compile(rb"\r\nTransfer-Encoding[ \t]*:", re.IGNORECASE)

#: etcd's requests have about ten headers.
HEADERS_MAX = 100
#: Of a refused request so much of the body is read to keep the connection, as Go does.
DRAIN_MAX = 256 * 1024


class Then(enum.IntEnum):
    """How the loop goes on with a connection (``_conn.pxd``, THEN_*)."""

    NEXT = 0
    CLOSE = 1
    READ_HEAD = 2
    READ_BODY = 3
    #: A whole body: have it decoded and processed, then call ``General.answer``.
    DELIVER = 4
    #: The connection leaves the loop, with ``General.request`` and ``General.http``.
    DETACH = 5
    # From here on for sealed connections only.
    HANDSHAKE = 7
    #: Answered, and the next request has not begun.
    IDLE = 8
    #: Write what there is and call ``Sealed.feed`` once more.
    AGAIN = 9


class BodyBudget:
    """Bytes that the bodies on the general path may hold together. Thread-safe."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes
        self._lock = threading.RLock()

    def take(self, n: int) -> bool:
        """Take ``n`` bytes; False when there are not so many left."""
        with self._lock:
            if n > self._left:
                return False
            self._left -= n
            return True

    def give(self, n: int) -> None:
        """Give ``n`` bytes back."""
        with self._lock:
            self._left += n


class General:
    """One connection, for one request.

    Parameters
    ----------
    handlers : Handlers
    config : ReceiverConfig
    remote : object
        Shows ``ip:port`` in logs.
    budget : BodyBudget
        Shared by all connections.
    learn : callable
        Called with the bytes of a head that may be followed by a message for Raft; tells whether
        the core will recognise it from now on. Then the core takes the request over.
    certificate : mapping, optional
        The caller's, of a connection with TLS.

    Attributes
    ----------
    request : Request
        Once its head has been read.
    body : bytearray
        What is to be processed when ``feed`` returns ``Then.DELIVER``.
    rest : bytes
        What has been read and not used when the connection goes on with ``Then.NEXT``.
    request : Request
        The head, once it is whole.
    http : h11.Connection
        Has read the head, and holds what came with it. Of ``Then.DETACH`` the caller's.

    Notes
    -----
    Used by one thread at a time. Nothing here blocks.
    """

    def __init__(
        self,
        handlers: Handlers,
        config: ReceiverConfig,
        remote: object,
        budget: BodyBudget,
        learn: Callable[[bytes], bool],
        *,
        certificate: Mapping[str, Any] | None = None,
    ) -> None:
        self.body = bytearray()
        self.rest = b""
        self._handlers = handlers
        self._config = config
        self._remote = remote
        self._certificate = certificate
        self._budget = budget
        self._learn = learn
        self.http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=max(config.max_head_bytes, 8192)
        )
        self._head = b""
        self._first = b""  # the head and what came with it
        self._is_head_whole = False
        self.request = Request("", "", {}, remote, certificate)
        self._is_message = False  # a message for Raft; otherwise answered before its body
        self._seen = 0  # bytes of the body
        self._taken = 0  # of the budget
        self._out: list[bytes] = []

    def feed(self, data: bytes) -> tuple[bytes, Then]:
        """Take bytes of the connection; return what to write and how to go on."""
        try:
            then = self._feed(data)
        except h11.RemoteProtocolError:
            if self._is_message:
                then = self._send_answer(self._handlers.read_failed(self.request), close=True)
            else:
                then = self._send_answer(_bad_request(), close=True)
        return self._take_out(), then

    def broken(self) -> tuple[bytes, Then]:
        """Hear that the rest of the request will not come; returns as ``feed``."""
        if self._is_message:
            self._send_answer(self._handlers.read_failed(self.request), close=True)
        return self._take_out(), Then.CLOSE

    def answer(self, answer: Answer | None) -> tuple[bytes, Then]:
        """Answer the message that was to be delivered; returns as ``feed``. None is 204."""
        answer = answer or self._handlers.no_content()
        then = self._send_answer(answer, close=answer.close)
        return self._take_out(), then

    def take_body(self) -> bytearray:
        """Return the body, which is the caller's now; it counts in the budget until ``close``."""
        body, self.body = self.body, bytearray()
        return body

    def close(self) -> None:
        """Let go of the body and of its place in the budget."""
        self._budget.give(self._taken)
        self._taken = 0
        self.body = bytearray()

    def _feed(self, data: bytes) -> Then:
        if not self._is_head_whole:
            seen = len(self._head)
            self._head += data
            end = self._head.find(b"\r\n\r\n") + 4
            self._is_head_whole = end >= 4
            head = bytes(self._head[:end] if self._is_head_whole else self._head)
            refusal = self._check_head(head, seen)
            if refusal is not None:
                return self._send_answer(refusal, close=True)
            if not self._is_head_whole:
                return Then.READ_HEAD
            data = self._first = bytes(self._head)
            self._head = head
        self.http.receive_data(data)
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    self._send(
                        h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                    )
                return Then.READ_BODY
            then = self._on_event(event)
            if then is not None:
                return then

    def _check_head(self, head: bytes, seen: int) -> Answer | None:
        """Refuse a head that is not to be shown to h11, as soon as that can be told.

        ``seen`` bytes of it were looked at before: to do so again for each byte of a head that
        comes so would take seconds of this thread. Only a CR at their end was let pass unseen.
        """
        if _BARE.search(head, max(seen - 1, 0)):
            return _bad_request()
        if len(head) > self._config.max_head_bytes or head.count(b"\n") > HEADERS_MAX + 2:
            return self._handlers.head_too_large()
        if not self._is_head_whole:
            return None
        lengths = _LENGTH.findall(head)
        is_framed_once = len(lengths) + len(_CODING.findall(head)) <= 1
        is_number = all(map(_DIGITS.fullmatch, lengths))
        if not (_HEAD.fullmatch(head) and is_framed_once and is_number):
            return _bad_request()
        # 18 digits: no longer number is worth converting.
        if lengths and len(lengths[0].strip()) > 18:
            return self._handlers.body_too_large(self.request)
        return None

    def _on_event(self, event: object) -> Then | None:
        if isinstance(event, h11.Request):
            return self._on_request(event)
        if isinstance(event, h11.Data):
            return self._on_data(bytes(event.data))
        assert isinstance(event, h11.EndOfMessage)
        return Then.DELIVER if self._is_message else self._go_on()

    def _on_request(self, event: h11.Request) -> Then | None:
        headers: dict[str, str] = {}
        for name, value in event.headers:
            headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
        path, _, _ = event.target.decode("ascii").partition("?")
        method = event.method.decode("ascii")
        self.request = Request(method, path, headers, self._remote, self._certificate)
        answer = self._handlers.check(self.request, can_detach=True)
        if answer is None and path == SNAPSHOT_PATH:
            if self._handlers.snapshots.begin():
                return Then.DETACH
            answer = self._handlers.too_many_snapshots(self.request)
        if answer is None:
            if self._handlers.is_learnable(self.request) and self._learn(self._head):
                self.rest = self._first
                return Then.NEXT
            self._is_message = True
            return None
        # What a refused request still sends is read, if it is little, to keep the connection; the
        # loop reads on for a moment, so that a sender hears the answer and not of a broken pipe.
        is_long = int(headers.get("content-length", "0")) > DRAIN_MAX
        close = answer.close or is_long or self.http.they_are_waiting_for_100_continue
        then = self._send_answer(answer, close=close)
        return then if then is Then.CLOSE else None

    def _on_data(self, data: bytes) -> Then | None:
        self._seen += len(data)
        if self._is_message and self._seen > self._config.max_body_bytes:
            return self._send_answer(self._handlers.body_too_large(self.request), close=True)
        if not self._is_message:
            return Then.CLOSE if self._seen > DRAIN_MAX else None
        if not self._budget.take(len(data)):
            return self._send_answer(self._handlers.overloaded(self.request), close=True)
        self._taken += len(data)
        self.body += data
        return None

    def _send_answer(self, answer: Answer, *, close: bool) -> Then:
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return Then.CLOSE  # answered already
        response = h11.Response(
            status_code=answer.status,
            headers=_headers(answer, close=close),
            reason=_phrase(answer.status).encode("ascii"),
        )
        self._send(response)
        if answer.body and answer.status not in (204, 304) and self.request.method != "HEAD":
            self._send(h11.Data(data=answer.body))
        self._send(h11.EndOfMessage())
        return Then.CLOSE if close else self._go_on()

    def _go_on(self) -> Then:
        """Tell how, now that we have answered."""
        if self.http.our_state is not h11.DONE:
            return Then.CLOSE
        if self.http.their_state is not h11.DONE:
            return Then.READ_BODY
        self.rest = self.http.trailing_data[0]
        return Then.NEXT

    def _send(self, event: h11.Event) -> None:
        self._out.append(self.http.send(event) or b"")

    def _take_out(self) -> bytes:
        out = b"".join(self._out)
        self._out.clear()
        return out


def render(answer: Answer) -> bytes:
    """Write an answer to a request the core recognised."""
    lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}"]
    lines += [f"{name}: {value}" for name, value in _headers(answer, close=answer.close)]
    body = b"" if answer.status in (204, 304) else answer.body
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _headers(answer: Answer, *, close: bool) -> list[tuple[str, str]]:
    headers = [*answer.headers, ("Date", formatdate(usegmt=True))]
    if answer.status not in (204, 304):
        headers.append(("Content-Length", str(len(answer.body))))
    if close:
        headers.append(("Connection", "close"))
    return headers


def _bad_request() -> Answer:
    headers = (
        ("Content-Type", "text/plain; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
    )
    return Answer(400, headers, b"Bad Request\n", close=True)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
