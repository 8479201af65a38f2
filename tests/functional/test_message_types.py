"""What depends on a message's type: the table of docs/wire.md, each row of it as it happens."""

from __future__ import annotations

import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline import Inbox, Message, MessageType, ReceiverConfig, SnapshotStatus, Transport
from tests.support import LONG_TIMEOUT
from tests.support.http import CLUSTER_ID
from tests.support.listening import dial, listen, post, read_status
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, pipeline_to, settle
from tests.support.server import ERROR, OK, ScriptedServer, close, in_turn
from tests.support.waiting import eventually

WIRE = Path(__file__).parents[2] / "docs" / "wire.md"
LATER = max(MessageType) + 1


class Row(NamedTuple):
    """The cells of the table, but the first."""

    when_broken: str
    awaited: str
    heard: str
    lane: str
    answered: str
    with_inbox: str


def table() -> dict[int, Row]:
    """The table, by type."""
    section = WIRE.read_text().partition("### Types\n")[2].partition("\n### ")[0]
    rows: dict[int, Row] = {}
    for line in re.findall(r"^\| ((?:`[A-Z_]+`|a number).*) \|$", section, re.MULTILINE):
        first, *cells = line.split(" | ")
        names = re.findall(r"`([A-Z_]+)`", first)
        kinds = [int(MessageType[name]) for name in names] or [
            int(re.findall(r"\((\d+) and above\)", first)[0])
        ]
        for kind in kinds:
            assert kind not in rows
            rows[kind] = Row(*cells)
    return rows


TABLE = table() if WIRE.exists() else {}  # a wheel is tried with the tests alone

pytestmark = pytest.mark.skipif(not TABLE, reason="the documents are not beside the tests")

each_type = pytest.mark.parametrize(
    ("kind", "row"),
    TABLE.items(),
    ids=[f"{MessageType(kind).name if kind < LATER else kind}" for kind in TABLE],
)


def message_of(kind: int, index: int = 1) -> Message:
    return Message(type=kind, to=PEER, from_=1, term=1, index=index)


FIRST = message_of(MessageType.HEARTBEAT, index=0)


def test_every_type_has_its_row_and_the_numbers_of_a_later_raft_one() -> None:
    assert sorted(TABLE) == [*sorted(map(int, MessageType)), LATER]


@each_type
def test_what_becomes_of_it_when_its_connection_breaks(kind: int, row: Row) -> None:
    with (
        ScriptedServer(in_turn(OK, close, OK)) as server,
        pipeline_to(server, connections=1) as pipeline,
    ):
        for message in (FIRST, message_of(kind)):
            pipeline.send(message)
            settle(pipeline)
        books = pipeline.stats()
        seen = {(3, 0): "sent again", (2, 1): "fails"}[(len(server.requests), books.failed)]
    assert seen == row.when_broken


@each_type
def test_how_long_its_answer_is_awaited(kind: int, row: Row) -> None:
    """A heartbeat that leaves after it has the same deadline, if it has one, later."""
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        pipeline_to(server, raft, connections=2, response_timeout_s=0.05) as pipeline,
    ):
        server.script = server.hold
        pipeline.send(message_of(kind))
        server.wait_requests(1)
        for count in (1, 2):
            pipeline.send(FIRST)
            raft.wait_unreachable(count)
        if row.awaited == "for ever":
            eventually(lambda: pipeline.stats().failed == 2)
            assert pipeline.stats().in_flight == 1
        else:
            assert row.awaited == "`response_timeout_s`"
            assert settle(pipeline).failed == 3
        server.release.set()


@each_type
def test_what_raft_hears_of_it(kind: int, row: Row) -> None:
    raft = FakeRaft()
    with (
        ScriptedServer(in_turn(OK, ERROR, OK)) as server,
        pipeline_to(server, raft, connections=1) as pipeline,
    ):
        for message in (FIRST, message_of(kind), message_of(kind)):
            pipeline.send(message)
            settle(pipeline)
        follower = pipeline.follower_stats()
    heard = []
    if raft.unreachable == [PEER]:
        heard.append("`report_unreachable`")
    if raft.snapshots == [(PEER, SnapshotStatus.FAILURE), (PEER, SnapshotStatus.FINISH)]:
        heard.append("`report_snapshot`")
    else:
        assert raft.snapshots == []
    text = ", ".join(heard)
    if (follower.success, follower.fail) == (1, 1):
        text += "; `follower_stats()` counts it"
    else:
        assert (follower.success, follower.fail) == (0, 0)
    assert text == row.heard


