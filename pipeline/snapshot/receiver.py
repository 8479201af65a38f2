"""``POST /raft/snapshot`` from its body to its answer: no sockets.

Wire format (spec section 7.2)::

    | length, 8 bytes, big-endian | raftpb Message | database, to the end of the body |

Source: etcd ``rafthttp/http.go`` ``snapshotHandler``, ``message_codec.go`` ``decodeLimit``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.callbacks import require_no_awaitable
from pipeline.config import MIB, ReceiverConfig
from pipeline.errors import UnmarshalError
from pipeline.locks import lock_of
from pipeline.logs import Fields, show
from pipeline.net._budget import BodyShare
from pipeline.raft import AnyRaft
from pipeline.receive.handlers import Handlers
from pipeline.receive.places import Place, Places
from pipeline.snapshot.body import BodyError, ClosingError, NoRoomError, SnapshotBody
from pipeline.snapshot.store import SnapshotStore
from pipeline.stats import SNAPSHOT_BOUNDS_S, Histogram
from pipeline.types import MessageType
from pipeline.wire._messages import Decoded, decode
from pipeline.wire.answers import Answer, Request
from pipeline.wire.protocol import format_id

if TYPE_CHECKING:
    from pipeline.snapshot.connections import SnapshotConnections

__all__ = ["SnapshotCounts", "SnapshotReceiver"]

#: The message alone, without the database; etcd ``snapshotLimitByte``.
MAX_MESSAGE_BYTES = 64 * MIB

#: From, before a message has been decoded; etcd ``unknownSnapshotSender``.
UNKNOWN_SENDER = "UNKNOWN_SNAPSHOT_SENDER"

# Read and written at once.
_STEP_BYTES = MIB

# Members told apart, as for bytes received; the rest is one series without a name.
_MAX_SENDERS = 128


class SnapshotCounts(NamedTuple):
    """What became of the snapshots of one sender."""

    #: Stored and processed.
    success: int
    #: Refused, broken off, not stored or not processed.
    failures: int
    #: Being stored or processed at this moment.
    in_flight: int
    #: Of those that succeeded, from the head to the answer.
    duration: Histogram


@dataclass(slots=True)
class _Sender:
    success: int = 0
    failures: int = 0
    in_flight: int = 0
    duration: Histogram = field(default_factory=lambda: Histogram(SNAPSHOT_BOUNDS_S))


class SnapshotReceiver:
    """Stores snapshots, hands their messages to Raft, and counts.

    Parameters
    ----------
    raft : Raft
    handlers : Handlers
        Makes the answers and counts bytes and failures.
    config : ReceiverConfig
        ``snapshot_dir``, its limits, and ``snapshot_receives``.

    Attributes
    ----------
    store : SnapshotStore or None
        None takes no snapshots.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, raft: AnyRaft, handlers: Handlers, config: ReceiverConfig) -> None:
        self.store: SnapshotStore | None = None
        if config.snapshot_dir is not None:
            self.store = SnapshotStore(config.snapshot_dir, config)
        #: Whether there is a place to store them.
        self.is_taking = self.store is not None
        self._raft: Any = raft  # what its process returns is looked at, whatever it is declared as
        self._places = Places(config.snapshot_receives)
        self._handlers = handlers
        self._config = config
        self._lock = lock_of(self)  # guards what follows
        self._senders: dict[str, _Sender] = {}
        #: Bytes of databases written to the disk, of those that were given up as well.
        self.stored_bytes = 0
        self._arriving: set[SnapshotBody] = set()

    def prepare(self) -> None:
        """Make the directory, if there is to be one; ``OSError`` if it cannot be made."""
        if self.store is not None:
            self.store.prepare()

    def connections(self) -> SnapshotConnections:
        """Return what takes the connections of one listener on which snapshots arrive."""
        from pipeline.snapshot.connections import SnapshotConnections  # and h11 with it

        return SnapshotConnections(self.receive, self._config)

    def take_place(self) -> Place | None:
        """Take one of the places for receives; None when all are taken."""
        return self._places.take()

    def refused(self) -> None:
        """Count a request that was answered without its body being looked at."""
        with self._lock:
            self._sender(UNKNOWN_SENDER).failures += 1

    def counts(self) -> dict[str, SnapshotCounts]:
        """Return what is counted, by From."""
        with self._lock:
            return {
                name: SnapshotCounts(s.success, s.failures, s.in_flight, s.duration.copy())
                for name, s in list(self._senders.items())
            }

    def left_bytes(self) -> int | None:
        """Return how much of the databases that are arriving is still to come; None if one does
        not say.
        """
        with self._lock:
            lefts = [body.left for body in self._arriving]
        return None if None in lefts else sum(left or 0 for left in lefts)

    def forget(self, sender: int) -> None:
        """Drop what was counted for a member that is one no more."""
        with self._lock:
            self._senders.pop(format_id(sender), None)

    def receive(self, request: Request, body: SnapshotBody) -> Answer:
        """Store the database of a request that ``Handlers.check`` let pass, process its message.

        Blocks as long as the body takes, and as ``raft.process`` does. Whatever goes wrong becomes
        an answer. Checks, counts and texts are etcd's, in etcd's order.
        """
        try:
            return self._receive(request, body)
        except MemoryError:  # the machine's, and no fault of anybody's
            self.refused()
            return self._handlers.overloaded(request.remote)

    def _receive(self, request: Request, body: SnapshotBody) -> Answer:
        begin = time.monotonic()
        handlers = self._handlers
        buffer = memoryview(bytearray(_STEP_BYTES))
        sender = format_id(0)  # as etcd, while nothing is decoded
        share = handlers.budget.share()  # of the message; it ends with this call
        try:
            decoded, data = _read_message(body, buffer, share, encoded=handlers.is_encoded)
        except NoRoomError:
            self.refused()
            return handlers.overloaded(request.remote)
        except BodyError as error:
            handlers.received.count_failure(request.remote)
            return self._failed(sender, request, 400, "failed to decode raft message", error)
        message, has_unknown_fields, index = decoded
        sender = format_id(message.from_)
        if handlers.source is None:  # with an inbox all of this is counted as it is taken
            if has_unknown_fields and not handlers.is_encoded:
                handlers.lost_fields(message.from_, request.remote)
            handlers.received.count_bytes(message.from_, len(data))
        if message.type != MessageType.SNAP:
            return self._failed(sender, request, 400, "wrong raft message type")
        with self._in_flight(sender):
            try:
                saved = self._save(index, body, buffer)
            except (OSError, BodyError) as error:
                return self._failed(sender, request, 500, "failed to save KV snapshot", error)
            handlers.received.count_bytes(message.from_, saved)
            text = "stored the database of snapshot %d of %s from %s: %d bytes in %.3f s"
            seconds = time.monotonic() - begin
            about = Fields(peer=sender, address=str(request.remote), channel="snapshot")
            handlers.log.info(text, index, sender, request.remote, saved, seconds, **about)
            try:
                self._hand_on(message, data)
            except BaseException as error:  # whatever a node raises, its listener goes on
                rejected = None if isinstance(error, ClosingError) else handlers.rejected(error)
                return rejected or self._failed(
                    sender, request, 500, "failed to process raft message", error
                )
        with self._lock:
            counts = self._sender(sender)
            counts.success += 1
            counts.duration.observe(time.monotonic() - begin)
        return handlers.no_content()

    def _hand_on(self, message: object, data: bytearray) -> None:
        """Have Raft process the message of a stored snapshot, or take it from the inbox."""
        source = self._handlers.source
        if source is None:
            result = self._raft.process(message)
            if result is not None:  # a coroutine has not processed anything
                require_no_awaitable("process", result)
        elif not source.deliver(data):
            raise ClosingError("the inbox is closed")

    def _save(self, index: int, body: SnapshotBody, buffer: memoryview) -> int:
        """Store the rest of the body; the bytes it has."""
        assert self.store is not None
        body.saving = saving = self.store.begin(index, body.left)
        with self._lock:
            self._arriving.add(body)
        try:
            while n := body.readinto(buffer):
                saving.write(buffer[:n])
                with self._lock:
                    self.stored_bytes += n
            saving.commit()
            return saving.size
        finally:
            body.saving = None
            with self._lock:
                self._arriving.discard(body)
            saving.close()

    def _failed(
        self,
        sender: str,
        request: Request,
        status: int,
        text: str,
        error: BaseException | None = None,
    ) -> Answer:
        with self._lock:
            self._sender(sender).failures += 1
        if error is not None:
            text = f"{text} ({_text_of(error)})"
        if isinstance(error, ClosingError):
            return self._handlers.shutting_down()
        trace = None if isinstance(error, (BodyError, OSError)) else error
        return self._handlers.snapshot_failed(request.remote, sender, status, text, trace)

    @contextlib.contextmanager
    def _in_flight(self, sender: str) -> Iterator[None]:
        with self._lock:
            counts = self._sender(sender)
            counts.in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                counts.in_flight -= 1

    def _sender(self, name: str) -> _Sender:
        """Return the counters of a sender; the caller holds the lock."""
        if name not in self._senders and len(self._senders) >= _MAX_SENDERS:
            name = ""
        return self._senders.setdefault(name, _Sender())


