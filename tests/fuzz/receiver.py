"""The receiver as a state machine: a script of bytes in pieces, turns, time and ends.

A script (README.md has its table) drives a ``Machine``: callers connect, send any bytes in any
pieces, stop reading, close; the loop takes its turns, threads serve requests, also while
``process`` is still at work on others; time passes; the receiver is stopped at any step.

Invariants: the loop's books are right after each step, nothing is left of any connection at the
end, every place and every byte of a budget is given back, and nothing in the library is an
internal error. In a *calm* script, where nothing but bytes and turns happens, each caller is
answered as if its bytes had come in one piece, and Raft is given the same messages.

With an inbox, which is a target of its own, there are no handler threads, and the script takes: of
whatever is taken, put back, dropped or held the books are right at each step, and nobody waits for
room that there is.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from pipeline.config import ReceiverConfig
from pipeline.identity import Identity
from pipeline.receive._receiver import Receiver
from pipeline.receive.handlers import Handlers
from pipeline.receive.inbox import Inbox
from pipeline.receive.odd_request import OddRequest
from pipeline.snapshot.receiver import SnapshotReceiver
from pipeline.types import MessageType
from pipeline.wire._messages import Entry, Message, Snapshot, SnapshotMetadata
from tests.support.http import CLUSTER_ID, HEARTBEAT, peer_headers
from tests.support.listening import raw_head

MAX_CALLERS = 8
#: Of a script; what is behind them is ignored.
MAX_STEPS = 400

#: Of what a caller has yet to send, so many bytes; the last one is all of it.
PIECES = (1, 2, 3, 5, 16, 40, 100, 1000, 65536, 1 << 30)
#: Milliseconds: within, at and beyond each time limit of the configuration below.
PAUSES_MS = (1, 10, 100, 999, 1001, 2001, 3001, 5001, 10001, 61000)


def _post(message: Message, *extra: str, **headers: str | None) -> bytes:
    body = message.marshal()
    head = raw_head(f"content-length: {len(body)}", *extra, headers=peer_headers(**headers))
    return head + body


def _chunked(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return raw_head("transfer-encoding: chunked") + framed + b"0\r\n\r\n"


def _large(size: int) -> Message:
    return Message(type=MessageType.APP, from_=1, to=2, entries=[Entry(data=bytes(size))])


_PROP = Message(type=MessageType.PROP, from_=1, to=2, entries=[Entry(data=b"put")])
_SNAP = Message(
    type=MessageType.SNAP, from_=1, to=2, snapshot=Snapshot(metadata=SnapshotMetadata(index=5))
)
#: What a caller may be given to send, by number. New ones go to the end: the corpus has numbers.
TEMPLATES = (
    _post(HEARTBEAT),
    _post(HEARTBEAT, x_server_from="3"),
    _post(_PROP),
    _post(_large(70_000)),
    _post(_large(1_200_000)),
    _chunked(HEARTBEAT.marshal(), 3),
    _post(HEARTBEAT, "expect: 100-continue"),
    _post(HEARTBEAT, "connection: close"),
    _post(HEARTBEAT, x_etcd_cluster_id="1"),
    raw_head("content-length: 5") + b"\xff" * 5,
    raw_head("content-length: 0"),
    raw_head(f"content-length: {1 << 41}"),
    raw_head("transfer-encoding: chunked") + b"1\r\na\r\n" * 40,
    raw_head(line="GET /version HTTP/1.1"),
    raw_head(line="GET /raft/probing HTTP/1.0"),
    raw_head(line="GET /raft/stream/msgapp/1 HTTP/1.1"),
    raw_head("content-length: 40", line="POST /raft/snapshot HTTP/1.1")
    + len(_SNAP.marshal()).to_bytes(8, "big")
    + _SNAP.marshal(),
    raw_head("content-length: 10", line="PUT /nowhere HTTP/1.1") + bytes(10),
    b"POST /raft HTTP/1.1\r\n",
    b"\r\n\r\n",
    b"x" * 300,
    b"x-a: b\r\n" * 20,
    _post(HEARTBEAT, "content-length: 3"),
    _post(Message(type=MessageType.HUP, from_=1, to=2)),
    _post(_large(200_000)),
)

_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")


class InternalErrors(logging.Handler):
    """Keeps the first fault of its own that the library has logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: logging.LogRecord | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.first is None and "internal error" in record.getMessage():
            self.first = record

    def raise_first(self) -> None:
        if self.first is not None:
            record, self.first = self.first, None
            raise AssertionError(record.getMessage()) from (record.exc_info or (None, None))[1]

    @staticmethod
    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        """Have every script of this process fail that logs one, and show nothing of the log."""
        logger = logging.getLogger("pipeline")
        logger.addHandler(ERRORS)
        propagate, logger.propagate = logger.propagate, False
        try:
            yield
        finally:
            logger.propagate = propagate
            logger.removeHandler(ERRORS)


