"""What every benchmark shares: the sink, the subjects, the message and the machine."""

from __future__ import annotations

import argparse
import atexit
import enum
import functools
import json
import os
import platform
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pipeline
from pipeline import MessageType, PipelineConfig, SendResult, TLSInfo
from pipeline.examples.certificates import Certificates
from pipeline.tls.credentials import Credentials

HERE = Path(__file__).resolve().parent
BIN = HERE / "bin"

MEMBER_ID = 0x8E9E05C52164694D
PEER_ID = 0xCE2A822CEA30BFCA
CLUSTER_ID = 0xCDF818194E3A8C32
TERM = 7

SUBJECTS = ("core", "core-prebuilt", "baseline")
#: No run takes a tenth of this; one that hangs must not hold up the rest.
RUN_TIMEOUT_S = 120.0
#: From this size on a message is a MsgSnap; appends are smaller (etcd's maxSizePerMsg).
SNAPSHOT_BYTES = 1 << 20


class QuietRaft:
    """A node that is told of failures and does nothing; the subjects count them.

    ``finished`` gets the status of each snapshot, which is how one message is awaited: what the Go
    program does with a channel.
    """

    def __init__(self) -> None:
        self.finished: queue.SimpleQueue[object] = queue.SimpleQueue()

    def process(self, message: object) -> None:
        raise AssertionError("a sender is given no messages")

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None:
        pass

    def report_snapshot(self, member_id: int, status: object) -> None:
        self.finished.put(status)


@functools.cache
def certificate() -> TLSInfo:
    """One certificate for everybody (ECDSA P-256) and its authority, for as long as we run."""
    directory = Path(tempfile.mkdtemp(prefix="raft-pipeline-bench-"))
    atexit.register(shutil.rmtree, directory)
    return Certificates(directory).issue("node", days=1)


def tls_flags() -> list[object]:
    """The words that make any of our programs speak mutual TLS with ``certificate``."""
    info = certificate()
    assert info.trusted_ca_file is not None
    return ["--cert", os.fsdecode(info.cert_file), "--ca", os.fsdecode(info.trusted_ca_file)]


def add_tls_options(parser: argparse.ArgumentParser) -> None:
    """Let a program in Python understand ``tls_flags``."""
    parser.add_argument("--cert", help="speak mutual TLS with this certificate and its key")
    parser.add_argument("--ca", help="who signed the other side's")


def tls_of(args: argparse.Namespace) -> TLSInfo | None:
    """What ``add_tls_options`` were given; None without them."""
    if args.cert is None:
        return None
    return TLSInfo(cert_file=args.cert, key_file=args.cert, trusted_ca_file=args.ca)


def credentials_of(args: argparse.Namespace) -> Credentials | None:
    """The same, loaded."""
    info = tls_of(args)
    return info and Credentials(info)


def bare_sender(*, tls: bool = False) -> list[object]:
    """The command of bare C that sends."""
    return [BIN / "bare_sender-tls", *tls_flags()] if tls else [BIN / "bare_sender"]


def posted(transport: pipeline.Transport, peer_id: int) -> int:
    """How many messages to a peer its pipeline has taken: what no stream carries."""
    books = [each.books for each in transport.peer_stats()[peer_id].streams if each.books]
    return transport.stats()[peer_id].accepted - sum(each.accepted for each in books)


class Listening:
    """A process that prints "listening PORT", and one JSON object when its stdin ends.

    A context manager; ``counters`` is that object once the block is left.
    """

    def __init__(self, *command: object) -> None:
        self._command = [str(word) for word in command]
        self.counters: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"ended at once: {' '.join(self._command)}")
        self.port = int(line.removeprefix("listening "))
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def __exit__(self, kind: object, *exc: object) -> None:
        out, _ = self._process.communicate()
        if kind is None:
            self.counters = json.loads(out)


class Sink(Listening):
    """The C sink, with what it is told ("--stamp", "--close", "--spin"). ``counters``: requests,
    body_bytes, connections, handshakes, gets, bad, cpu_s, peak_kib, and stamps_ns (arrival,
    CLOCK_REALTIME) with "--stamp".
    """

    def __init__(self, *flags: str, tls: bool = False) -> None:
        super().__init__(*sink(tls=tls), *flags)


def sink(*, tls: bool = False) -> list[object]:
    """The command of bare C that receives."""
    return [BIN / "sink-tls", *tls_flags()] if tls else [BIN / "sink"]