def _read_message(
    body: SnapshotBody, buffer: memoryview, share: BodyShare, *, encoded: bool
) -> tuple[Decoded, bytearray]:
    """Read the length and the message; the message and its bytes. etcd ``decodeLimit``."""
    size_bytes = int.from_bytes(_read_exactly(body, buffer, 8, share), "big")
    # The number is a stranger's: nothing is reserved by it.
    if size_bytes > MAX_MESSAGE_BYTES:
        raise BodyError("rafthttp: error limit exceeded")
    data = _read_exactly(body, buffer, size_bytes, share)
    try:
        return decode(data, encoded=encoded), data
    except UnmarshalError as error:
        raise BodyError(str(error)) from error


def _read_exactly(body: SnapshotBody, buffer: memoryview, size: int, share: BodyShare) -> bytearray:
    data = bytearray()
    while left := size - len(data):
        n = body.readinto(buffer[:left])
        if n == 0:
            raise BodyError("unexpected EOF" if data else "EOF")
        if not share.set(len(data) + n):
            raise NoRoomError("no memory for a message")
        data += buffer[:n]
    return data


def _text_of(error: BaseException) -> str:
    """Return a line for an answer; of the operating system's errors without the path."""
    return show(error, _say).encode("utf-8", "replace").decode()


def _say(error: object) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error)
