"""Run every measurement, keep all of it in results/bench.json, print one Markdown table.

Subjects take turns (bare C, core, baseline, and again) so that a machine that gets slower for a
while does so for all of them; a ratio is taken inside each round and the table shows the median.
Figures are those of design.md section 6. A target that is missed is printed as missed; the exit
code says only whether the run itself was sound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import svg
from driver import LONE_MESSAGES
from harness import (
    BIN,
    HERE,
    SUBJECTS,
    Load,
    Sink,
    body_bytes,
    machine,
    quantiles,
    receive,
    run_json,
    say,
)
from quiet import PATIENCE_HELP, Watch, remark

Runs = dict[str, list[dict[str, Any]]]  # "subject mode" -> one result per round

ENTRY_BYTES = 128
RECEIVING = {"receive": Load.SMALL, "receive-large": Load.LARGE}


def run_one(subject: str, mode: str, seconds: float, wire_bytes: int) -> dict[str, Any]:
    """One subject against a fresh sink; what the sink counted must be what was sent."""
    with Sink(*(["--stamp"] if mode == "lone" else [])) as sink:
        common = ("--port", sink.port, "--size")
        if subject == "bare-c" and mode != "work":
            load = ("--messages", LONE_MESSAGES) if mode == "lone" else ("--seconds", seconds)
            flags = {"spin": ("--spin",), "lone": ("--lone",)}.get(mode, ())
            result = run_json(BIN / "bare_sender", *common, wire_bytes, *load, *flags)
        else:
            driver = [sys.executable, HERE / "driver.py", subject, mode]
            result = run_json(*driver, *common, ENTRY_BYTES, "--seconds", seconds)
    counters = sink.counters
    if counters["requests"] != result["total"] or counters["bad"]:
        raise SystemExit(f"{subject} {mode}: {result['total']} sent, the sink counted {counters}")
    stamps_ns = counters.pop("stamps_ns")
    if mode == "lone":
        # One request at a time, so the n-th stamp belongs to the n-th offer. The kernel begins
        # to stamp a moment after the socket asks for it; the first may be missing.
        offers_ns = result.pop("offers_ns")
        pairs = zip(offers_ns, stamps_ns, strict=True)
        result["wire_ns"] = quantiles([arrived - at for at, arrived in pairs if arrived])
        if subject == "bare-c":
            result["send_ns"] = quantiles(result["send_ns"])
    return {**result, "sink": counters}


def run_either(subject: str, mode: str, seconds: float, wire_bytes: int) -> dict[str, Any]:
    if mode in RECEIVING:
        return receive(subject, RECEIVING[mode], seconds)
    return run_one(subject, mode, seconds, wire_bytes)


def measure(rounds: int, seconds: float, watch: Watch, wire_bytes: int) -> Runs:
    plan = [(subject, mode) for mode in ("rate", "spin") for subject in ("bare-c", *SUBJECTS)]
    plan.remove(("core-prebuilt", "spin"))
    plan += [("core", "busy"), ("baseline", "busy")]
    plan += [("bare-c", "lone"), ("core", "lone"), ("baseline", "lone")]
    plan += [("bare-c", "work"), ("core", "work"), ("baseline", "work")]
    plan += [(subject, "receive") for subject in ("bare-c", "core", "inbox", "uvicorn")]
    plan += [(subject, "receive-large") for subject in ("recv", "core", "uvicorn")]
    runs: Runs = {}
    for n in range(rounds):
        for subject, mode in plan:
            say(f"round {n + 1} of {rounds}: {subject} {mode}")
            result = watch.run(partial(run_either, subject, mode, seconds, wire_bytes))
            runs.setdefault(f"{subject} {mode}", []).append(result)
    say("")
    return runs


def pytest(*args: object) -> str:
    """What pytest prints, run quietly."""
    command = [sys.executable, "-m", "pytest", "-q", *map(str, args)]
    done = subprocess.run(
        command,
        check=False,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\npytest failed with {done.returncode}")
    return done.stdout


def bench_one(test: str) -> dict[str, Any]:
    """The statistics of one benchmark for pytest."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "benchmarks.json"
        pytest(f"--benchmark-json={out}", test)
        (found,) = json.loads(out.read_text())["benchmarks"]
    keep = ("min", "median", "mean", "stddev", "max", "rounds", "iterations")
    return {**{key: found["stats"][key] for key in keep}, "extra_info": found["extra_info"]}


