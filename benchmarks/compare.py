"""Ours beside etcd's own Go pipeline and the clients people use, in one run: ``make bench-peers``.

Every subject has a process of its own and takes its turn (A B C, A B C, ...), so that a machine
that gets slower does so for all; ratios are taken within a round, and medians are shown. Writes

results/peers.json      one object for each case and subject, with every round
results/peers-run.json  the machine, the versions, what was skipped, and how it was run
results/peers.svg       CPU per message, which docs/benchmarks.md shows

``--report`` makes table and chart anew from these files. How each figure is made: NOTES.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from exchange import ETCD, INBOX_UVLOOP, Row
from harness import BIN, HERE, SNAPSHOT_BYTES, machine, run_json, say
from peers.clients import SUBJECTS as CLIENTS
from peers.clients import missing
from quiet import PATIENCE_HELP, PAUSE_S, Watch, remark, was_alone, was_apart, watched
from report import put_into
from sides import GROUPS, LARGE, SIDES, SMALL, TLS_SIDES, label
from verdicts import TARGETS, chart, judge, summary, table, verdict_table, while_apart

RESULTS = HERE / "results"


def seconds_of(size: int, seconds: float) -> float:
    """The measured time: more for the largest, of which the slowest send a few a second."""
    return seconds if size <= SNAPSHOT_BYTES else seconds * 2.5


def why_skipped(subject: str) -> str | None:
    """Why ``subject`` cannot be measured here; None if it can."""
    if subject == ETCD and not (BIN / "etcd").exists():
        return "the Go program is not built (make benchmarks/bin/etcd needs go)"
    module = {"uvicorn": "uvicorn", INBOX_UVLOOP: "uvloop"}.get(subject)
    if (subject in CLIENTS and missing(subject)) or (
        module is not None and importlib.util.find_spec(module) is None
    ):
        return "not installed (pip install -e '.[bench]')"
    return None


def why_side_skipped(side: str) -> str | None:
    """Why nobody's ``side`` can be measured here; None if it can."""
    if side not in TLS_SIDES:
        return None
    if not all((BIN / name).exists() for name in ("sink-tls", "bare_sender-tls")):
        return "bare C over OpenSSL is not built (make benchmarks/bin/sink-tls needs its headers)"
    if SIDES[side].counted == "handshakes" and shutil.which("openssl") is None:
        return "no openssl program to shake hands with"
    return None


Case = tuple[str, str, int]  # side, subject, size


def runner(case: Case, seconds: float) -> Callable[[], Row]:
    side, subject, size = case
    return partial(SIDES[side].run, subject, size, seconds_of(size, seconds))


class Apart:
    """Our and etcd's runs of the targets while the CPUs share no cache: the others wait then."""

    def __init__(self, plan: Sequence[Case], seconds: float) -> None:
        wanted = [
            (target.side, who, target.size)
            for target in TARGETS
            if target.etcd
            for who in (ETCD, target.subject)
        ]
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
    if shutil.which("openssl"):
        words = ["openssl", "version"]
        found["openssl"] = subprocess.check_output(words, text=True).split()[1]
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
    """Print the whole table; write the chart and, if asked, the short part of the page."""
    (args.out / "peers.svg").write_text(chart(results))
    head = "\n\n".join(filter(None, (verdict_table(judge(results)), while_apart(results))))
    tail = footer(run, results)
    (args.out / "peers.md").write_text(f"{head}\n\n{table(results)}\n\n{tail}\n")
    print(f"{head}\n\n{table(results)}\n\n{tail}")
    if args.into:
        shown = os.path.relpath(args.out / "peers.svg", args.into.parent)
        small = [each for each in results if each["size_bytes"] in (SMALL, LARGE)]
        text = f"\n{head}\n\n![CPU per message]({shown})\n\n{table(small)}\n\n{tail}\n"
        put_into(args.into, text, args.mark)


def sides_of(words: str) -> list[str]:
    """The sides that ``--sides`` names, by themselves or a group at once, in their order."""
    named = {side for word in words.split(",") for side in GROUPS.get(word, (word,))}
    if unknown := named - SIDES.keys():
        raise ValueError(f"no such side: {unknown}; there are {[*GROUPS, *SIDES]}")
    return [side for side in SIDES if side in named]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each measured run")
    parser.add_argument("--patience", type=float, default=900.0, help=PATIENCE_HELP)
    parser.add_argument("--subjects", default="", help="only these, by commas")
    parser.add_argument("--sizes", default="", help="only these, in bytes, by commas")
    parser.add_argument(
        "--sides",
        default=",".join(GROUPS),
        help=f"only these, or groups ({', '.join(GROUPS)}), by commas",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--into", type=Path, help="put the short table into this file as well")
    parser.add_argument("--mark", default="bench-peers", help="where in it")
    parser.add_argument("--report", action="store_true", help="of the files there are; no run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out, out_run = args.out / "peers.json", args.out / "peers-run.json"
    if not args.report:
        wanted = set(args.subjects.split(",")) - {""}
        known = {subject for side in SIDES.values() for subject in side.subjects}
        if wanted - known:
            parser.error(f"no such subject: {wanted - known}; there are {sorted(known)}")
        try:
            sides = sides_of(args.sides)
        except ValueError as error:
            parser.error(str(error))
        chosen = (wanted or known) & {who for side in sides for who in SIDES[side].subjects}
        skipped = {name: why for name in sorted(chosen) if (why := why_skipped(name))}
        skipped |= {side: why for side in sides if (why := why_side_skipped(side))}
        for name, why in skipped.items():
            say(f"skipped: {name}: {why}\n")
        sizes = {int(size) for size in args.sizes.split(",") if size}
        plan = [
            (side, subject, size)
            for side in sides
            if side not in skipped
            for size in SIDES[side].sizes
            for subject in SIDES[side].subjects
            if subject in chosen and subject not in skipped and size in (sizes or {size})
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
            more = {
                "rounds": rounds,
                "skipped": {**skipped, **failed},
                "verdicts": judge(results),
            }
            out_run.write_text(json.dumps({**run, **more}, indent=1) + "\n")

        measure(plan, args, keep)
    publish(json.loads(out.read_text()), json.loads(out_run.read_text()), args)


if __name__ == "__main__":
    main()
