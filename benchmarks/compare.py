"""Ours beside etcd's own Go pipeline and the clients people use, in one run: ``make bench-peers``.

Every subject has a process of its own and takes its turn (A B C, A B C, ...), so that a machine
that gets slower does so for all; ratios are taken within a round, and medians are shown. Writes

results/peers.json      one object for each case and subject, with every round
results/peers-run.json  the machine, the versions, what was skipped, and how it was run
results/peers.svg       CPU per message, which the README shows

``--report`` makes table and chart anew from these files. How each figure is made: NOTES.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import svg
from harness import (
    BIN,
    HERE,
    SNAPSHOT_BYTES,
    Listening,
    Sink,
    body_bytes,
    builder,
    machine,
    quantiles,
    receiving,
    run_json,
    say,
)
from peers.clients import SUBJECTS as CLIENTS
from peers.clients import missing
from quiet import PATIENCE_HELP, PAUSE_S, Watch, remark, was_alone, was_apart, watched
from report import put_into

RESULTS = HERE / "results"
SIZES = (128, 1 << 10, 16 << 10, 1 << 20, 64 << 20)
CLIENTS_PY = HERE / "peers" / "clients.py"
OURS, ETCD, BARE, BARE_THREADS = "ours", "etcd", "bare-c", "bare-c-threads"
#: As ``ours``, but with a new ``Message`` for each ``send``. The Go program offers one message
#: again and again, as everyone else here does, so ``ours`` is what is compared with it.
OURS_ANEW = "ours-anew"
SENDERS = (ETCD, OURS, OURS_ANEW, BARE, BARE_THREADS, "urllib3", *CLIENTS)
RECEIVERS = (ETCD, OURS, "uvicorn", BARE)
PAIRS = (ETCD, OURS)
SIDES = {"send": SENDERS, "receive": RECEIVERS, "both": PAIRS}
#: The targets of issue 5: (side, size, figure) -> the most, or the least, ours / etcd may be.
TARGETS = {
    ("send", 128, "cpu_us_per_msg"): ("<=", 0.3),
    ("send", 128, "msgs_per_s"): (">=", 3.0),
    ("send", 64 << 20, "cpu_us_per_msg"): ("<=", 0.35),
    ("receive", 128, "cpu_us_per_msg"): ("<=", 0.4),
    ("receive", 64 << 20, "cpu_us_per_msg"): ("<=", 0.25),
    ("both", 128, "msgs_per_s"): (">=", 2.5),
}
FIGURE_NAMES = {"cpu_us_per_msg": "CPU per message", "msgs_per_s": "messages per second"}
FIGURES = ("msgs_per_s", "cpu_us_per_msg", "p50_us", "p99_us", "rss_above_payload_mb")

Row = dict[str, Any]


def label(size: int) -> str:
    for factor, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= factor:
            return f"{size // factor} {unit}"
    return f"{size} B"


def lone_messages(size: int) -> int:
    """How many are sent one at a time for the latencies: what takes about 0.1 s."""
    return max(4, min(300, (256 << 20) // size))


def connections(size: int) -> int:
    """Of the load. Two large bodies at once would hide what a receiver needs beside one."""
    return 4 if size <= SNAPSHOT_BYTES else 1


def seconds_of(size: int, seconds: float) -> float:
    """The measured time: more for the largest, of which the slowest send a few a second."""
    return seconds if size <= SNAPSHOT_BYTES else seconds * 2.5


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
    return {figure: result[figure] for figure in (*FIGURES, "messages")}


def send_to(subject: str, port: int, size: int, seconds: float) -> tuple[Row, int]:
    """Send as ``subject`` to whoever listens at ``port``: the figures, and how many it sent."""
    wire_bytes, lone = body_bytes(size), lone_messages(size)
    timing = ("--seconds", seconds, "--lone", lone)
    if subject == ETCD:
        url = f"http://127.0.0.1:{port}"
        result = run_json(BIN / "etcd", "send", "--url", url, "--body", wire_bytes, *timing)
        return from_go(result), result["total"]
    if subject in (BARE, BARE_THREADS):
        bare: list[object] = [BIN / "bare_sender", "--port", port, "--size", wire_bytes]
        threads = ["--threads"] if subject == BARE_THREADS else []
        warmup = 200 if size < SNAPSHOT_BYTES else 2
        result = run_json(*bare, *threads, "--seconds", seconds, "--warmup", warmup)
        alone = run_json(*bare, "--connections", 1, "--messages", lone, "--warmup", 0, "--times")
        above_mb = (result["peak_kib"] * 1024 - wire_bytes) / 1e6
        return row(result, alone["exchange_ns"], above_mb), result["total"] + alone["total"]
    if subject in CLIENTS:
        command = [CLIENTS_PY, subject, "--size", wire_bytes]
    else:
        name = {OURS: "core-prebuilt", OURS_ANEW: "core", "urllib3": "baseline"}[subject]
        command = [HERE / "driver.py", name, "peer", "--size", size]
    result = run_json(sys.executable, *command, "--port", port, *timing)
    return row(result, result["lone_ns"], result["rss_above_payload_mb"]), result["total"]


def receiver(subject: str) -> Listening:
    if subject == ETCD:
        return Listening(BIN / "etcd", "receive")
    return Listening(*receiving("core" if subject == OURS else subject))


def used(counters: Row) -> tuple[float, float]:
    """CPU in us for each message, and peak of memory in MB, of a receiver of any kind."""
    if "cpu_s" in counters:  # the C sink
        return counters["cpu_s"] * 1e6 / counters["requests"], counters["peak_kib"] * 1024 / 1e6
    if "peak_mb" in counters:  # the Go program
        return counters["cpu_us_per_msg"], counters["peak_mb"]
    return counters["cpu_us_per_message"], counters["peak_mib"] * (1 << 20) / 1e6


def run_send(subject: str, size: int, seconds: float) -> Row:
    sink = Listening(sys.executable, CLIENTS_PY, "grpcio-sink") if subject == "grpcio" else Sink()
    with sink:
        result, total = send_to(subject, sink.port, size, seconds)
    expect(subject, total, sink.counters)
    return result


def run_receive(subject: str, size: int, seconds: float) -> Row:
    with tempfile.NamedTemporaryFile() as body, receiver(subject) as listening:
        body.write(builder("core", size)(100_000).marshal())
        body.flush()
        load = [BIN / "bare_sender", "--port", listening.port, "--body", body.name]
        warmup = 200 if size < SNAPSHOT_BYTES else 2
        sent = run_json(
            *load, "--connections", connections(size), "--seconds", seconds, "--warmup", warmup
        )
        alone = run_json(
            *load, "--connections", 1, "--messages", lone_messages(size), "--warmup", 0, "--times"
        )
    expect(subject, sent["total"] + alone["total"], listening.counters)
    cpu_us, peak_mb = used(listening.counters)
    # The C sink throws bodies away as they come; the others hold one for each connection.
    above_mb = peak_mb - (0 if subject == BARE else connections(size) * size / 1e6)
    return row({**sent, "cpu_us_per_message": cpu_us}, alone["exchange_ns"], above_mb)


def run_both(subject: str, size: int, seconds: float) -> Row:
    """``subject`` into itself: its rate, and the CPU of both processes for each message."""
    with receiver(subject) as listening:
        result, total = send_to(subject, listening.port, size, seconds)
    expect(subject, total, listening.counters)
    cpu_us, peak_mb = used(listening.counters)
    above_mb = result["rss_above_payload_mb"] + peak_mb
    return {
        **result,
        "cpu_us_per_msg": result["cpu_us_per_msg"] + cpu_us,
        "rss_above_payload_mb": above_mb,
    }


RUN: dict[str, Callable[[str, int, float], Row]] = {
    "send": run_send,
    "receive": run_receive,
    "both": run_both,
}


def why_skipped(subject: str) -> str | None:
    """Why ``subject`` cannot be measured here; None if it can."""
    if subject == ETCD and not (BIN / "etcd").exists():
        return "the Go program is not built (make benchmarks/bin/etcd needs go)"
    if (subject in CLIENTS and missing(subject)) or (
        subject == "uvicorn" and importlib.util.find_spec(subject) is None
    ):
        return "not installed (pip install -e '.[bench]')"
    return None


Case = tuple[str, str, int]  # side, subject, size


def runner(case: Case, seconds: float) -> Callable[[], Row]:
    side, subject, size = case
    return partial(RUN[side], subject, size, seconds_of(size, seconds))


class Apart:
    """Ours and etcd's runs of the targets while the CPUs share no cache: the others wait then."""

    def __init__(self, plan: Sequence[Case], seconds: float) -> None:
        targets = {(side, size): None for side, size, _ in TARGETS}
        wanted = [(side, who, size) for side, size in targets for who in PAIRS]
        self.runs: dict[Case, list[Row]] = {case: [] for case in wanted if case in plan}
        self._seconds = seconds

    def run_next(self) -> None:
        """Make the run there are fewest of, and keep it if the CPUs were apart all the time."""
        if not self.runs:
            time.sleep(PAUSE_S)
            return
        case = min(self.runs, key=lambda case: len(self.runs[case]))
        try:
            result = watched(runner(case, self._seconds))
        except SystemExit as error:
            say(f"while apart: {case}: given up, for {error}\n")
            del self.runs[case]
            return
        if was_alone(result) and was_apart(result):
            self.runs[case].append(result)


