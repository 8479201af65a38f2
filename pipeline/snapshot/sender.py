r"""The snapshot channel, sending: a MsgSnap and the database behind it in one POST.

Source: etcd rafthttp/snapshot_sender.go. The body (spec section 7.2):

    offset   size    content
    0        8       length of the message, big-endian
    8        n       raftpb Message, MsgSnap
    8 + n    rest    the database, as it is

Differs from etcd: the length is known, so it is sent (Content-Length) and the body is not
chunked, and ``sendfile`` can write a file; one transfer per peer at a time; a rate limit; a stall
timer.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from pipeline.arguments import require_id, require_number
from pipeline.callbacks import Callbacks, require_callable
from pipeline.config import PipelineConfig, require_rate
from pipeline.errors import (
    STOPPED,
    InternalError,
    PeerUnreachableError,
    PipelineError,
    PostError,
    SnapshotCancelledError,
    SnapshotSourceError,
    UsageError,
    without_frames,
)
from pipeline.forks import disown, foreign_error
from pipeline.locks import lock_of
from pipeline.logs import get_logger, show
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.pipeline import PeerPipeline
from pipeline.send.sendable import Sendable
from pipeline.snapshot.link import AnsweredError, Ending, SnapshotLink
from pipeline.snapshot.source import (
    FileSource,
    SnapshotSource,
    UnsendableError,
    close_quietly,
    open_source,
)
from pipeline.stats import SNAPSHOT_BOUNDS_S, Histogram
from pipeline.threads import LibraryThread, Once
from pipeline.types import MessageType
from pipeline.wire import protocol
from pipeline.wire._messages import EncodedMessage, Message, byte_view

__all__ = [
    "RateLimiter",
    "SnapshotProgress",
    "SnapshotSendCounts",
    "SnapshotSender",
    "SnapshotTransfer",
]

logger = get_logger(__name__)

CONTENT_TYPE = "application/octet-stream"

#: One write is at most this long: only between two writes the thread sees that it is to end.
STEP_BYTES = 4 << 20
#: Under a rate limit one write takes as many bytes as the limit allows in this time, so that bytes
#: keep moving: etcd's listener closes a connection that was silent for 5 s.
STEP_S = 0.125
#: A transfer that was held up may catch up on this much of the time it has lost.
BURST_S = 0.05
#: However many transfers share however small a limit, each moves a byte after this long.
TURN_MAX_S = 1.0
#: Between two calls of ``on_progress`` within a phase.
PROGRESS_INTERVAL_S = 0.1
#: What the rate is taken over: this many intervals.
RATE_SAMPLES = 50

Phase: TypeAlias = Literal["waiting", "dialing", "sending", "answering", "done"]

_here = threading.local()  # .sender: whose thread this is


def is_transfer_thread() -> bool:
    """Tell whether the caller runs in the thread of a transfer, that is, in a callback."""
    return getattr(_here, "sender", None) is not None


class SnapshotProgress(NamedTuple):
    """How far a transfer is."""

    #: ``waiting`` for the one before it, ``dialing``, ``sending``, ``answering`` when everything
    #: was written and the peer stores and applies it, ``done`` however it ended.
    phase: Phase
    #: Bytes of the database written to the connection.
    sent_bytes: int
    #: Bytes of the database.
    total_bytes: int
    #: Bytes a second, over the last 5 s; of all of it when everything was written.
    rate_bytes_per_s: float


class SnapshotSendCounts(NamedTuple):
    """What a peer's transfers came to."""

    #: Answered 204.
    success: int
    #: Not delivered; those that a newer one replaced are not among them.
    failures: int
    #: Being sent.
    in_flight: int
    #: Messages and databases answered 204.
    sent_bytes: int
    #: Of databases: written to a connection, whatever became of them.
    written_bytes: int
    #: Of databases that are being sent, and of those that wait: not written yet.
    left_bytes: int
    #: Of the successful ones, seconds.
    durations: Histogram


