"""The bytes etcd's encoders make, written out (spec section 1.6)."""

import pytest

from pipeline.raftpb import raft_pb2
from pipeline.types import MessageType
from pipeline.wire._messages import ConfState, Entry, Message, Snapshot, SnapshotMetadata, decode

SOME_DATA = "73 6f 6d 65 20 64 61 74 61"
EMPTY_SNAPSHOT = "4a 0a 12 08 0a 02 28 00 10 00 18 00"
ENTRY_4 = f"3a 11 08 00 10 01 18 04 22 09 {SOME_DATA}"

#: Name, message, bytes of the encoder of 3.4 and 3.5.
VECTORS = [
    (
        "zero",
        Message(type=MessageType.HUP),
        f"08 00 10 00 18 00 20 00 28 00 30 00 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "link heartbeat",
        Message(type=MessageType.HEARTBEAT),
        f"08 08 10 00 18 00 20 00 28 00 30 00 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "heartbeat",
        Message(type=MessageType.HEARTBEAT, from_=1, to=2, term=1, commit=3),
        f"08 08 10 02 18 01 20 01 28 00 30 00 40 03 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "heartbeat with context",
        Message(type=MessageType.HEARTBEAT, from_=1, to=2, term=1, commit=3, context=b"\x00\x01"),
        f"08 08 10 02 18 01 20 01 28 00 30 00 40 03 {EMPTY_SNAPSHOT} 50 00 58 00 62 02 00 01",
    ),
    (
        "heartbeat response",
        Message(type=MessageType.HEARTBEAT_RESP, from_=1, to=2, term=1),
        f"08 09 10 02 18 01 20 01 28 00 30 00 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "append",
        Message(
            type=MessageType.APP,
            from_=1,
            to=2,
            term=1,
            log_term=0,
            index=3,
            commit=3,
            entries=[Entry(index=4, term=1, data=b"some data")],
        ),
        f"08 03 10 02 18 01 20 01 28 00 30 03 {ENTRY_4} 40 03 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "append response",
        Message(type=MessageType.APP_RESP, from_=1, to=2, term=1, index=3),
        f"08 04 10 02 18 01 20 01 28 00 30 03 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "append refused",
        Message(
            type=MessageType.APP_RESP, from_=1, to=2, term=1, index=3, reject=True, reject_hint=2
        ),
        f"08 04 10 02 18 01 20 01 28 00 30 03 40 00 {EMPTY_SNAPSHOT} 50 01 58 02",
    ),
    (
        "vote",
        Message(type=MessageType.VOTE, from_=1, to=2, term=1, index=3),
        f"08 05 10 02 18 01 20 01 28 00 30 03 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "proposal",
        Message(type=MessageType.PROP, from_=1, to=2, entries=[Entry(data=b"some data")]),
        "08 02 10 02 18 01 20 00 28 00 30 00 "
        f"3a 11 08 00 10 00 18 00 22 09 {SOME_DATA} 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "snapshot",
        Message(
            type=MessageType.SNAP,
            from_=1,
            to=2,
            term=1,
            snapshot=Snapshot(data=b"some data", metadata=SnapshotMetadata(index=1000, term=1)),
        ),
        "08 07 10 02 18 01 20 01 28 00 30 00 40 00 "
        f"4a 16 0a 09 {SOME_DATA} 12 09 0a 02 28 00 10 e8 07 18 01 50 00 58 00",
    ),
    (
        "ids of ten bytes",
        Message(
            type=MessageType.HEARTBEAT,
            from_=0x8E9E05C52164694D,
            to=0xCE2A822CEA30BFCA,
            term=2,
        ),
        "08 08 10 ca ff c2 d1 ce c5 a0 95 ce 01 18 cd d2 91 8b d2 b8 81 cf 8e 01 20 02 "
        f"28 00 30 00 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "zero entry",
        Message(type=MessageType.HUP, entries=[Entry()]),
        "08 00 10 00 18 00 20 00 28 00 30 00 3a 06 08 00 10 00 18 00 40 00 "
        f"{EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "entry",
        Message(type=MessageType.HUP, entries=[Entry(term=1, index=1, data=b"some data")]),
        "08 00 10 00 18 00 20 00 28 00 30 00 "
        f"3a 11 08 00 10 01 18 01 22 09 {SOME_DATA} 40 00 {EMPTY_SNAPSHOT} 50 00 58 00",
    ),
    (
        "conf state with voters",
        Message(
            type=MessageType.HUP,
            snapshot=Snapshot(metadata=SnapshotMetadata(conf_state=ConfState(voters=[1, 2, 3]))),
        ),
        "08 00 10 00 18 00 20 00 28 00 30 00 40 00 "
        "4a 10 12 0e 0a 08 08 01 08 02 08 03 28 00 10 00 18 00 50 00 58 00",
    ),
]

