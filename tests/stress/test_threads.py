"""Many threads at one thing: what the GIL kept in turns, where there is one.

Without a GIL (``make free-threaded``) they really run at the same time, and the thread sanitizer
sees what they share.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline import (
    ConfState,
    EncodedMessage,
    Entry,
    Inbox,
    Message,
    MessageType,
    Pipeline,
    SendResult,
    Snapshot,
    SnapshotMetadata,
    Transport,
    TransportConfig,
    UsageError,
)
from pipeline.net.dialling import Dial, DialError
from tests.support import LONG_TIMEOUT
from tests.support.http import CLUSTER_ID
from tests.support.inbox import HEARTBEAT, Caller, Reports, receiving
from tests.support.processes import run
from tests.support.raft import FakeRaft
from tests.support.senders import PEER, assert_balanced, message, pipeline_to, settle
from tests.support.server import OK, ScriptedServer, always

ROUNDS = 1_000

#: Of every size that is written differently: copied, borrowed from 4 KiB on, absent, empty.
PAYLOADS = (None, b"", b"a", b"b" * 127, b"c" * 128, b"d" * 5_000, b"e" * 70_000)
NUMBERS = (0, 1, 127, 128, 1 << 14, 1 << 32, (1 << 64) - 1)


@pytest.fixture(autouse=True)
def quick_turns() -> Iterator[None]:
    """Have the GIL, where there is one, change hands as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], object]) -> None:
    """Run each in a thread of its own, all from the same instant on; raise what one raises."""
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def call(work: Callable[[], object]) -> None:
        try:
            begin.wait(LONG_TIMEOUT)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10 * LONG_TIMEOUT)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