def run_json(*command: object) -> dict[str, Any]:
    """Run a program that prints one JSON object; it must succeed."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, check=False, stdout=subprocess.PIPE, text=True, timeout=RUN_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"not done after {RUN_TIMEOUT_S} s: {' '.join(words)}") from None
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}: {' '.join(words)}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def say(progress: str) -> None:
    """Show how far a run is: in place on a terminal, else a line each."""
    if sys.stderr.isatty():
        print(progress.ljust(78), end="\r", file=sys.stderr, flush=True)
    elif progress:
        print(progress, file=sys.stderr, flush=True)


def cpu_s() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def status_kib(name: str) -> int:
    """A line of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def forget_peak() -> None:
    """Make VmHWM count from here on; where the kernel refuses, it counts from the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


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


def _build_snapshot(size: int) -> Callable[[int], Any]:
    data = b"x" * size
    metadata = pipeline.SnapshotMetadata(index=1, term=TERM)

    def build(index: int) -> Any:
        return pipeline.Message(
            type=MessageType.SNAP,
            to=PEER_ID,
            from_=MEMBER_ID,
            term=TERM,
            snapshot=pipeline.Snapshot(data=data, metadata=metadata),
        )

    return build


def _build_protobuf_snapshot(size: int) -> Callable[[int], Any]:
    from pipeline.raftpb import raft_pb2

    message = raft_pb2.Message(type=MessageType.SNAP, to=PEER_ID, term=TERM, **{"from": MEMBER_ID})
    message.snapshot.data = b"x" * size
    message.snapshot.metadata.index, message.snapshot.metadata.term = 1, TERM
    # Encoded by a worker each time; made once, because protobuf copies what it is given.
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


def snapshots(name: str, size: int) -> Callable[[int], Any]:
    """How the subject ``name`` makes a MsgSnap of ``size`` bytes."""
    return _build_protobuf_snapshot(size) if name == "baseline" else _build_snapshot(size)


def builder(name: str, size: int) -> Callable[[int], Any]:
    """How the subject ``name`` makes the message of a given index, ``size`` bytes of payload.

    A MsgApp of one entry; from ``SNAPSHOT_BYTES`` on a MsgSnap.
    """
    if size >= SNAPSHOT_BYTES:
        return snapshots(name, size)
    makers = {"core": _build_core, "core-prebuilt": _build_again, "baseline": _build_protobuf}
    return makers[name](size)


def body_bytes(size: int) -> int:
    """The bytes on the wire of a message of ``size`` bytes of payload, the same for everyone."""
    encoded: int = builder("core", size)(100_000).byte_size()
    return encoded


@contextmanager
def running(
    name: str,
    port: int,
    size: int = 128,
    raft: QuietRaft | None = None,
    *,
    credentials: Credentials | None = None,
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
        raft or QuietRaft(),
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

    def __init__(self, size: int = 128) -> None:
        # Large messages meet the bound of bytes before the 64 of the count.
        capacity = max(1, min(64, PipelineConfig().queue_bytes // size))
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
    with tempfile.NamedTemporaryFile() as body, Listening(*receiving(subject)) as receiver:
        body.write(load.body())
        body.flush()
        sent = run_json(
            BIN / "bare_sender", "--port", receiver.port, "--body", body.name,
            "--connections", load.connections, "--seconds", seconds,
            "--warmup", 200 if load is Load.SMALL else 1,
        )  # fmt: skip
    result = receiver.counters
    if subject == "bare-c":
        total = result["requests"]
        result = {"total": total, "cpu_us_per_message": result["cpu_s"] * 1e6 / total}
    if result["total"] != sent["total"]:
        raise SystemExit(f"{subject}: {sent['total']} sent, {result['total']} received")
    return {**result, "messages_per_s": sent["messages_per_s"]}


def receiving(subject: str, *, tls: bool = False) -> list[object]:
    """The command of a process that receives as ``subject``; see ``Listening``."""
    if subject == "bare-c":
        return sink(tls=tls)
    return [sys.executable, HERE / "receive.py", subject, *(tls_flags() if tls else [])]


def commit() -> str:
    """The last commit that changed what is measured or how, and whether there are changes to it."""
    what = ("--", "setup.py", "pipeline", "benchmarks", ":!benchmarks/results", ":!*.md")
    try:
        last, changes = (
            subprocess.check_output(["git", *command, *what], cwd=HERE.parent, text=True)
            for command in (("log", "-1", "--format=%h"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):  # not a clone
        return "unknown"
    return last.strip() + ("-dirty" if changes else "")


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
        "commit": commit(),
        # make bench builds with the variables it runs with; see setup.py for the modes.
        "build": " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("PIPELINE_"))
        or "release",
    }
