"""Measure one subject once, in a process of its own, and print one JSON object.

``getrusage`` counts a whole process, so each measurement of each subject gets a fresh one;
``report.py`` starts them in turn. Modes:

rate  the main thread offers until QUEUE_FULL, then sleeps; CPU of the whole process
spin  the same, but instead of sleeping the main thread computes in Python and never rests
busy  as ``rate``, with a clock around every ``send`` (P5, loop awake)
lone  one message at a time to an idle pipeline: time in ``send`` (P5, loop asleep) and the
      moments of the offers, which are compared with the sink's stamps (P10)
peer  as ``rate``, with the peak of memory above the payload; then snapshots one at a time, each
      timed from ``send`` to ``report_snapshot``
work  a fixed piece of Python work in the main thread, timed alone and beside the pipeline at full
      rate; ``bare-c`` is beside bare C in a process of its own, which shares the cores and no GIL
threads  ``--threads`` Python threads, each of which does some 30 us of Python work for a message,
      makes it and offers it, as a node of several Raft groups may; for an interpreter without a GIL
      beside one with

With ``--port 0`` a sink is started for it.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from harness import (
    BIN,
    SUBJECTS,
    Pacer,
    QuietRaft,
    Sink,
    Subject,
    add_tls_options,
    cpu_s,
    credentials_of,
    forget_peak,
    quantiles,
    running,
    snapshots,
    status_kib,
)

from pipeline import SendResult, SnapshotStatus

WARMUP_S = 0.3
#: Iterations of the piece of work between two bursts: about 30 us of bytecode, in which at
#: 100,000 messages a second three of 64 queued messages leave.
SPIN_ITERATIONS = 1000
LONE_MESSAGES = 1000
#: Iterations of ``work``: about 0.3 ms, less than 64 queued messages last at full rate.
WORK_ITERATIONS = 10_000
#: Alone and beside the load in turn, so that a machine that changes its speed does so for both.
WORK_TURNS = 5
#: An I/O thread that is not asleep after this long would burn CPU for an idle peer.
LONE_PAUSE_S = 0.002
#: Upper bounds of the histogram of ``send``, in ns.
BUCKETS_NS = (
    100,
    200,
    300,
    400,
    500,
    750,
    1000,
    1500,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
    1_000_000,
)


def spin(accepted: int, iterations: int = SPIN_ITERATIONS) -> None:
    """A fixed piece of Python work: bytecode that holds the GIL and calls nothing."""
    x = accepted
    for i in range(iterations):
        x ^= i


def feed(subject: Subject, seconds: float, between: Callable[[int], None]) -> None:
    """Offer until full, then ``between``, for ``seconds``."""
    index, message = 1, subject.build(1)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        before = index
        index, message = subject.offer_until_full(index, message)
        between(index - before)


def measure_rate(
    subject: Subject, seconds: float, between: Callable[[int], None]
) -> dict[str, Any]:
    feed(subject, WARMUP_S, between)
    # The queue is as full at the end as it is here, so the clock counts answered messages.
    start, start_cpu, start_sent = time.perf_counter(), cpu_s(), subject.pipe.stats().sent
    feed(subject, seconds, between)
    sent = subject.pipe.stats().sent - start_sent
    took, took_cpu = time.perf_counter() - start, cpu_s() - start_cpu
    return {
        "messages": sent,
        "seconds": took,
        "messages_per_s": sent / took,
        "cpu_us_per_message": took_cpu * 1e6 / max(sent, 1),
    }


def measure_threads(subject: Subject, seconds: float, count: int) -> dict[str, Any]:
    is_over = threading.Event()

    def work() -> None:
        index, send, build = 1, subject.pipe.send, subject.build
        while not is_over.is_set():
            spin(index)
            send(build(index))
            index += 1

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(WARMUP_S)
    before, start, start_cpu = subject.pipe.stats(), time.perf_counter(), cpu_s()
    time.sleep(seconds)
    after, took, took_cpu = subject.pipe.stats(), time.perf_counter() - start, cpu_s() - start_cpu
    is_over.set()
    for thread in threads:
        thread.join()
    sent = after.sent - before.sent
    return {
        "offered_per_s": (after.offered - before.offered) / took,
        "messages_per_s": sent / took,
        "cpu_us_per_message": took_cpu * 1e6 / max(sent, 1),
    }


def measure_peer(subject: Subject, raft: QuietRaft, args: argparse.Namespace) -> dict[str, Any]:
    rss_kib = status_kib("VmRSS")  # the payload is there already
    forget_peak()
    result = measure_rate(subject, args.seconds, Pacer(args.size))
    subject.drain()
    above_kib = status_kib("VmHWM") - rss_kib
    while not raft.finished.empty():  # those of the run, if it was of snapshots
        raft.finished.get()
    message = snapshots(args.subject, args.size)(1)
    clock, send, finished = time.perf_counter_ns, subject.pipe.send, raft.finished
    times_ns = []
    for _ in range(args.lone):
        start_ns = clock()
        if send(message) is not SendResult.ACCEPTED:
            raise SystemExit("a lone snapshot was refused")
        if finished.get(timeout=30) is not SnapshotStatus.FINISH:
            raise SystemExit("a lone snapshot was not delivered")
        times_ns.append(clock() - start_ns)
    return {**result, "rss_above_payload_mb": above_kib * 1024 / 1e6, "lone_ns": times_ns}


def time_work(seconds: float, before: Callable[[], None]) -> list[int]:
    """Times of the fixed piece of work, in ns; ``before`` is called before each and not timed."""
    clock, times_ns = time.perf_counter_ns, []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        before()
        start_ns = clock()
        spin(0, WORK_ITERATIONS)
        times_ns.append(clock() - start_ns)
    return times_ns


def compare_work(alone_ns: list[int], loaded_ns: list[int]) -> dict[str, Any]:
    mean_alone, mean_loaded = statistics.fmean(alone_ns), statistics.fmean(loaded_ns)
    return {
        "alone_ns": {**quantiles(alone_ns), "mean": mean_alone},
        "loaded_ns": {**quantiles(loaded_ns), "mean": mean_loaded},
        "slow_down": mean_loaded / mean_alone,
    }


def measure_work(subject: Subject, seconds: float) -> dict[str, Any]:
    index, message = 1, subject.build(1)
    alone_ns: list[int] = []
    loaded_ns: list[int] = []
    messages = loaded_s = 0.0

    def fill() -> None:
        nonlocal index, message
        index, message = subject.offer_until_full(index, message)

    for _ in range(WORK_TURNS):
        subject.drain()
        alone_ns += time_work(seconds / WORK_TURNS / 2, lambda: None)
        start, start_sent = time.perf_counter(), subject.pipe.stats().sent
        loaded_ns += time_work(seconds / WORK_TURNS, fill)
        messages += subject.pipe.stats().sent - start_sent
        loaded_s += time.perf_counter() - start
    return {**compare_work(alone_ns, loaded_ns), "messages_per_s": messages / loaded_s}


def measure_work_beside_c(port: int, seconds: float) -> dict[str, Any]:
    alone_ns: list[int] = []
    loaded_ns: list[int] = []
    sent = []
    turn_s = max(seconds / WORK_TURNS, 0.2)
    for _ in range(WORK_TURNS):
        alone_ns += time_work(turn_s / 2, lambda: None)
        command = [BIN / "bare_sender", "--port", str(port), "--seconds", str(turn_s)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
            time.sleep(0.05)  # until it has connected
            loaded_ns += time_work(turn_s - 0.1, lambda: None)
            sent.append(json.loads(sender.communicate()[0]))
    return {
        **compare_work(alone_ns, loaded_ns),
        "messages_per_s": statistics.fmean(each["messages_per_s"] for each in sent),
        "total": sum(each["total"] for each in sent),
    }


def clock_cost_ns() -> float:
    """Median of an empty pair of clock readings, taken off every timed ``send``."""
    clock = time.perf_counter_ns
    return quantiles([-(clock() - clock()) for _ in range(10_000)])["p50"]


def describe(times_ns: list[int]) -> dict[str, Any]:
    cost = clock_cost_ns()
    net = [max(t - cost, 0.0) for t in times_ns]
    histogram = [0] * (len(BUCKETS_NS) + 1)
    for t in net:
        histogram[bisect.bisect_left(BUCKETS_NS, t)] += 1
    return {
        "samples": len(net),
        "clock_cost_ns": cost,
        "send_ns": quantiles(net),
        "buckets_ns": BUCKETS_NS,
        "histogram": histogram,
    }


def measure_busy(subject: Subject, seconds: float) -> dict[str, Any]:
    pacer = Pacer()
    feed(subject, WARMUP_S, pacer)
    send, build, clock, accepted = (
        subject.pipe.send,
        subject.build,
        time.perf_counter_ns,
        SendResult.ACCEPTED,
    )
    times_ns: list[int] = []
    deadline = time.perf_counter() + seconds
    index = 1
    while time.perf_counter() < deadline:
        before = index
        while True:
            message = build(index)
            t0 = clock()
            result = send(message)
            t1 = clock()
            if result is not accepted:
                break
            times_ns.append(t1 - t0)
            index += 1
        pacer(index - before)
    return describe(times_ns)


def measure_lone(subject: Subject) -> dict[str, Any]:
    send, build, clock, wall = (
        subject.pipe.send,
        subject.build,
        time.perf_counter_ns,
        time.time_ns,
    )
    times_ns, offers_ns = [], []
    for index in range(1, LONE_MESSAGES + 1):
        subject.drain()
        time.sleep(LONE_PAUSE_S)
        message = build(index)
        offered_ns = wall()
        t0 = clock()
        result = send(message)
        t1 = clock()
        if result is not SendResult.ACCEPTED:
            raise SystemExit(f"an idle pipeline answered {result!r}")
        times_ns.append(t1 - t0)
        offers_ns.append(offered_ns)
    return {**describe(times_ns), "offers_ns": offers_ns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=(*SUBJECTS, "bare-c"))
    parser.add_argument("mode", choices=("rate", "spin", "busy", "lone", "peer", "work", "threads"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", type=int, default=128, help="bytes in the one entry")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--lone", type=int, default=200, help="messages one at a time (peer)")
    parser.add_argument("--threads", type=int, default=1, help="that offer (threads)")
    add_tls_options(parser)
    args = parser.parse_args()
    if args.subject == "bare-c":
        if args.mode != "work":
            parser.error("bare-c has only the mode work")
        print(json.dumps(measure_work_beside_c(args.port, args.seconds)))
        return
    raft = QuietRaft()
    credentials = credentials_of(args)
    with ExitStack() as stack:
        port = args.port or stack.enter_context(Sink()).port
        subject = stack.enter_context(
            running(args.subject, port, args.size, raft, credentials=credentials)
        )
        if args.mode == "lone":
            result = measure_lone(subject)
        elif args.mode == "busy":
            result = measure_busy(subject, args.seconds)
        elif args.mode == "peer":
            result = measure_peer(subject, raft, args)
        elif args.mode == "work":
            result = measure_work(subject, args.seconds)
        elif args.mode == "threads":
            result = measure_threads(subject, args.seconds, args.threads)
        else:
            between = spin if args.mode == "spin" else Pacer()
            result = measure_rate(subject, args.seconds, between)
        subject.drain()
        stats = subject.pipe.stats()
    # A figure of a run in which messages were lost means nothing.
    if stats.failed or stats.dropped:
        raise SystemExit(f"messages were lost: {stats}")
    print(json.dumps({**result, "total": stats.sent}))


if __name__ == "__main__":
    main()
