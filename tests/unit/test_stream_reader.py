"""StreamReader without sockets: how an answer is judged, and when the next dial is (spec 8.4).

Upstream: ``stream_test.go`` ``TestStreamReaderDialResult``, which has its name in
``tests/functional/test_streams.py``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import pytest

from pipeline import MemberRemovedError
from pipeline._core import ActiveFlag, IOLoop
from pipeline.callbacks import Callbacks
from pipeline.errors import STOPPED
from pipeline.identity import Identity
from pipeline.logs import get_logger
from pipeline.net._budget import BodyBudget
from pipeline.net._sockets import OwnSocket
from pipeline.receive.inbox import Inbox
from pipeline.send.dispatcher import Dispatcher
from pipeline.send.picker import URLPicker
from pipeline.send.pipeline import PeerPipeline
from pipeline.send.reports import Reports
from pipeline.send.status import PeerStatus
from pipeline.stream import reader as module
from pipeline.stream._streams import StreamEvent, Streams
from pipeline.stream.reader import (
    LASTING_S,
    REFUSED_RETRY_S,
    REFUSED_WAIT_S,
    RETRY_S,
    StreamReader,
)
from tests.support.raft import FakeRaft

PEER = 0xB2
URLS = ("http://10.0.0.1:2380", "http://10.0.0.2:2380")
VERSION = "X-Server-Version: 3.6.0\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"


class Clock:
    """What ``time.monotonic`` says to the reader."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakePipeline:
    """A peer's pipeline as far as a reader wants of it, and the dials that it made."""

    def __init__(self) -> None:
        self.identity = Identity(0xA1, 0x7, ("http://10.0.0.9:2380",), "3.6.0")
        self.peer_id = PEER
        self.picker = URLPicker(URLS)
        self.status = PeerStatus(0xA1, PEER, ActiveFlag())
        self.critical: list[MemberRemovedError] = []
        self.reports = Reports(
            PEER,
            FakeRaft(),
            picker=self.picker,
            status=self.status,
            callbacks=Callbacks(get_logger("pipeline.test")),
            is_every_told=True,
            on_critical_error=self.critical.append,
        )
        self.dials: list[FakeDial] = []
        self.versions: list[str | None] = []

    def pool(self, url: str) -> FakePipeline:
        self.url = url
        return self

    def dial(self, _timeout_s: float, on_done: Callable[[object], object]) -> FakeDial:
        self.dials.append(FakeDial(self.url, on_done))
        return self.dials[-1]

    def note_version(self, headers: dict[str, str]) -> None:
        self.versions.append(headers.get("x-server-version"))


class FakeDial:
    """A dial that ends when the test says so."""

    def __init__(self, url: str, on_done: Callable[[object], object]) -> None:
        self.url = url
        self.failure = ""
        self.is_cancelled = False
        self._on_done = on_done

    def take(self) -> OwnSocket:
        return cast(OwnSocket, self)

    def succeed(self) -> None:
        self._on_done(self)

    def fail(self, reason: str) -> None:
        self.failure = reason
        self._on_done(self)


class FakeDispatcher:
    """Dials, and calls at once what it is to call soon."""

    def __init__(self) -> None:
        self.dialer = self

    def begin(self, dial: FakeDial) -> None:
        pass

    def cancel(self, dial: FakeDial) -> None:
        dial.is_cancelled = True

    def call_soon(self, function: Callable[[], object]) -> None:
        function()


