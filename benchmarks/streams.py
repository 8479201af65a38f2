"""Messages over the streams of two nodes of ours, in two processes, through the public API.

What ``peers/etcd/streams.go`` does with two transports of etcd's, and in the same way; either of
the two programs can be the other's leader or follower. Both print "listening PORT" first. The
follower reads the leader's URL from the first line of its stdin and ends when that does; each
prints one JSON object in the end.

The leader sends messages with consecutive indexes, ``BATCH`` at a time, and has at most ``WINDOW``
of them unanswered; the follower answers every ``BATCH``. MsgApps go by the stream of that name; of
the kind "message" they are heartbeats with a context. MsgVotes with an index of its own mark where
a run begins and ends, at which both sides look at their CPU; then come ``--lone`` messages one at a
time, which carry the moment of the offer.

With ``--encoded`` the leader offers ``EncodedMessage``s of bytes that are there already, as they
are with a Raft that encodes by itself, and the follower takes them so. With ``--spin`` the main
thread of the follower computes in Python all the time, and takes what has come every half
millisecond or so (S4). With ``--bursts`` it is only so many batches that are sent, whose
instructions ``check.py`` counts. ``compute`` is a process that does nothing but compute.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from driver import spin
from harness import (
    CLUSTER_ID,
    MEMBER_ID,
    PEER_ID,
    TERM,
    QuietRaft,
    add_tls_options,
    cpu_s,
    posted,
    quantiles,
    tls_of,
)

from pipeline import (
    EncodedMessage,
    Entry,
    Inbox,
    Message,
    MessageType,
    Transport,
    TransportConfig,
)

BATCH, WINDOW = 256, 2048
#: The index of a MsgVote: what begins or ends there.
HELLO, BEGIN, END, LONE = range(4)
#: Looked up once: to do it for each message would be a tenth of what one costs.
APP, HEARTBEAT = MessageType.APP, MessageType.HEARTBEAT
#: A loop that is not asleep after this long would burn CPU for an idle peer.
LONE_PAUSE_S = 0.002
#: How long the follower waits for the first message of a batch: a tick.
TICK_S = 0.1
#: What is computed between two takes when the main thread spins: about 0.5 ms of bytecode.
SPIN_ITERATIONS = 17_500
#: Different messages whose bytes are there before the first is offered; then their indexes begin
#: anew, and one goes out whole.
PREPARED = 1 << 14
PATIENCE_S = 30.0

Build = Callable[[int, bytes], Any]


def build_app(index: int, data: bytes) -> Message:
    return Message(
        type=APP,
        to=PEER_ID,
        from_=MEMBER_ID,
        term=TERM,
        log_term=TERM,
        index=index - 1,
        commit=index - 1,
        entries=(Entry(term=TERM, index=index, data=data),),
    )


def build_heartbeat(index: int, data: bytes) -> Message:
    return Message(
        type=HEARTBEAT,
        to=PEER_ID,
        from_=MEMBER_ID,
        term=TERM,
        commit=index,
        context=data,
    )


BUILDERS: dict[str, Build] = {"msgapp": build_app, "message": build_heartbeat}


def node(args: argparse.Namespace, member_id: int, inbox: Inbox[Any]) -> Transport:
    config = TransportConfig(streams=True, probe_interval_s=0)
    return Transport(
        member_id, CLUSTER_ID, QuietRaft(), inbox=inbox, config=config, tls=tls_of(args)
    )


def listen(transport: Transport, args: argparse.Namespace) -> None:
    listener = transport.listen(f"{'https' if args.cert else 'http'}://127.0.0.1:0")
    print(f"listening {listener.url.rpartition(':')[2]}", flush=True)


class Leader:
    """Offers messages to a started transport and counts what is answered."""

    def __init__(self, transport: Transport, inbox: Inbox[Message], build: Build) -> None:
        self._transport = transport
        self._inbox = inbox
        self._build = build
        self._marks: list[int] = []
        self.sent = 0
        self._acked = 0

    def wait_streams(self) -> None:
        """Wait until all four are up."""
        deadline = time.monotonic() + PATIENCE_S
        while not all(each.since for each in self._transport.peer_stats()[PEER_ID].streams):
            if time.monotonic() > deadline:
                raise SystemExit(f"not up: {self._transport.peer_stats()}")
            time.sleep(0.01)

    def mark(self, index: int) -> None:
        """Tell the follower what begins, and wait until it has heard."""
        vote = Message(type=MessageType.VOTE, to=PEER_ID, from_=MEMBER_ID, term=TERM, index=index)
        self.offer([vote])
        while not self._marks:
            self._hear()
        if (got := self._marks.pop()) != index:
            raise SystemExit(f"mark {index} was answered with {got}")

    def run(self, seconds: float, data: bytes) -> None:
        """Keep the window full for so long; then wait for all answers."""
        build = self._build
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            while self.sent + BATCH <= self._acked + WINDOW:
                first = self.sent + 1
                self.offer([build(index, data) for index in range(first, first + BATCH)])
                self.sent += BATCH
            self._hear()
        while self._acked < self.sent:
            self._hear()

    def send_bursts(self, bursts: int, data: bytes) -> None:
        """Send so many batches, each when the one before is answered."""
        build = self._build
        for _ in range(bursts):
            first = self.sent + 1
            self.offer([build(index, data) for index in range(first, first + BATCH)])
            self.sent += BATCH
            while self._acked < self.sent:
                self._hear()

    def send_lone(self, messages: int, size: int) -> None:
        for _ in range(messages):
            time.sleep(LONE_PAUSE_S)
            self.sent += 1
            self.offer([self._build(self.sent, time.time_ns().to_bytes(8).ljust(size, b"x"))])
        time.sleep(LONE_PAUSE_S)

    def offer(self, messages: list[Any]) -> None:
        if refused := self._transport.send(messages):
            raise SystemExit(f"{refused} of {len(messages)} messages were not queued")

    def _hear(self) -> None:
        answers = self._inbox.take(BATCH, PATIENCE_S)
        if not answers:
            raise SystemExit(f"no answer: {self.sent} sent, {self._acked} answered")
        for answer in answers:
            if answer.type is MessageType.APP_RESP:
                self._acked = answer.index
            elif answer.type is MessageType.VOTE_RESP:
                self._marks.append(answer.index)


def prepared(build: Build, data: bytes) -> Build:
    """Return what makes ``EncodedMessage``s of bytes that are there already.

    A message of other data, of which there are few, is encoded when it is made.
    """
    encoded = [build(index, data).marshal() for index in range(1, PREPARED + 1)]
    unmarshal = EncodedMessage.unmarshal

    def again(index: int, other: bytes) -> EncodedMessage:
        if other is not data:
            return unmarshal(build(index, other).marshal())
        return unmarshal(encoded[(index - 1) % PREPARED])

    return again


def lead(args: argparse.Namespace) -> dict[str, Any]:
    data, build = b"x" * args.size, BUILDERS[args.kind]
    if args.encoded:
        build = prepared(build, data)
    inbox = Inbox()
    with node(args, MEMBER_ID, inbox) as transport:
        listen(transport, args)
        transport.add_peer(PEER_ID, [args.peer])
        leader = Leader(transport, inbox, build)
        leader.wait_streams()
        leader.mark(HELLO)
        if args.bursts:
            leader.send_bursts(args.bursts, data)
            return {"total": leader.sent}
        leader.run(args.warmup, data)
        leader.mark(BEGIN)
        posts = posted(transport, PEER_ID)
        start, start_cpu, start_sent = time.perf_counter(), cpu_s(), leader.sent
        leader.run(args.seconds, data)
        took, took_cpu = time.perf_counter() - start, cpu_s() - start_cpu
        messages = leader.sent - start_sent
        leader.mark(END)
        leader.mark(LONE)
        leader.send_lone(args.lone, args.size)
        leader.mark(HELLO)
        posts = posted(transport, PEER_ID) - posts
    return {
        "messages": messages,
        "seconds": took,
        "total": leader.sent,
        "msgs_per_s": messages / took,
        "cpu_us_per_msg": took_cpu * 1e6 / messages,
        "posts": posts,
    }


class Follower:
    """Answers, and measures itself between the marks."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._answered = 0
        self._last = 0
        self._is_lone = False
        self._start = (0.0, 0)
        self.received = 0
        self.unsorted = 0
        self.lone_ns: list[int] = []
        self.measured = (0.0, 0)

    def take(self, messages: list[Any], now_ns: int) -> None:
        """Go through a batch that was taken at ``now_ns``."""
        last = self._last
        for message in messages:
            kind = message.type
            if kind is APP:
                index = message.index + 1
            elif kind is HEARTBEAT:
                index = message.commit
            else:
                self._mark(message)
                continue
            if index != last + 1:
                self.unsorted += 1
            last = index
            self.received += 1
            if self._is_lone:
                stamped = message.entries[0].data if kind is APP else message.context
                self.lone_ns.append(now_ns - int.from_bytes(stamped[:8]))
        self._last = last
        self._answer()

    def take_encoded(self, messages: list[Any], now_ns: int) -> None:
        """The same, without a look into them: that is the business of who takes them so."""
        vote = MessageType.VOTE
        for message in messages:
            if message.type is vote:
                self._mark(Message.unmarshal(message.data))
            else:
                self.received += 1
                if self._is_lone:
                    whole = Message.unmarshal(message.data)
                    stamped = whole.entries[0].data if whole.entries else whole.context
                    self.lone_ns.append(now_ns - int.from_bytes(stamped[:8]))
        self._answer()

    def _answer(self) -> None:
        answers = []
        while self._answered + BATCH <= self.received:
            self._answered += BATCH
            answers.append(answer_of(MessageType.APP_RESP, self._answered))
        self._send(answers)

    def _mark(self, vote: Message) -> None:
        if vote.index == BEGIN:
            self._start = cpu_s(), self.received
        elif vote.index == END:
            cpu, received = self._start
            self.measured = cpu_s() - cpu, self.received - received
        elif vote.index == LONE:
            self._is_lone = True
        self._send([answer_of(MessageType.VOTE_RESP, vote.index)])

    def _send(self, answers: list[Message]) -> None:
        if self._transport.send(answers):
            raise SystemExit(f"an answer was not queued: {answers}")


