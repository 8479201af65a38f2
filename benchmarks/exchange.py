"""One run of one subject for ``compare.py``: sending, receiving, or both, plain or over TLS."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from harness import (
    BIN,
    HERE,
    RUN_TIMEOUT_S,
    SNAPSHOT_BYTES,
    Listening,
    Sink,
    bare_sender,
    body_bytes,
    builder,
    quantiles,
    receiving,
    run_json,
    tls_flags,
)
from peers.clients import SUBJECTS as CLIENTS

Row = dict[str, Any]

CLIENTS_PY = HERE / "peers" / "clients.py"
STREAMS_PY = HERE / "streams.py"
OURS, ETCD, BARE, BARE_THREADS = "ours", "etcd", "bare-c", "bare-c-threads"
#: As ``ours``, but with a new ``Message`` for each ``send``. The Go program offers one message
#: again and again, as everyone else here does, so ``ours`` is what is compared with it.
OURS_ANEW = "ours-anew"
#: Receiving, ``ours`` calls ``process``; here the main thread, or a task of its loop, takes from
#: an inbox.
INBOXES = INBOX, INBOX_ASYNCIO, INBOX_UVLOOP = ("inbox", "inbox-asyncio", "inbox-uvloop")
#: By streams: ``EncodedMessage``s of bytes that are there already.
OURS_ENCODED = "ours-encoded"
#: The same while another process computes, and not the main thread of the one that receives.
BESIDE = "beside-a-process"
FIGURES = (
    "msgs_per_s",
    "cpu_us_per_msg",
    "receiver_cpu_us_per_msg",
    "p50_us",
    "p99_us",
    "rss_above_payload_mb",
)


def lone_messages(size: int) -> int:
    """How many are sent one at a time for the latencies: what takes about 0.1 s."""
    return max(4, min(300, (256 << 20) // size))


def connections(size: int) -> int:
    """Of the load. Two large bodies at once would hide what a receiver needs beside one."""
    return 4 if size <= SNAPSHOT_BYTES else 1


def warmup(size: int) -> int:
    """Messages of bare C before those that count."""
    return 200 if size < SNAPSHOT_BYTES else 2


def row(result: Row, lone_ns: Sequence[float], above_mb: float) -> Row:
    """The figures of one round, by the names of ``FIGURES``."""
    lone = quantiles(lone_ns)
    return {
        "msgs_per_s": result["messages_per_s"],
        "cpu_us_per_msg": result["cpu_us_per_message"],
        "p50_us": lone["p50"] / 1000,
        "p99_us": lone["p99"] / 1000,
        "rss_above_payload_mb": above_mb,
        "messages": result["messages"],
    }


def expect(subject: str, sent: int, counters: Row) -> None:
    """What the other side counted must be what was sent: lost messages make no figure."""
    received = counters.get("requests", counters.get("total"))
    if received != sent or counters.get("bad"):
        raise SystemExit(f"{subject}: {sent} sent, the other side counted {counters}")


def from_go(result: Row) -> Row:
    return {figure: result[figure] for figure in (*FIGURES, "messages") if figure in result}


def go_sender(port: int, size: int, *, tls: bool) -> list[object]:
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    flags = tls_flags() if tls else []
    return [BIN / "etcd", "send", "--url", url, "--body", body_bytes(size), *flags]


def driver(name: str, mode: str, port: int, size: int, *, tls: bool) -> list[object]:
    flags = tls_flags() if tls else []
    return [sys.executable, HERE / "driver.py", name, mode, "--port", port, "--size", size, *flags]


def send_to(
    subject: str, port: int, size: int, seconds: float, *, tls: bool = False
) -> tuple[Row, int]:
    """Send as ``subject`` to whoever listens at ``port``: the figures, and how many it sent."""
    wire_bytes, lone = body_bytes(size), lone_messages(size)
    timing = ("--seconds", seconds, "--lone", lone)
    if subject == ETCD:
        result = run_json(*go_sender(port, size, tls=tls), *timing)
        return from_go(result), result["total"]
    if subject in (BARE, BARE_THREADS):
        bare = [*bare_sender(tls=tls), "--port", port, "--size", wire_bytes]
        threads = ["--threads"] if subject == BARE_THREADS else []
        result = run_json(*bare, *threads, "--seconds", seconds, "--warmup", warmup(size))
        alone = run_json(*bare, "--connections", 1, "--messages", lone, "--warmup", 0, "--times")
        above_mb = (result["peak_kib"] * 1024 - wire_bytes) / 1e6
        return row(result, alone["exchange_ns"], above_mb), result["total"] + alone["total"]
    if subject in CLIENTS:
        command = [sys.executable, CLIENTS_PY, subject, "--port", port, "--size", wire_bytes]
    else:
        name = {OURS: "core-prebuilt", OURS_ANEW: "core", "urllib3": "baseline"}[subject]
        command = driver(name, "peer", port, size, tls=tls)
    result = run_json(*command, *timing)
    return row(result, result["lone_ns"], result["rss_above_payload_mb"]), result["total"]


def receiver(subject: str, *flags: str, tls: bool = False) -> Listening:
    if subject == ETCD:
        return Listening(BIN / "etcd", "receive", *(tls_flags() if tls else []))
    return Listening(*receiving("core" if subject == OURS else subject, tls=tls), *flags)


def used(counters: Row, messages: int) -> tuple[float, float]:
    """CPU in us for each message, and peak of memory in MB, of a receiver of any kind."""
    cpu_us = counters["cpu_s"] * 1e6 / messages
    if "peak_kib" in counters:  # the C sink
        return cpu_us, counters["peak_kib"] * 1024 / 1e6
    if "peak_mb" in counters:  # the Go program
        return cpu_us, counters["peak_mb"]
    return cpu_us, counters["peak_mib"] * (1 << 20) / 1e6


@contextmanager
def load(port: int, size: int, *, tls: bool) -> Iterator[list[object]]:
    """The command that posts messages of ``size`` to a receiver; their body is a file meanwhile."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(builder("core", size)(100_000).marshal())
        body.flush()
        yield [*bare_sender(tls=tls), "--port", port, "--body", body.name]