def measure(plan: Sequence[Case], args: argparse.Namespace, keep: Callable[..., None]) -> None:
    """Every case of ``plan``, ``args.rounds`` times; ``keep`` gets all there is after each round.

    A case that fails twice in a round is given up, with all its rounds, and named: the others are
    still worth having.
    """
    rounds: dict[Case, list[Row]] = {case: [] for case in plan}
    apart = Apart(plan, args.seconds)
    failed: dict[str, str] = {}
    watch, begun = Watch(args.patience, apart.run_next), time.monotonic()
    for n in range(args.rounds):
        for i, (side, subject, size) in enumerate(plan):
            if (side, subject, size) not in rounds:
                continue
            minutes = (time.monotonic() - begun) / 60
            at = f"{minutes:4.1f} min, round {n + 1}/{args.rounds}, {i + 1}/{len(plan)}"
            name = f"{side} {label(size)} {subject}"
            say(f"{at}: {name}")
            run = runner((side, subject, size), args.seconds)
            try:
                try:
                    result = watch.run(run)
                except SystemExit as error:
                    say(f"{at}: {name}: once more, for {error}\n")
                    result = watch.run(run)
            except SystemExit as error:
                say(f"{at}: {name}: given up, for {error}\n")
                failed[name] = str(error)
                del rounds[side, subject, size]
            else:
                rounds[side, subject, size].append(result)
        keep(summary(rounds, apart.runs), failed, n + 1)
    say("")