ERRORS = InternalErrors()


class Script:
    """Bytes that are read as numbers; zeros, and ``is_over``, at the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.steps = 0

    @property
    def is_over(self) -> bool:
        return self.at >= len(self.data) or self.steps >= MAX_STEPS

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def bytes(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]


class Caller:
    """One client. What it is given to send waits in ``rest`` until a step sends a piece of it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        self.rest = b""
        self.unsent = b""  # of pieces, for which there is no room in the socket
        self.sent = bytearray()
        self.received = bytearray()

    def send(self, n: int) -> None:
        piece, self.rest = self.rest[:n], self.rest[n:]
        self.unsent += piece
        self.sent += piece

    def push(self) -> bool:
        """Send what there is room for; whether that was anything."""
        if not self.unsent:
            return False
        try:
            n = self.socket.send(self.unsent)
        except BlockingIOError:
            return False
        except OSError:  # its end was closed
            n = len(self.unsent)
        self.unsent = self.unsent[n:]
        return True

    def receive(self) -> bool:
        """Read what there is; whether that was anything."""
        try:
            data = self.socket.recv(1 << 14)
        except OSError:
            return False
        self.received += data
        return bool(data)

    @property
    def has_endless_answer(self) -> bool:
        """Whether it was refused a stream with an answer that does not end.

        Nothing of what it sends behind that is read, so it matters when it comes.
        """
        return b"Transfer-Encoding: chunked" in self.received

    def statuses(self) -> list[bytes]:
        """Return those of the answers; interim ones depend on how bytes were cut."""
        found = _STATUS.findall(bytes(self.received))
        return [status for status in found if status[:1] != b"1"]


