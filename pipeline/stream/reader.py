"""StreamReader: dials one stream of a peer, again and again, and judges what it is answered.

Source: etcd rafthttp/stream.go ``streamReader``; spec section 8.4. What comes on the stream is read
in the loop (``_reader.pxd``).
"""

from __future__ import annotations

import http.client
import time
from functools import partial
from typing import Self

from pipeline.errors import (
    STOPPED,
    MemberRemovedError,
    PeerUnreachableError,
    PostError,
    UnexpectedStatusError,
)
from pipeline.identity import Version
from pipeline.logs import Fields, Throttle, get_logger
from pipeline.net.dialling import Dial, Dialer
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.pipeline import PeerPipeline
from pipeline.stats import StreamStats
from pipeline.stream._streams import Reader, StreamEvent, Streams, error_text
from pipeline.wire.odd_answer import OddAnswer, PeerAnswer
from pipeline.wire.protocol import (
    TELLING_STATUS,
    StreamNotSupportedError,
    check_stream_answer,
    format_id,
    post_url,
    stream_head,
)

__all__ = ["SOURCES", "StreamReader"]

logger = get_logger(__name__)

#: What etcd calls the streams in its log, and in the text of a failure.
SOURCES = {"msgapp": "stream MsgApp v2", "message": "stream Message"}

#: Between the beginnings of two dials at least; etcd ``DialRetryFrequency``, ten a second.
RETRY_S = 0.1
#: The same to a peer that refuses, after some times: to an etcd each dial is a line of its log.
REFUSED_RETRY_S = 5.0
#: A stream that ends sooner is as good as refused. Differs from etcd, which dials ten times a
#: second whoever ends each at once: a proxy with nobody behind it, or two processes with one ID.
LASTING_S = 1.0
#: How long the end of a refusal is waited for, if it has none in its head and a byte comes now and
#: then. A member that is not to be dialled answers so; it is asked again twice a day.
REFUSED_WAIT_S = 43200.0


