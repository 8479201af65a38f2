"""An inbox on an event loop: asyncio, uvloop, and others that watch a descriptor."""

from __future__ import annotations

import asyncio
import gc
import selectors
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import pipeline
from pipeline import UsageError
from pipeline.aio import Inbox, Transport
from tests.support import LONG_TIMEOUT, SHORT_TIMEOUT
from tests.support.http import CLUSTER_ID
from tests.support.inbox import (
    APP,
    HEARTBEAT,
    PROP,
    Caller,
    Reports,
    Running,
    assert_books,
    indexes,
    receiving,
    wait_until_waiting,
)
from tests.support.loops import LOOPS, loop_factory
from tests.support.processes import TIMEOUT_S
from tests.support.waiting import eventually_async

Main = Callable[[], Awaitable[None]]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Run a test's coroutine on a loop of its own, as ``asyncio.run`` does."""
    factory = loop_factory(request.param)

    def run(main: Any) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(main, 2 * LONG_TIMEOUT))

    return run


@asynccontextmanager
async def receiving_async(inbox: Inbox[Any]) -> AsyncIterator[tuple[Transport, Caller]]:
    """Run a node, and a caller of it whose calls do not wait for this loop."""
    async with Transport(2, CLUSTER_ID, Reports(), inbox=inbox) as transport:
        url = (await transport.listen("http://127.0.0.1:0")).url
        with Caller(url) as caller:
            yield transport, caller


async def ticks() -> None:
    """Let the loop take a few turns."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_messages_are_awaited(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        inbox = Inbox()
        async with receiving_async(inbox) as (_, caller):
            for index in range(3):
                taking = asyncio.create_task(inbox.take())
                await ticks()
                assert not taking.done()
                # Answered while this loop stands still.
                assert caller.ask(HEARTBEAT, index) == 204
                assert indexes(await taking) == [index]
            for index in range(5):
                assert caller.ask(APP, index) == 204
            assert indexes(await inbox.take(2)) == [0, 1]
            assert indexes(await inbox.take(timeout=0)) == [2, 3, 4]
            assert await inbox.take(timeout=0) == []
            assert await inbox.take(timeout=SHORT_TIMEOUT) == []
        assert inbox.closed
        assert await inbox.take() == []
        assert_books(inbox.threaded)

    run(main())


def test_async_for_takes_batches_until_the_inbox_is_closed(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        inbox = Inbox()
        taken: list[int] = []

        async def consume() -> None:
            async for batch in inbox:
                assert batch
                taken.extend(indexes(batch))

        consuming = asyncio.create_task(consume())
        async with receiving_async(inbox) as (_, caller):
            for index in range(300):
                assert await asyncio.to_thread(caller.ask, (APP, PROP)[index % 2], index) == 204
            await eventually_async(lambda: len(taken) == 300)
            assert not consuming.done()
        await consuming
        assert taken == [*range(300)]

    run(main())


def test_a_take_that_is_cancelled_loses_nothing(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        inbox = Inbox()
        taken: list[int] = []
        async with receiving_async(inbox) as (_, caller):
            for index in range(100):
                taking = asyncio.create_task(inbox.take())
                for _ in range(index % 4):
                    await asyncio.sleep(0)
                assert caller.ask(HEARTBEAT, index) == 204
                for _ in range(index // 4 % 5):
                    await asyncio.sleep(0)
                taking.cancel()
                try:
                    taken += indexes(await taking)
                except asyncio.CancelledError:
                    assert indexes(await inbox.take(timeout=0)) == [index]
                    taken.append(index)
            assert taken == [*range(100)]
            assert inbox._waiters == type(inbox._waiters)()
        assert_books(inbox.threaded)

    run(main())


def test_who_is_cancelled_when_it_was_to_look_leaves_it_to_the_next(
    run: Callable[[Any], None],
) -> None:
    async def main() -> None:
        inbox = Inbox()
        async with receiving_async(inbox) as (_, caller):
            for _ in range(20):
                first, second = (asyncio.create_task(inbox.take()) for _ in range(2))
                await ticks()
                asyncio.get_running_loop().call_soon(first.cancel)
                assert caller.ask(HEARTBEAT, 1) == 204
                await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait({first})
                if first.cancelled():
                    assert indexes(await second) == [1]
                else:
                    assert indexes(first.result()) == [1]
                    second.cancel()
                    await asyncio.wait({second})

    run(main())


def test_a_timeout_that_strikes_as_a_message_comes_loses_nothing(
    run: Callable[[Any], None],
) -> None:
    async def main() -> None:
        inbox = Inbox()
        count = 60
        async with receiving_async(inbox) as (_, caller):

            def send() -> None:
                for index in range(count):
                    assert caller.ask(HEARTBEAT, index) == 204

            sending = Running(send)
            taken: list[int] = []
            turn = 0
            while len(taken) < count:
                turn += 1
                taken += indexes(await inbox.take(timeout=(turn % 10) / 5000))
            assert taken == [*range(count)]
            sending.join()

    run(main())


def test_many_tasks_take_everything_once(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        inbox = Inbox(max_messages=16)
        taken: list[list[int]] = [[] for _ in range(5)]

        async def consume(number: int) -> None:
            while batch := await inbox.take(1 + number):
                taken[number] += indexes(batch)
                await asyncio.sleep(0)

        consuming = [asyncio.create_task(consume(number)) for number in range(5)]
        async with receiving_async(inbox) as (_, caller):
            for index in range(500):
                assert await asyncio.to_thread(caller.ask, HEARTBEAT, index) == 204
            await eventually_async(lambda: sum(map(len, taken)) == 500)
        await asyncio.gather(*consuming)
        assert sorted(index for mine in taken for index in mine) == [*range(500)]

    run(main())


def test_a_loop_with_nobody_to_take_does_not_spin(run: Callable[[Any], None]) -> None:
    """What lies there would wake it again and again."""

    async def main() -> None:
        inbox = Inbox()
        async with receiving_async(inbox) as (_, caller):
            taking = asyncio.create_task(inbox.take(1))
            await ticks()
            for index in range(2):
                assert caller.ask(HEARTBEAT, index) == 204
            assert indexes(await taking) == [0]
            await asyncio.sleep(SHORT_TIMEOUT)
            assert inbox._watching is None
            assert indexes(await inbox.take()) == [1]

    run(main())


def test_an_inbox_goes_on_in_another_loop_when_the_first_is_closed(
    run: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()

    async def take(timeout: float) -> list[int]:
        return indexes(await inbox.take(timeout=timeout))

    async def abandon() -> None:
        task = asyncio.ensure_future(inbox.take())
        await ticks()
        tasks.append(task)

    async def look() -> None:
        assert await take(LONG_TIMEOUT) == [7]

    tasks: list[Any] = []
    with receiving(inbox.threaded) as (_, listener), Caller(listener.url) as caller:
        # A loop that is closed with a task that still waits, which nobody cancels.
        loop = asyncio.new_event_loop()
        loop.run_until_complete(abandon())
        loop.close()
        sending = Running(lambda: (threading.Event().wait(SHORT_TIMEOUT), caller.ask(HEARTBEAT, 7)))
        run(look())
        sending.join()
    assert not caplog.records
    tasks[0]._log_destroy_pending = False
    tasks.clear()
    gc.collect()


def test_the_plain_methods_may_be_called_from_any_thread(run: Callable[[Any], None]) -> None:
    async def main() -> None:
        inbox = Inbox(max_messages=1)
        async with receiving_async(inbox) as (_, caller):
            posting = asyncio.to_thread(caller.ask, PROP)
            task = asyncio.create_task(posting)
            await asyncio.to_thread(wait_until_waiting, inbox.threaded, 1)
            seen = await asyncio.to_thread(
                lambda: (len(inbox), bool(inbox), inbox.closed, inbox.stats()[:4], repr(inbox))
            )
            assert seen == (1, True, False, (1, 0, 0, 1), "<aio.Inbox: 1 queued, 1 waiting>")
            assert inbox.fileno() == inbox.threaded.fileno()
            await inbox.take()
            assert await task == 204

    run(main())


@pytest.mark.parametrize("timeout", [-1, "soon", float("nan")])
def test_what_is_no_timeout_is_refused(timeout: Any) -> None:
    async def main() -> None:
        with pytest.raises(UsageError, match="timeout"):
            await Inbox().take(timeout=timeout)

    asyncio.run(main())


# Other loops


def test_an_inbox_of_the_other_face_is_refused_by_its_name() -> None:
    plain: Any = pipeline.Inbox()
    ours: Any = Inbox()
    with pytest.raises(UsageError, match=r"<Inbox: .* is not a pipeline\.aio\.Inbox"):
        Transport(1, CLUSTER_ID, Reports(), inbox=plain)
    with pytest.raises(UsageError, match=r"<aio\.Inbox: .* is not a pipeline\.Inbox"):
        pipeline.Transport(1, CLUSTER_ID, Reports(), inbox=ours)


def test_a_selector_wakes_for_what_has_come() -> None:
    from pipeline import Inbox as PlainInbox

    inbox = PlainInbox()
    with (
        selectors.DefaultSelector() as selector,
        receiving(inbox) as (_, listener),
        Caller(listener.url) as caller,
    ):
        selector.register(inbox, selectors.EVENT_READ)
        assert selector.select(0) == []
        for index in range(3):
            assert caller.ask(HEARTBEAT, index) == 204
            ((key, _),) = selector.select(LONG_TIMEOUT)
            assert key.fileobj is inbox
            assert indexes(inbox.take()) == [index]
            assert selector.select(0) == []


TRIO = """
import threading
import trio
from pipeline import Inbox
from tests.support.inbox import HEARTBEAT, Caller, receiving

