"""Pipelines to scripted servers, messages to send, and what to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pipeline import (
    Entry,
    Message,
    MessageType,
    Pipeline,
    PipelineConfig,
    PipelineStats,
    Raft,
    Snapshot,
)
from pipeline.tls import Credentials
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.server import ScriptedServer

MEMBER, PEER, CLUSTER = 1, 2, 1


def message(type: MessageType = MessageType.APP, data: bytes = b"", to: int = PEER) -> Message:
    """A message of a type, with ``data`` as an entry's or, for MsgSnap, the snapshot's."""
    if type is MessageType.SNAP:
        return Message(type=type, to=to, from_=MEMBER, term=1, snapshot=Snapshot(data=data))
    return Message(type=type, to=to, from_=MEMBER, term=1, entries=(Entry(data=data),))


def pipeline_to(
    target: ScriptedServer | str | Iterable[str],
    raft: Raft | None = None,
    *,
    on_critical_error: Callable[[Exception], None] | None = None,
    credentials: Credentials | None = None,
    **config: object,
) -> Pipeline:
    """A pipeline, not started, to a server or URLs; keyword arguments are PipelineConfig's."""
    if isinstance(target, ScriptedServer):
        target = target.url
    return Pipeline(
        PEER,
        (target,) if isinstance(target, str) else target,
        raft or FakeRaft(),
        member_id=MEMBER,
        cluster_id=CLUSTER,
        config=PipelineConfig(**config),  # type: ignore[arg-type]
        on_critical_error=on_critical_error,
        credentials=credentials,
    )


def eventually(
    predicate: Callable[[], bool], what: str = "", timeout: float = LONG_TIMEOUT
) -> None:
    """Wait for what has no event to wait for: the books, the kernel."""
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, f"did not happen within {timeout:g} s {what}"
        time.sleep(0.002)


def settle(pipeline: Pipeline, timeout: float = LONG_TIMEOUT) -> PipelineStats:
    """Wait until every accepted message has its outcome; return the books."""
    eventually(
        lambda: pipeline.stats().queued == 0 and pipeline.stats().in_flight == 0,
        str(pipeline.stats()),
        timeout,
    )
    return pipeline.stats()


def assert_balanced(books: PipelineStats) -> None:
    """The invariant of design R4."""
    assert books.offered == books.accepted + books.refused, books
    outcomes = books.sent + books.failed + books.dropped
    assert books.accepted == outcomes + books.queued + books.in_flight, books