def run_send(subject: str, size: int, seconds: float, *, tls: bool = False) -> Row:
    is_grpc = subject == "grpcio"
    sink = Listening(sys.executable, CLIENTS_PY, "grpcio-sink") if is_grpc else Sink(tls=tls)
    with sink:
        result, total = send_to(subject, sink.port, size, seconds, tls=tls)
    expect(subject, total, sink.counters)
    return result


def run_receive(subject: str, size: int, seconds: float, *, tls: bool = False) -> Row:
    with receiver(subject, tls=tls) as listening, load(listening.port, size, tls=tls) as post:
        at_rate = ("--connections", connections(size), "--seconds", seconds)
        sent = run_json(*post, *at_rate, "--warmup", warmup(size))
        one_by_one = ("--connections", 1, "--messages", lone_messages(size))
        alone = run_json(*post, *one_by_one, "--warmup", 0, "--times")
    total = sent["total"] + alone["total"]
    expect(subject, total, listening.counters)
    cpu_us, peak_mb = used(listening.counters, total)
    # The C sink throws bodies away as they come; the others hold one for each connection.
    above_mb = peak_mb - (0 if subject == BARE else connections(size) * size / 1e6)
    return row({**sent, "cpu_us_per_message": cpu_us}, alone["exchange_ns"], above_mb)


def run_both(subject: str, size: int, seconds: float) -> Row:
    """``subject`` into itself: its rate, and the CPU of both processes for each message."""
    with receiver(subject) as listening:
        result, total = send_to(subject, listening.port, size, seconds)
    expect(subject, total, listening.counters)
    cpu_us, peak_mb = used(listening.counters, total)
    above_mb = result["rss_above_payload_mb"] + peak_mb
    return {
        **result,
        "cpu_us_per_msg": result["cpu_us_per_msg"] + cpu_us,
        "rss_above_payload_mb": above_mb,
    }


