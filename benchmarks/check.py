"""Instructions per message against a committed reference: ``make bench-check``.

Each workload runs twice under valgrind, with few and with many messages; the difference, divided
by the messages between, has neither the start of Python nor of the pipeline in it. Instructions
are counted in user space, by cachegrind (callgrind's count in half the time): neither the speed of
the machine nor its load matters.

They do depend on the compiler and on Python. ``reference.json`` therefore names its environment;
in another one the check still runs, but with ``FOREIGN_TOLERANCE``, and says so.
``--write`` replaces the reference.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from harness import BIN, HERE, Listening, Sink, builder, run_json, running, snapshots

REFERENCE = HERE / "reference.json"
TOLERANCE = 0.05
#: Another compiler or Python moves the counts by up to this much without any change of ours.
FOREIGN_TOLERANCE = 0.25
#: Offered between two waits; they fit into msgc, so none is refused.
BURST = 60
FEW, MANY = 10 * BURST, 200 * BURST

VALGRIND = (
    "valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null",
    # One thread at a time, in the order they asked: the counts repeat.
    "--fair-sched=yes",
)  # fmt: skip


def instructions(valgrind_log: str) -> int:
    """What cachegrind counted, from what it logged."""
    found = re.search(r"I +refs: +([\d,]+)", valgrind_log)
    if not found:
        raise SystemExit(f"cachegrind counted nothing:\n{valgrind_log}")
    return int(found[1].replace(",", ""))


class Awaited:
    """A node on which the workload sleeps until a snapshot is through: polling would be counted."""

    def __init__(self) -> None:
        self.finished = threading.Lock()
        self.finished.acquire()

    def process(self, message: object) -> None:
        raise AssertionError("a sender is given no messages")

    def is_id_removed(self, member_id: int) -> bool:
        return False

    def report_unreachable(self, member_id: int) -> None:
        raise AssertionError("the sink answers everything")

    def report_snapshot(self, member_id: int, status: object) -> None:
        self.finished.release()


def work_send(size: int, messages: int, port: int) -> None:
    """Bursts of MsgApp; a MsgSnap ends each and is waited for."""
    gc.disable()
    raft = Awaited()
    with running("core", port, size, raft) as subject:
        send, last = subject.pipe.send, snapshots("core", size)(1)
        for burst in range(messages // BURST):
            for index in range(1, BURST):
                send(subject.build(burst * BURST + index))
            send(last)
            raft.finished.acquire()
        subject.drain(poll_s=0.1)


def work_marshal(size: int, messages: int, _port: int) -> None:
    """Build, encode and decode; no I/O."""
    gc.disable()
    build = builder("core", size)
    for index in range(messages):
        message = build(index)
        type(message).unmarshal(message.marshal())


WORK: dict[str, Callable[[int, int, int], None]] = {"send": work_send, "marshal": work_marshal}


def count(kind: str, size: int, messages: int) -> int:
    """The instructions of one whole process that carries ``messages``."""
    with tempfile.NamedTemporaryFile("r") as log:
        valgrind = [*VALGRIND, f"--log-file={log.name}", sys.executable]
        if kind == "receive":
            with (
                tempfile.NamedTemporaryFile() as body,
                Listening(*valgrind, HERE / "receive.py", "core") as receiver,
            ):
                body.write(builder("core", size)(100_000).marshal())
                body.flush()
                run_json(
                    BIN / "bare_sender", "--port", receiver.port, "--body", body.name,
                    "--messages", messages, "--warmup", 0,
                )  # fmt: skip
        else:
            with Sink() as sink:
                work = [kind, size, messages, sink.port]
                command = [*valgrind, __file__, "--work", *work]
                subprocess.run([str(word) for word in command], check=True)
        return instructions(log.read())


CASES = {
    "send-128B": ("send", 128),
    "send-64KiB": ("send", 64 << 10),
    "receive-128B": ("receive", 128),
    "receive-64KiB": ("receive", 64 << 10),
    "marshal-128B": ("marshal", 128),
}


def measure(case: str) -> float:
    """Instructions per message of ``case``."""
    kind, size = CASES[case]
    return (count(kind, size, MANY) - count(kind, size, FEW)) / (MANY - FEW)


def environment() -> dict[str, str]:
    """What the counts depend on, besides our code."""
    words = [os.environ.get("CC", "cc"), "--version"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "compiler": done.stdout.splitlines()[0],
        "cython": importlib.metadata.version("Cython"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make this run the reference")
    parser.add_argument("--cases", default=",".join(CASES), help="only these, by commas")
    parser.add_argument("--work", nargs=4, metavar=("KIND", "SIZE", "MESSAGES", "PORT"))
    args = parser.parse_args()
    if args.work:
        WORK[args.work[0]](*map(int, args.work[1:]))
        return
    if not shutil.which("valgrind"):
        raise SystemExit("bench-check needs valgrind")
    cases = args.cases.split(",")
    os.environ["PYTHONHASHSEED"] = "0"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = dict(zip(cases, pool.map(measure, cases), strict=True))
    here = environment()
    if args.write:
        rounded = {case: round(n) for case, n in counts.items()}
        REFERENCE.write_text(json.dumps({"environment": here, "cases": rounded}, indent=1) + "\n")
    reference = json.loads(REFERENCE.read_text())
    tolerance = TOLERANCE
    if reference["environment"] != here:
        tolerance = FOREIGN_TOLERANCE
        print(
            f"The reference was made with {reference['environment']}, this is {here}: "
            f"+{tolerance:.0%} is allowed instead of +{TOLERANCE:.0%}."
        )
    slower = []
    for case, n in counts.items():
        change = n / reference["cases"][case] - 1
        print(f"{case:15} {n:10,.0f} instructions/message {change:+7.1%}")
        if change > tolerance:
            slower.append(case)
        elif change < -tolerance:
            print(f"{'':15} Better: commit the new reference (make bench-reference) to keep it.")
    if slower:
        raise SystemExit(f"more than {tolerance:+.0%}: {', '.join(slower)}")


if __name__ == "__main__":
    main()