def answer_of(kind: MessageType, index: int) -> Message:
    return Message(type=kind, to=MEMBER_ID, from_=PEER_ID, term=TERM, index=index)


def follow(args: argparse.Namespace) -> dict[str, Any]:
    inbox = Inbox(encoded=True) if args.encoded else Inbox()
    is_told = threading.Event()
    with node(args, PEER_ID, inbox) as transport:
        listen(transport, args)
        transport.add_peer(MEMBER_ID, [sys.stdin.readline().strip()])
        threading.Thread(target=lambda: (sys.stdin.read(), is_told.set()), daemon=True).start()
        follower = Follower(transport)
        take = follower.take_encoded if args.encoded else follower.take
        while not is_told.is_set():
            if args.spin:
                spin(0, SPIN_ITERATIONS)
                messages = inbox.take(WINDOW)
            else:
                messages = inbox.take(BATCH, TICK_S)
            take(messages, time.time_ns())
            del messages  # not to be held while the next are waited for
    took_cpu, messages = follower.measured
    if not messages:  # bursts
        return {"total": follower.received, "out_of_order": follower.unsorted}
    lone = quantiles(follower.lone_ns)
    return {
        "messages": messages,
        "total": follower.received,
        "out_of_order": follower.unsorted,
        "cpu_us_per_msg": took_cpu * 1e6 / messages,
        "p50_us": lone["p50"] / 1000,
        "p99_us": lone["p99"] / 1000,
    }


def compute() -> None:
    """Compute in Python until stdin ends."""
    is_told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_told.set()), daemon=True).start()
    while not is_told.is_set():
        spin(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=("lead", "follow", "compute"))
    parser.add_argument("--peer", help="URL of the follower")
    parser.add_argument("--kind", choices=BUILDERS, default="msgapp", help="the stream")
    parser.add_argument("--size", type=int, default=128, help="bytes in the one entry")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the measured run")
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds before it")
    parser.add_argument("--bursts", type=int, help="only so many batches, one after the other")
    parser.add_argument("--lone", type=int, default=300, help="messages one at a time afterwards")
    parser.add_argument("--encoded", action="store_true", help="EncodedMessage")
    parser.add_argument("--spin", action="store_true", help="compute in the follower's main thread")
    add_tls_options(parser)
    args = parser.parse_args()
    if args.role == "compute":
        compute()
    else:
        print(json.dumps(lead(args) if args.role == "lead" else follow(args)))


if __name__ == "__main__":
    main()
