"""``examples/pysyncobj_node.py``: what PySyncObj takes for a connection, and a cluster of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import MessageType, TLSInfo
from pipeline.examples.etcd import free_port
from tests.support.processes import Program
from tests.support.tls import Authority
from tests.support.waiting import eventually

pytest.importorskip("pysyncobj")
from pysyncobj import SyncObjConf
from pysyncobj.node import TCPNode
from pysyncobj.poller import createPoller

from pipeline.examples.pysyncobj_node import Link, PipelineTransport, id_of


class Core:
    """What PySyncObj is to its transport, without a Raft: a thread's loop, turned by hand.

    Attributes
    ----------
    told : list
        The messages that came, and ``True`` or ``False`` when the other node was connected or not.
    """

    def __init__(self, own: str, other: str, tls: TLSInfo | None = None) -> None:
        self.conf = SyncObjConf()
        self._poller = createPoller("auto")
        self.ticks: list[Callable[[], None]] = []
        self.told: list[Any] = []
        self.other = TCPNode(other)
        self.transport = PipelineTransport(self, TCPNode(own), [self.other], tls=tls)
        self.transport.setOnMessageReceivedCallback(lambda node, message: self.told.append(message))
        self.transport.setOnNodeConnectedCallback(lambda node: self.told.append(True))
        self.transport.setOnNodeDisconnectedCallback(lambda node: self.told.append(False))

    def addOnTickCallback(self, tick: Callable[[], None]) -> None:
        self.ticks.append(tick)

    def removeOnTickCallback(self, tick: Callable[[], None]) -> None:
        self.ticks.remove(tick)

    def link(self) -> Link:
        return self.transport._links[id_of(self.other)]

    def send(self, message: object) -> bool:
        return bool(self.transport.send(self.other, message))

    def turn(self) -> None:
        for tick in self.ticks:
            tick()
        self._poller.poll(0.0)


def until(condition: Callable[[], object], *cores: Core) -> None:
    """Turn the loops until a condition holds."""

    def holds() -> object:
        for core in cores:
            core.turn()
        return condition()

    eventually(holds, lambda: [core.told for core in cores])


Pair = SimpleNamespace  # one, two: Core; again: makes a ``two``


@pytest.fixture(params=["http", "https"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Two that are connected."""
    tls = Authority(tmp_path).info() if request.param == "https" else None
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    one, two = Core(*addresses, tls), Core(*reversed(addresses), tls)
    pair = Pair(one=one, two=two, again=partial(Core, *reversed(addresses), tls))
    until(lambda: one.told == [True] == two.told, one, two)
    yield pair
    pair.one.transport.destroy()
    pair.two.transport.destroy()


def test_nodes_that_are_not_connected_are_sent_nothing() -> None:
    address = f"127.0.0.1:{free_port()}"
    core = Core(address, f"127.0.0.1:{free_port()}")
    try:
        stats = core.transport._transport.stats
        until(lambda: stats()[id_of(core.other)].failed > 1, core)  # it says hello in vain
        assert not core.send("nothing")
        assert core.told == []
    finally:
        core.transport.destroy()


def test_messages_come_once_and_in_order(pair: Pair) -> None:
    sent = [(n, bytes(100_000 if n % 100 == 0 else 10)) for n in range(2000)]
    for message in sent:
        assert pair.one.send(message)
    until(lambda: len(pair.two.told) > len(sent), pair.two)
    assert pair.two.told == [True, *sent]


def test_a_message_that_comes_twice_is_taken_once(pair: Pair) -> None:
    one, two = pair.one, pair.two
    link, post = one.link(), one.transport._post

    def post_twice(*args: Any, **fields: Any) -> int:
        return int(post(*args, **fields)) + int(post(*args, **fields))

    one.transport._post = post_twice
    for n in range(3):
        assert one.send(n)
    post(link, MessageType.HEARTBEAT, link.epoch)  # the hello, once more
    assert one.send(3)
    until(lambda: 3 in two.told, one, two)
    assert two.told == [True, 0, 1, 2, 3]
    assert one.told == [True]


def test_after_a_message_that_is_lost_the_node_is_connected_anew(pair: Pair) -> None:
    one, two = pair.one, pair.two
    assert one.send("first")
    one.link().number += 1  # as if one had been sent, and had failed
    assert one.send("after a gap")
    until(lambda: one.told == [True, False, True], one, two)
    assert one.send("again")
    until(lambda: "again" in two.told, one, two)
    assert two.told == [True, "first", "again"]


def test_a_full_queue_disconnects(pair: Pair) -> None:
    while pair.one.send(b""):  # what nobody takes from the other's inbox fills that, then the queue
        pass
    assert pair.one.told == [True, False]


def test_a_node_that_was_started_anew_is_connected_anew(pair: Pair) -> None:
    one = pair.one
    assert one.send("before")
    until(lambda: "before" in pair.two.told, one, pair.two)
    pair.two.transport.destroy()
    pair.two = two = pair.again()
    assert one.send("to whom it does not concern")
    until(lambda: one.told == [True, False, True] and two.told == [True], one, two)
    assert one.send("after")
    until(lambda: "after" in two.told, one, two)
    assert two.told == [True, "after"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_counter_outlives_its_leader(stack: ExitStack, tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(3)]

    def start(n: int) -> Program:
        others = [address for address in addresses if address != addresses[n]]
        journal = str(tmp_path / f"{n}.journal")
        module = "pipeline.examples.pysyncobj_node"
        return stack.enter_context(Program(module, journal, addresses[n], *others))

    programs = {n: start(n) for n in range(3)}
    offered = acknowledged = 0

    def add(program: Program) -> None:
        """Add 1, again until it is known to be done."""
        nonlocal offered, acknowledged
        is_added = False
        while not is_added:
            before = len(program.lines)
            offered += 1
            program.write("1\n")
            is_added = program.wait_line("^(added|not known)", before)[1] == "added"
        acknowledged += 1

    def values() -> list[int]:
        """The last value of each node."""
        told = [re.findall(r"^value (\d+)$", "\n".join(p.lines), re.M) for p in programs.values()]
        return [int(lines[-1]) if lines else 0 for lines in told]

    def leader() -> int | None:
        states = {
            n: [line for line in program.lines if line in ("leads", "follows", "campaigns")]
            for n, program in programs.items()
        }
        return next((n for n, told in states.items() if told[-1:] == ["leads"]), None)

    eventually(lambda: leader() is not None, "one leads")
    for n in range(3):
        add(programs[n])
    gone = leader()
    assert gone is not None
    killed = programs.pop(gone)
    killed.process.kill()
    killed.process.wait()
    eventually(lambda: leader() is not None, "another leads")
    for program in programs.values():
        add(program)
    programs[gone] = start(gone)
    add(programs[gone])
    eventually(lambda: len(set(values())) == 1, lambda: f"all have the same value: {values()}")
    assert acknowledged == 6
    assert acknowledged <= values()[0] <= offered