class ScriptedReader(StreamReader):
    """A reader whose loop is the test: what it asks of its base is kept."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.asked: list[tuple[str, object]] = []
        self.requests: list[bytes] = []
        self.answer = b""

    def dial_after(self, seconds: float) -> None:
        self.asked.append(("dial", round(seconds, 6)))

    def connect(self, sock: OwnSocket, request: bytes) -> bool:
        self.requests.append(request)
        return True

    def head(self) -> bytes:
        return self.answer

    def accept(self, head_len: int, *, is_chunked: bool) -> None:
        self.asked.append(("accept", (head_len, is_chunked)))

    def refuse(self) -> None:
        self.asked.append(("refuse", None))

    def wait_refused(self, head_len: int, *, is_chunked: bool, wait_s: float) -> None:
        self.asked.append(("wait", (head_len, is_chunked, wait_s)))

    def take_asked(self) -> list[tuple[str, object]]:
        asked, self.asked = self.asked, []
        return asked


class Bench:
    """One or more readers of a peer, at a clock of their own."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.pipeline = FakePipeline()
        self._streams: list[Streams] = []
        self.reader = self.make("message")

    def make(self, kind: str) -> ScriptedReader:
        source = Inbox().open_source(lambda *_: None)
        self._streams.append(
            Streams(
                IOLoop(1 << 20),
                BodyBudget(1 << 20, 1 << 20),
                source,
                source,
                delivered_types=0,
                max_bytes=1 << 20,
                drops_proposals=False,
            )
        )
        return ScriptedReader(
            self._streams[-1],
            kind,
            cast(PeerPipeline, self.pipeline),
            cast(Dispatcher, FakeDispatcher()),
            5.0,
        )

    @property
    def status(self) -> PeerStatus:
        return self.pipeline.status

    def dial(self, reader: ScriptedReader | None = None) -> FakeDial:
        """Have the reader dial, at the time it wants to."""
        reader = reader or self.reader
        dials = self.pipeline.dials
        before = len(dials)
        reader.on_connect()
        if len(dials) == before:
            ((what, seconds),) = reader.take_asked()
            assert what == "dial"
            assert isinstance(seconds, float)
            self.clock.now += seconds + 1e-6
            reader.on_connect()
        assert len(dials) == before + 1
        return dials[-1]

    def answered(
        self, answer: str, error: int = 0, reader: ScriptedReader | None = None
    ) -> list[tuple[str, object]]:
        """Dial, and have it answered so; what the reader made of it."""
        reader = reader or self.reader
        self.dial(reader).succeed()
        reader.answer = answer.encode()
        reader.on_event(StreamEvent.HEAD, error)
        return reader.take_asked()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


@pytest.fixture
def bench(clock: Clock) -> Bench:
    return Bench(clock)


def head(status: str, *lines: str) -> str:
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n"


def text(status: str, body: str, *lines: str) -> str:
    return head(status, *lines, f"Content-Length: {len(body)}\r\n") + body


@pytest.mark.parametrize("kind", ["message", "msgapp"])
def test_a_stream_is_asked_for_as_an_etcd_asks(bench: Bench, kind: str) -> None:
    reader = bench.make(kind)
    bench.dial(reader).succeed()
    (request,) = reader.requests
    line, *lines = request.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert line == f"GET /raft/stream/{kind}/a1 HTTP/1.1"
    assert lines[0] == "Host: 10.0.0.1:2380"
    assert lines[2:-1] == [
        "X-Etcd-Cluster-Id: 7",
        "X-Min-Cluster-Version: 3.0.0",
        "X-Peerurls: http://10.0.0.9:2380",
        "X-Raft-To: b2",
        "X-Server-From: a1",
        "X-Server-Version: 3.6.0",
    ]


