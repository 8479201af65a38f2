"""The application's callbacks: which are refused when given, and what becomes of what they do."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest

from pipeline import Message, Pipeline, TLSInfo, Transport, UsageError, aio
from pipeline.callbacks import Callbacks
from pipeline.logs import get_logger
from tests.support.callbacks import RudeError, Unawaited
from tests.support.raft import FakeRaft
from tests.support.senders import CLUSTER, MEMBER, PEER

METHODS = ["process", "is_id_removed", "report_unreachable", "report_snapshot"]
ENDINGS = [ValueError, RecursionError, SystemExit, KeyboardInterrupt, GeneratorExit]


async def later(*_: object) -> bool:
    return False


async def one_by_one(*_: object) -> AsyncIterator[bool]:
    yield False


class Later:
    async def __call__(self, *_: object) -> bool:
        return False

    async def method(self, *_: object) -> bool:
        return False


ASYNC: dict[str, Callable[..., Any]] = {
    "function": later,
    "generator": one_by_one,
    "object": Later(),
    "method": Later().method,
    "partial": functools.partial(functools.partial(later), 1),
    "partial of an object": functools.partial(Later()),
}

Make = Callable[[object], object]


def transport(raft: Any) -> object:
    return Transport(MEMBER, CLUSTER, raft)


def pipeline(raft: Any) -> object:
    return Pipeline(PEER, ["http://127.0.0.1:9"], raft, member_id=MEMBER, cluster_id=CLUSTER)


def aio_transport(raft: Any) -> object:
    return aio.Transport(MEMBER, CLUSTER, raft)


class Lacking:
    """A node that lacks a method, or has something else in its place."""

    def __init__(self, method: str, instead: object = None) -> None:
        for name in METHODS:
            if name != method:
                setattr(self, name, getattr(FakeRaft(), name))
        if instead is not None:
            setattr(self, method, instead)

    def __repr__(self) -> str:
        raise ArithmeticError


@pytest.mark.parametrize("make", [transport, pipeline, aio_transport])
@pytest.mark.parametrize("method", METHODS)
def test_a_node_that_lacks_a_method_is_refused(make: Make, method: str) -> None:
    for raft in (Lacking(method), Lacking(method, "text")):
        with pytest.raises(UsageError, match=f"raft: .* has no method {method}"):
            make(raft)


@pytest.mark.parametrize("make", [transport, pipeline, aio_transport])
def test_none_is_no_node(make: Make) -> None:
    with pytest.raises(UsageError, match="raft: None has no method process"):
        make(None)


@pytest.mark.parametrize("make", [transport, pipeline])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ASYNC)
def test_a_node_with_an_async_method_is_refused_by_threads(
    make: Make, method: str, kind: str
) -> None:
    with pytest.raises(UsageError, match=rf"raft: {method} is async.*pipeline\.aio"):
        make(Lacking(method, ASYNC[kind]))
    aio_transport(Lacking(method, ASYNC[kind]))


GATES: dict[str, Callable[[Any], object]] = {
    "on_critical_error": lambda c: Transport(1, 1, FakeRaft(), on_critical_error=c),
    "remote_policy": lambda c: Transport(1, 1, FakeRaft(), remote_policy=c),
    "allow_member": lambda c: TLSInfo(
        cert_file="c", key_file="k", trusted_ca_file="ca", allow_member=c
    ),
    "on_critical_error of a Pipeline": lambda c: Pipeline(
        2, ["http://a:1"], FakeRaft(), member_id=1, cluster_id=1, on_critical_error=c
    ),
    "remote_policy of aio": lambda c: aio.Transport(1, 1, FakeRaft(), remote_policy=c),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", [*ASYNC, "no callable"])
def test_an_async_callback_is_refused_where_it_would_not_be_awaited(gate: str, kind: str) -> None:
    argument = gate.split(maxsplit=1)[0]
    with pytest.raises(UsageError, match=f"^{argument}: .* is (async|not callable)"):
        GATES[gate](ASYNC.get(kind, "text"))
    GATES[gate](lambda *_: False)


def test_asyncio_takes_an_async_critical_error_callback() -> None:
    aio.Transport(1, 1, FakeRaft(), on_critical_error=later)
    with pytest.raises(UsageError, match="on_critical_error: 'text' is not callable"):
        aio.Transport(1, 1, FakeRaft(), on_critical_error="text")  # type: ignore[arg-type]


class Source:
    """Bytes that tell whether they were closed."""

    is_closed = False

    def read(self, _: int) -> bytes:
        return b""

    def close(self) -> None:
        self.is_closed = True


def test_an_async_progress_callback_is_refused_and_the_source_closed() -> None:
    source: Any = Source()
    with (
        Transport(1, 1, FakeRaft()) as one,
        pytest.raises(UsageError, match=r"on_progress: .* is async"),
    ):
        one.send_snapshot(Message(type=7, to=2), source, size=1, on_progress=later)
    assert source.is_closed

    async def main() -> None:
        source.is_closed = False
        with pytest.raises(UsageError, match=r"on_progress: .* is async"):
            await aio.Transport(1, 1, FakeRaft()).send_snapshot(
                Message(type=7, to=2), source, size=1, on_progress=later
            )
        assert source.is_closed

    asyncio.run(main())


def test_a_transfer_takes_no_async_callback() -> None:
    with Transport(1, 1, FakeRaft()) as one:
        transfer = one.send_snapshot(Message(type=7, to=2), b"x")
        with pytest.raises(UsageError, match=r"callback: .* is async"):
            transfer.add_done_callback(later)


# -- what becomes of what they do


class Awaited:
    def __await__(self) -> Generator[None, None, bool]:
        yield
        return False


def plain_generator() -> Iterator[bool]:
    yield False


def future() -> object:
    loop = asyncio.new_event_loop()
    try:
        return loop.create_future()
    finally:
        loop.close()


RETURNED: dict[str, Callable[[], object]] = {
    "coroutine": Unawaited(True),
    "asynchronous generator": one_by_one,
    "generator": plain_generator,
    "future": future,
    "object": Awaited,
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_would_have_to_be_awaited_is_an_error_told_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Callbacks(get_logger("pipeline.tested"))
    callbacks = Callbacks(get_logger("pipeline.tested"), whole)
    for _ in range(3):
        assert callbacks.ask("gate", "2", RETURNED[kind]) is False
        callbacks.call("callback", "2", RETURNED[kind])
    assert (callbacks.errors, whole.errors) == (6, 6)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
    assert all("which is not awaited here" in text for text in caplog.messages)


@pytest.mark.parametrize(("result", "answer"), [(True, True), (1, True), (0, False), (None, False)])
def test_a_gate_s_answer_is_taken_for_what_it_is(result: object, answer: bool) -> None:
    callbacks = Callbacks(get_logger("pipeline.tested"))
    assert callbacks.ask("gate", "2", lambda: result) is answer
    assert callbacks.errors == 0


class Undecided:
    def __bool__(self) -> bool:
        raise ValueError


def test_an_answer_that_cannot_be_told_is_no() -> None:
    callbacks = Callbacks(get_logger("pipeline.tested"))
    assert callbacks.ask("gate", "2", Undecided) is False
    assert callbacks.errors == 1


@pytest.mark.parametrize("error", [*ENDINGS, RudeError])
def test_whatever_a_callback_raises_is_counted_and_told_with_its_traceback(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pipeline.tested")
    callbacks = Callbacks(get_logger("pipeline.tested"))

    def fail(*_: object) -> bool:
        raise error

    def run() -> None:
        for _ in range(2):
            callbacks.call("callback", "2", fail)
            assert callbacks.ask("gate", "2", fail, 1, 2) is False
            callbacks.tell(object(), "report", "2", 1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert callbacks.errors == 6
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "callback raised for 2"),
        ("ERROR", "gate raised for 2"),
        ("ERROR", "report raised for 2"),
        ("DEBUG", "callback raised for 2"),
        ("DEBUG", "gate raised for 2"),
        ("DEBUG", "report raised for 2"),
    ]
    assert caplog.text.count("Traceback") == 6


def test_the_main_thread_is_interrupted_in_a_callback() -> None:
    callbacks = Callbacks(get_logger("pipeline.tested"))

    def fail() -> None:
        raise KeyboardInterrupt

    for ask in (callbacks.call, callbacks.ask):
        with pytest.raises(KeyboardInterrupt):
            ask("callback", "2", fail)
    assert callbacks.errors == 2
