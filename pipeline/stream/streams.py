"""The streams of a node, and the four of a peer: what they share, and who hears what comes.

Source: etcd rafthttp/peer.go ``startPeer``: there, too, what comes by a stream has a queue of its
own, and proposals another, for they may wait for a leader.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pipeline.config import TransportConfig
from pipeline.logs import get_logger
from pipeline.net._sockets import OwnSocket
from pipeline.receive.detached import BegunRequest
from pipeline.receive.handlers import Handlers
from pipeline.receive.inbox import Inbox
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.pipeline import PeerPipeline
from pipeline.stats import FollowerStats, StreamStats
from pipeline.stream._streams import Streams
from pipeline.stream.reader import StreamReader
from pipeline.stream.writer import StreamWriter
from pipeline.threads import LibraryThread
from pipeline.wire.answers import stream_answer
from pipeline.wire.protocol import STREAM_KINDS, parse_stream_path

__all__ = ["NodeStreams", "PeerStreams"]

logger = get_logger(__name__)

#: Taken at once by the threads that call ``raft.process``.
BATCH = 256


class PeerStreams:
    """The four ends that a node has of the streams of a peer.

    Parameters
    ----------
    node : NodeStreams
    pipeline : PeerPipeline
        The peer's.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, node: NodeStreams, pipeline: PeerPipeline) -> None:
        config = node.config
        self.writers = {
            kind: StreamWriter(
                node.core,
                kind,
                pipeline,
                node.dispatcher,
                config=config.pipeline,
                queue_length=config.stream_queue_length,
            )
            for kind in STREAM_KINDS
        }
        self.readers = {
            kind: StreamReader(
                node.core, kind, pipeline, node.dispatcher, config.pipeline.dial_timeout_s
            )
            for kind in STREAM_KINDS
        }

    def start(self) -> None:
        """Begin to dial."""
        for reader in self.readers.values():
            reader.start()

    def stop_begin(self) -> int:
        """End all without waiting; how many messages were dropped."""
        dropped = sum(writer.begin_stop() for writer in self.writers.values())
        for reader in self.readers.values():
            reader.stop_begin()
        return dropped

    def stop_end(self, deadline: float) -> None:
        """Wait until ``deadline`` (``time.monotonic()``) for what :meth:`stop_begin` ended."""
        for end in (*self.writers.values(), *self.readers.values()):
            end.wait_stopped(max(0.0, deadline - time.monotonic()))

    def renew(self) -> None:
        """End what is up in good order: it was made with credentials that are replaced."""
        for end in (*self.writers.values(), *self.readers.values()):
            end.renew()

    def pause(self, *, is_paused: bool) -> None:
        """Throw away what comes on them from now on, or not any more."""
        for reader in self.readers.values():
            reader.pause(is_paused=is_paused)

    def retry(self) -> None:
        """Ask for the streams that were refused: the peer has other URLs. What is up stays."""
        for reader in self.readers.values():
            reader.retry()

    def stats(self) -> tuple[StreamStats, ...]:
        """Return what there is to tell of each end."""
        return (
            *(writer.stream_stats() for writer in self.writers.values()),
            *(reader.stream_stats() for reader in self.readers.values()),
        )

    def follower_stats(self) -> tuple[FollowerStats, ...]:
        """Return what became of MsgApp messages, by writer."""
        return tuple(writer.follower_stats() for writer in self.writers.values())


class NodeStreams:
    """What the streams of a node share.

    Parameters
    ----------
    handlers : Handlers
        Knows what is for Raft. With an inbox what comes goes there.
    dispatcher : Dispatcher
        Its loop runs the streams. Not started yet.
    config : TransportConfig
    find : callable
        Returns the streams of a peer by its ID; None of a member that is no peer.

    Attributes
    ----------
    is_stopping : bool
        Whether ``stop_begin`` was called.

    Notes
    -----
    Thread-safe. Without an inbox what comes goes into two of our own, of each of which one thread
    (``pipeline-stream-<name>``, ``pipeline-stream-prop-<name>``) calls ``raft.process``, in the
    order in which messages came.
    """

    def __init__(
        self,
        handlers: Handlers,
        dispatcher: Dispatcher,
        config: TransportConfig,
        find: Callable[[int], PeerStreams | None],
    ) -> None:
        self.config = config
        self.dispatcher = dispatcher
        self._handlers = handlers
        self._find = find
        self._inboxes: tuple[Inbox[Any], ...] = ()
        self._threads: list[LibraryThread] = []
        self.is_stopping = False
        if handlers.source is not None:
            self._sources = (handlers.source, handlers.source)
        else:
            messages, proposals = (_inbox(is_encoded=handlers.is_encoded) for _ in range(2))
            self._inboxes = (messages, proposals)
            self._sources = (
                messages.open_source(handlers.count_taken),
                proposals.open_source(handlers.count_taken),
            )
        self.core = Streams(
            dispatcher.loop,
            handlers.budget,
            *self._sources,
            delivered_types=handlers.delivered_types,
            max_bytes=config.receiver.max_body_bytes,
            drops_proposals=handlers.source is None,
        )

    def start(self) -> None:
        """Let the loop, which is about to be started, have streams. Once."""
        self.core.open()
        for inbox, what in zip(self._inboxes, ("", "prop-"), strict=False):
            name = f"pipeline-stream-{what}{self.dispatcher.name}"
            self._threads.append(LibraryThread(self._deliver, name, (inbox,)))
            self._threads[-1].start()

    def has_peer(self, peer_id: int) -> bool:
        """Tell whether a stream to a member would have messages to carry."""
        return self._find(peer_id) is not None

    def make_peer(self, pipeline: PeerPipeline) -> PeerStreams:
        """Return the streams of a new peer."""
        return PeerStreams(self, pipeline)

    def take(self, connection: OwnSocket, begun: BegunRequest) -> None:
        """Take over a connection on which a peer has asked for a stream, and was let past."""
        kind, peer_id = parse_stream_path(begun.request.path)
        streams = self._find(peer_id)
        if streams is None:  # it is none any more
            connection.close()
            return
        is_chunked = begun.is_http_1_1
        head = stream_answer(self._handlers.stream_headers, is_chunked=is_chunked)
        streams.writers[kind].serve(connection, head, is_chunked=is_chunked)

    def stop_begin(self) -> None:
        """Let nothing come any more; what a thread is at goes on."""
        self.is_stopping = True
        for inbox, source in zip(self._inboxes, self._sources, strict=False):
            inbox.close_source(source)

    def stop_end(self, deadline: float) -> None:
        """Let go of the loop, which has ended, and wait for the threads until ``deadline``."""
        self.core.close()
        for thread in tuple(self._threads):
            thread.wait_ended(deadline)

    def forget_after_fork(self) -> None:
        """In a forked child, which has no loop and no thread of ours."""
        self.core.forget_after_fork()

    def _deliver(self, inbox: Inbox[Any]) -> None:
        """Call Raft with what comes, until nothing will; in a thread of its own."""
        while not inbox.closed:
            for message in inbox.take(BATCH, None):
                if self.is_stopping:  # while the last one was processed
                    return
                deliver = partial(self._handlers.process, message, None, "a stream")
                logger.survive("a message was not delivered", deliver)


def _inbox(*, is_encoded: bool) -> Inbox[Any]:
    return Inbox(encoded=True) if is_encoded else Inbox()