def bench_files(watch: Watch) -> Runs:
    """The pytest-benchmark files, each benchmark once: its name -> its only result."""
    results: Runs = {}
    listed = pytest("--collect-only", *sorted(HERE.glob("bench_*.py")))
    for test in (line for line in listed.splitlines() if "::" in line):
        say(f"pytest {test}")
        results[test.partition("::")[2]] = [watch.run(partial(bench_one, test))]
    say("")
    return results


@dataclass(frozen=True)
class Row:
    """One line of the table. ``holds`` is None where there is nothing to reach."""

    figure: str
    ours: str
    reference: str
    ratio: str = ""
    target: str = ""
    holds: bool | None = None

    def cells(self) -> list[str]:
        met = {None: "", True: "yes", False: "**no**"}[self.holds]
        return [self.figure, self.ours, self.reference, self.ratio, self.target, met]


def table(rows: Sequence[Row]) -> str:
    header = ["figure", "ours", "reference", "ratio", "target", "met"]
    lines = [header, ["---"] * len(header), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def rows_of_runs(runs: Runs) -> list[Row]:
    def values(run: str, *path: str) -> list[float]:
        found: list[Any] = runs[run]
        for key in path:
            found = [value[key] for value in found]
        return found

    def median(run: str, *path: str) -> float:
        return statistics.median(values(run, *path))

    def ratio(run: str, reference: str, *path: str) -> float:
        """Median over the rounds of the ratio inside one round."""
        pairs = zip(values(run, *path), values(reference, *path), strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    cpu, rate = "cpu_us_per_message", "messages_per_s"
    core_cpu, bare_cpu = median("core rate", cpu), median("bare-c rate", cpu)
    alone, spinning = (
        ratio("core rate", "bare-c rate", cpu),
        ratio("core spin", "bare-c spin", rate),
    )
    prebuilt = ratio("core-prebuilt rate", "bare-c rate", cpu)
    fewer = ratio("baseline rate", "core rate", cpu)
    awake_ns, asleep_ns = (median(f"core {mode}", "send_ns", "p50") for mode in ("busy", "lone"))
    asleep = ratio("core lone", "bare-c lone", "send_ns", "p50")
    p50_ns, p99_ns = (median("core lone", "wire_ns", p) for p in ("p50", "p99"))

    def us(run: str, *path: str) -> str:
        return f"{median(run, *path) / 1000:.2f} us"

    def slower(subject: str) -> str:
        return f"{median(f'{subject} work', 'slow_down'):.2f} x"

    def kept(subject: str) -> str:
        return f"{ratio(f'{subject} spin', f'{subject} rate', rate):.0%}"

    return [
        Row(
            "P1 CPU per message, 128 B MsgApp, built anew for each send",
            f"{core_cpu:.2f} us",
            f"bare C {bare_cpu:.2f} us",
            f"{alone:.2f}",
            "<= 1.35",
            alone <= 1.35,
        ),
        Row(
            "P1 the same, one message offered again and again",
            f"{median('core-prebuilt rate', cpu):.2f} us",
            f"bare C {bare_cpu:.2f} us",
            f"{prebuilt:.2f}",
        ),
        Row(
            "P1 against the baseline",
            f"{core_cpu:.2f} us",
            f"baseline {median('baseline rate', cpu):.0f} us",
            f"{fewer:.0f} x less",
            ">= 30 x less",
            fewer >= 30,
        ),
        Row(
            "Messages per second, main thread resting",
            f"{median('core rate', rate):,.0f}",
            f"bare C {median('bare-c rate', rate):,.0f}, "
            f"baseline {median('baseline rate', rate):,.0f}",
            f"{ratio('core rate', 'bare-c rate', rate):.2f}",
        ),
        Row(
            "P4 messages per second, main thread spinning",
            f"{median('core spin', rate):,.0f}",
            f"bare C beside a spinning thread {median('bare-c spin', rate):,.0f}",
            f"{spinning:.2f}",
            ">= 0.8",
            spinning >= 0.8,
        ),
        Row(
            "P4 rate kept when the main thread spins",
            kept("core"),
            f"bare C {kept('bare-c')}, baseline {kept('baseline')}",
        ),
        Row(
            "P5 `send()`, loop awake, p50 (p99)",
            f"{awake_ns / 1000:.2f} us ({us('core busy', 'send_ns', 'p99')})",
            f"baseline {us('baseline busy', 'send_ns', 'p50')}",
            "",
            "<= 0.5 us",
            awake_ns <= 500,
        ),
        Row(
            "P5 `send()`, loop asleep, p50 (p99)",
            f"{asleep_ns / 1000:.2f} us ({us('core lone', 'send_ns', 'p99')})",
            f"bare C's wake {us('bare-c lone', 'send_ns', 'p50')}, "
            f"baseline {us('baseline lone', 'send_ns', 'p50')}",
            f"{asleep:.2f}",
            "<= 1.6",  # the rest is the kernel's, which wakes a thread for both
            asleep <= 1.6,
        ),
        Row(
            "P10 lone message, offer to wire, p50",
            f"{p50_ns / 1000:.0f} us",
            f"bare C {us('bare-c lone', 'wire_ns', 'p50')}, "
            f"baseline {us('baseline lone', 'wire_ns', 'p50')}",
            f"{ratio('core lone', 'bare-c lone', 'wire_ns', 'p50'):.2f}",
            "<= 50 us",
            p50_ns <= 50_000,
        ),
        Row(
            "P10 lone message, offer to wire, p99",
            f"{p99_ns / 1000:.0f} us",
            f"bare C {us('bare-c lone', 'wire_ns', 'p99')}, "
            f"baseline {us('baseline lone', 'wire_ns', 'p99')}",
            f"{ratio('core lone', 'bare-c lone', 'wire_ns', 'p99'):.2f}",
            "<= 500 us",
            p99_ns <= 500_000,
        ),
        Row(
            "Python work in the main thread, beside the pipeline at full rate, takes",
            f"{slower('core')} at {median('core work', rate):,.0f}/s",
            f"beside bare C in its own process {slower('bare-c')} at "
            f"{median('bare-c work', rate):,.0f}/s, "
            f"baseline {slower('baseline')} at {median('baseline work', rate):,.0f}/s",
            f"{ratio('core work', 'bare-c work', 'slow_down'):.2f}",
        ),
    ]


def rows_of_receiving(runs: Runs) -> list[Row]:
    def median(run: str, key: str) -> float:
        return statistics.median(result[key] for result in runs[run])

    def ratio(run: str, reference: str, key: str) -> float:
        pairs = zip(runs[run], runs[reference], strict=True)
        return statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)

    cpu, rate, peak = "cpu_us_per_message", "messages_per_s", "peak_mib"
    fewer = ratio("uvicorn receive", "core receive", cpu)
    large_ms = median("core receive-large", cpu) / 1000
    above_mib = median("core receive-large", peak) - 64
    taken = ratio("inbox receive", "bare-c receive", cpu)
    return [
        Row(
            "P6 receive, CPU per message, 128 B MsgApp",
            f"{median('core receive', cpu):.1f} us",
            f"uvicorn + asgi_app {median('uvicorn receive', cpu):.0f} us",
            f"{fewer:.1f} x less",
            ">= 3 x less",
            fewer >= 3,
        ),
        Row(
            "P6 the same, against bare C that does not decode",
            f"{median('core receive', cpu):.1f} us",
            f"bare C {median('bare-c receive', cpu):.1f} us",
            f"{ratio('core receive', 'bare-c receive', cpu):.2f}",
        ),
        Row(
            "I2 receive into an inbox and take, CPU per message, 128 B MsgApp",
            f"{median('inbox receive', cpu):.1f} us",
            f"bare C {median('bare-c receive', cpu):.1f} us",
            f"{taken:.2f}",
            "<= 1.6",
            taken <= 1.6,
        ),
        Row(
            "Messages received per second",
            f"{median('core receive', rate):,.0f}, "
            f"into an inbox {median('inbox receive', rate):,.0f}",
            f"bare C {median('bare-c receive', rate):,.0f}, "
            f"uvicorn {median('uvicorn receive', rate):,.0f}",
        ),
        Row(
            "P7 receive, CPU per 64 MiB MsgSnap",
            f"{large_ms:.1f} ms",
            f"recv into one buffer {median('recv receive-large', cpu) / 1000:.1f} ms, "
            f"uvicorn {median('uvicorn receive-large', cpu) / 1000:.0f} ms",
            f"{ratio('core receive-large', 'recv receive-large', cpu):.2f}",
            "<= 2.5 x recv",
            ratio("core receive-large", "recv receive-large", cpu) <= 2.5,
        ),
        Row(
            "P7 the same, peak memory above the payload",
            f"{above_mib:.1f} MiB",
            f"uvicorn {median('uvicorn receive-large', peak) - 64:.0f} MiB",
            "",
            "<= 16 MiB",
            above_mib <= 16,
        ),
    ]


def rows_of_marshal(benchmarks: dict[str, dict[str, Any]]) -> list[Row]:
    rows = []
    for work, target_ns in (("marshal", 100), ("unmarshal", 250), ("build+marshal", None)):
        ours_ns, protobuf_ns = (
            benchmarks[f"test_codec[{work}-{who}-app-1x128B]"]["median"] * 1e9
            for who in ("ours", "protobuf")
        )
        rows.append(
            Row(
                f"P8 {work}, one 128 B entry",
                f"{ours_ns:.0f} ns",
                f"protobuf {protobuf_ns:,.0f} ns",
                f"{ours_ns / protobuf_ns:.2f}",
                f"<= {target_ns} ns" if target_ns else "",
                ours_ns <= target_ns if target_ns else None,
            )
        )
    return rows


def rows_of_taking(benchmarks: dict[str, dict[str, Any]]) -> list[Row]:
    """What is taken at once costs less each; beside it the bytes as they came."""

    def ns(batch: int, kind: str) -> float:
        stats = benchmarks[f"test_a_batch_is_taken[{batch}-{kind}]"]
        return float(stats["median"]) * 1e9 / batch

    return [
        Row(
            f"`take` and its Messages, each of {batch}, 128 B MsgApp",
            f"{ns(batch, 'Message'):,.0f} ns",
            f"as EncodedMessage {ns(batch, 'EncodedMessage'):,.0f} ns",
        )
        for batch in (1, 16, 256)
    ]


def chart(runs: Runs) -> str:
    """P5: how many calls of ``send`` took how long, of all rounds together."""

    def panel(mode: str) -> dict[str, float]:
        results = runs[f"core {mode}"]
        bounds = [f"{ns / 1000:g} us" for ns in results[0]["buckets_ns"]]
        names = [*(f"up to {bound}" for bound in bounds), f"over {bounds[-1]}"]
        counts = [sum(column) for column in zip(*(r["histogram"] for r in results), strict=True)]
        return {name: n for name, n in zip(names, counts, strict=True) if n}

    return svg.bars(
        {
            "send() while the loop is awake: calls": panel("busy"),
            "send() that must wake the loop: calls": panel("lone"),
        },
        highlight="",
    )


def put_into(page: Path, text: str, mark: str = "bench") -> None:
    """Replace what stands between ``mark:begin`` and ``mark:end`` in ``page``."""
    before, begin, rest = page.read_text().partition(f"<!-- {mark}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {mark}:end -->")
    if not end:
        raise SystemExit(f"{page} has no {mark}:begin and {mark}:end")
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each run at full rate")
    parser.add_argument("--patience", type=float, default=600.0, help=PATIENCE_HELP)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bench.json")
    parser.add_argument("--into", type=Path, help="put the table into this file as well")
    args = parser.parse_args()

    wire_bytes = body_bytes(ENTRY_BYTES)
    watch = Watch(args.patience)
    runs = measure(args.rounds, args.seconds, watch, wire_bytes)
    files = bench_files(watch)
    benchmarks = {name: each for name, (each,) in files.items()}
    rows = [
        *rows_of_runs(runs),
        *rows_of_receiving(runs),
        *rows_of_taking(benchmarks),
        *rows_of_marshal(benchmarks),
    ]
    where = machine()
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "make bench",
        "machine": where,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "body_bytes": wire_bytes,
        "table": [asdict(row) for row in rows],
        "runs": runs,
        "benchmarks": files,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_name("send-time.svg").write_text(chart(runs))
    lines = [table(rows)]
    if disturbed := remark([run for each in (*runs.values(), *files.values()) for run in each]):
        lines.append(f"\n{disturbed}")
    lines.append(
        f"\n{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, {where['python']}, "
        f"{where['build']} build; median of {args.rounds} rounds; all of it in {args.out.name}"
    )
    print("\n".join(lines))
    if args.into:
        put_into(args.into, "\n".join(lines))


if __name__ == "__main__":
    main()