class Holding(FakeRaft):
    """Holds what has an index, until ``release``."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.begun = threading.Semaphore(0)

    def process(self, message: Message) -> None:
        if message.index:
            self.begun.release()
            assert self.release.wait(LONG_TIMEOUT)
        super().process(message)


@pytest.fixture
def raft() -> Iterator[Holding]:
    raft = Holding()
    yield raft
    raft.release.set()


def is_answered(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0.0)[0])


@each_type
def test_when_it_is_answered_and_whether_it_takes_the_last_thread(
    raft: Holding, kind: int, row: Row
) -> None:
    """Of two threads that call ``process``, proposals take one; the other types take both."""
    is_delivered = row.answered == "after `process`"
    with (
        listen(raft, config=ReceiverConfig(handlers=2)) as listener,
        dial(listener.url) as first,
        dial(listener.url) as second,
        dial(listener.url) as third,
    ):
        first.sendall(post(message_of(kind).marshal()))
        if not is_delivered:
            assert (read_status(first), row.answered) == (204, "204, not delivered")
            assert raft.processed == []
            return
        assert raft.begun.acquire(timeout=LONG_TIMEOUT)
        if row.lane == "proposals":
            second.sendall(post(message_of(kind).marshal()))
            third.sendall(post(FIRST.marshal()))
            assert read_status(third) == 204
            assert not raft.begun.acquire(blocking=False)
        else:
            assert row.lane in ("control", "appends")
            third.sendall(post(FIRST.marshal()))
            assert read_status(third) == 204
            second.sendall(post(message_of(kind).marshal()))
            assert raft.begun.acquire(timeout=LONG_TIMEOUT)
        assert not is_answered(first)
        assert not is_answered(second)
        raft.release.set()
        assert (read_status(first), read_status(second)) == (204, 204)
        assert [message.type for message in raft.processed] == [FIRST.type, kind, kind]


@contextmanager
def inbox_at(max_messages: int) -> Iterator[tuple[Inbox, str]]:
    """An inbox, and where it is posted to."""
    inbox: Inbox = Inbox(max_messages=max_messages)
    with Transport(2, CLUSTER_ID, FakeRaft(), inbox=inbox) as transport:
        yield inbox, transport.listen("http://127.0.0.1:0").url


@each_type
def test_when_it_is_answered_that_goes_to_an_inbox(kind: int, row: Row) -> None:
    with (
        inbox_at(max_messages=10) as (inbox, url),
        dial(url) as first,
        dial(url) as second,
    ):
        first.sendall(post(message_of(kind).marshal()))
        if row.with_inbox == "when taken":
            eventually(lambda: len(inbox) == 1)
            second.sendall(post(FIRST.marshal()))
            assert read_status(second) == 204
            assert not is_answered(first)
            assert [message.type for message in inbox.take()] == [kind, FIRST.type]
            assert read_status(first) == 204
            return
        assert read_status(first) == 204
        taken = {"at once": [kind], "204, not delivered": []}[row.with_inbox]
        assert [message.type for message in inbox.take()] == taken


LANES = {
    "control": MessageType.HEARTBEAT,
    "appends": MessageType.APP,
    "proposals": MessageType.PROP,
}


@each_type
def test_in_which_lane_it_waits(kind: int, row: Row) -> None:
    """When each lane has room for one, of three messages that of its own lane has to wait."""
    with inbox_at(max_messages=1) as (inbox, url), ExitStack() as stack:
        first, *others = [stack.enter_context(dial(url)) for _ in range(4)]
        first.sendall(post(message_of(kind).marshal()))
        if row.lane == "none":
            assert read_status(first) == 204
        else:
            eventually(lambda: len(inbox) == 1)
        for sock, other in zip(others, LANES.values(), strict=True):
            sock.sendall(post(message_of(other).marshal()))
        eventually(lambda: len(inbox) == 3)
        there = [message.type for message in inbox.take()]
        if row.lane == "none":
            assert sorted(there) == sorted(LANES.values())
            return
        missing = [lane for lane, other in LANES.items() if other not in there[1:]]
        assert (there[0], missing) == (kind, [row.lane])
        assert [message.type for message in inbox.take(timeout=LONG_TIMEOUT)] == [LANES[row.lane]]
