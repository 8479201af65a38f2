"""A node of PySyncObj, its messages carried by a Transport: a counter that is the same everywhere.

::

    python -m pipeline.examples.pysyncobj_node JOURNAL 127.0.0.1:4321 127.0.0.1:4322 127.0.0.1:4323

The first address is the node's own. Each line of its input is a number to add; each value that the
counter takes is a line of its output. PySyncObj is the Raft: ``PipelineTransport`` is all that is
given to it, and what it gains is TLS on both sides, reading without the GIL, and dead links found.

PySyncObj takes its transport for a TCP connection: each message once and in order, or the node is
*disconnected* and begins anew. A Transport promises less, and Raft needs no more: a message that
fails is gone, one that was sent again may come twice. A vote that came twice would be counted
twice. So the messages to a node are numbered, and a ``Link`` is what a connection is. That is most
of the glue.

Messages are pickles, as PySyncObj's own are: whoever can reach the port can run what they like
here. Give it ``tls``, or a network of its own. Not carried: PySyncObj's read-only nodes, its
``password`` and ``syncobj_admin``.

Glue: 93 lines, those of the classes ``Link`` and ``PipelineTransport`` without blank lines,
comments and docstrings.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from pysyncobj import SyncObj, SyncObjConf, SyncObjException, replicated
from pysyncobj import transport as of_pysyncobj
from pysyncobj.poller import POLL_EVENT_TYPE

from pipeline import (
    Entry,
    Inbox,
    Message,
    MessageType,
    PipelineConfig,
    SnapshotStatus,
    TLSInfo,
    Transport,
    TransportConfig,
)

__all__ = ["Counter", "Link", "PipelineTransport", "main"]

#: The same in all nodes, so that those of two clusters do not mix. Change it.
CLUSTER_ID = 0x50795379
#: PySyncObj puts a large entry, or all of what a node has missed, into the queue at once.
CONFIG = TransportConfig(pipeline=PipelineConfig(connections=1, queue_length=1 << 16))


def id_of(node: Any) -> int:
    """Return the member ID of a node; PySyncObj's own is its address."""
    return int.from_bytes(hashlib.sha256(node.id.encode()).digest()[:8])


class Link:
    """What a TCP connection to a node would be, both ways.

    Attributes
    ----------
    epoch : int
        Of the messages that leave; 0 while there is no link. A hello tells the other node of it.
    number : int
        Of the next message that leaves.
    is_answered : bool
        Whether the other node has taken the hello.
    is_up : bool
        Whether PySyncObj knows the node as connected.
    hello_at : float
        When to say hello, unless it is up.
    expected : (int, int)
        Epoch and number of the next message to come.
    """

    def __init__(self, node: Any) -> None:
        self.node, self.id = node, id_of(node)
        self.epoch = self.number = 0
        self.is_answered = self.is_up = False
        self.hello_at = 0.0
        self.expected = (0, 0)


