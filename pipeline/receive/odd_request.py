"""Odd requests: whatever is not the one request the core recognises.

Sans-I/O: the receiving loop reads and writes, h11 parses, ``handlers.py`` answers. What h11 is
lenient about is refused before it (RFC 9112 sections 2.2, 5.1, 5.2, 6.1): bare CR or LF, folded
lines, space before a colon, control characters, two lengths, a length beside a transfer coding.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import h11

from pipeline.config import ReceiverConfig
from pipeline.errors import without_frames
from pipeline.receive.handlers import Handlers
from pipeline.receive.places import Place
from pipeline.receive.request_body import RequestBody
from pipeline.wire.answers import (
    BODILESS,
    Answer,
    Request,
    header_lines,
    sender_of,
    text_answer,
)
from pipeline.wire.protocol import SNAPSHOT_PATH, STREAM_PREFIX, reason_phrase

__all__ = ["OddRequest", "Then"]

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
#: A refused request keeps its connection if no more than this is left of its body, as with Go. The
#: loop throws the rest away without looking at it.
SKIP_MAX = 256 * 1024


class Then(enum.IntEnum):
    """How the loop goes on with a connection (``_caller.pxd``, THEN_*)."""

    NEXT = 0
    CLOSE = 1
    READ_HEAD = 2
    READ_BODY = 3
    #: A whole body: have it decoded and processed, then call ``OddRequest.answer``.
    DELIVER = 4
    #: The connection leaves the loop, for a snapshot or a stream, with ``OddRequest.request`` and
    #: ``OddRequest.framing``.
    DETACH = 5
    #: There is more to do of what has come. Others have their turn, strangers among them; then
    #: call ``feed`` with nothing.
    TURN = 7
    #: The answer does not end: a byte of it now and then, until the caller goes.
    ENDLESS = 13


class OddRequest:
    """One connection, for one request.

    Parameters
    ----------
    handlers : Handlers
    config : ReceiverConfig
    remote : object
        Shows ``ip:port`` in logs.
    learn : callable
        Called with the bytes of a head that may be followed by a message for Raft, and its sender;
        tells whether the core can recognise it from now on. Then the core takes the request over.
    certificate : mapping, optional
        The caller's, of a connection with TLS.

    Attributes
    ----------
    request : Request
        The head, once it is whole.
    body : bytearray
        What is to be processed when ``feed`` returns ``Then.DELIVER``.
    rest : bytes
        What has been read and not used when the connection goes on with ``Then.NEXT``.
    is_learnt : bool
        Then: nothing is answered, and ``rest`` begins with a head for the core to learn.
    skip : int
        Then bytes to be thrown away before the next request.
    framing : RequestBody
        Of ``Then.DETACH`` the caller's.
    early : bytes
        Of ``Then.DETACH``: what has come behind the head, and ``framing`` has not seen.
    arrived : int
        Bytes of the body since the caller has last set it to 0: what counts for ``min_body_rate``.
    is_member : bool or None
        Whether this request was let past; None before its head is whole, and for what is served
        to anybody. It decides who the connection takes turns with.
    share : BodyShare
        What the body counts with in the budget, until ``close``.
    sender : int
        Whom X-Server-From names; 0 for nobody.

    Notes
    -----
    Used by one thread at a time. Nothing here blocks, and no call does more than some
    milliseconds' work, whatever was sent. A refused request is answered and ended at once: of what
    is left of its body nothing is looked at, and the connection goes on only if its length is
    known and not much.
    """

    def __init__(
        self,
        handlers: Handlers,
        config: ReceiverConfig,
        remote: object,
        learn: Callable[[bytes, int], bool],
        *,
        certificate: Mapping[str, Any] | None = None,
    ) -> None:
        self.body = bytearray()
        self.rest = b""
        self.is_learnt = False
        self.skip = 0
        self.early = b""
        self.arrived = 0
        self.is_member: bool | None = None
        self.request = Request("", "", {}, remote, certificate)
        self.framing: RequestBody | None = None  # once the head is whole
        self._handlers = handlers
        self._config = config
        self._remote = remote
        self._certificate = certificate
        self._learn = learn
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=max(config.max_head_bytes, 8192)
        )
        self._head = bytearray()
        self._lines = 0  # of the head
        self.sender = 0
        self._is_message = False  # a message for Raft; otherwise answered before its body
        self._seen = 0  # bytes of the body
        self.share = handlers.budget.share()
        self._place: Place | None = None  # of a snapshot, until it has left the loop
        self._out: list[bytes] = []

    def feed(self, data: bytes) -> tuple[bytes, Then]:
        """Take bytes of the connection; return what to write and how to go on."""
        try:
            then = self._feed(data)
        except h11.RemoteProtocolError as error:
            without_frames(error)  # h11 raises it from a frame that holds it
            if self._is_message:
                then = self._send_answer(
                    self._handlers.read_failed(self.request.remote), close=True
                )
            else:
                self.is_member = False
                then = self._send_answer(text_answer(400, "Bad Request", close=True), close=True)
        return self._take_out(), then

    def broken(self) -> tuple[bytes, Then]:
        """Hear that the rest of the request will not come; returns as ``feed``."""
        if self._is_message:
            self._send_answer(self._handlers.read_failed(self.request.remote), close=True)
        return self._take_out(), Then.CLOSE

    def answer(self, answer: Answer | None) -> tuple[bytes, Then]:
        """Answer the message that was to be delivered; returns as ``feed``. None is 204."""
        answer = answer or self._handlers.no_content()
        then = self._send_answer(answer, close=answer.close)
        return self._take_out(), then

    def take_body(self) -> bytearray:
        """Return the body, which is the caller's now, and so is what it counts with (``share``)."""
        body, self.body = self.body, bytearray()
        return body

    def move_place(self) -> Place:
        """Hand over the place that was taken for a snapshot, with ``Then.DETACH``. Once."""
        place, self._place = self._place, None
        assert place is not None
        return place

    @property
    def is_http_1_1(self) -> bool:
        """Whether the caller knows chunks."""
        return self._http.their_http_version == b"1.1"

    def close(self) -> None:
        """Let go of the body, of its share of the budget, and of a place that nobody took over."""
        self.share.close()
        if self._place is not None:
            self._place.give_back()
            self._place = None
        self.body = bytearray()

    def _feed(self, data: bytes) -> Then:
        if self.framing is not None:
            return self._read_body(self.framing, data)
        seen = len(self._head)
        self._head += data
        end = self._head.find(b"\r\n\r\n", max(seen - 3, 0)) + 4
        is_whole = end >= 4
        if is_whole:
            data = bytes(self._head[end:])
            del self._head[end:]
        refusal = self._check_head(self._head, seen, is_whole=is_whole)
        if refusal is not None:
            self.is_member = False
            return self._send_answer(refusal, close=True)
        return self._read_head(bytes(self._head), data) if is_whole else Then.READ_HEAD

    def _check_head(self, head: bytearray, seen: int, *, is_whole: bool) -> Answer | None:
        """Refuse a head that is not to be shown to h11, as soon as that can be told.

        ``seen`` bytes of it were looked at before: to do so again for each byte of a head that
        comes so would take seconds of this thread. Only a CR at their end was let pass unseen.
        """
        if _BARE.search(head, max(seen - 1, 0)):
            return text_answer(400, "Bad Request", close=True)
        self._lines += head.count(b"\n", seen)
        if len(head) > self._config.max_head_bytes or self._lines > HEADERS_MAX + 2:
            return self._handlers.head_too_large()
        if not is_whole:
            return None
        lengths = _LENGTH.findall(head)
        is_framed_once = len(lengths) + len(_CODING.findall(head)) <= 1
        is_number = all(map(_DIGITS.fullmatch, lengths))
        if not (_HEAD.fullmatch(head) and is_framed_once and is_number):
            return text_answer(400, "Bad Request", close=True)
        # 18 digits: no longer number is worth converting.
        if lengths and len(lengths[0].strip()) > 18:
            return self._handlers.body_too_large(self.request.remote)
        return None

    def _read_head(self, head: bytes, data: bytes) -> Then:
        """Decide on a request whose head is whole; ``data`` came behind it."""
        self._http.receive_data(head)
        event = self._http.next_event()
        assert isinstance(event, h11.Request)
        headers: dict[str, str] = {}
        for name, value in event.headers:
            headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
        path, _, _ = event.target.decode("ascii").partition("?")
        method = event.method.decode("ascii")
        self.request = Request(method, path, headers, self._remote, self._certificate)
        self.framing = RequestBody(self._http, headers)
        self.sender = sender_of(self.request) or 0
        answer = self._handlers.check(self.request, can_detach=True)
        if answer is None and path == SNAPSHOT_PATH:
            assert self._handlers.snapshots is not None  # or ``check`` would have answered
            self._place = self._handlers.snapshots.take_place()
            if self._place is None:
                answer = self._handlers.too_many_snapshots(self.request.remote)
        if answer is not None:
            return self._answer_at_once(answer, self.framing, data)
        self.is_member = True
        if path == SNAPSHOT_PATH or path.startswith(STREAM_PREFIX):
            self.early = data
            return Then.DETACH
        if self._handlers.is_learnable(self.request) and self._learn(head, self.sender):
            self.rest = head + data
            self.is_learnt = True
            return Then.NEXT
        self._is_message = True
        return self._read_body(self.framing, data)

    def _answer_at_once(self, answer: Answer, framing: RequestBody, data: bytes) -> Then:
        """Answer a request without waiting for its body, which is of no interest.

        The loop reads on for a moment, so that a sender hears the answer and not of a broken pipe.
        """
        if answer.status >= 300:
            self.is_member = False
        if data:  # who has something more to say is not kept from it
            answer = replace(answer, is_endless=False)
        try:
            framing.read(data)
        except h11.RemoteProtocolError as error:
            without_frames(error)
            answer = replace(answer, close=True)
        if framing.left is not None and framing.left <= SKIP_MAX and not framing.is_waiting:
            self.skip = framing.left
        elif not framing.is_whole:
            answer = replace(answer, close=True)
        return self._send_answer(answer, close=answer.close)

    def _read_body(self, framing: RequestBody, data: bytes) -> Then:
        """Read some more of a message's body."""
        part = framing.read(data)
        self.arrived += len(part)
        self._seen += len(part)
        if self._seen > self._config.max_body_bytes:
            return self._send_answer(self._handlers.body_too_large(self.request.remote), close=True)
        if not self.share.set(len(self.body) + len(part)):
            return self._send_answer(self._handlers.overloaded(self.request.remote), close=True)
        self.body += part
        if framing.is_whole:
            return Then.DELIVER
        if framing.is_busy:
            return Then.TURN
        self._out.append(framing.go_on())
        return Then.READ_BODY

    def _send_answer(self, answer: Answer, *, close: bool) -> Then:
        if answer.is_endless and (close or not self._may_be_endless()):
            answer = replace(answer, is_endless=False)
        if not self._is_in(h11.IDLE, h11.SEND_RESPONSE):
            return Then.CLOSE  # answered already
        response = h11.Response(
            status_code=answer.status,
            headers=header_lines(answer, close=close),
            reason=reason_phrase(answer.status).encode("ascii"),
        )
        self._send(response)
        if answer.body and answer.status not in BODILESS and self.request.method != "HEAD":
            self._send(h11.Data(data=answer.body))
        if answer.is_endless:
            return Then.ENDLESS
        self._send(h11.EndOfMessage())
        if close or not self._is_in(h11.DONE):  # the caller wants no more
            return Then.CLOSE
        assert self.framing is not None
        self.rest = self.framing.rest
        return Then.NEXT

    def _may_be_endless(self) -> bool:
        """Tell whether an answer to this request can be told from one that is cut short."""
        wants_the_end = "close" in self.request.headers.get("connection", "").lower()
        return self.is_http_1_1 and not wants_the_end

    def _is_in(self, *states: object) -> bool:
        return self._http.our_state in states

    def _send(self, event: h11.Event) -> None:
        self._out.append(self._http.send(event) or b"")

    def _take_out(self) -> bytes:
        out = b"".join(self._out)
        self._out.clear()
        return out