def summary(rounds: Mapping[Case, Sequence[Row]], apart: Mapping[Case, Sequence[Row]]) -> list[Row]:
    """One object for each case: the medians of its rounds, the rounds, its ratios to etcd's, and in
    ``apart`` the runs made while the CPUs shared no cache.
    """
    results: list[Row] = [
        {
            "case": f"{side}-{label(size).replace(' ', '')}",
            "side": side,
            "subject": subject,
            "size_bytes": size,
            **{key: statistics.median(each[key] for each in done) for key in FIGURES},
            "rounds": done,
            "apart": apart.get((side, subject, size), []),
        }
        for (side, subject, size), done in rounds.items()
    ]
    add_ratios(results)
    return results


def add_ratios(results: list[Row]) -> None:
    """Adds to every object what it is to etcd in each round: ``ratio_to_etcd``, by figure."""
    etcd = {each["case"]: each["rounds"] for each in results if each["subject"] == ETCD}
    for each in results:
        if each["case"] in etcd:
            pairs = list(zip(each["rounds"], etcd[each["case"]], strict=True))
            each["ratio_to_etcd"] = {
                key: [mine[key] / theirs[key] for mine, theirs in pairs]
                for key in ("msgs_per_s", "cpu_us_per_msg")
            }


def amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(results: Sequence[Row]) -> str:
    lines = []
    titles = {
        "send": "Sending, to one neutral sink",
        "receive": "Receiving, under one neutral load",
        "both": "Into itself, both processes",
    }
    for side, title in titles.items():
        of_side = [each for each in results if each["side"] == side]
        if not of_side:
            continue
        lines += [
            "",
            f"| {title} | subject | messages/s | CPU us/message | of etcd's CPU | of etcd's rate "
            "| p50 us | p99 us | memory above payload, MB |",
            "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
        ]
        for size in sorted({each["size_bytes"] for each in of_side}):
            for each in (one for one in of_side if one["size_bytes"] == size):
                ratios = each.get("ratio_to_etcd", {})
                cpu, rate = (
                    f"{statistics.median(ratios[key]):.2f}" if key in ratios else ""
                    for key in ("cpu_us_per_msg", "msgs_per_s")
                )
                rate_and_cpu, times = (
                    " | ".join(amount(each[key]) for key in keys)
                    for keys in (("msgs_per_s", "cpu_us_per_msg"), ("p50_us", "p99_us"))
                )
                lines.append(
                    f"| {label(size)} | {each['subject']} | {rate_and_cpu} | {cpu} | {rate} "
                    f"| {times} | {each['rss_above_payload_mb']:.1f} |"
                )
    return "\n".join(lines[1:])