class RateLimiter:
    """A token bucket that all transfers of a node share. Thread-safe.

    Parameters
    ----------
    rate : float or None
        Bytes a second, at least 1; None for no limit.
    """

    def __init__(self, rate: float | None) -> None:
        self._lock = lock_of(self)  # guards the two below
        self._free_at = 0.0  # time.monotonic(): when all that was taken is paid for
        self._rate: float | None = None
        self.set_rate(rate)

    def set_rate(self, rate: float | None) -> None:
        """Change the limit, for running transfers too. ``UsageError`` if it is not one."""
        require_rate("rate", rate)
        with self._lock:
            self._rate = rate
            self._free_at = 0.0

    def take(self, want: int) -> tuple[int, float]:
        """Take leave to send up to ``want`` bytes: how many, and in how many seconds."""
        with self._lock:
            if self._rate is None:
                return want, 0.0
            now = time.monotonic()
            count = max(1, min(want, int(self._rate * STEP_S)))
            free_at = max(self._free_at, now - BURST_S) + count / self._rate
            self._free_at = min(free_at, now + TURN_MAX_S)
            return count, max(0.0, self._free_at - now)


class SnapshotTransfer:
    """A snapshot on its way: what ``Transport.send_snapshot`` returns. Thread-safe.

    Attributes
    ----------
    peer_id : int
        The member it is for.
    """

    def __init__(
        self,
        message: Sendable,
        source: SnapshotSource,
        *,
        size: int | None,
        on_progress: Callable[[SnapshotProgress], object] | None,
        profile: str,
        callbacks: Callbacks,
    ) -> None:
        try:
            require_callable("on_progress", on_progress)
            self.message = _encode(message, profile)
            self.peer_id = message.to
            self.source = open_source(source, size)
        except BaseException:
            close_quietly(source)
            raise
        self.total_bytes = self.source.size
        self.ending = Ending()
        self.link: SnapshotLink | None = None
        self._phase: Phase = "waiting"
        self._sent_bytes = 0
        self._on_progress = on_progress
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_SAMPLES)
        self._began_at = 0.0  # to write
        self._rate: float | None = None  # when everything was written
        self._sender: SnapshotSender | None = None
        self._callbacks = callbacks
        #: For asyncio; completed when it has ended.
        self.future: concurrent.futures.Future[None] = concurrent.futures.Future()
        # It is not for a waiting thread to cancel: only ``cancel`` of this class ends a transfer.
        self.future.set_running_or_notify_cancel()

    def __repr__(self) -> str:
        phase, sent, total, _ = self.progress
        return f"<SnapshotTransfer to {self.peer_id:x}: {phase}, {sent} of {total} bytes>"

    @property
    def progress(self) -> SnapshotProgress:
        """How far it is at this moment."""
        rate = self._rate
        if rate is None:
            rate = 0.0
            if self._marks:
                since, sent = self._marks[0]
                rate = (self._sent_bytes - sent) / max(time.monotonic() - since, 1e-3)
        return SnapshotProgress(self._phase, self._sent_bytes, self.total_bytes, rate)

    def cancel(self) -> None:
        """End it, in whatever phase; nothing if it has ended. Does not wait.

        Raft is told that the snapshot failed, and not that the peer is unreachable.
        """
        self.ending.end("cancelled")
        if self._sender is not None:
            self._sender.drop_waiting(self)

    def done(self) -> bool:
        """Tell whether it has ended, and Raft has been told."""
        return self.future.done()

    def result(self, timeout: float | None = None) -> None:
        """Wait until it has ended; return if the peer answered 204.

        Raises
        ------
        PostError
            If the peer or the network is at fault; see its subclasses.
        SnapshotSourceError
            If the source raised, cannot be read, or is not as long as declared.
        SnapshotCancelledError
            If it was cancelled, stopped or superseded.
        MemberNotFoundError
            If it is for no peer.
        InternalError
            If we are at fault.
        TimeoutError
            If it has not ended after ``timeout`` seconds.
        """
        if timeout is not None:
            require_number("timeout", timeout, 0.0, threading.TIMEOUT_MAX)
        error = self.future.exception(timeout)
        if error is not None:
            # Not itself: it would hold the caller's frame, which holds us.
            raised = copy.copy(error)
            raised.__cause__ = error.__cause__
            try:
                raise raised
            finally:
                del raised, error

    def add_done_callback(self, callback: Callable[[SnapshotTransfer], object]) -> None:
        """Have ``callback`` called with this, once it has ended; at once if it has.

        It is called by the library's thread, or by the caller's. What it raises is logged.
        """
        require_callable("callback", callback)
        self.future.add_done_callback(lambda _: self._call("a transfer's callback", callback, self))

    # What follows is the sender's.

    def attach(self, sender: SnapshotSender, callbacks: Callbacks) -> None:
        """Belong to a peer from now on; the application is called through ``callbacks``."""
        self._sender = sender
        self._callbacks = callbacks

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        if phase == "sending":
            self._began_at = time.monotonic()
            self._marks.append((self._began_at, 0))
        elif phase == "answering":
            self._rate = self._sent_bytes / max(time.monotonic() - self._began_at, 1e-6)
        self._phase = phase
        self._report()

    def moved(self, count: int) -> None:
        """Note that bytes of the database were written."""
        self._sent_bytes += count
        if self._sender is not None:
            self._sender.count_written(count)
        now = time.monotonic()
        if now - self._marks[-1][0] >= PROGRESS_INTERVAL_S:
            self._marks.append((now, self._sent_bytes))
            self._report()

    def finish(self, error: PipelineError | None) -> None:
        """End it: close the source, and tell whoever waits."""
        try:
            self.source.close()
        except BaseException as failure:
            peer = protocol.format_id(self.peer_id)
            reason = f"the source cannot be closed: {show(failure)}"
            text = "the source of a snapshot for %s cannot be closed"
            logger.exception(text, peer, peer=peer, channel="snapshot", reason=reason)
            if error is None:
                # As in etcd, which then tells the node that it failed.
                error = SnapshotSourceError(reason)
                error.__cause__ = failure
        if self._rate is None:
            self._rate = 0.0
        self.enter("done")
        if error is None:
            self.future.set_result(None)
        else:
            if isinstance(error, SnapshotSourceError) and error.__cause__ is not None:
                # What the application wants to see of it stays, as text.
                error.add_note("".join(traceback.format_exception(error.__cause__)))
            without_frames(error)
            self.future.set_exception(error)

    def forget_after_fork(self) -> None:
        """In a forked child: let go of what is the parent's, and let nobody wait for it."""
        self.ending.close()
        if self.link is not None:
            self.link.close()
        if isinstance(self.source, FileSource):
            close_quietly(self.source)  # the application's file may raise: others come after it
        self.future = concurrent.futures.Future()
        self.future.set_exception(foreign_error("result", "transfer"))
        names = ("progress", "done", "cancel", "result", "add_done_callback")
        disown(self, "transfer", names)

    def _report(self) -> None:
        if self._on_progress is not None:
            self._call("on_progress", self._on_progress, self.progress)

    def _call(self, name: str, callback: Callable[..., object], *args: object) -> None:
        self._callbacks.call(name, protocol.format_id(self.peer_id), callback, *args)