class Run:
    """One receiver, its callers, and the Raft behind it."""

    def __init__(
        self,
        machine_type: Any,
        config: ReceiverConfig,
        *,
        inbox: Inbox[Any] | None = None,
        is_calm: bool = False,
    ) -> None:
        self.is_calm = is_calm
        self.inbox = inbox
        self.processed: list[bytes] = []
        self.kept: list[Message] = []
        self.is_failing = False
        self.removed: set[int] = set()
        self.nested: Script | None = None  # what goes on while process is at work
        self.callers: list[Caller] = []
        self.config = config
        self.handlers = Handlers(
            self, Identity(1, CLUSTER_ID, (), "3.5.1"), config=config, inbox=inbox
        )
        if inbox is not None:
            self._count_bytes = self.handlers.received.count_bytes
            self.handlers.received.count_bytes = self._taken  # type: ignore[method-assign]
        self.snapshots = SnapshotReceiver(self, self.handlers, config)
        self.handlers.snapshots = self.snapshots
        self.receiver = Receiver(
            self.handlers, config, self.handlers.cluster_header, self._take_away
        )
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind("")  # a name of the kernel's choice
        listening.listen(MAX_CALLERS)
        listening.setblocking(False)
        self.address = listening.getsockname()
        handlers = config.handlers if inbox is None else 0
        self.machine = machine_type(self.receiver, listening.detach(), handlers)

    # Raft.

    def process(self, message: Message) -> None:
        if self.is_calm:
            self.processed.append(message.marshal())
        self.kept.append(message)
        if self.nested is not None and not self.nested.is_over:
            for _ in range(self.nested.byte() % 8):
                self.step(self.nested)
        if self.is_failing:
            raise RuntimeError("a failing Raft")

    def _taken(self, sender: int, size_bytes: int) -> None:
        """Hear, in the middle of a take, of what is taken; whatever may happen then happens."""
        if self.machine.is_taking and self.nested is not None and not self.nested.is_over:
            for _ in range(self.nested.byte() % 8):
                self.step(self.nested)
        if self.machine.is_taking and self.is_failing:
            raise KeyboardInterrupt
        self._count_bytes(sender, size_bytes)

    def is_id_removed(self, member_id: int) -> bool:
        return member_id in self.removed

    def report_unreachable(self, member_id: int) -> None:
        pass

    def report_snapshot(self, member_id: int, status: Any) -> None:
        pass

    def _take_away(self, connection: Any, odd: OddRequest) -> None:
        """Take a snapshot's connection, as SnapshotConnections does, and end it."""
        connection.close()
        odd.move_place().give_back()

    # Steps. Each reads its arguments from the script.

    def step(self, script: Script) -> None:
        """Take the next step of a script; a calm one has none that loses a byte or takes time."""
        script.steps += 1
        if self.inbox is None:
            steps = CALM_STEPS if self.is_calm else STEPS
        else:
            steps = CALM_INBOX_STEPS if self.is_calm else INBOX_STEPS
        steps[script.byte() % len(steps)](self, script)
        self.machine.check()

    def caller(self, script: Script) -> Caller | None:
        number = script.byte()
        return self.callers[number % len(self.callers)] if self.callers else None

    def connect(self, script: Script) -> None:
        if len(self.callers) < MAX_CALLERS:
            with contextlib.suppress(OSError):  # it listens no more, or to no more
                self.callers.append(Caller(self.address))

    def give_bytes(self, script: Script) -> None:
        given = script.bytes(script.byte() % 64)
        if (caller := self.caller(script)) is not None:
            caller.rest += given

    def give_template(self, script: Script) -> None:
        given = TEMPLATES[script.byte() % len(TEMPLATES)]
        if (caller := self.caller(script)) is not None and len(caller.rest) < 4 << 20:
            caller.rest += given

    def send(self, script: Script) -> None:
        n = PIECES[script.byte() % len(PIECES)]
        if (caller := self.caller(script)) is not None:
            caller.send(n)
            caller.push()

    def send_odd(self, script: Script) -> None:
        n = script.byte()
        if (caller := self.caller(script)) is not None:
            caller.send(n)
            caller.push()

    def turn(self, script: Script) -> None:
        for caller in self.callers:
            caller.push()
        self.machine.turn()

    def serve_message(self, script: Script) -> None:
        self.machine.serve(False)

    def serve_odd(self, script: Script) -> None:
        self.machine.serve(True)

    def receive(self, script: Script) -> None:
        if (caller := self.caller(script)) is not None:
            caller.receive()

    def wait(self, script: Script) -> None:
        self.machine.advance(PAUSES_MS[script.byte() % len(PAUSES_MS)] * 1_000_000)

    def close(self, script: Script) -> None:
        if (caller := self.caller(script)) is not None:
            caller.socket.close()
            self.callers.remove(caller)

    def end_sending(self, script: Script) -> None:
        if (caller := self.caller(script)) is not None and not caller.unsent:
            with contextlib.suppress(OSError):  # its end was closed
                caller.socket.shutdown(socket.SHUT_WR)

    def fail_from_now_on(self, script: Script) -> None:
        self.is_failing = not self.is_failing

    def remove_member(self, script: Script) -> None:
        self.removed ^= {1}

    def lead(self, script: Script) -> None:
        self.machine.lead(bool(script.byte() & 1))

    def forget_messages(self, script: Script) -> None:
        self.kept.clear()

    def stop(self, script: Script) -> None:
        how = script.byte()  # rarely: nothing comes behind it
        if how > 250:
            self.machine.stop(how % 2 + 1)

    def take(self, script: Script) -> None:
        self._take(1 + script.byte() % 8)

    def _take(self, n: int) -> bool:
        """Take from the inbox; whether there was anything."""
        if self.inbox is None or self.machine.is_taking:  # its books are not those of two at once
            return False
        self.machine.is_taking = True
        try:
            messages = self.inbox.take(n)
        except KeyboardInterrupt:
            self.machine.has_put_back = True
            return True
        finally:
            self.machine.is_taking = False
        for message in messages:
            data = message.data if self.inbox.encoded else message.marshal()
            if self.is_calm:
                self.processed.append(data)
        self.kept += messages
        return bool(messages)

    def stop_node(self, script: Script) -> None:
        if script.byte() > 200:
            self._stop_node()

    def _stop_node(self) -> None:
        if self.inbox is not None and self.handlers.source is not None:
            self.inbox.close_source(self.handlers.source)

    def settle(self) -> None:
        """Let everything happen that needs neither bytes nor time."""
        quiet_rounds = 0
        while quiet_rounds < 2:  # what a turn has written is read in the next round
            is_moving = False
            for caller in self.callers:
                is_moving |= caller.push()
                is_moving |= caller.receive()
            is_moving |= self.machine.serve(True) or self.machine.serve(False)
            is_moving |= self._take(256)
            is_alive = self.machine.turn()
            self.machine.check()
            is_quiet = not is_moving and (self.machine.is_quiet or not is_alive)
            quiet_rounds = quiet_rounds + 1 if is_quiet else 0

    def end(self) -> None:
        """Stop in any state; see that nothing is left."""
        self.nested = None
        self.is_failing = False
        self.machine.end()
        self.machine.check()
        self._stop_node()
        while self.machine.serve(True) or self.machine.serve(False):
            pass
        assert self.snapshots._places.free == self.config.snapshot_receives
        assert self.handlers.budget.used == 0
        for caller in self.callers:
            caller.socket.close()
        if self.inbox is not None:
            assert self.inbox.closed
            books = self.inbox.stats()
            assert books.received == books.taken + books.dropped
            assert (books.queued, books.queued_bytes, books.waiting) == (0, 0, 0)
            del self.handlers.received.count_bytes, self._count_bytes
        # No cycle is left, so the receiver is freed here and now.
        del self.machine, self.receiver, self.handlers, self.snapshots
        ERRORS.raise_first()