class Changing:
    """A message of which everything is assigned to, again and again, by two threads."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.shared = Entry(term=1, index=1)
        self.message = Message(type=MessageType.APP, to=PEER, entries=(self.shared, self.shared))
        self.conf_state = ConfState(voters=(1, 2, 3))
        self.metadata = SnapshotMetadata(conf_state=self.conf_state)
        self.snapshot = Snapshot(metadata=self.metadata)

    def meanwhile(self, *works: Callable[[], object]) -> None:
        """Run these while two threads assign."""

        def run() -> None:
            try:
                at_once(*works)
            finally:
                self.is_over.set()

        at_once(run, lambda: self.assign(1), lambda: self.assign(2))

    def assign(self, seed: int) -> None:
        chance = random.Random(seed)
        entries = [(), (self.shared,), (self.shared, self.shared), (Entry(data=b"x"), self.shared)]
        while not self.is_over.is_set():
            payload, number = chance.choice(PAYLOADS), chance.choice(NUMBERS)
            # Made anew: nobody else keeps it alive.
            payload = None if payload is None else bytearray(payload)
            kept = None if payload is None else bytes(payload)
            self.shared.data = chance.choice((payload, kept))
            self.shared.index = number
            self.shared.type = chance.choice((0, 1, 2))
            self.message.context = chance.choice((payload, kept))
            self.message.entries = chance.choice(entries)
            self.message.snapshot = chance.choice((None, self.snapshot))
            self.message.term = self.message.commit = self.message.reject_hint = number
            self.message.reject = chance.choice((True, False))
            self.snapshot.data = kept
            self.snapshot.metadata = chance.choice((self.metadata, SnapshotMetadata(index=9)))
            self.metadata.index = number
            self.metadata.conf_state = chance.choice((self.conf_state, ConfState(learners=(7,))))
            self.conf_state.voters = range(chance.choice((0, 1, 100)))
            self.conf_state.auto_leave = chance.choice((True, False))

    def look(self) -> None:
        """Fail if a field has, or is encoded as, what it was never assigned."""
        for profile in itertools.islice(itertools.cycle(("3.5", "3.6", "3.7")), ROUNDS):
            encoded = self.message.marshal(profile)
            self.check(Message.unmarshal(encoded))
            self.check(pickle.loads(pickle.dumps(self.message)))
            self.check(self.message)
            assert self.message.byte_size(profile) > 0
            assert "Message(" in repr(self.message)
            assert self.message in (self.message, None)
            assert (self.message == Message(type=MessageType.APP)) in (True, False)

    def check(self, seen: Message) -> None:
        assert {seen.term, seen.commit, seen.reject_hint} <= set(NUMBERS)
        assert bytes_of(seen.context) in PAYLOADS
        for entry in seen.entries:
            assert entry.index in NUMBERS
            assert bytes_of(entry.data) in (*PAYLOADS, b"x")
        if (snapshot := seen.snapshot) is not None:
            metadata = snapshot.metadata
            assert bytes_of(snapshot.data) in PAYLOADS
            assert metadata.index in (0, *NUMBERS, 9)
            assert metadata.conf_state.voters in ((), (0,), (1, 2, 3), tuple(range(100)))
            assert metadata.conf_state.learners in ((), (7,))


def bytes_of(payload: Any) -> bytes | None:
    return None if payload is None else bytes(payload)


def test_a_message_that_is_assigned_to_is_read_and_encoded_as_one_value_or_the_other() -> None:
    changing = Changing()
    changing.meanwhile(changing.look, changing.look)


def send_all(pipeline: Pipeline, sent: Message | EncodedMessage, count: int) -> None:
    """Offer it until it was accepted so many times."""
    while count > 0:
        if pipeline.send(sent) is SendResult.ACCEPTED:
            count -= 1
        else:
            time.sleep(0.0005)


def test_a_message_that_is_assigned_to_is_sent_as_one_value_or_the_other() -> None:
    changing = Changing()
    with ScriptedServer(always(OK)) as server:
        with pipeline_to(server) as pipeline:
            send = partial(send_all, pipeline, changing.message, ROUNDS // 2)
            changing.meanwhile(send, send)
            assert settle(pipeline).sent == ROUNDS // 2 * 2
        for request in server.requests:
            changing.check(Message.unmarshal(request.body))


def test_an_encoded_message_that_is_made_anew_is_sent_as_one_or_the_other() -> None:
    encoded = EncodedMessage(b"", type=MessageType.APP, to=PEER)
    texts = [Message(type=MessageType.APP, context=payload).marshal() for payload in PAYLOADS]
    is_over = threading.Event()
    with ScriptedServer(always(OK)) as server:
        with pipeline_to(server) as pipeline:

            def make() -> None:
                for text in itertools.cycle(texts):
                    encoded.__init__(bytearray(text), type=0, to=PEER)  # type: ignore[misc]
                    assert bytes(encoded.data) in texts
                    assert len(encoded) in set(map(len, texts))
                    if is_over.is_set():
                        return

            def send() -> None:
                try:
                    send_all(pipeline, encoded, ROUNDS)
                finally:
                    is_over.set()

            at_once(make, make, send)
            assert settle(pipeline).sent == ROUNDS
        for request in server.requests:
            assert request.body in (b"", *texts)


class Cluster:
    """A node with peers that all are one server, and what threads do with it at once."""

    PEERS = range(10, 16)

    def __init__(self, url: str) -> None:
        self.raft = FakeRaft()
        # An interval of probes, so that the poller follows the peers, too.
        config = TransportConfig(probe_interval_s=0.05, stop_timeout_s=LONG_TIMEOUT)
        self.node = Transport(1, 1, self.raft, config=config)
        self.url = url
        self.is_over = threading.Event()
        self.sent = 0
        self._counting = threading.Lock()

    def send(self) -> None:
        messages = [message(to=to) for to in (*self.PEERS, *self.PEERS)]
        while not self.is_over.is_set():
            try:
                not_queued = self.node.send(messages)
            except UsageError:
                assert self.is_over.wait(LONG_TIMEOUT)
                return
            assert 0 <= not_queued <= len(messages)
            with self._counting:
                self.sent += len(messages) - not_queued

    def change(self, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(ROUNDS // 4):
            peer = chance.choice(self.PEERS)
            with contextlib.suppress(UsageError):  # once it is stopped
                chance.choice(
                    (
                        lambda peer=peer: self.node.add_peer(peer, [self.url]),
                        lambda peer=peer: self.node.add_peer(peer, [self.url]),
                        lambda peer=peer: self.node.update_peer(peer, [self.url, self.url]),
                        lambda peer=peer: self.node.remove_peer(peer),
                        lambda peer=peer: self.node.add_remote(peer, [self.url]),
                        lambda peer=peer: self.node.cut_peer(peer),
                        lambda peer=peer: self.node.mend_peer(peer),
                        self.node.pause,
                        self.node.resume,
                    )
                )()

    def look(self) -> None:
        while not self.is_over.is_set():
            for books in self.node.stats().values():
                assert_balanced(books)
            assert 0 <= self.node.active_peers() <= len(self.PEERS)
            assert set(self.node.peer_stats()) <= set(self.PEERS)
            self.node.follower_stats()
            self.node.remote_stats()
            self.node.probe_stats()
            self.node.snapshot()
            self.node.server_stats()
            self.node.transport_stats()
            assert "Transport" in repr(self.node)


@pytest.mark.parametrize("is_stopped", [False, True], ids=["to the end", "stopped in the middle"])
def test_peers_come_and_go_and_are_looked_at_while_messages_are_sent(is_stopped: bool) -> None:
    with ScriptedServer(always(OK)) as server:
        cluster = Cluster(server.url)
        cluster.node.start()

        def change() -> None:
            try:
                at_once(lambda: cluster.change(1), lambda: cluster.change(2))
            finally:
                cluster.is_over.set()

        def stop() -> None:
            if is_stopped:
                server.wait_requests(50)
                at_once(cluster.node.stop, cluster.node.stop)

        at_once(cluster.send, cluster.send, cluster.look, cluster.look, change, stop)
        cluster.node.stop()
        assert cluster.sent > 0
        assert cluster.node.stats() == {}
        assert cluster.node.transport_stats().callback_errors == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.streams
def test_a_node_that_is_started_used_and_stopped_by_several_threads_at_once(seed: int) -> None:
    chance = random.Random(seed)
    config = TransportConfig(stop_timeout_s=LONG_TIMEOUT)
    with receiving(Inbox(), peers=(1,)) as (_, peer):
        for _ in range(8):
            inbox = Inbox()
            node = Transport(1, CLUSTER_ID, Reports(), inbox=inbox, config=config)

            def soon(
                work: Callable[..., object], *given: object, pause_s: float | None = None
            ) -> Callable[[], None]:
                pause_s = chance.random() * 0.01 if pause_s is None else pause_s

                def call() -> None:
                    time.sleep(pause_s)
                    with contextlib.suppress(UsageError):  # it is not started yet, or stopped
                        work(*given)

                return call

            at_once(
                soon(node.start, pause_s=0.0),
                soon(node.stop),
                soon(node.stop),
                soon(node.add_peer, PEER, [peer.url]),
                soon(node.listen, "http://127.0.0.1:0"),
                soon(node.send, [message(), message()]),
                soon(inbox.take, 10, LONG_TIMEOUT),
            )
            node.stop()
            assert inbox.closed
            assert node.stats() == {}


def test_each_message_of_an_inbox_is_taken_by_one_of_many_threads() -> None:
    inbox = Inbox()
    count = 400
    with receiving(inbox) as (_, listener):
        taken: list[list[int]] = [[] for _ in range(4)]

        def take(mine: list[int]) -> None:
            while sum(map(len, taken)) < count:
                mine.extend(found.index for found in inbox.take(7, 0.01))
                len(inbox), inbox.stats(), repr(inbox), inbox.fileno()

        def push(first: int) -> None:
            with Caller(listener.url) as caller:
                for index in range(first, count, 2):
                    assert caller.ask(HEARTBEAT, index) == 204

        at_once(
            *(lambda mine=mine: take(mine) for mine in taken),  # type: ignore[misc]
            *(lambda first=first: push(first) for first in range(2)),  # type: ignore[misc]
        )
        assert sorted(itertools.chain(*taken)) == list(range(count))


def test_the_socket_of_a_dial_goes_to_one_of_those_who_want_it() -> None:
    for _ in range(ROUNDS // 10):
        dial = Dial("127.0.0.1", 1, 1.0, (), lambda _: None)
        sock = Closed()
        got: list[object] = []

        def take(dial: Dial = dial, got: list[object] = got) -> None:
            with contextlib.suppress(DialError):
                got.append(dial.take())

        finish = lambda dial=dial, sock=sock: dial.finish(sock)  # noqa: E731
        at_once(finish, dial.discard, take)
        assert sock.closes + len(got) == 1


class Closed:
    """Counts how often it is closed."""

    def __init__(self) -> None:
        self.closes = 0

    def close(self) -> None:
        self.closes += 1


def test_what_is_made_when_it_is_first_needed_is_made_once(tmp_path: Path) -> None:
    result = run("first_use.py", str(tmp_path))
    assert result.stdout == "ok\n", result.stdout + result.stderr
