"""The asyncio face: where callbacks run, in which order, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest

import pipeline.transport
from pipeline import (
    MemberNotFoundError,
    MemberRemovedError,
    Message,
    MessageType,
    PeerChange,
    PeerState,
    PipelineConfig,
    ReceiverConfig,
    RequestRejected,
    SnapshotCancelledError,
    SnapshotProgress,
    SnapshotSourceError,
    SnapshotStatus,
    TransportConfig,
    UsageError,
)
from pipeline.aio import Transport
from pipeline.aio.deliveries import Call
from tests.support import LONG_TIMEOUT, SHORT_TIMEOUT
from tests.support.callbacks import Unawaited
from tests.support.http import CLUSTER_ID, Reply, peer_headers, post_heartbeat, reply_of_socket
from tests.support.loops import LOOPS, loop_factory
from tests.support.processes import TIMEOUT_S
from tests.support.senders import message
from tests.support.server import (
    ERROR,
    OK,
    ScriptedServer,
    always,
    answer,
    in_turn,
    refused_port,
)
from tests.support.waiting import eventually, eventually_async

# A stop that waited for the callback it is called from would take this long.
FOREVER = TransportConfig(stop_timeout_s=3600.0)

Main = Coroutine[Any, Any, None]


class Node:
    """Records what it is told; ``on_process`` and ``on_report`` may be plain or async."""

    def __init__(
        self,
        on_process: Callable[[Message], Awaitable[None] | None] = lambda message: None,
        on_report: Callable[[], Awaitable[None] | None] = lambda: None,
    ) -> None:
        self.processed: list[Message] = []
        self.reports: list[tuple[object, ...]] = []
        self.threads: set[int] = set()
        self.on_process = on_process
        self.on_report = on_report

    def process(self, message: Message) -> Awaitable[None] | None:
        self.threads.add(threading.get_ident())
        self.processed.append(message)
        return self.on_process(message)

    def is_id_removed(self, member_id: int) -> bool:
        self.threads.add(threading.get_ident())
        return member_id == 7

    def report_unreachable(self, member_id: int) -> Awaitable[None] | None:
        self.threads.add(threading.get_ident())
        self.reports.append((member_id,))
        return self.on_report()

    async def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        self.reports.append((member_id, status))

    def removed(self, error: MemberRemovedError) -> None:
        self.reports.append((error.peer_id, "removed"))

    async def changed(self, change: PeerChange) -> None:
        self.threads.add(threading.get_ident())
        self.reports.append((change.member_id, change.state))


def posting(url: str, **fields: int) -> asyncio.Task[Reply]:
    return asyncio.create_task(asyncio.to_thread(post_heartbeat, url, **fields))


def transport_of(node: Node, **changes: Any) -> Transport:
    return Transport(2, CLUSTER_ID, node, on_critical_error=node.removed, **changes)


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    """Run a test's coroutine on a loop of its own, as ``asyncio.run`` does."""
    factory = loop_factory(request.param)

    def run(main: Main) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)

    return run


def test_many_messages_go_both_ways(run: Callable[[Main], None]) -> None:
    count = 1000
    config = TransportConfig(pipeline=PipelineConfig(queue_length=count))

    async def main() -> None:
        a, b = Node(), Node()
        async with (
            Transport(1, CLUSTER_ID, a, config=config) as one,
            Transport(2, CLUSTER_ID, b, config=config) as two,
        ):
            one.add_peer(2, [(await two.listen("http://127.0.0.1:0")).url])
            two.add_peer(1, [(await one.listen("http://127.0.0.1:0")).url])
            for index in range(count):
                one.send([Message(type=MessageType.HEARTBEAT, from_=1, to=2, index=index)])
                two.send([Message(type=MessageType.HEARTBEAT, from_=2, to=1, index=index)])
            await eventually_async(lambda: one.stats()[2].sent == two.stats()[1].sent == count)
            assert (one.active_peers(), one.active_since(2) is not None) == (1, True)
            assert one.follower_stats().keys() == {2}
        for node in (a, b):
            assert sorted(message.index for message in node.processed) == list(range(count))
            assert node.threads == {threading.get_ident()}

    run(main())