def verdicts(results: Sequence[Row]) -> str:
    """The targets of the issue, and whether each is met: the median of the rounds' ratios."""
    lines = [
        "| ours / etcd's Go pipeline | median | of each round | target | met |",
        "| --- | --: | --- | --- | --- |",
    ]
    for (side, size, figure), (sign, bound) in TARGETS.items():
        for each in results:
            key = (each["side"], each["size_bytes"], each["subject"])
            if key != (side, size, OURS) or "ratio_to_etcd" not in each:
                continue
            ratios = each["ratio_to_etcd"][figure]
            median = statistics.median(ratios)
            met = median <= bound if sign == "<=" else median >= bound
            rounds = " ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(
                f"| {side}, {label(size)}: {FIGURE_NAMES[figure]} | {median:.2f} | {rounds} "
                f"| {sign} {bound} | {'yes' if met else '**no**'} |"
            )
    return "\n".join(lines)


def while_apart(results: Sequence[Row]) -> str:
    """The same ratios while the CPUs shared no cache, as far as they did: of the medians."""
    runs = {(each["side"], each["size_bytes"], each["subject"]): each["apart"] for each in results}
    found = []
    for side, size, figure in TARGETS:
        ours, etcd = (runs.get((side, size, subject)) for subject in (OURS, ETCD))
        if ours and etcd:
            mine, theirs = (statistics.median(run[figure] for run in each) for each in (ours, etcd))
            found.append(
                f"{side}, {label(size)}: {FIGURE_NAMES[figure]} {mine / theirs:.2f} "
                f"({len(ours)} and {len(etcd)} runs)"
            )
    if not found:
        return ""
    return (
        f"That is with CPUs that share a cache. While the host had them apart: {'; '.join(found)}."
    )


def chart(results: Sequence[Row]) -> str:
    panels = {}
    for side, size in (("send", 128), ("receive", 128), ("send", 64 << 20), ("receive", 64 << 20)):
        values = {
            each["subject"]: each["cpu_us_per_msg"]
            for each in results
            if (each["side"], each["size_bytes"]) == (side, size)
        }
        if values:
            ranked = dict(sorted(values.items(), key=lambda item: item[1]))
            panels[f"{side}, {label(size)}: CPU us per message (log scale, less is good)"] = ranked
    return svg.bars(panels, OURS)