@pytest.mark.parametrize(
    ("lines", "is_chunked"), [(CHUNKED, True), ("Connection: close\r\n", False)]
)
def test_what_follows_a_200_is_the_stream(bench: Bench, lines: str, is_chunked: bool) -> None:
    answer = head("200 OK", VERSION, lines)
    asked = bench.answered(answer + "a frame")
    assert asked == [("accept", (len(answer), is_chunked))]
    assert bench.status.is_active
    assert bench.pipeline.versions == ["3.6.0"]


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        ("404 Not Found", "error sender not found\n", "peer b2 failed to find local node"),
        ("405 Method Not Allowed", "", "unhandled http status 405"),
        ("403 Forbidden", "", "unhandled http status 403"),
        ("500 Internal Server Error", "", "unhandled http status 500"),
        ("301 Moved Permanently", "", "unhandled http status 301"),
        ("412 Precondition Failed", "incompatible version\n", "incompatible version"),
        ("412 Precondition Failed", "cluster ID mismatch\n", "cluster ID mismatch"),
        (
            "412 Precondition Failed",
            "to field mismatch\n",
            'unhandled error "to field mismatch\\n" when precondition failed',
        ),
        ("200 OK", "hello", "the answer is no stream"),
    ],
)
def test_a_refusal_deactivates_the_peer_and_turns_to_its_next_url(
    bench: Bench, status: str, body: str, reason: str
) -> None:
    bench.status.activate()
    asked = bench.answered(text(status, body, VERSION))
    assert asked == [("refuse", None), ("dial", RETRY_S)]
    assert not bench.status.is_active
    assert bench.status.last_error is not None
    assert bench.status.last_error.text == reason
    assert bench.pipeline.picker.pick() == URLS[1]
    assert bench.pipeline.critical == []


def test_a_refusal_without_a_version_says_nothing_of_the_peer(bench: Bench) -> None:
    bench.status.activate()
    assert bench.answered(text("410 Gone", "x")) == [("refuse", None), ("dial", RETRY_S)]
    assert bench.status.is_active
    assert bench.status.last_error is None
    assert bench.pipeline.critical == []
    assert bench.pipeline.picker.pick() == URLS[1]  # there may be another member


@pytest.mark.parametrize(("lines", "is_chunked"), [((CHUNKED,), True), ((), False)])
def test_a_refusal_that_does_not_end_is_waited_for_and_not_dialled_again(
    bench: Bench, lines: tuple[str, ...], is_chunked: bool
) -> None:
    answer = head("404 Not Found", "X-Etcd-Cluster-Id: 7\r\n", *lines)
    waits = [("wait", (len(answer), is_chunked, REFUSED_WAIT_S))]
    assert bench.answered(answer + "1\r\n4\r\n") == waits
    # Its end has the loop call on_connect.
    bench.dial()


def test_a_refusal_whose_connection_has_ended_is_not_waited_for(bench: Bench) -> None:
    answer = head("404 Not Found", CHUNKED)
    assert bench.answered(answer, errno.ECONNRESET)[0] == ("refuse", None)


def test_a_member_that_was_removed_hears_of_it_once_of_a_peer_and_dials_no_more(
    bench: Bench,
) -> None:
    gone = text("410 Gone", "removed member\n", VERSION)
    other = bench.make("msgapp")
    assert bench.answered(gone) == [("refuse", None)]
    assert bench.answered(gone, reader=other) == [("refuse", None)]
    (critical,) = bench.pipeline.critical
    assert critical.peer_id == PEER
    assert critical.status == 410
    dials = len(bench.pipeline.dials)
    bench.reader.on_connect()
    other.on_connect()
    assert len(bench.pipeline.dials) == dials


def test_dials_to_who_refuses_come_ever_later_until_one_is_accepted(bench: Bench) -> None:
    refusal = text("404 Not Found", "", VERSION)
    times = []
    for _ in range(8):
        bench.answered(refusal)
        times.append(bench.clock.now)
    gaps = [round(after - before, 3) for before, after in pairwise(times)]
    assert gaps == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, REFUSED_RETRY_S]
    bench.answered(head("200 OK", VERSION, CHUNKED))
    bench.clock.now += LASTING_S
    lost_at = bench.clock.now
    bench.reader.on_event(StreamEvent.LOST, 0)
    bench.reader.take_asked()
    for gap in (0.0, RETRY_S):
        bench.answered(refusal)
        assert bench.clock.now - lost_at == pytest.approx(gap, abs=1e-3)