def test_messages_of_one_member_are_processed_one_by_one_as_they_came(
    run: Callable[[Main], None],
) -> None:
    active = {1: 0, 3: 0}
    most = dict(active)

    async def process(message: Message) -> None:
        active[message.from_] += 1
        most[message.from_] = max(most[message.from_], active[message.from_])
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        active[message.from_] -= 1

    async def main() -> None:
        node = Node(process)
        async with transport_of(node) as transport:
            listener = await transport.listen("http://127.0.0.1:0")
            # One connection per sender: the next one leaves when the last one is answered.
            config = TransportConfig(pipeline=PipelineConfig(connections=1))
            async with (
                Transport(1, CLUSTER_ID, Node(), config=config) as one,
                Transport(3, CLUSTER_ID, Node()) as three,
            ):
                for sender in (one, three):
                    sender.add_peer(2, [listener.url])
                    for index in range(50):
                        beat = Message(
                            type=MessageType.HEARTBEAT, from_=sender.member_id, to=2, index=index
                        )
                        sender.send([beat])
                await eventually_async(lambda: one.stats()[2].sent == three.stats()[2].sent == 50)
        assert most == {1: 1, 3: 1}
        assert [m.index for m in node.processed if m.from_ == 1] == list(range(50))

    run(main())


def test_calls_queue_for_their_member_in_the_order_they_were_left(
    run: Callable[[Main], None],
) -> None:
    gate = asyncio.Event()

    async def main() -> None:
        node = Node(lambda message: gate.wait() if message.index == 0 else None)  # type: ignore[arg-type, return-value]
        async with transport_of(node) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            posts = []
            for index in range(3):
                posts.append(posting(url, index=index))
                await eventually_async(lambda index=index: waiting(transport) == index + 1)
            other = await posting(url, from_=9, index=9)  # does not wait for member 1
            assert [m.index for m in node.processed] == [0, 9]
            gate.set()
            replies = [other, *await asyncio.gather(*posts)]
        assert [m.index for m in node.processed] == [0, 9, 1, 2]
        assert [reply.status for reply in replies] == [204] * 4

    run(main())


@pytest.mark.streams
def test_what_comes_by_streams_is_processed_on_the_loop_in_order(
    run: Callable[[Main], None],
) -> None:
    count = 1000

    async def main() -> None:
        a, b = Node(), Node()
        async with Transport(1, CLUSTER_ID, a) as one, Transport(2, CLUSTER_ID, b) as two:
            one.add_peer(2, [(await two.listen("http://127.0.0.1:0")).url])
            two.add_peer(1, [(await one.listen("http://127.0.0.1:0")).url])
            ends = ((one, 2), (two, 1))
            await eventually_async(
                lambda: all(
                    stream.since is not None
                    for node, peer_id in ends
                    for stream in node.peer_stats()[peer_id].streams
                )
            )
            for index in range(count):
                one.send([Message(type=MessageType.HEARTBEAT, from_=1, to=2, index=index)])
                two.send([Message(type=MessageType.HEARTBEAT, from_=2, to=1, index=index)])
            await eventually_async(lambda: len(a.processed) == len(b.processed) == count)
        for node in (a, b):
            assert [message.index for message in node.processed] == list(range(count))
            assert node.threads == {threading.get_ident()}

    run(main())


@pytest.mark.streams
def test_a_proposal_that_waits_holds_up_neither_its_member_s_messages_nor_its_dials(
    run: Callable[[Main], None],
) -> None:
    leader = asyncio.Event()

    async def process(message: Message) -> None:
        if message.type == MessageType.PROP:
            await leader.wait()

    async def main() -> None:
        node = Node(process)  # it has removed member 7
        async with transport_of(node) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            waits = Message(type=MessageType.PROP, from_=7, to=2).marshal()
            proposing = asyncio.create_task(
                asyncio.to_thread(reply_of_socket, url, "POST", "/raft", peer_headers(), waits)
            )
            await eventually_async(lambda: len(node.processed) == 1)
            assert (await posting(url, from_=7, index=5)).status == 204
            dialled = await asyncio.to_thread(
                reply_of_socket, url, "GET", "/raft/stream/message/7", peer_headers(), b""
            )
            assert (dialled.status, dialled.body) == (410, b"removed member\n")
            assert not proposing.done()
            leader.set()
            assert (await proposing).status == 204

    run(main())