by_name = pytest.mark.parametrize(
    ("message", "text"), [vector[1:] for vector in VECTORS], ids=[v[0] for v in VECTORS]
)


@by_name
def test_the_3_5_profile_makes_etcds_bytes(message: Message, text: str) -> None:
    assert message.marshal().hex(" ") == text
    assert message.byte_size() == len(bytes.fromhex(text))


@by_name
def test_etcds_bytes_are_read_as_the_message(message: Message, text: str) -> None:
    assert decode(bytes.fromhex(text))[:2] == (message, False)


@by_name
def test_the_3_6_profile_drops_an_empty_snapshot_and_appends_vote(
    message: Message, text: str
) -> None:
    expected = text.replace(f" {EMPTY_SNAPSHOT}", "") + " 68 00"
    assert message.marshal("3.6").hex(" ") == expected
    assert decode(bytes.fromhex(expected))[:2] == (message, False)


def test_a_zero_message_has_the_size_of_its_era() -> None:
    zero = Message(type=MessageType.HUP)
    assert [len(zero.marshal(profile)) for profile in ("3.5", "3.6", "3.7")] == [30, 20, 0]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Message(type=MessageType.HEARTBEAT), "08 08"),
        (
            Message(type=MessageType.HEARTBEAT, from_=1, to=2, term=1, commit=3),
            "08 08 10 02 18 01 20 01 40 03",
        ),
    ],
    ids=["link heartbeat", "heartbeat"],
)
def test_the_3_7_profile_makes_only_what_is_set(message: Message, text: str) -> None:
    assert message.marshal("3.7").hex(" ") == text
    assert Message.unmarshal(bytes.fromhex(text)) == message


def test_the_3_7_append_with_an_explicit_zero_is_read_alike() -> None:
    # Upstream's test sets logTerm to 0, and 3.7 sends what was set: "28 00". Our fields know
    # no "set to zero", so we send two bytes less; both are the same message.
    append = VECTORS[5][1]
    text = f"08 03 10 02 18 01 20 01 28 00 30 03 3a 0f 10 01 18 04 22 09 {SOME_DATA} 40 03"
    assert Message.unmarshal(bytes.fromhex(text)) == append
    assert append.marshal("3.7").hex(" ") == text.replace(" 28 00", "")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (raft_pb2.HardState(term=2, vote=1, commit=5), "08 02 10 01 18 05"),
        (raft_pb2.ConfChange(id=0, type="ConfChangeAddNode", node_id=3), "08 00 10 00 18 03"),
        (
            raft_pb2.ConfChangeV2(
                transition="ConfChangeTransitionAuto",
                changes=[raft_pb2.ConfChangeSingle(type="ConfChangeAddNode", node_id=3)],
            ),
            "08 00 12 04 08 00 10 03",
        ),
        (raft_pb2.Entry(Type=0, Term=0, Index=0), "08 00 10 00 18 00"),
        (
            raft_pb2.Entry(Type=0, Term=1, Index=1, Data=b"some data"),
            f"08 00 10 01 18 01 22 09 {SOME_DATA}",
        ),
        (raft_pb2.ConfState(auto_leave=False), "28 00"),
        (raft_pb2.ConfState(voters=[1, 2, 3], auto_leave=False), "08 01 08 02 08 03 28 00"),
    ],
    ids=[
        "hard state",
        "conf change",
        "conf change v2",
        "zero entry",
        "entry",
        "zero conf state",
        "conf state",
    ],
)
def test_the_protobuf_classes_make_etcds_bytes_when_zeros_are_set(
    message: raft_pb2.Message, text: str
) -> None:
    assert message.SerializeToString().hex(" ") == text
    assert type(message).FromString(bytes.fromhex(text)) == message