# Beside a thread that computes all the time only the rate says anything: that thread's CPU is in
# the process's.


def run_send_spinning(subject: str, size: int, seconds: float, *, tls: bool) -> Row:
    with Sink(tls=tls) as sink:
        if subject == BARE:
            command = [*bare_sender(tls=tls), "--port", sink.port, "--size", body_bytes(size)]
            command.append("--spin")
        else:
            command = driver("core-prebuilt", "spin", sink.port, size, tls=tls)
        result = run_json(*command, "--seconds", seconds)
    expect(subject, result["total"], sink.counters)
    return {"msgs_per_s": result["messages_per_s"], "messages": result["messages"]}


def run_receive_spinning(subject: str, size: int, seconds: float, *, tls: bool) -> Row:
    with (
        receiver(subject, "--spin", tls=tls) as listening,
        load(listening.port, size, tls=tls) as post,
    ):
        sent = run_json(*post, "--seconds", seconds, "--warmup", warmup(size))
    expect(subject, sent["total"], listening.counters)
    return {"msgs_per_s": sent["messages_per_s"], "messages": sent["messages"]}


# Streams: two members in two processes, each of which listens and dials the other.


def lead(follower: Listening, command: Sequence[object], url: str) -> Row:
    """Run a leader beside a started follower, and tell each where the other is."""
    words = [str(word) for word in (*command, "--peer", url.format(follower.port))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        try:
            if line := leader.stdout.readline():
                follower.tell(url.format(int(line.removeprefix("listening "))))
            out, _ = leader.communicate(timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            leader.kill()
            raise SystemExit(f"not done after {RUN_TIMEOUT_S} s: {' '.join(words)}") from None
    if leader.returncode:
        raise SystemExit(f"failed with {leader.returncode}: {' '.join(words)}")
    result: Row = json.loads(out)
    return result


@contextmanager
def computing() -> Iterator[None]:
    """Have a process beside that computes all the time."""
    with subprocess.Popen([sys.executable, STREAMS_PY, "compute"], stdin=subprocess.PIPE) as beside:
        yield
        beside.communicate()


def run_streams(
    subject: str,
    size: int,
    seconds: float,
    *,
    kind: str = "msgapp",
    tls: bool = False,
    spins: bool = False,
) -> Row:
    """Exchange small messages by streams. CPU is the leader's, and the follower's by itself; the
    latencies are of lone messages, from the offer to the receipt.
    """
    program = [BIN / "etcd"] if subject == ETCD else [sys.executable, STREAMS_PY]
    flags = tls_flags() if tls else []
    if subject in (OURS_ENCODED, BESIDE):
        flags.append("--encoded")
    spin = ["--spin"] if spins and subject != BESIDE else []
    command = [*program, "lead", "--kind", kind, "--size", size, "--seconds", seconds, *flags]
    url = f"{'https' if tls else 'http'}://127.0.0.1:{{}}"
    with (
        computing() if subject == BESIDE else nullcontext(),
        Listening(*program, "follow", *flags, *spin) as follower,
    ):
        sent = lead(follower, command, url)
    received = follower.counters
    if (
        received["total"] != sent["total"]
        or received["messages"] != sent["messages"]
        or received["out_of_order"]
        or sent.get("posts")
        or received.get("posts")
    ):
        raise SystemExit(f"{subject}: {sent} sent, the other side counted {received}")
    result = {"msgs_per_s": sent["msgs_per_s"], "messages": sent["messages"]}
    if spins:  # that CPU would be in the process's
        return result
    return {
        **result,
        "cpu_us_per_msg": sent["cpu_us_per_msg"],
        "receiver_cpu_us_per_msg": received["cpu_us_per_msg"],
        "p50_us": received["p50_us"],
        "p99_us": received["p99_us"],
    }
