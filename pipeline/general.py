"""The receiver's general path: whatever is not the one request the core recognises.

Sans-I/O: the receiving loop reads and writes, h11 parses, ``handlers.py`` answers. What h11 is
lenient about is refused before it (RFC 9112 sections 2.2, 5.1, 5.2, 6.1): bare CR or LF, folded
lines, space before a colon, control characters, two lengths, a length beside a transfer coding.
"""

from __future__ import annotations

import enum
import re
import threading
from http import HTTPStatus

import h11

from pipeline.config import ReceiverConfig
from pipeline.handlers import Answer, Handlers, Request

__all__ = ["BodyBudget", "General", "Then", "render"]

_HEAD = re.compile(
    rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [!-~]+ HTTP/1\.[01]\r\n"
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n"
)
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LENGTH = re.compile(rb"\r\nContent-Length[ \t]*:([^\r]*)", re.IGNORECASE)
_CODING = re.compile(rb"\r\nTransfer-Encoding[ \t]*:", re.IGNORECASE)

#: etcd's requests have about ten headers.
HEADERS_MAX = 100
#: Of a request refused by its head, so much of the body is read to keep the connection (as Go does).
DRAIN_MAX = 256 * 1024


class Then(enum.IntEnum):
    """How the loop goes on with a connection (``_server.pxd``, THEN_*)."""

    NEXT = 0
    CLOSE = 1
    READ_HEAD = 2
    READ_BODY = 3


class BodyBudget:
    """Bytes that the bodies on the general path may hold together. Thread-safe."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes
        self._lock = threading.Lock()

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

    Attributes
    ----------
    is_plain : bool
        The request was a message for Raft whose head was accepted: the core may learn the head.
    rest : bytes
        What has been read behind the request when ``feed`` returns ``Then.NEXT``.

    Notes
    -----
    Used by one thread at a time. ``feed`` blocks as long as ``raft.process`` does.
    """

    def __init__(
        self, handlers: Handlers, config: ReceiverConfig, remote: object, budget: BodyBudget
    ) -> None:
        self.is_plain = False
        self.rest = b""
        self._handlers = handlers
        self._config = config
        self._remote = remote
        self._budget = budget
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=max(config.max_head_bytes, 8192)
        )
        self._head: bytearray | None = bytearray()  # until it is whole
        self._request: Request | None = None
        self._early: Answer | None = None  # waits for the rest of a body that is not wanted
        self._body = bytearray()
        self._seen = 0  # bytes of the body
        self._out: list[bytes] = []

    def feed(self, data: bytes) -> tuple[bytes, Then]:
        """Take bytes of the connection; return what to write and how to go on."""
        self._out.clear()
        try:
            then = self._feed(data)
        except h11.RemoteProtocolError as error:
            then = self._refuse(error)
        if then in (Then.NEXT, Then.CLOSE):
            self.close()
        return b"".join(self._out), then

    def gone(self) -> None:
        """Hear that the connection has ended, in the middle of whatever it was."""
        if self._request is not None and self._early is None:
            self._handlers.read_failed(self._request)
        self.close()

    def close(self) -> None:
        """Give the body's bytes back to the budget."""
        self._budget.give(len(self._body))
        self._body = bytearray()
        self._request = None

    def _feed(self, data: bytes) -> Then:
        if self._head is not None:
            self._head += data
            end = self._head.find(b"\r\n\r\n") + 4
            head = bytes(self._head[:end] if end >= 4 else self._head)
            if _BARE.search(head) or (end >= 4 and not _is_well_formed(head)):
                return self._answer(_bad_request(), close=True)
            if len(head) > self._config.max_head_bytes or head.count(b"\n") > HEADERS_MAX + 2:
                return self._answer(self._handlers.head_too_large(), close=True)
            if end < 4:
                return Then.READ_HEAD
            data, self._head = bytes(self._head), None
        self._http.receive_data(data)
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    self._send(h11.InformationalResponse(status_code=100, headers=[]))
                return Then.READ_BODY
            then = self._on_event(event)
            if then is not None:
                return then

    def _on_event(self, event: h11.Event | type[h11.PAUSED]) -> Then | None:
        if isinstance(event, h11.Request):
            return self._on_request(event)
        if isinstance(event, h11.Data):
            return self._on_data(bytes(event.data))
        assert isinstance(event, h11.EndOfMessage)
        assert self._request is not None
        answer = self._early or self._handlers.deliver(self._request, self._body)
        return self._answer(answer, close=answer.close)

    def _on_request(self, event: h11.Request) -> Then | None:
        headers: dict[str, str] = {}
        for name, value in event.headers:
            headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
        self._request = Request(
            event.method.decode("ascii"), event.target.decode("ascii"), headers, self._remote
        )
        answer = self._handlers.check(self._request)
        if answer is None:
            self.is_plain = True
            return None
        length = headers.get("content-length", "0")
        waits = self._http.they_are_waiting_for_100_continue
        if answer.close or waits or len(length) > 9 or int(length) > DRAIN_MAX:
            return self._answer(answer, close=True)
        self._early = answer
        return None

    def _on_data(self, data: bytes) -> Then | None:
        assert self._request is not None
        self._seen += len(data)
        if self._early is not None:
            if self._seen > DRAIN_MAX:
                return self._answer(self._early, close=True)
            return None
        if self._seen > self._config.max_body_bytes:
            return self._answer(self._handlers.body_too_large(self._request), close=True)
        if not self._budget.take(len(data)):
            return self._answer(self._handlers.overloaded(self._request), close=True)
        self._body += data
        return None

    def _answer(self, answer: Answer, *, close: bool) -> Then:
        headers = [*answer.headers]
        has_body = answer.status not in (204, 304)
        if has_body:
            headers.append(("Content-Length", str(len(answer.body))))
        if close:
            headers.append(("Connection", "close"))
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            phrase = _phrase(answer.status).encode("ascii")
            self._send(h11.Response(status_code=answer.status, headers=headers, reason=phrase))
            is_head = self._request is not None and self._request.method == "HEAD"
            if has_body and answer.body and not is_head:
                self._send(h11.Data(data=answer.body))
            self._send(h11.EndOfMessage())
        if close or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return Then.CLOSE
        self.rest = self._http.trailing_data[0]
        return Then.NEXT

    def _refuse(self, error: h11.RemoteProtocolError) -> Then:
        if error.error_status_hint == 431:
            return self._answer(self._handlers.head_too_large(), close=True)
        if self._request is not None and self._early is None:
            return self._answer(self._handlers.read_failed(self._request), close=True)
        return self._answer(_bad_request(), close=True)

    def _send(self, event: h11.Event) -> None:
        self._out.append(self._http.send(event) or b"")


def render(answer: Answer) -> bytes:
    """Write an answer to a request the core recognised."""
    headers: list[tuple[str, str]] = [*answer.headers]
    if answer.status not in (204, 304):
        headers.append(("Content-Length", str(len(answer.body))))
    if answer.close:
        headers.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + answer.body


def _is_well_formed(head: bytes) -> bool:
    """Tell whether a head is to be shown to h11 at all."""
    lengths = _LENGTH.findall(head)
    if len(lengths) > 1 or (lengths and _CODING.search(head)):
        return False
    if lengths and not re.fullmatch(rb"[ \t]*[0-9]{1,18}[ \t]*", lengths[0]):
        return False
    return _HEAD.fullmatch(head) is not None


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
