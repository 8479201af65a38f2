"""What every benchmark shares: the sink, the subjects, the message and the machine."""

from __future__ import annotations

import enum
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
from pipeline import MessageType, SendResult
from pipeline.tls import Credentials

HERE = Path(__file__).resolve().parent
BIN = HERE / "bin"

MEMBER_ID = 0x8E9E05C52164694D
PEER_ID = 0xCE2A822CEA30BFCA
CLUSTER_ID = 0xCDF818194E3A8C32
TERM = 7

SUBJECTS = ("core", "core-prebuilt", "baseline")


class QuietRaft:
    """A node that is told of failures and does nothing; the subjects count them."""

    def process(self, message: object) -> None:
        raise AssertionError("a sender is given no messages")

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None:
        pass

    def report_snapshot(self, member_id: int, status: object) -> None:
        pass


class Sink:
    """The C sink as a process of its own; a context manager.

    ``counters`` holds what it counted once the block is left: requests, body_bytes,
    connections, bad, cpu_s, and stamps_ns (arrival, CLOCK_REALTIME) if ``stamp`` was asked for.
    """

    def __init__(self, *, stamp: bool = False) -> None:
        self._args = [str(BIN / "sink"), *(["--stamp"] if stamp else [])]
        self.counters: dict[str, Any] = {}

    def __enter__(self) -> Sink:
        self._process = subprocess.Popen(
            self._args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().removeprefix("listening "))
        return self

    def __exit__(self, *exc: object) -> None:
        out, _ = self._process.communicate()
        self.counters = json.loads(out)


@dataclass(frozen=True)
class Subject:
    """A started pipeline and how a message for it is made, as its user would make one."""

    pipe: Any
    build: Callable[[int], Any]

    def offer_until_full(self, index: int, message: Any) -> tuple[int, Any]:
        """Offer fresh messages until one is refused; the next index and the refused message."""
        send, build, accepted = self.pipe.send, self.build, SendResult.ACCEPTED
        while send(message) is accepted:
            index += 1
            message = build(index)
        return index, message

    def drain(self, poll_s: float = 0.001, deadline_s: float = 30.0) -> None:
        """Wait until every accepted message has its outcome."""
        deadline = time.monotonic() + deadline_s
        while (stats := self.pipe.stats()).queued or stats.in_flight:
            if time.monotonic() > deadline:
                raise SystemExit(f"not drained after {deadline_s} s: {stats}")
            time.sleep(poll_s)


def _build_core(size: int) -> Callable[[int], Any]:
    message_type, entry_type, data = pipeline.Message, pipeline.Entry, b"x" * size

    def build(index: int) -> Any:
        return message_type(
            type=MessageType.APP,
            to=PEER_ID,
            from_=MEMBER_ID,
            term=TERM,
            log_term=TERM,
            index=index,
            entries=(entry_type(term=TERM, index=index + 1, data=data),),
            commit=index,
        )

    return build


def _build_again(size: int) -> Callable[[int], Any]:
    message = _build_core(size)(1)
    return lambda index: message


def _build_protobuf(size: int) -> Callable[[int], Any]:
    # Imported here: only the baseline's process pays for protobuf.
    from pipeline.raftpb import raft_pb2

    message_type, data = raft_pb2.Message, b"x" * size

    def build(index: int) -> Any:
        message = message_type(
            type=MessageType.APP,
            to=PEER_ID,
            term=TERM,
            logTerm=TERM,
            index=index,
            commit=index,
            **{"from": MEMBER_ID},
        )
        message.entries.add(Term=TERM, Index=index + 1, Data=data)
        return message

    return build


def builder(name: str, size: int) -> Callable[[int], Any]:
    """How the subject ``name`` makes the MsgApp of a given index, one entry of ``size`` bytes."""
    makers = {"core": _build_core, "core-prebuilt": _build_again, "baseline": _build_protobuf}
    return makers[name](size)


