"""Snapshots: 1 GiB by the channel beside a bare ``sendfile``, and 64 MiB MsgSnaps by the pipeline.

``make bench-snapshot`` prints a table and writes results/snapshot.json. Each measurement has a
sending process and a reading one of its own; the subjects take turns within a round, and a ratio is
taken within it. The reader receives into 1 MiB and forgets, and answers 204; over TLS it decrypts.
The file has been written just before, so it is read from memory, not from a disk.

bare      a blocking socket and ``os.sendfile``; over TLS ``read`` and ``sendall``
channel   ``Transport.send_snapshot`` of the path
chunks    the same of an iterator of 1 MiB chunks
pipeline  sixteen MsgSnaps of 64 MiB, from memory, one after the other
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from harness import CLUSTER_ID, HERE, MEMBER_ID, PEER_ID, TERM, QuietRaft, machine, say
from pytest_benchmark.fixture import BenchmarkFixture
from quiet import PATIENCE_HELP, Watch, remark
from report import put_into

from pipeline import (
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
    SnapshotStatus,
    TLSInfo,
    Transport,
    TransportConfig,
)

GIB = 1 << 30
PIPELINE_BYTES = 64 << 20
CHUNK = 1 << 20
Runs = dict[str, list[dict[str, Any]]]
SUBJECTS = ("bare", "channel", "chunks", "pipeline")
HEAD = b"POST /raft/snapshot HTTP/1.1\r\nHost: reader\r\nContent-Length: %d\r\n\r\n"


def read_and_forget(directory: Path, *, is_tls: bool) -> None:
    """Serve connections until stdin ends; the port is printed first."""
    context = None
    if is_tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "node.pem")
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=read_one, args=(sock, context), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def read_one(sock: socket.socket, context: ssl.SSLContext | None) -> None:
    """Read requests of one connection; one that breaks off is not answered, and so noticed."""
    if context is not None:
        sock = context.wrap_socket(sock, server_side=True)
    buffer = bytearray(CHUNK)
    while n := sock.recv_into(buffer):
        head, _, begun = bytes(buffer[:n]).partition(b"\r\n\r\n")
        left = int(head.lower().rpartition(b"content-length: ")[2]) - len(begun)
        while left > 0:
            n = sock.recv_into(buffer, min(left, CHUNK))
            if n == 0:
                return
            left -= n
        sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
    sock.close()


class Raft(QuietRaft):
    """Counts the snapshots that have ended."""

    def __init__(self) -> None:
        self.ended = threading.Semaphore(0)
        self.statuses: list[SnapshotStatus] = []

    def report_snapshot(self, member_id: int, status: object) -> None:
        assert isinstance(status, SnapshotStatus)
        self.statuses.append(status)
        self.ended.release()


def message(data: bytes | None = None) -> Message:
    snapshot = Snapshot(data=data, metadata=SnapshotMetadata(index=1, term=TERM))
    return Message(type=MessageType.SNAP, to=PEER_ID, from_=MEMBER_ID, term=TERM, snapshot=snapshot)


def send_bare(directory: Path, port: int, *, is_tls: bool) -> Callable[[], None]:
    def send() -> None:
        with (
            (directory / "db").open("rb", buffering=0) as file,
            socket.create_connection(("127.0.0.1", port)) as plain,
        ):
            sock: socket.socket = plain
            if is_tls:
                context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
                sock = context.wrap_socket(plain, server_hostname="127.0.0.1")
            sock.sendall(HEAD % GIB)
            if is_tls:
                buffer = memoryview(bytearray(256 * 1024))
                while n := file.readinto(buffer):
                    sock.sendall(buffer[:n])
            else:
                offset = 0
                while offset < GIB:
                    offset += os.sendfile(sock.fileno(), file.fileno(), offset, 1 << 24)
            assert sock.recv(100).startswith(b"HTTP/1.1 204 ")

    return send


def send_by_transport(
    subject: str, directory: Path, transport: Transport, raft: Raft
) -> Callable[[], None]:
    def channel() -> None:
        transport.send_snapshot(message(), directory / "db").result()

    def chunks() -> None:
        with (directory / "db").open("rb", buffering=0) as file:
            pieces = iter(lambda: file.read(CHUNK), b"")
            transport.send_snapshot(message(), pieces, size=GIB).result()

    large = message(bytes(PIPELINE_BYTES)) if subject == "pipeline" else message()

    def by_pipeline() -> None:
        for _ in range(GIB // PIPELINE_BYTES):
            transport.send([large])
            raft.ended.acquire()

    return {"channel": channel, "chunks": chunks, "pipeline": by_pipeline}[subject]


def memory_kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])


def send(subject: str, directory: Path, port: int, *, is_tls: bool) -> dict[str, float]:
    """Send 1 GiB as ``subject``; what it took."""
    files = directory / "node.pem"
    info = TLSInfo(
        cert_file=files, key_file=files, trusted_ca_file=directory / "ca.pem"
    ) if is_tls else None  # fmt: skip
    raft = Raft()
    with contextlib.ExitStack() as stack:
        if subject == "bare":
            run = send_bare(directory, port, is_tls=is_tls)
        else:
            config = TransportConfig(streams=False, probe_interval_s=0)
            transport = Transport(MEMBER_ID, CLUSTER_ID, raft, tls=info, config=config)
            stack.enter_context(transport)
            transport.add_peer(PEER_ID, [f"http{'s' * is_tls}://127.0.0.1:{port}"])
            run = send_by_transport(subject, directory, transport, raft)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, proc(5)
        resident_kib = memory_kib("VmRSS")
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        run()
        took_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        growth_kib = memory_kib("VmHWM") - resident_kib
    if SnapshotStatus.FAILURE in raft.statuses:
        raise SystemExit(f"{subject}: not delivered")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "mb_per_s": GIB / took_s / 1e6,
        "cpu_s_per_gib": cpu_s,
        "peak_growth_mib": growth_kib / 1024,
    }


def measure(subject: str, directory: Path, *, is_tls: bool) -> dict[str, Any]:
    """Run one measurement in two fresh processes."""
    options = [str(directory), *(["--tls"] if is_tls else [])]
    command = [sys.executable, __file__]
    with subprocess.Popen(
        [*command, "read", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        port = reader.stdout.readline().strip()
        sent = subprocess.run(
            [*command, subject, *options, "--port", port],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        reader.communicate()
    result: dict[str, Any] = json.loads(sent.stdout)
    return result


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """A directory with the file to be sent, and a certificate."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(directory / "ca.pem")
        ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
            directory / "node.pem"
        )
        with (directory / "db").open("wb") as file:
            for _ in range(GIB // CHUNK):
                file.write(os.urandom(CHUNK))
        yield directory


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with prepared() as directory:
        yield directory


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
def test_a_gib_of_snapshots_is_sent(
    benchmark: BenchmarkFixture, directory: Path, subject: str, is_tls: bool
) -> None:
    results: list[dict[str, Any]] = []
    benchmark.pedantic(lambda: results.append(measure(subject, directory, is_tls=is_tls)), rounds=2)
    for key in results[0]:
        benchmark.extra_info[key] = statistics.median(result[key] for result in results)


def run_rounds(rounds: int, watch: Watch) -> Runs:
    """Every subject, plain and over TLS, in turn: ``<subject>, plain`` -> one result per round."""
    runs: Runs = {}
    with prepared() as directory:
        for n in range(rounds):
            for subject, is_tls in itertools.product(SUBJECTS, (False, True)):
                name = f"{subject}, {'TLS' if is_tls else 'plain'}"
                say(f"round {n + 1} of {rounds}: {name}")
                result = watch.run(partial(measure, subject, directory, is_tls=is_tls))
                runs.setdefault(name, []).append(result)
    say("")
    return runs


def table(runs: Runs) -> str:
    lines = [
        "| 1 GiB | MB/s | of bare | CPU s | of bare | peak memory above |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, results in runs.items():
        bare = runs[f"bare, {name.partition(', ')[2]}"]
        rate, cpu, peak = (
            statistics.median(each[key] for each in results)
            for key in ("mb_per_s", "cpu_s_per_gib", "peak_growth_mib")
        )
        of_rate, of_cpu = (
            statistics.median(
                one[key] / other[key] for one, other in zip(results, bare, strict=True)
            )
            for key in ("mb_per_s", "cpu_s_per_gib")
        )
        lines.append(
            f"| {name} | {rate:,.0f} | {of_rate:.0%} | {cpu:.2f} | {of_cpu:.2f} | {peak:.1f} MiB |"
        )
    return "\n".join(lines)


def report(rounds: int, patience_s: float, out: Path, page: Path | None) -> None:
    """Run the rounds, keep them in ``out``, print the table; put it into ``page``, too."""
    when, where = datetime.now(UTC).isoformat(timespec="seconds"), machine()
    runs = run_rounds(rounds, Watch(patience_s))
    result = {"when": when, "machine": where, "rounds": rounds, "runs": runs}
    out.write_text(json.dumps(result, indent=1) + "\n")
    about = (
        f"{where['cpu']}, {where['cores']} cores, {where['python']}; median of {rounds} "
        f"interleaved rounds; {when}; `make bench-snapshot`"
    )
    disturbed = remark([run for each in runs.values() for run in each])
    text = "\n\n".join(filter(None, (table(runs), about, disturbed)))
    print(text)
    if page:
        put_into(page, f"\n{text}\n", "bench-snapshot")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", choices=(*SUBJECTS, "read", "report"), nargs="?")
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--port", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=300.0, help=PATIENCE_HELP)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "snapshot.json")
    parser.add_argument("--into", type=Path, help="put the table into this file as well")
    args = parser.parse_args()
    if args.subject in (None, "report"):
        report(args.rounds, args.patience, args.out, args.into)
    elif args.subject == "read":
        read_and_forget(args.directory, is_tls=args.tls)
    else:
        print(json.dumps(send(args.subject, args.directory, args.port, is_tls=args.tls)))


if __name__ == "__main__":
    main()
