"""The books balance at every instant and at the end, whatever the peer does (design R4)."""

from __future__ import annotations

import random
import threading
import time

import pytest

from pipeline import MessageType, PipelineStats, SendResult
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import assert_balanced, message, pipeline_to, settle
from tests.support.server import ERROR, OK, Connection, Request, ScriptedServer, answer

PRODUCERS = 4
SEED = 20240607
TYPES = (MessageType.APP, MessageType.HEARTBEAT, MessageType.PROP, MessageType.SNAP)


class Chaos:
    """A script that fails at random and knows what it promised."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.answered = 0  # requests answered 204

    def __call__(self, connection: Connection, request: Request) -> bytes | None:
        with self._lock:
            kind = self._random.random()
        if kind < 0.70:
            with self._lock:
                self.answered += 1
            return OK
        if kind < 0.76:
            return ERROR
        if kind < 0.80:
            connection.close()
        elif kind < 0.84:
            connection.reset()
        elif kind < 0.88:
            connection.send(b"garbage\r\n\r\n")
            connection.close()
        elif kind < 0.92:
            return answer("412 Precondition Failed", b"cluster ID mismatch\n")
        elif kind < 0.96:
            time.sleep(0.001)
            with self._lock:
                self.answered += 1
            return b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
        else:
            connection.send(b"HTTP/1.1 500 Oops\r\nContent-Length: 10\r\n\r\n123")
            connection.close()
        return None


class Sampler(threading.Thread):
    """Looks at the books all the time, and keeps the first sample that does not balance."""

    def __init__(self, stats: object, *, max_in_flight: int = 4) -> None:
        super().__init__(daemon=True)
        self._max_in_flight = max_in_flight
        self._stats = stats
        self._is_over = threading.Event()
        self.samples = 0
        self.error: AssertionError | None = None

    def run(self) -> None:
        previous = self._stats()  # type: ignore[operator]
        while not self._is_over.is_set() and self.error is None:
            books: PipelineStats = self._stats()  # type: ignore[operator]
            self.samples += 1
            try:
                assert_balanced(books)
                for name in ("offered", "accepted", "refused", "sent", "failed", "dropped"):
                    assert getattr(books, name) >= getattr(previous, name), (name, previous, books)
                assert 0 <= books.in_flight <= self._max_in_flight
                assert 0 <= books.queued <= 64
            except AssertionError as error:
                self.error = error
            previous = books
            time.sleep(0)

    def finish(self) -> None:
        self._is_over.set()
        self.join(LONG_TIMEOUT)
        assert self.samples > 10
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("max_queue_age", [None, 0.001], ids=["any age", "young"])
def test_10_000_messages_to_a_server_that_fails_at_random(max_queue_age: float | None) -> None:
    raft = FakeRaft()
    chaos = Chaos(SEED)
    results: list[SendResult] = []
    with (
        ScriptedServer(chaos) as server,
        pipeline_to(server, raft, max_queue_age=max_queue_age) as pipeline,
    ):
        # Of those that expire, each of 8 dispatcher threads may hold as many as were queued.
        sampler = Sampler(pipeline.stats, max_in_flight=4 + 8 * 64 if max_queue_age else 4)
        sampler.start()

        def produce(number: int) -> None:
            mine = []
            accepted = 0
            while accepted < 10_000 // PRODUCERS:
                result = pipeline.send(message(TYPES[(number + accepted) % 4]))
                mine.append(result)
                if result is SendResult.ACCEPTED:
                    accepted += 1
                else:
                    time.sleep(0.0005)
            results.extend(mine)

        producers = [threading.Thread(target=produce, args=(n,)) for n in range(PRODUCERS)]
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join(100)
        books = settle(pipeline)
        sampler.finish()
        assert books.offered == len(results)
        assert books.refused == results.count(SendResult.QUEUE_FULL)
        assert books.accepted == 10_000
        assert books.sent + books.failed == 10_000
        assert books.dropped == 0
        # One report per failure, one snapshot report per snapshot, and nobody imagined a 204:
        # a reused connection that dies is retried, so the server may have answered for nothing.
        assert len(raft.unreachable) == books.failed
        assert len(raft.snapshots) == 10_000 // 4
        assert books.sent == chaos.answered
        if max_queue_age is not None:
            assert len(server.requests) < 10_000  # some did expire


@pytest.mark.parametrize("max_queue_age", [None, 0.002], ids=["any age", "young"])
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 6))]
)
def test_stopped_in_the_middle(seed: int, max_queue_age: float | None) -> None:
    raft = FakeRaft()
    accepted = [0] * PRODUCERS
    offered = [0] * PRODUCERS
    with (
        ScriptedServer(Chaos(seed)) as server,
        pipeline_to(server, raft, max_queue_age=max_queue_age) as pipeline,
    ):
        sampler = Sampler(pipeline.stats, max_in_flight=4 + 8 * 64 if max_queue_age else 4)
        sampler.start()

        def produce(number: int) -> None:
            while True:
                result = pipeline.send(message(TYPES[number]))
                offered[number] += 1
                if result is SendResult.STOPPED:
                    return
                accepted[number] += result is SendResult.ACCEPTED

        producers = [threading.Thread(target=produce, args=(n,)) for n in range(PRODUCERS)]
        for producer in producers:
            producer.start()
        server.wait_requests(30 + 20 * seed)
        dropped = pipeline.stop()
        for producer in producers:
            producer.join(LONG_TIMEOUT)
        books = settle(pipeline)
        sampler.finish()
        assert (books.queued, books.in_flight, books.queued_bytes) == (0, 0, 0)
        assert books.offered == sum(offered)
        assert books.accepted == sum(accepted)
        assert books.dropped == dropped
        assert books.accepted == books.sent + books.failed + books.dropped
        assert len(raft.unreachable) == books.failed