def _encode(message: Sendable, profile: str) -> bytes:
    try:
        kind, to = message.type, message.to
        is_ours = isinstance(message, (Message, EncodedMessage))
        serialize = None if is_ours else message.SerializeToString  # type: ignore[union-attr]
    except AttributeError:
        raise UsageError(f"message: {show(message)} is not a message") from None
    if kind != MessageType.SNAP:
        raise UsageError(f"message: is of type {show(kind)}, not a MsgSnap")
    require_id("message.to", to)
    if not to:
        raise UsageError("message: is for nobody (to is 0)")
    if isinstance(message, Message):
        return message.marshal(profile)
    if isinstance(message, EncodedMessage):
        return bytes(byte_view(message.data))
    assert serialize is not None
    data = serialize()
    if type(data) is not bytes:
        raise UsageError(f"message: its SerializeToString returned {show(data)}, not bytes")
    return data


class SnapshotSender:
    """Snapshots to one peer, one at a time; the newest of those that wait is the next.

    Parameters
    ----------
    pipeline : PeerPipeline
        The peer's; its picker, heads and reports are shared.
    dispatcher : Dispatcher
        Tells Raft of those that were given up before their turn.
    config : PipelineConfig
    answer_timeout_s : float
        From the last byte written to the answer.
    limiter : RateLimiter
        The node's.

    Notes
    -----
    Thread-safe. A thread is started when there is something to send, and ends after it.
    """

    def __init__(
        self,
        pipeline: PeerPipeline,
        *,
        dispatcher: Dispatcher,
        config: PipelineConfig,
        answer_timeout_s: float,
        limiter: RateLimiter,
    ) -> None:
        self._pipeline = pipeline
        self._reports = pipeline.reports
        self._peer = protocol.format_id(pipeline.peer_id)
        self._log = logger.about(
            local=protocol.format_id(pipeline.identity.member_id),
            peer=self._peer,
            channel="snapshot",
        )
        self._dispatcher = dispatcher
        self._config = config
        self._answer_timeout_s = answer_timeout_s
        self._limiter = limiter
        self._ending = Once()
        # Who has it runs a transfer, or starts the thread that does.
        self._turn = Once()
        self._thread: LibraryThread | None = None
        self._running: SnapshotTransfer | None = None
        # One, but while a newer one takes its place. Whoever takes a transfer out sees to its end.
        self._waiting: list[SnapshotTransfer] = []
        self._lock = lock_of(self)  # guards what follows
        self._success = self._failures = self._in_flight = self._sent_bytes = 0
        self._written_bytes = 0
        self._durations = Histogram(SNAPSHOT_BOUNDS_S)

    def send(self, transfer: SnapshotTransfer) -> bool:
        """Take a transfer: it begins now, or after the one that runs. False after ``stop``.

        Nothing is locked: another thread may come in between, and a signal's handler.
        """
        transfer.attach(self, self._reports.callbacks)
        if self._ending.is_taken():
            return False
        if self._turn.take():
            self._begin(transfer)
        else:
            self._waiting.append(transfer)
            while len(self._waiting) > 1 and (old := self._take_waiting()) is not None:
                # Raft knows no more than that a snapshot for this peer is on its way, and hears
                # how the newer one ends. A failure told now would have it send one more.
                error = SnapshotCancelledError("superseded by a newer snapshot")
                self._dispatcher.call_soon(partial(old.finish, error))
            # The thread may have looked before, and given its turn back.
            if self._turn.take():
                following = self._take_waiting()
                if following is None:
                    self._turn.give_back()
                else:
                    self._begin(following)
        if self._ending.is_taken():  # meanwhile, perhaps before the transfer could be seen
            self.stop_begin()
        return True

    def drop_waiting(self, transfer: SnapshotTransfer) -> None:
        """Give up a transfer if it waits for its turn."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(transfer)
            self._give_up(transfer)

    def stop_begin(self) -> None:
        """End what runs and waits, without waiting for it."""
        self._ending.take()
        while (waiting := self._take_waiting()) is not None:
            waiting.ending.end(STOPPED)
            self._give_up(waiting)
        running = self._running
        if running is not None:
            running.ending.end(STOPPED)

    def stop_end(self, deadline: float) -> None:
        """Wait until ``deadline`` (``time.monotonic()``) for the thread, unless it is this one."""
        thread = self._thread
        if thread is not None and not thread.wait_ended(deadline):
            self._log.warning(
                "the snapshot for peer %s is still in a callback or its source; it ends after it",
                self._peer,
                reason="a callback or the source blocks",
            )

    def counts(self) -> SnapshotSendCounts:
        """What the transfers came to so far."""
        transfers = (self._running, *self._waiting)
        left = sum(it.total_bytes - it.progress.sent_bytes for it in transfers if it is not None)
        with self._lock:
            return SnapshotSendCounts(
                self._success,
                self._failures,
                self._in_flight,
                self._sent_bytes,
                self._written_bytes,
                left,
                self._durations.copy(),
            )

    def count_written(self, count: int) -> None:
        """Count bytes of a database that were written; a transfer does."""
        with self._lock:
            self._written_bytes += count

    def forget_after_fork(self) -> None:
        """In a forked child, which has no thread: stop, and let go of the parent's connection."""
        self._ending.take()
        self._turn = Once()
        self._thread = None
        for transfer in (self._running, *self._waiting):
            if transfer is not None:
                transfer.forget_after_fork()
        self._running = None
        self._waiting.clear()

    def _take_waiting(self) -> SnapshotTransfer | None:
        try:
            return self._waiting.pop(0)
        except IndexError:
            return None

    def _begin(self, transfer: SnapshotTransfer) -> None:
        """Start the thread with a transfer; the turn is the caller's. ``RuntimeError`` if none."""
        self._running = transfer
        thread = self._thread = LibraryThread(self._run, f"pipeline-snapshot-to-{self._peer}")
        try:
            thread.start()
        except RuntimeError:  # there are no more threads to be had
            self._running = None
            self._turn.give_back()
            transfer.source.close()
            while (waiting := self._take_waiting()) is not None:
                self._give_up(waiting)
            raise

    def _give_up(self, transfer: SnapshotTransfer) -> None:
        """End, soon, what had not begun: nothing was asked of the peer."""
        with self._lock:
            self._failures += 1

        def tell() -> None:
            self._reports.snapshot_given_up()
            transfer.finish(transfer.ending.error())

        # Never from here: a Raft that cancels while it holds a lock must not be called back.
        self._dispatcher.call_soon(tell)

    # What follows runs in the thread.

    def _run(self) -> None:
        _here.sender = self
        transfer = self._running
        while transfer is not None:
            logger.survive("a snapshot's end was not told", self._transfer, transfer)
            transfer = self._next()

    def _next(self) -> SnapshotTransfer | None:
        """Return what is to be run next, or give the turn back."""
        while True:
            self._running = following = self._take_waiting()
            if following is not None:
                if self._ending.is_taken():  # by who could not see it
                    following.ending.end("stopped")
                return following
            self._turn.give_back()
            # One may have come since: who brought it found the turn taken.
            if not (self._waiting and self._turn.take()):
                return None

    def _transfer(self, transfer: SnapshotTransfer) -> None:
        """See one transfer to its end; tell everyone who has to know, in etcd's order."""
        url = self._pipeline.picker.pick()
        begun_at = time.monotonic()
        with self._lock:
            self._in_flight += 1
        error: PipelineError | None = None
        try:
            self._log.info(
                "start to send database snapshot of %d bytes to %s",
                transfer.total_bytes,
                self._peer,
                url=url,
            )
            self._post(transfer, url)
        except PipelineError as failure:
            error = failure
        except BaseException as failure:
            self._log.exception("internal error, please report: a snapshot was not sent", url=url)
            error = InternalError(f"a snapshot was not sent: {show(failure)}")
            error.__cause__ = failure
        try:
            if error is None:
                self._succeed(transfer, url, time.monotonic() - begun_at)
            else:
                self._fail(url, error)
        finally:
            with self._lock:
                self._in_flight -= 1
            transfer.finish(error)

    def _succeed(self, transfer: SnapshotTransfer, url: str, took_s: float) -> None:
        self._reports.snapshot_delivered()
        self._log.info("database snapshot was sent to %s in %.1f s", self._peer, took_s, url=url)
        with self._lock:
            self._sent_bytes += len(transfer.message) + transfer.total_bytes
            self._success += 1
            self._durations.observe(took_s)

    def _fail(self, url: str, error: PipelineError) -> None:
        text = "failed to send database snapshot to %s: %s"
        reason = error.reason if isinstance(error, PostError) else show(error, str)
        self._log.warning(text, self._peer, error, url=url, reason=reason)
        # Differs from etcd: what happened on our side says nothing of the peer. There only a stop
        # ends a transfer, and a database that cannot be read makes its peer unreachable.
        is_stop = isinstance(error, SnapshotCancelledError) and self._ending.is_taken()
        if isinstance(error, PostError) or is_stop:
            self._reports.snapshot_failed(error, url)
        else:
            self._reports.snapshot_given_up()
        with self._lock:
            self._failures += 1

    def _head(self, url: str) -> bytes:
        return protocol.request_head(
            self._pipeline.identity, url, path=protocol.SNAPSHOT_PATH, content_type=CONTENT_TYPE
        )

    def _post(self, transfer: SnapshotTransfer, url: str) -> None:
        config = self._config
        transfer.enter("dialing")
        link = transfer.link = SnapshotLink(
            self._pipeline.pool(url),
            self._dispatcher.dialer,
            transfer.ending,
            peer_id=transfer.peer_id,
            stall_timeout_s=config.stall_timeout_s,
            dead_link_timeout_s=config.dead_link_timeout_s,
        )
        try:
            link.dial(config.dial_timeout_s)
            transfer.enter("sending")
            try:
                _RequestWriter(transfer, link, self._limiter).write(self._head(url))
                transfer.enter("answering")
                answer = link.read_answer(self._answer_timeout_s)
                is_early = False
            except AnsweredError as early:
                answer = early.answer
                is_early = True
        finally:
            link.close()
            transfer.link = None
        self._pipeline.note_version(answer.headers)
        error: PostError | None = protocol.check_answer(
            answer.status,
            answer.body,
            answer.headers,
            peer_id=transfer.peer_id,
            url=protocol.post_url(url, protocol.SNAPSHOT_PATH),
        )
        if error is None and is_early:
            reason = "answered 204 before everything was sent"
            error = PeerUnreachableError(reason, peer_id=transfer.peer_id, url=url)
        if error is not None:
            raise error


