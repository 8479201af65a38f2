"""StreamWriter: sends one kind of stream to a peer, which has dialled.

Source: etcd rafthttp/stream.go ``streamWriter``; spec section 8.3. What is sent is written in the
loop (``_writer.pxd``).
"""

from __future__ import annotations

import time
from typing import Self

from pipeline.config import PipelineConfig
from pipeline.logs import Throttle, get_logger
from pipeline.net._sockets import OwnSocket
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.pipeline import PeerPipeline
from pipeline.stats import StreamStats
from pipeline.stream._streams import StreamEvent, Streams, Writer, error_text
from pipeline.stream.reader import SOURCES
from pipeline.wire.protocol import format_id

__all__ = ["StreamWriter"]

logger = get_logger(__name__)


class StreamWriter(Writer):
    """Sends one kind of stream to a peer.

    Parameters
    ----------
    streams : Streams
    kind : str
        "msgapp" or "message".
    pipeline : PeerPipeline
        The peer's; its status and reports are the stream's as well.
    dispatcher : Dispatcher
        Has its threads tell what becomes of it.
    config : PipelineConfig
        For the encoding, and the bytes that may wait.
    queue_length : int
        Messages that may wait.

    Notes
    -----
    Thread-safe, but ``on_event``, which a dispatcher thread calls.
    """

    def __new__(
        cls,
        streams: Streams,
        kind: str,
        pipeline: PeerPipeline,
        dispatcher: Dispatcher,
        *,
        config: PipelineConfig,
        queue_length: int,
    ) -> Self:
        """Make the end that the loop knows."""
        return super().__new__(
            cls,
            streams,
            kind,
            pipeline.identity.member_id,
            pipeline.peer_id,
            profile=config.profile,
            queue_length=queue_length,
            queue_bytes=config.queue_bytes,
        )

    def __init__(
        self,
        streams: Streams,
        kind: str,
        pipeline: PeerPipeline,
        dispatcher: Dispatcher,
        *,
        config: PipelineConfig,
        queue_length: int,
    ) -> None:
        self._pipeline = pipeline
        self._dispatcher = dispatcher
        self._peer = format_id(pipeline.peer_id)
        self._since = 0.0
        self._log = logger.about(
            local=format_id(pipeline.identity.member_id), peer=self._peer, channel=self.kind
        )
        self._throttle = Throttle(self._log)
        self.queue_length, self.queue_bytes = queue_length, config.queue_bytes

    def serve(self, connection: OwnSocket, head: bytes, *, is_chunked: bool) -> None:
        """Send on a connection that the peer has dialled, from now on. Never waits."""
        self._since = time.time()
        reports = self._pipeline.reports
        # First, for another thread may hear of its end as soon as it is attached.
        reports.stream_up()
        self._log.info(
            "established TCP streaming connection with remote peer %s: %s, out",
            self._peer,
            SOURCES[self.kind],
        )
        if self.attach(connection, head, is_chunked=is_chunked):
            # Not here: the application is told.
            self._dispatcher.call_soon(reports.tell_changes)

    def stream_stats(self) -> StreamStats:
        """Return what there is to tell."""
        books = self.stats()
        since = self._since if self.working else None
        return StreamStats(self.kind, "out", since, books.sent, books.sent_bytes, books)

    def on_event(self, event: StreamEvent, error: int) -> None:
        """Tell that the stream is over, and of the messages that have failed with it."""
        lost = self.take_lost()
        reason = error_text(error)
        if error:
            self._throttle.warning(
                "lost TCP streaming connection with remote peer %s: %s (%s), %d messages not sent",
                self._peer,
                SOURCES[self.kind],
                reason,
                lost,
                reason=reason,
            )
        else:
            self._throttle.warning(
                "closed TCP streaming connection with remote peer %s: %s, %d messages not sent",
                self._peer,
                SOURCES[self.kind],
                lost,
                reason="replaced",
            )
        reports = self._pipeline.reports
        # A peer that has dialled again by now is there.
        if error and not self.working:
            reports.stream_down("write", reason, source=SOURCES[self.kind], messages=lost)
        elif lost:
            reports.not_tried(self._pipeline.peer_id, snapshots=0)
