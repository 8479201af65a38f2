"""Encoding and decoding one message: ours beside protobuf's, in one run (P8).

    python -m pytest benchmarks/bench_marshal.py

Ids name what is done, the message and its encoded bytes. ``build`` is making the objects: a node
makes every message once, so its cost belongs to sending; for protobuf, which copies every payload
when it is set, it is most of it. Both sides write and read the same bytes, those of etcd 3.5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from pipeline.raftpb import raft_pb2
from pipeline.types import MessageType
from pipeline.wire._messages import Entry, Message

KIB, MIB = 1 << 10, 1 << 20


class Case(NamedTuple):
    name: str
    type: MessageType
    entries: int
    payload: bytes


CASES = [
    Case("heartbeat", MessageType.HEARTBEAT, 0, b""),
    Case("app-1x128B", MessageType.APP, 1, b"x" * 128),
    Case("app-64x128B", MessageType.APP, 64, b"x" * 128),
    Case("app-1x1MiB", MessageType.APP, 1, b"x" * MIB),
]


def build_ours(case: Case) -> Message:
    return Message(
        type=case.type,
        to=2,
        from_=1,
        term=5,
        log_term=5,
        index=1000,
        commit=999,
        entries=[Entry(term=5, index=1001 + i, data=case.payload) for i in range(case.entries)],
    )


def build_protobuf(case: Case) -> raft_pb2.Message:
    return raft_pb2.Message(
        type=case.type,
        to=2,
        term=5,
        logTerm=5,
        index=1000,
        commit=999,
        reject=False,
        rejectHint=0,
        entries=[
            raft_pb2.Entry(Type=0, Term=5, Index=1001 + i, Data=case.payload)
            for i in range(case.entries)
        ],
        snapshot=raft_pb2.Snapshot(
            metadata=raft_pb2.SnapshotMetadata(
                conf_state=raft_pb2.ConfState(auto_leave=False), index=0, term=0
            )
        ),
        **{"from": 1},
    )


def works(case: Case) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What is measured, by name: functions and arguments. All make the same bytes or message."""
    ours, theirs = build_ours(case), build_protobuf(case)
    data = ours.marshal()
    assert data == theirs.SerializeToString()
    return {
        "marshal-ours": (ours.marshal, ()),
        "marshal-protobuf": (theirs.SerializeToString, ()),
        "build+marshal-ours": (lambda: build_ours(case).marshal(), ()),
        "build+marshal-protobuf": (lambda: build_protobuf(case).SerializeToString(), ()),
        "unmarshal-ours": (Message.unmarshal, (data,)),
        "unmarshal-protobuf": (raft_pb2.Message.FromString, (data,)),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("work", list(works(CASES[0])))
def test_codec(benchmark: Any, case: Case, work: str) -> None:
    run, arguments = works(case)[work]
    size = build_ours(case).byte_size()
    benchmark.group = f"{work.rsplit('-', 1)[0]} {case.name} {size}B"
    benchmark.extra_info.update(message_type=case.type.name, bytes=size, entries=case.entries)
    # Enough calls a round that the clock's own cost does not show, and enough rounds that somebody
    # else's 10 ms do not make the median.
    rounds, calls = (200, 20) if size > KIB * 64 else (2000, 500 if case.entries < 2 else 20)
    benchmark.pedantic(run, arguments, rounds=rounds, iterations=calls, warmup_rounds=5)
