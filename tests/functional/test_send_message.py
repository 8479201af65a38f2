"""Upstream's tests of two Transports (functional) and of its message codec, over the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pipeline import (
    ConfState,
    Entry,
    Listener,
    Message,
    MessageType,
    ReceiverConfig,
    Snapshot,
    SnapshotMetadata,
    SnapshotStatus,
    Transport,
)
from tests.support.http import handlers_of, peer_headers, reply_of_socket
from tests.support.raft import FakeRaft
from tests.support.waiting import eventually


@dataclass
class Pair:
    """Member 1 sends, member 2 listens."""

    sender: Transport
    raft: FakeRaft  # the sender's
    receiver: Transport
    listener: Listener
    received: FakeRaft


@pytest.fixture
def pair() -> Iterator[Pair]:
    raft, received = FakeRaft(), FakeRaft()
    with Transport(1, 1, raft) as sender, Transport(2, 1, received) as receiver:
        listener = receiver.listen("http://127.0.0.1:0")
        sender.add_peer(2, [listener.url])
        yield Pair(sender, raft, receiver, listener, received)


MESSAGES = [
    Message(type=MessageType.PROP, from_=1, to=2, entries=[Entry(data=b"a proposal")]),
    Message(
        type=MessageType.APP, from_=1, to=2, term=1, log_term=0, index=3, commit=3,
        entries=[Entry(term=1, index=4)],
    ),
    Message(type=MessageType.APP_RESP, from_=1, to=2, term=1, index=3),
    Message(type=MessageType.VOTE, from_=1, to=2, term=1, log_term=0, index=3),
    Message(type=MessageType.VOTE_RESP, from_=1, to=2, term=1),
    Message(
        type=MessageType.SNAP, from_=1, to=2, term=1,
        snapshot=Snapshot(
            data=b"a snapshot",
            metadata=SnapshotMetadata(conf_state=ConfState(voters=[1, 2]), index=1000, term=1),
        ),
    ),
    Message(type=MessageType.HEARTBEAT, from_=1, to=2, term=1, commit=3),
    Message(type=MessageType.HEARTBEAT_RESP, from_=1, to=2, term=1),
]  # fmt: skip


@pytest.mark.parametrize("sent", MESSAGES, ids=lambda message: message.type.name)
def test_send_message(pair: Pair, sent: Message) -> None:
    pair.sender.send([sent])
    assert pair.received.wait_processed(1) == [sent]
    if sent.type is MessageType.SNAP:
        assert pair.raft.wait_snapshots(1) == [(2, SnapshotStatus.FINISH)]
    eventually(lambda: pair.sender.stats()[2].sent == 1)
    assert pair.raft.unreachable == []


def test_send_message_when_stream_is_broken(pair: Pair) -> None:
    """Upstream's stream may lose 49 heartbeats before one arrives; the pipeline loses none."""
    beat = MESSAGES[-2]
    pair.sender.send([beat] * 8)  # on all four connections
    pair.received.wait_processed(8)
    eventually(lambda: pair.sender.stats()[2].sent == 8)
    url = pair.listener.url
    pair.listener.close()  # and with it all connections
    pair.receiver.listen(url)
    for count in range(9, 13):
        pair.sender.send([beat])
        assert pair.received.wait_processed(count)[-1] == beat
    assert pair.raft.unreachable == []


@pytest.mark.parametrize(
    "sent",
    [
        Message(type=MessageType.APP, from_=1, to=2, term=1, log_term=1, index=3,
                entries=[Entry(term=1, index=4)]),
        Message(type=MessageType.PROP, from_=1, to=2,
                entries=[Entry(data=b"one"), Entry(data=b"two"), Entry(data=b"three")]),
    ],
    ids=lambda message: message.type.name,
)  # fmt: skip
@pytest.mark.parametrize("profile", ["3.5", "3.6", "3.7"])
def test_message(sent: Message, profile: str) -> None:
    assert Message.unmarshal(sent.marshal(profile)) == sent


def test_message_above_the_limit() -> None:
    """A message is encoded whatever its size; the receiver has the limit."""
    config = ReceiverConfig(max_body_bytes=1000)
    raft = FakeRaft()
    handlers = handlers_of(raft, config)
    body = Message(type=MessageType.PROP, from_=1, to=2, entries=[Entry(data=bytes(1010))])
    with Listener(handlers, "http://127.0.0.1:0", config) as listener:
        reply = reply_of_socket(listener.url, "POST", "/raft", peer_headers(), body.marshal())
    assert (reply.status, reply.body) == (413, b"request body too large\n")
    assert raft.processed == []