def versions() -> dict[str, str]:
    found = {}
    for name in (
        "urllib3",
        "requests",
        "httpx",
        "aiohttp",
        "pycurl",
        "grpcio",
        "uvicorn",
        "uvloop",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for line in (HERE / "peers" / "etcd" / "go.mod").read_text().splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == "go.etcd.io/etcd/server/v3":
            found["etcd"] = words[1].removeprefix("v")
    return found


def footer(run: Row, results: Sequence[Row]) -> str:
    where, used_versions = run["machine"], run["versions"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, {where['python']}, "
        f"{run['go']}; {', '.join(f'{k} {v}' for k, v in used_versions.items())}; median of "
        f"{run['rounds']} interleaved rounds of {run['seconds']} s; {run['when']}; "
        f"`{run['command']}`"
    ]
    if run["skipped"]:
        lines.append("Skipped: " + "; ".join(f"{k}: {why}" for k, why in run["skipped"].items()))
    if disturbed := remark([one for each in results for one in each["rounds"]]):
        lines.append(disturbed)
    return "\n\n".join(lines)


def publish(results: Sequence[Row], run: Row, args: argparse.Namespace) -> None:
    """Print the whole table; write the chart and, if asked, the short part of the README."""
    (args.out / "peers.svg").write_text(chart(results))
    head = "\n\n".join(filter(None, (verdicts(results), while_apart(results))))
    tail = footer(run, results)
    (args.out / "peers.md").write_text(f"{head}\n\n{table(results)}\n\n{tail}\n")
    print(f"{head}\n\n{table(results)}\n\n{tail}")
    if args.readme:
        small = [each for each in results if each["size_bytes"] in (128, 64 << 20)]
        text = (
            f"\n{head}\n\n![CPU per message](benchmarks/results/peers.svg)\n\n"
            f"{table(small)}\n\n{tail}\n"
        )
        put_into(args.readme, text, "bench-peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each measured run")
    parser.add_argument("--patience", type=float, default=900.0, help=PATIENCE_HELP)
    parser.add_argument("--subjects", default="", help="only these, by commas")
    parser.add_argument("--sizes", default="", help="only these, in bytes, by commas")
    parser.add_argument("--sides", default="send,receive,both")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--readme", type=Path, help="put the short table into this file as well")
    parser.add_argument("--report", action="store_true", help="of the files there are; no run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out, out_run = args.out / "peers.json", args.out / "peers-run.json"
    if not args.report:
        wanted = set(args.subjects.split(",")) - {""}
        known = {subject for side in SIDES.values() for subject in side}
        if wanted - known:
            parser.error(f"no such subject: {wanted - known}; there are {sorted(known)}")
        chosen = wanted or known
        skipped = {name: why for name in sorted(chosen) if (why := why_skipped(name))}
        for name, why in skipped.items():
            say(f"skipped: {name}: {why}\n")
        sizes = [int(size) for size in args.sizes.split(",") if size] or list(SIZES)
        plan = [
            (side, subject, size)
            for side in args.sides.split(",")
            for size in sizes
            for subject in SIDES[side]
            if subject in chosen and subject not in skipped
        ]
        go = "no Go" if why_skipped(ETCD) else run_json(BIN / "etcd", "version")["go"]
        run = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "make bench-peers",
            "machine": machine(),
            "versions": versions(),
            "go": go,
            "seconds": args.seconds,
        }

        def keep(results: Sequence[Row], failed: Mapping[str, str], rounds: int) -> None:
            out.write_text(json.dumps(results, indent=1) + "\n")
            more = {"rounds": rounds, "skipped": {**skipped, **failed}}
            out_run.write_text(json.dumps({**run, **more}, indent=1) + "\n")

        measure(plan, args, keep)
    publish(json.loads(out.read_text()), json.loads(out_run.read_text()), args)


if __name__ == "__main__":
    main()