class StreamReader(Reader):
    """Receives one kind of stream of a peer.

    Parameters
    ----------
    streams : Streams
        Where what comes goes.
    kind : str
        "msgapp" or "message".
    pipeline : PeerPipeline
        The peer's; its URLs, connections' settings, status and reports are the stream's as well.
    dispatcher : Dispatcher
        Dials, and has its threads tell what becomes of it.
    dial_timeout_s : float

    Notes
    -----
    ``start``, ``stop_begin``, ``retry``, ``stats`` and ``renew`` are thread-safe. The rest is
    called by the poller's thread, or by a dispatcher thread, one at a time.
    """

    def __new__(
        cls,
        streams: Streams,
        kind: str,
        pipeline: PeerPipeline,
        dispatcher: Dispatcher,
        dial_timeout_s: float,
    ) -> Self:
        """Make the end that the loop knows."""
        return super().__new__(cls, streams, kind, pipeline.identity.member_id, pipeline.peer_id)

    def __init__(
        self,
        streams: Streams,
        kind: str,
        pipeline: PeerPipeline,
        dispatcher: Dispatcher,
        dial_timeout_s: float,
    ) -> None:
        self._pipeline = pipeline
        self._dispatcher = dispatcher
        self._dial_timeout_s = dial_timeout_s
        self._peer = format_id(pipeline.peer_id)
        self._local = Version.parse(pipeline.identity.server_version)
        self._url = ""  # of the last dial
        self._dial: Dial | None = None
        self._retry_s = RETRY_S
        self._next_at = 0.0  # time.monotonic(): no dial begins before
        self._accepted_at = 0.0  # time.monotonic()
        self._log = logger.about(
            local=format_id(pipeline.identity.member_id), peer=self._peer, channel=self.kind
        )
        self._throttle = Throttle(self._log)
        self._is_stopping = False
        self._since: float | None = None

    @property
    def _dialer(self) -> Dialer:
        return self._dispatcher.dialer

    def start(self) -> None:
        """Begin to dial."""
        self.dial_after(0.0)

    def stop_begin(self) -> None:
        """End the stream, or the dial; the core's ``wait_stopped`` waits for it."""
        self._is_stopping = True
        self.begin_stop()
        if (dial := self._dial) is not None:
            self._dialer.cancel(dial)

    def retry(self) -> None:
        """Dial anew if a refusal is waited for to end: whoever is dialled now may be another."""
        if self.state == "refused":
            self.renew()

    def stream_stats(self) -> StreamStats:
        """Return what there is to tell."""
        messages, size, since, ignored, dropped = self.stats()
        return StreamStats(
            self.kind,
            "in",
            self._since if since else None,
            messages,
            size,
            None,
            ignored=ignored,
            dropped=dropped,
        )

    # -- in the poller's thread

    def on_connect(self) -> None:
        """Dial, unless it is too early to."""
        if self._is_stopping:
            return
        now = time.monotonic()
        if now < self._next_at:
            self.dial_after(self._next_at - now)
            return
        self._next_at = now + self._retry_s
        self._url = self._pipeline.picker.pick()
        dial = self._pipeline.pool(self._url).dial(self._dial_timeout_s, self._dialled)
        self._dial = dial
        self._dialer.begin(dial)
        if self._has_begun_stop():  # by now
            self._dialer.cancel(dial)

    def _has_begun_stop(self) -> bool:
        return self._is_stopping

    def _dialled(self, dial: Dial) -> None:
        self._dial = None
        if not dial.failure:
            head = stream_head(
                self._pipeline.identity, self._url, self.kind, self._pipeline.peer_id
            )
            self.connect(dial.take(), head)
        elif dial.failure != STOPPED:
            # Not here: it is told to the application.
            self._dispatcher.call_soon(partial(self._failed, self._unreachable(dial.failure)))

    # -- in a dispatcher thread

    def on_event(self, event: StreamEvent, error: int) -> None:
        """Judge the answer to the dial, or tell that the stream is over; then dial again."""
        if self._is_stopping:
            return
        if event is StreamEvent.HEAD:
            try:
                self._judge(self.head(), error)
            except Exception:
                self._log.exception("internal error, please report: an answer was not judged")
                self.refuse()
                self.dial_after(self._retry_s)
            return
        reason = error_text(error)
        self._throttle.warning(
            "lost TCP streaming connection with remote peer %s: %s (%s)",
            self._peer,
            SOURCES[self.kind],
            reason,
            url=self._url,
            reason=reason,
        )
        if error:
            self._pipeline.reports.stream_down(
                "read", reason, source=SOURCES[self.kind], url=self._url
            )
        if time.monotonic() - self._accepted_at < LASTING_S:
            self._note_refusal()
        else:
            self._retry_s = RETRY_S
            self._next_at = 0.0
        self.dial_after(0.0)

    def _note_refusal(self) -> None:
        self._retry_s = min(2 * self._retry_s, REFUSED_RETRY_S)

    def _judge(self, data: bytes, error: int) -> None:
        answer = self._read(data)
        if isinstance(answer, PostError):
            if error:
                answer = self._unreachable(error_text(error))
            self.refuse()
            self._failed(answer)
            return
        self._pipeline.note_version(answer.headers)
        failure = check_stream_answer(
            answer.status,
            answer.body,
            answer.headers,
            local=self._local,
            peer_id=self._pipeline.peer_id,
            url=post_url(self._url, ""),
        )
        is_endless = "content-length" not in answer.headers
        is_chunked = answer.headers.get("transfer-encoding", "").lower() == "chunked"
        if failure is None and not is_endless:
            failure = UnexpectedStatusError(
                "the answer is no stream", peer_id=self._pipeline.peer_id, url=self._url, status=200
            )
        if failure is None and error:  # a head that is whole to http.client only
            failure = self._unreachable(error_text(error))
        if failure is None:
            self._accepted_at = time.monotonic()
            self._since = time.time()
            # First, for another thread may hear of its end as soon as it is accepted.
            self._pipeline.reports.stream_up()
            self._log.info(
                "established TCP streaming connection with remote peer %s: %s, in",
                self._peer,
                SOURCES[self.kind],
                url=self._url,
            )
            self.accept(head_len(data), is_chunked=is_chunked)
            self._pipeline.reports.tell_changes()
            return
        self._note_refusal()
        if isinstance(failure, MemberRemovedError):
            self.refuse()  # and nothing follows: whoever is removed dials no more
            self._pipeline.reports.stream_refused(failure, source=SOURCES[self.kind])
            return
        is_waiting = is_endless and not error
        if is_waiting:
            self.wait_refused(head_len(data), is_chunked=is_chunked, wait_s=REFUSED_WAIT_S)
        else:
            self.refuse()
        self._failed(failure, is_waiting=is_waiting)

    def _read(self, data: bytes) -> PeerAnswer | PostError:
        """Return the answer that a head is of; what is wrong with it, if it is none."""
        try:
            # Whatever has come is judged: a text that comes behind its head is not waited for.
            answer = OddAnswer(TELLING_STATUS).feed(data, is_ended=True, is_written=True)
        except (http.client.HTTPException, ValueError) as error:
            return self._unreachable(f"malformed or incomplete answer: {error!r}")
        return answer or self._unreachable("malformed or incomplete answer")

    def _failed(self, error: PostError, *, is_waiting: bool = False) -> None:
        """Tell of a dial that came to nothing, and dial again."""
        if self._is_stopping:
            return
        if isinstance(error, StreamNotSupportedError):
            self._pipeline.picker.unreachable(error.url)
            text, about = "%s of peer %s: %s", Fields(url=error.url, reason=error.reason)
            self._log.debug(text, SOURCES[self.kind], self._peer, error, **about)
        else:
            self._pipeline.reports.stream_refused(error, source=SOURCES[self.kind])
        if not is_waiting:
            self.dial_after(max(0.0, self._next_at - time.monotonic()))

    def _unreachable(self, reason: str) -> PeerUnreachableError:
        return PeerUnreachableError(reason, peer_id=self._pipeline.peer_id, url=self._url)


def head_len(data: bytes) -> int:
    """Return how long the head of an answer is, whose empty line has come."""
    return data.index(b"\r\n\r\n") + 4