class PipelineTransport(of_pysyncobj.Transport):  # type: ignore[misc]  # pysyncobj has no types
    """What ``SyncObj(transportClass=PipelineTransport)`` is given; implements ``RaftReports``.

    Used by PySyncObj's thread, but for ``report_unreachable``. ``functools.partial`` adds ``tls``.
    """

    def __init__(
        self, core: SyncObj, own: Any, others: Iterable[Any], *, tls: TLSInfo | None = None
    ) -> None:
        super().__init__(core, own, others)
        self._core, self._scheme = core, "http" if tls is None else "https"
        self._links: dict[int, Link] = {}
        self._lost: deque[int] = deque()
        self._epochs = itertools.count(time.time_ns())  # of another life they are others
        self._inbox = Inbox()
        url = f"{self._scheme}://{own.address}"
        self._transport = Transport(
            id_of(own), CLUSTER_ID, self, peer_urls=[url], tls=tls, config=CONFIG, inbox=self._inbox
        )
        self._transport.start()
        self._transport.listen(url)
        for node in others:
            self.addNode(node)
        core._poller.subscribe(self._inbox.fileno(), self._take, POLL_EVENT_TYPE.READ)
        core.addOnTickCallback(self._tick)

    def addNode(self, node: Any) -> None:
        link = self._links[id_of(node)] = Link(node)
        self._transport.add_peer(link.id, [f"{self._scheme}://{node.address}"])

    def dropNode(self, node: Any) -> None:
        if (link := self._links.pop(id_of(node), None)) is not None:
            self._break(link)
            self._transport.remove_peer(link.id)

    def send(self, node: Any, message: Any) -> bool:
        link = self._links.get(id_of(node))
        if link is None or not link.is_up:
            return False
        entry = Entry(data=pickle.dumps(message))
        if self._post(link, MessageType.APP, link.epoch, index=link.number, entries=[entry]):
            self._break(link)  # the queue is full
        link.number += 1
        return link.is_up

    def destroy(self) -> None:
        self._core._poller.unsubscribe(self._inbox.fileno())
        self._core.removeOnTickCallback(self._tick)
        self._transport.stop()

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None: ...
    def report_unreachable(self, member_id: int) -> None:
        self._lost.append(member_id)  # for the tick: this is a thread of the library

    def _post(self, link: Link, kind: MessageType, epoch: int, **fields: Any) -> int:
        own = self._transport.member_id
        return self._transport.send(
            [Message(type=kind, to=link.id, from_=own, log_term=epoch, **fields)]
        )

    def _break(self, link: Link) -> None:
        """End a link; the next hello is later than one look of PySyncObj at who is connected."""
        was_up, link.is_up, link.is_answered, link.epoch = link.is_up, False, False, 0
        link.hello_at = time.monotonic() + self._core.conf.appendEntriesPeriod
        if was_up:
            self._onNodeDisconnected(link.node)

    def _tick(self) -> None:
        while self._lost:
            if (link := self._links.get(self._lost.popleft())) is not None:
                self._break(link)
        for link in self._links.values():
            if link.is_answered and not link.is_up:
                link.is_up = True
                self._onNodeConnected(link.node)
            elif not link.is_up and time.monotonic() >= link.hello_at:
                link.epoch, link.number = next(self._epochs), 0
                link.hello_at = time.monotonic() + self._core.conf.connectionTimeout
                self._post(link, MessageType.HEARTBEAT, link.epoch)

    def _take(self, descriptor: int, events: int) -> None:
        """Take what has come: a hello, what another node says to ours, or a message."""
        for message in self._inbox.take(1 << 16):
            link, epoch = self._links.get(message.from_), message.log_term
            if link is None:
                continue
            if message.type == MessageType.HEARTBEAT:
                if link.expected[0] != epoch:  # else it has come twice
                    link.expected = (epoch, 0)
                self._post(link, MessageType.HEARTBEAT_RESP, epoch)
            elif message.type == MessageType.HEARTBEAT_RESP:
                if epoch == link.epoch:
                    link.is_answered = not message.reject
                if epoch == link.epoch and message.reject:
                    self._break(link)
            elif link.expected == (epoch, message.index):
                link.expected = (epoch, message.index + 1)
                self._onMessageReceived(link.node, pickle.loads(message.entries[0].data or b""))
            elif link.expected[0] != epoch or link.expected[1] < message.index:
                # We have been started since, or the one before this is lost: begin anew.
                self._post(link, MessageType.HEARTBEAT_RESP, epoch, reject=True)


class Counter(SyncObj):  # type: ignore[misc]
    """The application: what is added on one node is added on all."""

    def __init__(self, journal: str, own: str, others: list[str]) -> None:
        config = SyncObjConf(journalFile=journal, onStateChanged=self._tell_state)
        super().__init__(own, others, config, transportClass=PipelineTransport)
        self.value = 0

    @replicated  # type: ignore[untyped-decorator]
    def add(self, number: int) -> None:
        self.value += number
        print(f"value {self.value}", flush=True)

    def _tell_state(self, before: int, now: int) -> None:
        print(("follows", "campaigns", "leads")[now], flush=True)


def main() -> None:
    """Run a node until its input ends."""
    journal, own, *others = sys.argv[1:]
    counter = Counter(journal, own, others)
    try:
        for line in sys.stdin:
            try:
                counter.add(int(line), sync=True, timeout=5)
                print(f"added {int(line)}", flush=True)
            except SyncObjException as error:  # perhaps it is added all the same
                print(f"not known to be added: {error.errorCode}", flush=True)
    finally:
        counter.destroy_synchronous()


if __name__ == "__main__":
    main()