class _RequestWriter:
    """Writes a request, as fast as the limit allows."""

    def __init__(
        self, transfer: SnapshotTransfer, link: SnapshotLink, limiter: RateLimiter
    ) -> None:
        self._transfer = transfer
        self._source = transfer.source
        self._link = link
        self._limiter = limiter
        self._allowed = 0  # bytes taken from the limiter, and not written yet

    def write(self, head: bytes) -> None:
        """Write head, framing, message and database."""
        message = self._transfer.message
        length = 8 + len(message) + self._source.size
        framing = b"%d\r\n\r\n%s" % (length, struct.pack(">Q", len(message)))
        if self._source.size == 0:
            self._source.require_end()  # nothing of it is looked at later
        self._write(memoryview(head + framing + message))
        if isinstance(self._source, FileSource):
            chunks = self._source.chunks(self._write_file(self._source))
        else:
            chunks = self._source.chunks()
        for chunk in chunks:
            self._write(chunk, is_database=True)

    def _write(self, data: memoryview, *, is_database: bool = False) -> None:
        done = 0
        while done < len(data):
            # The view is released also when a write raises, for the error may outlive the source.
            with data[done : done + self._allow(len(data) - done)] as part:
                n = self._link.write(part)
            self._allowed -= n
            done += n
            if is_database:
                self._transfer.moved(n)

    def _write_file(self, file: FileSource) -> int:
        """Have the kernel write the file, as far as it does that; how many bytes."""
        done = 0
        while done < file.size and self._link.is_plain:
            count = self._allow(file.size - done)
            if done + count == file.size:
                file.require_end()
            try:
                n = self._link.write_file(file, done, count)
            except UnsendableError:
                break
            self._allowed -= n
            done += n
            self._transfer.moved(n)
        return done

    def _allow(self, want: int) -> int:
        """Wait until something may be written; how much of ``want``."""
        want = min(want, STEP_BYTES)
        if self._allowed <= 0:
            self._allowed, wait_s = self._limiter.take(want)
            if wait_s:
                self._link.pause(wait_s)
        return min(want, self._allowed)