@pytest.mark.parametrize("error", [0, errno.ECONNRESET])
def test_who_ends_each_stream_at_once_is_dialled_ever_later(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    times = []
    for _ in range(9):
        bench.answered(head("200 OK", VERSION, CHUNKED))
        times.append(bench.clock.now)
        bench.reader.on_event(StreamEvent.LOST, error)
        assert bench.reader.take_asked() == [("dial", 0.0)]
    gaps = [round(after - before, 3) for before, after in pairwise(times)]
    assert gaps == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, REFUSED_RETRY_S, REFUSED_RETRY_S]
    warned = [r for r in caplog.records if r.levelname == "WARNING" and "lost" in r.getMessage()]
    assert len(warned) == 6  # not the second to the fourth, within the second of the first


def test_whoever_cannot_be_reached_is_dialled_ten_times_a_second(bench: Bench) -> None:
    for _ in range(5):
        before = bench.clock.now
        bench.dial().fail("connection refused")
        assert bench.reader.take_asked() == [("dial", RETRY_S)]
        assert bench.clock.now - before <= RETRY_S + 1e-3
    assert bench.status.last_error is not None
    assert bench.status.last_error.text == "connection refused"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("", errno.ECONNREFUSED),
        ("SSH-2.0-OpenSSH_9.2\r\n", errno.ECONNRESET),
        ("HTTP/1.1 200 OK\r\nX-Server-Ver", errno.ECONNRESET),
        ("HTTP/1.1 200 OK\nX-Server-Version: 3.6.0\n\n", errno.ECONNRESET),
        ("HTTP/1.1 abc\r\n\r\n", 0),
        ("HTTP/1.1 100 Continue\r\n\r\n", 0),
    ],
)
def test_whatever_is_no_answer_is_an_unreachable_peer_and_dialled_again(
    bench: Bench, answer: str, error: int
) -> None:
    bench.status.activate()
    assert bench.answered(answer, error) == [("refuse", None), ("dial", RETRY_S)]
    assert not bench.status.is_active


def test_a_refusal_whose_text_comes_behind_its_head_is_one(bench: Bench) -> None:
    answer = head("412 Precondition Failed", VERSION, "Content-Length: 20\r\n")
    assert bench.answered(answer) == [("refuse", None), ("dial", RETRY_S)]
    assert bench.status.last_error is not None
    assert bench.status.last_error.text.endswith("when precondition failed")


@pytest.mark.parametrize("is_in_order", [True, False])
def test_a_stream_that_is_lost_is_dialled_again_at_once(bench: Bench, is_in_order: bool) -> None:
    bench.answered(head("200 OK", VERSION, CHUNKED))
    bench.clock.now += 10.0
    bench.reader.on_event(StreamEvent.LOST, 0 if is_in_order else errno.ECONNRESET)
    assert bench.reader.take_asked() == [("dial", 0.0)]
    assert bench.status.is_active == is_in_order
    before = bench.clock.now
    bench.dial()
    assert bench.clock.now == before


def test_a_dial_that_is_too_early_is_put_off(bench: Bench) -> None:
    bench.reader.on_connect()
    bench.clock.now += 0.04
    bench.reader.on_connect()
    assert bench.reader.take_asked() == [("dial", 0.06)]
    assert len(bench.pipeline.dials) == 1


def test_a_stop_ends_the_dial_and_nothing_is_told_of_it(bench: Bench) -> None:
    dial = bench.dial()
    bench.reader.stop_begin()
    assert dial.is_cancelled
    dial.fail(STOPPED)
    assert bench.reader.take_asked() == []
    bench.reader.on_connect()
    assert len(bench.pipeline.dials) == 1
    assert bench.status.last_error is None


def test_an_answer_that_comes_after_the_stop_is_not_judged(bench: Bench) -> None:
    bench.dial().succeed()
    bench.reader.answer = text("404 Not Found", "", VERSION).encode()
    bench.reader.stop_begin()
    bench.reader.on_event(StreamEvent.HEAD, 0)
    bench.reader.on_event(StreamEvent.LOST, 0)
    assert bench.reader.take_asked() == []
    assert bench.status.last_error is None