@contextmanager
def running(
    name: str, port: int, size: int = 128, *, credentials: Credentials | None = None
) -> Iterator[Subject]:
    """Start the subject ``name`` against the sink at ``port``; entries carry ``size`` bytes.

    ``core`` and ``baseline`` make a new message for every send; ``core-prebuilt`` offers one
    message again and again, which leaves the cost of sending alone. With ``credentials``, which
    the baseline does not take, they send over TLS.
    """
    if name == "baseline":
        from baseline import BaselinePipeline

        kind: type[Any] = BaselinePipeline
    else:
        kind = pipeline.Pipeline
    pipe = kind(
        PEER_ID,
        [f"{'https' if credentials else 'http'}://127.0.0.1:{port}"],
        QuietRaft(),
        member_id=MEMBER_ID,
        cluster_id=CLUSTER_ID,
        **({"credentials": credentials} if credentials else {}),
    )
    pipe.start()
    try:
        yield Subject(pipe, builder(name, size))
    finally:
        pipe.stop()


class Pacer:
    """Sleeps of the length in which about two thirds of msgc drain.

    The producer must neither poll, which would be charged to the subject, nor let the queue run
    empty. The length follows what the last sleep made room for, by one rule for all subjects.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._low, self._high = capacity // 2, capacity * 5 // 6
        self._pause_s = 200e-6

    def __call__(self, accepted: int) -> None:
        if accepted > self._high:
            self._pause_s = max(self._pause_s * 0.9, 20e-6)
        elif accepted < self._low:
            self._pause_s *= 1.1
        time.sleep(self._pause_s)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p10, p50, p90, p99, p999 and max by rank; ``values`` in any order, not empty."""
    ranked = sorted(values)
    last = len(ranked) - 1
    named = {"p10": 0.10, "p50": 0.50, "p90": 0.90, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {name: ranked[round(share * last)] for name, share in named.items()}


class Load(enum.Enum):
    """What a receiver is given: its messages, and over how many connections."""

    SMALL = "MsgApp-128B"
    LARGE = "MsgSnap-64MiB"

    @property
    def connections(self) -> int:
        return 4 if self is Load.SMALL else 1

    def body(self) -> bytes:
        if self is Load.SMALL:
            encoded: bytes = _build_core(128)(1).marshal()
        else:
            snapshot = pipeline.Snapshot(
                data=bytes(64 << 20), metadata=pipeline.SnapshotMetadata(index=1, term=TERM)
            )
            message = pipeline.Message(
                type=MessageType.SNAP, to=PEER_ID, from_=MEMBER_ID, snapshot=snapshot
            )
            encoded = message.marshal()
        return encoded


def receive(subject: str, load: Load, seconds: float) -> dict[str, Any]:
    """Send ``load`` to a fresh receiving process; what it took there, and how fast it went.

    ``peak_mib`` is the receiver's peak memory above what it had before the first message.
    """
    command = (
        [str(BIN / "sink")]
        if subject == "bare-c"
        else [sys.executable, str(HERE / "receive.py"), subject]
    )
    with (
        tempfile.NamedTemporaryFile() as body,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as receiver,
    ):
        body.write(load.body())
        body.flush()
        assert receiver.stdout is not None
        port = receiver.stdout.readline().removeprefix("listening ").strip()
        sender = subprocess.run(
            [
                str(BIN / "bare_sender"), "--port", port, "--body", body.name,
                "--connections", str(load.connections), "--seconds", str(seconds),
                "--warmup", "200" if load is Load.SMALL else "1",
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        sent = json.loads(sender.stdout)
        out, _ = receiver.communicate()
    result = json.loads(out)
    if subject == "bare-c":
        total = result["requests"]
        result = {"total": total, "cpu_us_per_message": result["cpu_s"] * 1e6 / total}
    if result["total"] != sent["total"]:
        raise SystemExit(f"{subject}: {sent['total']} sent, {result['total']} received")
    return {**result, "messages_per_s": sent["messages_per_s"]}


def machine() -> dict[str, Any]:
    """Where a figure was measured; part of every result."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "version": pipeline.__version__,
        # make bench builds with the variables it runs with; see setup.py for the modes.
        "build": " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("PIPELINE_"))
        or "release",
    }
