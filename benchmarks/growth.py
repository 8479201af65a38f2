"""P9: what a message costs with more peers, more workers and other sizes: ``make bench-growth``.

peers    1 to 128 peers of one Transport, at the same total rate: CPU per message
idle     128 peers that had one message each: CPU and memory of one; over mutual TLS as well, and
         the memory of as many connections of others to a listener of ours
workers  1 to 64 connections of one pipeline, at full rate: CPU per message
sizes    messages of 64 B to 64 MiB, at full rate: CPU per message

Beside each curve stands bare C's, with as many connections and at full rate. Rounds, processes and
sinks are as in ``report.py``. Writes results/growth.json and results/growth.svg; ``--report`` draws
the chart anew from the file.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import svg
from driver import measure_rate
from exchange import OURS, expect, receiver
from harness import (
    BIN,
    CLUSTER_ID,
    HERE,
    MEMBER_ID,
    SNAPSHOT_BYTES,
    TERM,
    Pacer,
    QuietRaft,
    Sink,
    Subject,
    add_tls_options,
    body_bytes,
    builder,
    certificate,
    cpu_s,
    machine,
    run_json,
    say,
    status_kib,
    tls_flags,
    tls_of,
)
from quiet import PATIENCE_HELP, Watch, remark

from pipeline import (
    Entry,
    Message,
    MessageType,
    Pipeline,
    PipelineConfig,
    TLSInfo,
    Transport,
    TransportConfig,
)

PEERS = (1, 2, 4, 8, 16, 32, 64, 128)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
SIZES = tuple(64 << shift for shift in range(0, 21, 2))
IDLE_PEERS = 128
#: Long enough for one look at the clock and one sleep to be nothing among 128 peers.
IDLE_S = 2.0
#: Messages a second to all peers together: half of what one core sends.
RATE = 20_000
TICK_S = 0.001
WARMUP_S = 0.5

Row = dict[str, Any]


def message_to(peer: int) -> Message:
    return Message(
        type=MessageType.APP,
        to=peer,
        from_=MEMBER_ID,
        term=TERM,
        log_term=TERM,
        index=100_000,
        entries=(Entry(term=TERM, index=100_001, data=b"x" * 128),),
        commit=100_000,
    )


def url(port: int, tls: TLSInfo | None) -> str:
    return f"{'https' if tls else 'http'}://127.0.0.1:{port}"


def started(peers: int, port: int, tls: TLSInfo | None = None) -> Transport:
    """A Transport with peers 1 to ``peers``, all of them the sink; without probes."""
    transport = Transport(
        MEMBER_ID,
        CLUSTER_ID,
        QuietRaft(),
        config=TransportConfig(streams=False, probe_interval_s=0),
        tls=tls,
    )
    transport.start()
    for peer in range(1, peers + 1):
        transport.add_peer(peer, [url(port, tls)])
    return transport


def sent_by(transport: Transport) -> int:
    """Messages answered so far; none that was accepted may have been lost."""
    books = transport.stats().values()
    if any(each.failed or each.dropped for each in books):
        raise SystemExit("messages were lost")
    return sum(each.sent for each in books)


def offer_at_rate(transport: Transport, messages: Sequence[Message], seconds: float) -> None:
    """``RATE`` messages a second, to the peers in turn, in bursts of one tick."""
    each, n = round(RATE * TICK_S), 0
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        transport.send([messages[(n + i) % len(messages)] for i in range(each)])
        n += each
        # A tick that was missed is not made up for: one peer's queue would not hold the burst.
        now = time.perf_counter()
        due = max(due + TICK_S, now)
        time.sleep(due - now)


def finish(transport: Transport) -> int:
    while any(each.queued or each.in_flight for each in transport.stats().values()):
        time.sleep(0.001)
    total = sent_by(transport)
    transport.stop()
    return total


def run_peers(peers: int, port: int, seconds: float) -> Row:
    transport = started(peers, port)
    messages = [message_to(peer) for peer in range(1, peers + 1)]
    offer_at_rate(transport, messages, WARMUP_S)
    start, start_cpu_s, start_sent = time.perf_counter(), cpu_s(), sent_by(transport)
    offer_at_rate(transport, messages, seconds)
    took, took_cpu_s = time.perf_counter() - start, cpu_s() - start_cpu_s
    sent = sent_by(transport) - start_sent
    return {
        "messages_per_s": sent / took,
        "cpu_us_per_message": took_cpu_s * 1e6 / sent,
        "total": finish(transport),
    }


def settle(transport: Transport) -> None:
    """Wait until all is sent, and for what is tidied up after that."""
    while any(each.queued or each.in_flight for each in transport.stats().values()):
        time.sleep(0.01)
    time.sleep(WARMUP_S)


def run_idle(peers: int, port: int, seconds: float, tls: TLSInfo | None) -> Row:
    transport = started(1, port, tls)
    transport.send([message_to(1)])
    settle(transport)
    alone_kib = status_kib("VmRSS")
    for peer in range(2, peers + 1):
        transport.add_peer(peer, [url(port, tls)])
    transport.send([message_to(peer) for peer in range(2, peers + 1)])
    settle(transport)
    seconds = max(seconds, IDLE_S)
    kib, start_cpu_s = status_kib("VmRSS"), cpu_s()
    time.sleep(seconds)
    took_cpu_s = cpu_s() - start_cpu_s
    return {
        "cpu_us_per_peer_and_s": took_cpu_s * 1e6 / peers / seconds,
        "kib_per_peer": (kib - alone_kib) / (peers - 1),
        "total": finish(transport),
    }


def received_kib(connections: int, tls: TLSInfo) -> float:
    """By how much a listener of ours has grown while so many others are connected and silent."""
    context = ssl.create_default_context(cafile=tls.trusted_ca_file)
    context.load_cert_chain(os.fsdecode(tls.cert_file))
    body = message_to(1).marshal()
    head = (
        "POST /raft HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/protobuf\r\n"
        f"X-Etcd-Cluster-Id: {CLUSTER_ID:x}\r\nX-Server-From: {MEMBER_ID:x}\r\n"
        "X-Server-Version: 3.5.1\r\nX-Min-Cluster-Version: 3.0.0\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with ExitStack() as stack, receiver(OURS, tls=True) as listening:
        for _ in range(connections):
            plain = socket.create_connection(("127.0.0.1", listening.port))
            sock = stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
            sock.sendall(head + body)
            if not (answer := sock.recv(4096)).startswith(b"HTTP/1.1 204 "):
                raise SystemExit(f"answered {answer!r}")
        time.sleep(WARMUP_S)
    expect("received", connections, listening.counters)
    return float(listening.counters["grown_kib"])


def run_idle_received(connections: int) -> Row:
    alone_kib, kib = (received_kib(n, certificate()) for n in (1, connections))
    return {"kib_per_connection": (kib - alone_kib) / (connections - 1)}


def run_pipeline(workers: int, size: int, port: int, seconds: float) -> Row:
    """One pipeline at full rate."""
    pipe = Pipeline(
        1,
        [f"http://127.0.0.1:{port}"],
        QuietRaft(),
        member_id=MEMBER_ID,
        cluster_id=CLUSTER_ID,
        config=PipelineConfig(connections=workers),
    )
    with pipe:
        subject = Subject(pipe, builder("core", size))
        result = measure_rate(subject, seconds, Pacer(size))
        subject.drain()
        stats = pipe.stats()
    if stats.failed or stats.dropped:
        raise SystemExit(f"messages were lost: {stats}")
    return {**result, "total": stats.sent}


def run_one(curve: str, n: int, seconds: float) -> Row:
    """One point of one curve in a process of its own, against a fresh sink."""
    if curve == "idle TLS received":
        return run_idle_received(n)
    tls = curve == "idle TLS"
    with Sink(tls=tls) as sink:
        if curve.startswith("bare "):
            size = n if curve == "bare sizes" else 128
            connections = {"bare peers": 4 * n, "bare workers": n}.get(curve, 4)
            load = [BIN / "bare_sender", "--port", sink.port, "--size", body_bytes(size)]
            warmup = 200 if size < SNAPSHOT_BYTES else 2
            more = ["--connections", connections, "--seconds", seconds, "--warmup", warmup]
            result = run_json(*load, *more)
        else:
            words = ["--one", curve, n, sink.port, "--seconds", seconds]
            words += tls_flags() if tls else []
            result = run_json(sys.executable, __file__, *words)
    counters = sink.counters
    if counters["requests"] != result["total"] or counters["bad"]:
        raise SystemExit(f"{curve} {n}: {result['total']} sent, the sink counted {counters}")
    return result


CURVES: dict[str, Sequence[int]] = {
    "peers": PEERS,
    "bare peers": PEERS,
    "idle": (IDLE_PEERS,),
    "idle TLS": (IDLE_PEERS,),
    "idle TLS received": (IDLE_PEERS,),
    "workers": WORKERS,
    "bare workers": WORKERS,
    "sizes": SIZES,
    "bare sizes": SIZES,
}


def measure(rounds: int, seconds: float, watch: Watch) -> dict[str, list[Row]]:
    """Curve -> points in order; each has ``n``, its rounds, and their medians."""
    curves_here = dict(CURVES)
    if not (BIN / "sink-tls").exists():
        del curves_here["idle TLS"], curves_here["idle TLS received"]
        say("skipped: idle TLS: bin/sink-tls is not built, for OpenSSL's headers\n")
    plan = [(curve, n) for curve, points in curves_here.items() for n in points]
    results: dict[tuple[str, int], list[Row]] = {point: [] for point in plan}
    for i in range(rounds):
        for curve, n in plan:
            say(f"round {i + 1} of {rounds}: {curve} {n}")
            results[curve, n].append(watch.run(partial(run_one, curve, n, seconds)))
    say("")
    curves: dict[str, list[Row]] = {curve: [] for curve in curves_here}
    for (curve, n), done in results.items():
        keys = done[0].keys() - {"discarded"}
        medians = {key: statistics.median(each[key] for each in done) for key in sorted(keys)}
        curves[curve].append({"n": n, **medians, "rounds": done})
    return curves


def chart(curves: dict[str, list[Row]]) -> str:
    def points(curve: str) -> list[tuple[float, float]]:
        return [(each["n"], each["cpu_us_per_message"]) for each in curves[curve]]

    labels = {
        "peers": f"peers, {RATE:,} messages/s in all",
        "workers": "workers (connections)",
        "sizes": "bytes of a message",
    }
    return svg.lines(
        {
            f"CPU us/message: {curve}": (
                text,
                {"ours": points(curve), "bare C": points(f"bare {curve}")},
            )
            for curve, text in labels.items()
        }
    )


def describe(curves: dict[str, list[Row]]) -> str:
    """P9 in words: growth from 1 to 64 peers, and what an idle peer costs."""
    at = {each["n"]: each["cpu_us_per_message"] for each in curves["peers"]}
    ratios = [
        many["cpu_us_per_message"] / one["cpu_us_per_message"]
        for one, many in zip(
            *(next(e["rounds"] for e in curves["peers"] if e["n"] == n) for n in (1, 64)),
            strict=True,
        )
    ]
    idle = curves["idle"][0]
    over_tls = ""
    if "idle TLS" in curves:
        sent, received = curves["idle TLS"][0], curves["idle TLS received"][0]
        over_tls = (
            f"; over mutual TLS {sent['cpu_us_per_peer_and_s']:.2f} us and "
            f"{sent['kib_per_peer']:.0f} KiB, and a connection of another's that is idle "
            f"{received['kib_per_connection']:.0f} KiB (target 128)"
        )
    return (
        f"P9: 64 peers cost {statistics.median(ratios):.2f} x what one costs for each message at "
        f"{RATE:,}/s in all ({at[1]:.2f} -> {at[64]:.2f} us; target within 15 %); an idle peer "
        f"costs {idle['cpu_us_per_peer_and_s']:.2f} us of CPU a second and "
        f"{idle['kib_per_peer']:.0f} KiB (target 0 and 64){over_tls}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--patience", type=float, default=300.0, help=PATIENCE_HELP)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory")
    parser.add_argument("--report", action="store_true", help="of the file there is; no run")
    parser.add_argument("--one", nargs=3, metavar=("CURVE", "N", "PORT"))
    add_tls_options(parser)
    args = parser.parse_args()
    if args.one:
        curve, n, port = args.one[0], int(args.one[1]), int(args.one[2])
        run = {
            "peers": partial(run_peers, n),
            "idle": partial(run_idle, n, tls=None),
            "idle TLS": partial(run_idle, n, tls=tls_of(args)),
            "workers": partial(run_pipeline, n, 128),
            "sizes": partial(run_pipeline, 4, n),
        }[curve]
        print(json.dumps(run(port, args.seconds)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / "growth.json"
    if not args.report:
        result = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "rounds": args.rounds,
            "seconds": args.seconds,
            "curves": measure(args.rounds, args.seconds, Watch(args.patience)),
        }
        out.write_text(json.dumps(result, indent=1) + "\n")
    curves = json.loads(out.read_text())["curves"]
    runs = [run for points in curves.values() for each in points for run in each["rounds"]]
    (args.out / "growth.svg").write_text(chart(curves))
    print("\n".join(filter(None, (describe(curves), remark(runs)))))


if __name__ == "__main__":
    main()
