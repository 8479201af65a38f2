"""``examples/raft_rs.py``: the half that carries messages without raft-rs, the program with it."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from pipeline import Entry, EntryType, Message, MessageType, Transport
from pipeline.examples import raft_rs
from pipeline.examples.raft_rs import CLUSTER_ID, Member
from pipeline.wire._messages import decode
from tests.support import LONG_TIMEOUT, MIB
from tests.support.processes import TIMEOUT_S
from tests.support.raft import FakeRaft
from tests.support.server import refused_port
from tests.support.wire import span, varint

#: What ``rraft-py`` 0.2.27 encodes of a message in which every scalar of eraftpb is set.
GOLDEN = bytes.fromhex(
    "08 03 10 02 18 01 20 05 28 04 30 06"
    " 3a 17 08 01 10 05 18 07 22 04 64 61 74 61 28 01 32 07 63 6f 6e 74 65 78 74"
    " 40 03 50 01 58 08 62 03 63 74 78 68 09 70 07 78 04 80 01 fd ff ff ff ff ff ff ff ff 01"
)


def field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value % 2**64)


def eraftpb(context: bytes = b"ctx") -> bytes:
    """Encode a message with every field that eraftpb has and raftpb has not."""
    entry = (
        field(1, EntryType.CONF_CHANGE)
        + field(2, 5)
        + field(3, 7)
        + span(4 << 3 | 2, b"data")
        + field(5, True)  # sync_log
        + span(6 << 3 | 2, b"context")
    )
    return (
        field(1, MessageType.APP)
        + field(2, 2)
        + field(3, 1)
        + field(4, 5)
        + field(5, 4)
        + field(6, 6)
        + span(7 << 3 | 2, entry)
        + field(8, 3)
        + field(10, True)
        + field(11, 8)
        + span(12 << 3 | 2, context)
        + field(13, 9)  # request_snapshot
        + field(14, 7)  # deprecated_priority
        + field(15, 4)  # commit_term
        + field(16, -3)  # priority
    )


class Encoded:
    """A message of raft-rs, as far as the glue looks at it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def encode(self) -> bytes:
        return self.data


class Core:
    """A node of raft-rs that has nothing ready, and writes down what it is told."""

    def __init__(self) -> None:
        self.stepped: SimpleQueue[Encoded] = SimpleQueue()
        self.unreachable: SimpleQueue[int] = SimpleQueue()
        self.ticks: SimpleQueue[None] = SimpleQueue()

    def step(self, message: Encoded) -> None:
        self.stepped.put(message)

    def report_unreachable(self, member_id: int) -> None:
        self.unreachable.put(member_id)

    def tick(self) -> None:
        self.ticks.put(None)

    def has_ready(self) -> bool:
        return False


@contextlib.contextmanager
def running(member: Member) -> Iterator[str]:
    """Run a member; its URL."""
    thread = threading.Thread(target=member.run)
    thread.start()
    with member.transport as transport:
        yield transport.listen("http://127.0.0.1:0").url
    thread.join()  # it ends with its transport


def test_the_bytes_of_these_tests_are_those_of_raft_rs() -> None:
    assert eraftpb() == GOLDEN


@pytest.mark.parametrize("size", [3, 100_000, 3 * MIB])
def test_a_message_of_raft_rs_arrives_whole(size: int) -> None:
    """Through the glue on both sides, as the program has it."""
    one, two = Member(1, Core(), Encoded), Member(2, Core(), Encoded)
    sent = [eraftpb(bytes(size)), eraftpb(b"another")]
    with running(one), running(two) as url:
        one.transport.add_peer(2, [url])
        for data in sent:
            one.send([Encoded(data)])
            assert two.core.stepped.get(timeout=LONG_TIMEOUT).data == data
        assert two.transport.transport_stats().unknown_fields == 0
        assert one.transport.stats()[2].failed == 0


def test_without_the_glue_the_fields_of_raft_rs_are_lost_and_counted() -> None:
    raft = FakeRaft()
    one = Member(1, Core(), Encoded)
    with running(one), Transport(2, CLUSTER_ID, raft) as transport:
        one.transport.add_peer(2, [transport.listen("http://127.0.0.1:0").url])
        one.send([Encoded(eraftpb())])
        (message,) = raft.wait_processed(1)
        assert transport.transport_stats().unknown_fields == 1
    entry = Entry(term=5, index=7, type=EntryType.CONF_CHANGE, data=b"data")
    assert message == Message(
        type=MessageType.APP,
        to=2,
        from_=1,
        term=5,
        log_term=4,
        index=6,
        entries=[entry],
        commit=3,
        reject=True,
        reject_hint=8,
        context=b"ctx",
    )


@pytest.mark.parametrize("number", [5, 6])
def test_each_field_of_an_entry_of_raft_rs_is_missed(number: int) -> None:
    body = field(1, MessageType.APP) + span(7 << 3 | 2, field(number, 1))
    assert decode(body).has_unknown_fields


@pytest.mark.parametrize("number", [13, 14, 15, 16])
def test_each_field_of_a_message_of_raft_rs_is_missed(number: int) -> None:
    assert decode(field(1, MessageType.APP) + field(number, 1)).has_unknown_fields


def test_the_node_hears_of_time_and_of_who_is_unreachable() -> None:
    one = Member(1, Core(), Encoded)
    with running(one), refused_port() as port:
        one.transport.add_peer(2, [f"http://127.0.0.1:{port}"])
        one.send([Encoded(eraftpb())])
        assert one.core.unreachable.get(timeout=LONG_TIMEOUT) == 2
        one.core.ticks.get(timeout=LONG_TIMEOUT)


def test_the_program_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rraft", None)
    assert raft_rs.main() == 1
    assert "docs/howto/raft-rs.md" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("rraft") is None,
    reason="rraft-py is not installed: docs/howto/raft-rs.md says how it is built",
)
def test_three_members_of_raft_rs_commit_and_lose_no_context() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pipeline.examples.raft_rs"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    entries = raft_rs.ENTRIES
    last = result.stdout.splitlines()[-1]
    assert last == f"{entries}/{entries} entries are in all three, each with its context"