@pytest.mark.streams
def test_an_async_node_tells_who_was_removed(run: Callable[[Main], None]) -> None:
    class Asked(Node):
        async def is_id_removed(self, member_id: int) -> bool:  # type: ignore[override]
            await asyncio.sleep(0)
            return super().is_id_removed(member_id)

    async def main() -> None:
        node = Asked()
        async with transport_of(node) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            replies = [
                await asyncio.to_thread(
                    reply_of_socket, url, "GET", f"/raft/stream/msgapp/{one}", peer_headers(), b""
                )
                for one in (7, 8)
            ]
        assert [reply.status for reply in replies] == [410, 404]
        assert node.threads == {threading.get_ident()}

    run(main())


def waiting(transport: Transport) -> int:
    return sum(len(queue) for queue in transport._deliveries._queues.values())


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_what_process_raises_decides_the_answer(
    run: Callable[[Main], None], is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[BaseException] = [
        RequestRejected(418, b"a teapot\n"),
        ValueError("no"),
        asyncio.CancelledError(),
        TimeoutError("not ours"),
    ]

    def plain(message: Message) -> None:
        if message.index < len(errors):
            raise errors[message.index]

    async def later(message: Message) -> None:
        await asyncio.sleep(0)
        plain(message)

    async def main() -> None:
        async with transport_of(Node(later if is_async else plain)) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            replies = [await posting(url, index=index) for index in range(5)]
        assert [reply.status for reply in replies] == [418, 500, 500, 500, 204]
        assert replies[0].body == b"a teapot\n"

    run(main())
    assert "failed to process Raft message" in caplog.text


def test_reports_and_critical_errors_come_on_the_loop_in_etcd_s_order(
    run: Callable[[Main], None],
) -> None:
    async def main() -> None:
        node = Node()
        with ScriptedServer(always(answer("403 Forbidden"))) as server:
            async with transport_of(node) as transport:
                transport.add_peer(5, [server.url])
                assert transport.send([message(MessageType.SNAP, b"s", to=5), message(to=9)]) == 1
                await eventually_async(lambda: transport.stats()[5].failed == 1)
                removed = transport._raft.is_id_removed
                assert await asyncio.to_thread(removed, 7) is True
                assert await asyncio.to_thread(removed, 5) is False
        assert node.reports == [(5, "removed"), (5,), (5, SnapshotStatus.FAILURE)]
        assert node.threads == {threading.get_ident()}

    run(main())


def test_changes_of_a_peer_come_on_the_loop_before_the_reports_of_what_brought_them(
    run: Callable[[Main], None],
) -> None:
    async def main() -> None:
        node = Node()
        with ScriptedServer(in_turn(OK, ERROR, ERROR, OK)) as server:
            async with transport_of(node, on_peer_change=node.changed) as transport:
                transport.add_peer(5, [server.url])
                for sent in range(4):
                    transport.send([message(to=5)])
                    books = transport.stats
                    await eventually_async(
                        lambda n=sent, books=books: books()[5].sent + books()[5].failed == n + 1
                    )
        up, down = (5, PeerState.ACTIVE), (5, PeerState.INACTIVE)
        assert node.reports == [up, down, (5,), (5,), up]
        assert node.threads == {threading.get_ident()}

    run(main())


def test_a_report_that_raises_is_logged_and_counted(
    run: Callable[[Main], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def report() -> None:
        raise ValueError("tell nobody")

    async def main() -> None:
        node = Node(on_report=report)
        with refused_port() as port:
            async with transport_of(node) as transport:
                transport.add_peer(5, [f"http://127.0.0.1:{port}"])
                transport.send([message(to=5), message(to=5)])
                await eventually_async(lambda: transport.stats()[5].failed == 2)
        assert node.reports == [(5,), (5,)]

    run(main())
    assert "tell nobody" in caplog.text


def test_every_method_works_from_a_callback(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        done = asyncio.Event()

        async def process(message: Message) -> None:
            transport.add_peer(5, ["http://127.0.0.1:1"])
            transport.update_peer(5, ["http://127.0.0.1:2"])
            transport.send([Message(type=MessageType.HEARTBEAT, to=5)])
            assert await transport.remove_peer(5) in (0, 1)
            transport.add_peer(6, ["http://127.0.0.1:1"])
            assert await transport.remove_all_peers() == 0
            async with await transport.listen("http://127.0.0.1:0") as other:
                assert other.stats().accepted == 0
                assert other.urls == (other.url,)
            done.set()

        async with transport_of(Node(process)) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            assert (await posting(url)).status == 204
        assert done.is_set()

    run(main())


def test_a_stuck_loop_makes_callers_wait_and_holds_no_more_calls_than_threads(
    run: Callable[[Main], None],
) -> None:
    config = TransportConfig(receiver=ReceiverConfig(handlers=2))

    def calls() -> int:
        return len([thing for thing in gc.get_objects() if type(thing) is Call])

    async def main() -> None:
        node = Node()
        async with transport_of(node, config=config) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            gc.collect()  # those of another test
            before = calls()
            replies: list[Reply] = []
            threads = [
                threading.Thread(target=lambda n=n: replies.append(post_heartbeat(url, from_=n)))
                for n in range(1, 9)
            ]
            for thread in threads:
                thread.start()
            # From here on the loop is stuck: this very line of the test blocks it.
            eventually(lambda: calls() == before + 2)
            time.sleep(SHORT_TIMEOUT)
            assert (calls() - before, node.processed, replies) == (2, [], [])
            await eventually_async(lambda: len(replies) == 8)
            for thread in threads:
                thread.join()
        assert {reply.status for reply in replies} == {204}

    run(main())


def test_stop_cancels_the_callbacks_that_run_and_refuses_those_that_wait(
    run: Callable[[Main], None],
) -> None:
    config = TransportConfig(stop_timeout_s=0.1)
    cancelled: list[int] = []

    async def process(message: Message) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(message.index)
            raise

    async def main() -> None:
        node = Node(process)
        transport = transport_of(node, config=config)
        async with transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            first = posting(url, index=1)
            await eventually_async(lambda: waiting(transport) == 1)
            second = posting(url, index=2)
            await eventually_async(lambda: waiting(transport) == 2)
            assert await asyncio.gather(transport.stop(), transport.stop()) == [0, 0]
            assert cancelled == [1]
            assert [m.index for m in node.processed] == [1]
            for reply in await asyncio.gather(first, second):
                assert (reply.status, reply.body) == (503, b"shutting down\n")
            with pytest.raises(UsageError, match="stopped"):
                transport.add_peer(5, ["http://127.0.0.1:1"])
            with pytest.raises(UsageError, match="stopped"):
                await transport.listen("http://127.0.0.1:0")

    run(main())


def test_stop_from_a_callback_does_not_wait_for_it(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        stopped = asyncio.Event()

        async def process(message: Message) -> None:
            await transport.stop()
            await asyncio.sleep(0)  # it was not cancelled
            stopped.set()

        transport = transport_of(Node(process), config=FOREVER)
        await transport.start()
        url = (await transport.listen("http://127.0.0.1:0")).url
        reply = await posting(url)
        assert reply.status == 503
        await asyncio.wait_for(stopped.wait(), LONG_TIMEOUT)

    run(main())


def test_removing_a_peer_from_its_report_waits_for_none_of_its_reports(
    run: Callable[[Main], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async def report() -> None:
            if len(node.reports) == 1:
                await eventually_async(lambda: waiting(transport) == 4)  # a worker each
                await transport.remove_peer(5)
                raise ValueError("nobody waits for this")

        node = Node(on_report=report)
        with refused_port() as port:
            async with transport_of(node, config=FOREVER) as transport:
                transport.add_peer(5, [f"http://127.0.0.1:{port}"])
                transport.send([message(to=5)] * 4)
                await eventually_async(lambda: len(node.reports) == 4)
                assert transport.stats() == {}

    run(main())
    assert "nobody waits for this" in caplog.text


@pytest.mark.parametrize("callback", ["on_critical_error", "on_peer_change"])
@pytest.mark.parametrize("ends", ["stop", "remove_peer"])
def test_what_is_to_be_told_next_does_not_hold_up_who_ends_the_peer_from_a_callback(
    run: Callable[[Main], None], ends: str, callback: str
) -> None:
    """The worker's ``report_unreachable`` comes after the callback from which we stop."""

    async def main() -> None:
        ended = asyncio.Event()

        async def removed(_: object) -> None:
            await (transport.stop() if ends == "stop" else transport.remove_peer(5))
            ended.set()

        node = Node()
        with ScriptedServer(always(answer("403 Forbidden"))) as server:
            callbacks: dict[str, Any] = {callback: removed}
            transport = Transport(2, CLUSTER_ID, node, config=FOREVER, **callbacks)
            async with transport:
                transport.add_peer(5, [server.url])
                transport.send([message(to=5)])
                await asyncio.wait_for(ended.wait(), LONG_TIMEOUT)
                assert transport.stats() == {}
                if ends == "remove_peer":
                    await eventually_async(lambda: node.reports == [(5,)])

    run(main())


@pytest.mark.parametrize("removes", ["remove_peer", "remove_all_peers"])
def test_a_change_that_waits_is_not_told_of_a_peer_that_was_removed(
    run: Callable[[Main], None], removes: str
) -> None:
    """The thread that tells goes on when the callback removes the peer, before that has ended."""

    async def main() -> None:
        told: list[PeerState] = []
        returned = asyncio.Event()

        async def changed(change: PeerChange) -> None:
            told.append(change.state)
            if len(told) > 1:
                return
            await eventually_async(lambda: transport.active_peers() == 0)  # the next one waits
            await (transport.remove_peer(5) if removes == "remove_peer" else remove_all())
            returned.set()

        with ScriptedServer(in_turn(OK, ERROR)) as server:
            transport = transport_of(Node(), on_peer_change=changed, config=FOREVER)
            remove_all = transport.remove_all_peers
            async with transport:
                transport.add_peer(5, [server.url])
                transport.send([message(to=5)])
                await eventually_async(lambda: told != [])
                transport.send([message(to=5)])
                await asyncio.wait_for(returned.wait(), LONG_TIMEOUT)
        assert told == [PeerState.ACTIVE]

    run(main())


def test_stop_from_a_callback_waits_for_none_of_its_member_s_calls(
    run: Callable[[Main], None],
) -> None:
    async def main() -> None:
        async def process(message: Message) -> None:
            await eventually_async(lambda: waiting(transport) == 2)
            await transport.stop()

        node = Node(process)
        transport = transport_of(node, config=FOREVER)
        await transport.start()
        url = (await transport.listen("http://127.0.0.1:0")).url
        replies = await asyncio.gather(posting(url), posting(url))
        assert [reply.status for reply in replies] == [503, 503]
        await transport.stop()
        await eventually_async(lambda: waiting(transport) == 0)
        assert len(node.processed) == 1

    run(main())


@pytest.fixture
def nothing_to_collect() -> Iterator[None]:
    """Leave no task to the garbage collector.

    asyncio logs what a task has raised and nobody has asked it for when the task is collected,
    which may be in the middle of a test that looks at the log.
    """
    yield
    gc.collect()


@pytest.mark.usefixtures("nothing_to_collect")
def test_a_callback_that_ends_the_program_ends_it(run: Callable[[Main], None]) -> None:
    replies: list[Reply] = []

    async def process(message: Message) -> None:
        raise SystemExit(3)

    transport = transport_of(Node(process))

    async def main() -> None:
        await transport.start()
        url = (await transport.listen("http://127.0.0.1:0")).url
        thread.append(threading.Thread(target=lambda: replies.append(post_heartbeat(url))))
        thread[0].start()
        await asyncio.Event().wait()

    thread: list[threading.Thread] = []
    with pytest.raises(SystemExit, match="3"):
        run(main())
    try:
        thread[0].join(LONG_TIMEOUT)
        assert [reply.status for reply in replies] == [500]
    finally:
        transport._stop()


def test_a_loop_that_ends_in_the_middle_of_a_stop_lets_it_end(
    run: Callable[[Main], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        transport = transport_of(Node())
        await transport.start()
        stopping.append(asyncio.create_task(transport.stop()))
        await asyncio.sleep(0)

    stopping: list[asyncio.Task[int]] = []
    run(main())
    assert stopping[0].cancelled()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_stop_that_ctrl_c_has_ended_is_finished_by_the_next(run: Callable[[Main], None]) -> None:
    """``asyncio.run`` cancels every task after a Ctrl-C, the one that stops us among them."""
    before = set(threading.enumerate())

    async def main() -> None:
        transport = transport_of(Node())
        await transport.start()
        await transport.listen("http://127.0.0.1:0")
        stop = asyncio.create_task(transport.stop())
        await asyncio.sleep(0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert stop.cancelled()
        assert await transport.stop() == 0
        assert await transport.stop() == 0
        left = {t.name for t in set(threading.enumerate()) - before}
        assert not [name for name in left if name.startswith("pipeline-") and "aio" not in name]

    run(main())


def test_a_cancelled_stop_goes_on(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        transport = transport_of(Node())
        await transport.start()
        stopping = asyncio.create_task(transport.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert await transport.stop() == 0

    run(main())


def test_a_loop_that_ends_without_stop_leaves_no_thread_waiting(
    run: Callable[[Main], None],
) -> None:
    replies: list[Reply] = []
    transport = transport_of(Node(lambda message: asyncio.Event().wait()))  # type: ignore[arg-type, return-value]

    async def main() -> None:
        await transport.start()
        url = (await transport.listen("http://127.0.0.1:0")).url
        for index in range(2):  # one runs, one waits for its turn
            thread = threading.Thread(target=lambda: replies.append(post_heartbeat(url)))
            threads.append(thread)
            thread.start()
            await eventually_async(lambda index=index: waiting(transport) == index + 1)
        # Returning cancels what runs on the loop.

    threads: list[threading.Thread] = []
    run(main())
    try:
        for thread in threads:
            thread.join(LONG_TIMEOUT)
        assert [reply.status for reply in replies] == [503, 503]
    finally:
        transport._stop()


def test_while_the_loop_does_not_run_messages_are_refused() -> None:
    node = Node()
    transport = transport_of(node)
    with asyncio.Runner() as runner:
        runner.run(transport.start())
        listener = runner.run(transport.listen("http://127.0.0.1:0"))
        assert post_heartbeat(listener.url).status == 503
        runner.run(asyncio.sleep(0))  # what was given up is not begun
        assert node.processed == []
        runner.run(transport.stop())
    assert transport._raft.is_id_removed(7) is False  # nor is any other call made


def test_the_loop_s_own_thread_is_told_that_it_would_wait_for_itself() -> None:
    async def main() -> None:
        async with transport_of(Node()) as transport:
            with pytest.raises(UsageError, match="wait for itself"):
                transport._raft.process(message())

    asyncio.run(main())


def test_the_asgi_application_may_run_on_the_same_loop(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        node = Node()
        sent: list[Any] = []
        body = message().marshal()
        events = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return events.pop()

        async def send(event: Any) -> None:
            sent.append(event)

        async def shutdown() -> Any:
            return {"type": "lifespan.shutdown"}

        async with transport_of(node) as transport:
            app = transport.asgi_app
            headers = [(k.encode(), v.encode()) for k, v in peer_headers().items()]
            scope = {"type": "http", "method": "POST", "path": "/raft", "headers": headers}
            scope["raw_path"] = b"/raft"
            await app(scope, receive, send)
            await app({"type": "lifespan"}, shutdown, send)
        assert sent[0]["status"] == 204
        assert [m.type for m in node.processed] == [MessageType.APP]

    run(main())


def test_a_transport_that_was_never_started_is_freed_when_dropped() -> None:
    transport = transport_of(Node())
    reference = weakref.ref(transport)
    del transport
    gc.collect()
    assert reference() is None


def test_a_program_that_drops_its_transport_ends() -> None:
    program = """
import asyncio, threading
from pipeline.aio import Transport
from tests.functional.test_aio import CLUSTER_ID, Node, waiting
from tests.support.http import post_heartbeat
from tests.support.waiting import eventually_async

async def main():
    transport = Transport(2, CLUSTER_ID, Node(lambda message: asyncio.Event().wait()))
    await transport.start()
    url = (await transport.listen("http://127.0.0.1:0")).url
    threading.Thread(target=lambda: print(post_heartbeat(url).status)).start()
    await eventually_async(lambda: waiting(transport) == 1)

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "503\n", "")


def test_start_and_stop_are_said_once_and_metrics_are_there() -> None:
    async def main() -> None:
        transport = transport_of(Node(), peer_urls=["http://127.0.0.1:0"])
        assert (transport.member_id, transport.cluster_id) == (2, CLUSTER_ID)
        with pytest.raises(UsageError, match="not started"):
            await transport.listen()
        with pytest.raises(UsageError, match="send: the transport was not started"):
            transport.send([message(to=1)])
        async with transport:
            with pytest.raises(UsageError, match="once"):
                await transport.start()
            listener = await transport.listen()
            assert listener.url != transport.peer_urls[0]
            families = transport.metrics_collector().collect()
            samples = {sample.name: sample for family in families for sample in family.samples}
            connections = samples["raft_pipeline_listener_connections"]
            assert (connections.labels, connections.value) == (
                {"Local": "2", "Listener": listener.url},
                0,
            )

    asyncio.run(main())


def test_has_every_public_name_of_the_threaded_transport() -> None:
    """What one can do one can do here, under the same name."""
    threaded = {name for name in dir(pipeline.transport.Transport) if not name.startswith("_")}
    assert threaded <= {name for name in dir(Transport) if not name.startswith("_")}


def snapshot_to(peer_id: int) -> Message:
    return Message(type=MessageType.SNAP, to=peer_id, from_=2, term=1)


@pytest.fixture
def phases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell of progress when a phase begins, however long a busy machine is at one of them."""
    monkeypatch.setattr("pipeline.snapshot.sender.PROGRESS_INTERVAL_S", LONG_TIMEOUT)


@pytest.mark.usefixtures("phases_only")
def test_what_a_progress_callback_raises_or_returns_is_counted_and_ends_nothing(
    run: Callable[[Main], None],
) -> None:
    def fail(_: object) -> None:
        raise ValueError

    async def main() -> None:
        problems: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, about: problems.append(about))
        with ScriptedServer() as server:
            async with transport_of(Node()) as transport:
                transport.add_peer(1, [server.url])
                callbacks = transport.callbacks
                await transport.send_snapshot(snapshot_to(1), b"x", on_progress=fail)
                await eventually_async(lambda: callbacks.errors == 4)
                await transport.send_snapshot(snapshot_to(1), b"x", on_progress=Unawaited())
                await eventually_async(lambda: callbacks.errors == 8)
        assert problems == []

    run(main())


def test_a_callback_that_awaits_to_no_end_is_not_believed(run: Callable[[Main], None]) -> None:
    """One coroutine that returns another, as of a decorator that has forgotten to await."""

    async def process(message: Message) -> Any:
        return asyncio.sleep(0)

    async def main() -> None:
        node = Node(process)
        async with transport_of(node) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            assert (await posting(url)).status == 500
            assert transport.callbacks.errors == 1

    run(main())


@pytest.mark.parametrize("error", [ValueError, GeneratorExit, RecursionError])
def test_a_report_that_raises_on_the_loop_is_counted_and_ends_nothing(
    run: Callable[[Main], None], error: type[BaseException]
) -> None:
    async def report() -> None:
        raise error

    async def main() -> None:
        node = Node(on_report=report)
        with ScriptedServer(always(answer("500 Internal Server Error"))) as server:
            async with transport_of(node) as transport:
                transport.add_peer(1, [server.url])
                for count in range(1, 4):
                    transport.send([message(to=1)])
                    await eventually_async(lambda count=count: len(node.reports) == count)  # type: ignore[misc]
                    await eventually_async(lambda: transport.stats()[1].in_flight == 0)
                assert transport.callbacks.errors == 3

    run(main())


def test_a_task_factory_that_raises_costs_one_call_and_ends_nothing(
    run: Callable[[Main], None],
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        problems: list[object] = []
        loop.set_exception_handler(lambda _, about: problems.append(about))
        async with transport_of(Node()) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url

            def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
                if "_make_calls" in repr(coro):
                    raise ValueError
                return asyncio.Task(coro, loop=loop, **options)

            loop.set_task_factory(factory)
            assert (await posting(url)).status == 500
            loop.set_task_factory(None)
            assert (await posting(url)).status == 204
            assert transport.transport_stats().callback_errors == 1
        assert problems == []

    run(main())


def test_a_task_factory_that_raises_keeps_nobody_from_stopping(run: Callable[[Main], None]) -> None:
    def factory(*_: object, **__: object) -> Any:
        raise RuntimeError("the factory's")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport = transport_of(Node())
        await transport.start()
        loop.set_task_factory(factory)
        assert await transport.stop() == 0
        assert await transport.stop() == 0
        loop.set_task_factory(None)

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks in this Python")
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_calls_may_be_made_in_eager_tasks(run: Callable[[Main], None], *, is_async: bool) -> None:
    async def later(message: Message) -> None:
        await asyncio.sleep(0)

    def eager(loop: Any, coroutine: Any, **settings: Any) -> Any:
        settings.pop("eager_start", None)  # which uvloop gives, and 3.13.0's factory does not take
        return asyncio.eager_task_factory(loop, coroutine, **settings)  # type: ignore[attr-defined]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        problems: list[object] = []
        loop.set_exception_handler(lambda _, about: problems.append(about))
        loop.set_task_factory(eager)
        node = Node(later) if is_async else Node()
        async with transport_of(node) as transport:
            url = (await transport.listen("http://127.0.0.1:0")).url
            replies = await asyncio.gather(*(posting(url, index=n) for n in range(20)))
            assert {reply.status for reply in replies} == {204}
            assert len(node.processed) == 20
            deliveries = transport._deliveries
            assert (deliveries._queues, deliveries._tasks) == ({}, {})
        assert problems == []

    run(main())


@pytest.mark.usefixtures("phases_only")
def test_a_snapshot_is_awaited_and_told_of_on_the_loop(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        node, seen = Node(), []

        def progress(now: SnapshotProgress) -> None:
            seen.append((now.phase, threading.get_ident()))

        with ScriptedServer() as server:
            async with transport_of(node) as transport:
                transport.add_peer(1, [server.url])
                chunks = iter([b"hello", b"you"])
                await transport.send_snapshot(snapshot_to(1), chunks, size=8, on_progress=progress)
                assert node.reports == [(1, SnapshotStatus.FINISH)]
                assert server.requests[0].body.endswith(b"helloyou")
                await eventually_async(lambda: len(seen) == 4)
                with pytest.raises(SnapshotSourceError):
                    await transport.send_snapshot(snapshot_to(1), [b"x"], size=2)
                with pytest.raises(MemberNotFoundError):
                    await transport.send_snapshot(snapshot_to(9), b"x")
        phases = ["dialing", "sending", "answering", "done"]
        assert seen == [(phase, threading.get_ident()) for phase in phases]

    run(main())


@pytest.mark.parametrize("by", ["task", "handle", "stop"])
def test_a_snapshot_that_is_awaited_can_be_ended(run: Callable[[Main], None], by: str) -> None:
    async def main() -> None:
        node = Node()
        with ScriptedServer() as server:
            server.script = server.hold
            async with transport_of(node) as transport:
                transport.add_peer(1, [server.url])
                if by == "task":
                    task = asyncio.create_task(transport.send_snapshot(snapshot_to(1), b"x"))
                    await asyncio.to_thread(server.wait_requests, 1)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    transfer = await transport.begin_snapshot(snapshot_to(1), b"x")
                    await asyncio.to_thread(server.wait_requests, 1)
                    await eventually_async(lambda: transfer.progress.phase == "answering")
                    if by == "handle":
                        transfer.cancel()
                    else:
                        await transport.stop()
                    with pytest.raises(SnapshotCancelledError):
                        await transfer.result()
                    assert transfer.done()
                if by != "stop":
                    await eventually_async(lambda: node.reports == [(1, SnapshotStatus.FAILURE)])
            server.release.set()

    run(main())


def test_a_snapshot_whose_beginning_is_cancelled_is_cancelled(
    run: Callable[[Main], None],
) -> None:
    async def main() -> None:
        node = Node()
        with ScriptedServer() as server:
            server.script = server.hold
            async with transport_of(node) as transport:
                transport.add_peer(1, [server.url])
                task = asyncio.create_task(transport.begin_snapshot(snapshot_to(1), b"x"))
                await asyncio.sleep(0)  # it has begun to open the source
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await eventually_async(lambda: node.reports == [(1, SnapshotStatus.FAILURE)])
            server.release.set()

    run(main())