async def consume(inbox, taken):
    while not inbox.closed:
        await trio.lowlevel.wait_readable(inbox.fileno())
        taken += [message.index for message in inbox.take()]

async def main():
    inbox, taken = Inbox(), []
    with receiving(inbox) as (transport, listener):
        async with trio.open_nursery() as nursery:
            with Caller(listener.url) as caller:
                # What is cancelled while it waits loses nothing.
                with trio.move_on_after(0.05):
                    await consume(inbox, taken)
                for index in range(50):
                    if index == 1:
                        nursery.start_soon(consume, inbox, taken)
                    assert await trio.to_thread.run_sync(caller.ask, HEARTBEAT, index) == 204
                with trio.fail_after(30):
                    while len(taken) < 50:
                        await trio.sleep(0.001)
            await trio.to_thread.run_sync(transport.stop)
    assert taken == [*range(50)], taken
    print("ok")

trio.run(main)
"""


def test_trio_waits_for_the_descriptor() -> None:
    pytest.importorskip("trio", reason="no trio for this Python")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", TRIO],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)


def test_a_program_that_drops_a_transport_with_an_inbox_ends() -> None:
    program = """
import asyncio
from pipeline.aio import Inbox, Transport
from tests.support.http import CLUSTER_ID
from tests.support.inbox import Reports

async def main():
    inbox = Inbox()
    transport = Transport(2, CLUSTER_ID, Reports(), inbox=inbox)
    await transport.start()
    await transport.listen("http://127.0.0.1:0")
    task = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    print("ends")

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "ends\n", "")