#: By number; new ones go to the end: the corpus has numbers.
CALM_STEPS = (
    Run.connect, Run.give_bytes, Run.give_template, Run.send, Run.send_odd, Run.turn,
    Run.serve_message, Run.serve_odd, Run.receive,
)  # fmt: skip
STEPS = (
    *CALM_STEPS, Run.wait, Run.close, Run.end_sending, Run.fail_from_now_on, Run.remove_member,
    Run.lead, Run.forget_messages, Run.stop,
)  # fmt: skip


CALM_INBOX_STEPS = (*CALM_STEPS, Run.take)
INBOX_STEPS = (*STEPS, Run.take, Run.stop_node)


def configuration(flags: int, *, is_calm: bool = False) -> ReceiverConfig:
    # The clock goes on while a busy machine does something else: not far enough to matter.
    unit_s = 60.0 if is_calm else 1.0
    return ReceiverConfig(
        handlers=1 + (flags >> 1 & 1),
        max_connections=2 if flags & 4 else 64,
        max_buffered_bytes=100_000 if flags & 8 else 1 << 30,
        max_body_bytes=1000 if flags & 16 else 1 << 40,
        min_body_rate=0 if flags & 32 else 1024,
        max_head_bytes=256 if flags & 64 else 16 * 1024,
        head_timeout_s=unit_s,
        stall_timeout_s=2 * unit_s,
        idle_timeout_s=3 * unit_s,
        snapshot_receives=1,
        snapshot_dir=f"{tempfile.gettempdir()}/never-made",
    )


def inbox_of(flags: int) -> Inbox[Any]:
    make: Any = Inbox
    return make(  # type: ignore[no-any-return]
        max_messages=1 if flags & 2 else 3,
        max_bytes=100 if flags & 8 else 1 << 30,
        encoded=bool(flags & 32),
    )


def run(machine_type: Any, data: bytes, *, has_inbox: bool = False) -> None:
    """Run a script; raises when an invariant does not hold."""
    script = Script(data)
    flags = script.byte()
    if flags & 1:
        _run_calm(machine_type, script, has_inbox=has_inbox)
        return
    inbox = inbox_of(flags) if has_inbox else None
    one = Run(machine_type, configuration(flags), inbox=inbox)
    try:
        if flags & 128:
            one.nested = script
        while not script.is_over:
            one.step(script)
    finally:
        one.end()


def _run_calm(machine_type: Any, script: Script, *, has_inbox: bool) -> None:
    config = configuration(2, is_calm=True)
    pieces, whole = (
        Run(machine_type, config, inbox=inbox_of(2) if has_inbox else None, is_calm=True)
        for _ in range(2)
    )
    try:
        while not script.is_over:
            pieces.step(script)
        pieces.settle()
        for caller in pieces.callers:
            other = Caller(whole.address)
            whole.callers.append(other)
            other.rest = bytes(caller.sent)
            other.send(len(other.rest))
        whole.settle()
        is_all_read = True
        for caller, other in zip(pieces.callers, whole.callers, strict=True):
            found, expected = caller.statuses(), other.statuses()
            if caller.has_endless_answer or other.has_endless_answer:
                is_all_read = False
                n = min(len(found), len(expected))
                found, expected = found[:n], expected[:n]
            assert found == expected
        if is_all_read:
            assert sorted(pieces.processed) == sorted(whole.processed)
    finally:
        whole.end()
        pieces.end()
