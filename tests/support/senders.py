"""Pipelines to scripted servers, messages to send, and what to wait for."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterable

import pytest

from pipeline import (
    Entry,
    Message,
    MessageType,
    Pipeline,
    PipelineConfig,
    PipelineStats,
    Raft,
    Snapshot,
    TransportConfig,
)
from pipeline.identity import Identity
from pipeline.peer import Peer
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.pipeline import PeerPipeline
from pipeline.snapshot.sender import RateLimiter, SnapshotSender
from pipeline.tls.credentials import Credentials
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.server import Connection, Request, Script, ScriptedServer
from tests.support.waiting import eventually, until_read

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


def peer_to(
    url: str, dispatcher: Dispatcher, raft: Raft, config: PipelineConfig | None = None
) -> Peer:
    """A peer, not started, as a Transport makes it."""
    config = config or PipelineConfig()
    identity = Identity(MEMBER, CLUSTER, (), TransportConfig().server_version)
    pipeline = PeerPipeline(PEER, [url], raft, identity, dispatcher=dispatcher, config=config)
    snapshots = SnapshotSender(
        pipeline,
        dispatcher=dispatcher,
        config=config,
        answer_timeout_s=LONG_TIMEOUT,
        limiter=RateLimiter(None),
    )
    return Peer(pipeline, snapshots, dispatcher)


def settle(pipeline: Pipeline, timeout: float = LONG_TIMEOUT) -> PipelineStats:
    """Wait until every accepted message has its outcome; return the books."""
    eventually(
        lambda: pipeline.stats().queued == 0 and pipeline.stats().in_flight == 0,
        lambda: f"no message is queued or in flight: {pipeline.stats()}",
        timeout,
    )
    return pipeline.stats()


def assert_balanced(books: PipelineStats) -> None:
    """The invariant of design R4."""
    assert books.offered == books.accepted + books.refused, books
    outcomes = books.sent + books.failed + books.dropped
    assert books.accepted == outcomes + books.queued + books.in_flight, books


def unfinished(status: str, framing: str) -> Script:
    """Answer as an etcd does that breaks its answer off: the head, and then for long nothing."""

    def script(connection: Connection, request: Request) -> None:
        connection.send(f"HTTP/1.1 {status}\r\n{framing}\r\n\r\n".encode())
        connection.server.release.wait(LONG_TIMEOUT)

    return script


#: How an answer may promise a body that does not come.
FRAMINGS = ["Content-Length: 29", "Transfer-Encoding: chunked", "X-To: the end of the stream"]

INTERIMS = 60


def many_interims(final: bytes) -> Script:
    """Answer with 60 interim answers, each by itself, and then ``final``."""

    def script(connection: Connection, request: Request) -> None:
        for _ in range(INTERIMS):
            connection.send(b"HTTP/1.1 102 Processing\r\n\r\n")
            until_read(connection.sock)
        connection.send(final)

    return script


class ParsedHeads:
    """Counts the heads that http.client is asked to read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        begin = http.client.HTTPResponse.begin

        def counting(response: http.client.HTTPResponse) -> None:
            self.count += 1
            begin(response)

        monkeypatch.setattr(http.client.HTTPResponse, "begin", counting)
