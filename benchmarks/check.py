"""Instructions per message against a committed reference: ``make bench-check``.

Each workload runs twice under valgrind, with few and with many messages; the difference, divided
by the messages between, has neither the start of Python nor of the pipeline in it. Instructions
are counted in user space, by cachegrind (callgrind's count in half the time): neither the speed of
the machine nor its load matters. Those over TLS are counted by callgrind, which knows the library
an instruction is in: libssl's and libcrypto's own are OpenSSL's business and left out.

They do depend on the compiler and on Python. ``reference.json`` therefore names its environment;
in another one the check still runs, but with ``FOREIGN_TOLERANCE``, and says so. They also depend
on where Python's objects lie: its cache of methods is keyed by the address of a name, and two names
that fall on one slot cost a message hundreds of instructions. That is chance and can only add, so
what is above its tolerance is counted again in other layouts, and the least is what it costs.
``--write`` replaces the reference, of the cases that were counted.
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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exchange import STREAMS_PY, lead
from harness import (
    BIN,
    HERE,
    Listening,
    Sink,
    add_tls_options,
    bare_sender,
    builder,
    credentials_of,
    run_json,
    running,
    snapshots,
    tls_flags,
)
from streams import BATCH

from pipeline.tls.credentials import Credentials

REFERENCE = HERE / "reference.json"
TOLERANCE = 0.05
#: Another compiler or Python moves the counts by up to this much without any change of ours.
FOREIGN_TOLERANCE = 0.25
#: In how many layouts of memory a case is counted before it is called slower.
LAYOUTS = 4
#: Offered between two waits; they fit into msgc, so none is refused.
BURST = 60
FEW, MANY = 10 * BURST, 200 * BURST
#: Of streams: batches, each of ``streams.BATCH``.
FEW_BATCHES, MANY_BATCHES = 20, 220
#: callgrind is slower, and so is a cipher under it.
FEW_TLS, MANY_TLS = 5 * BURST, 25 * BURST

#: One thread at a time, in the order they asked: the counts repeat.
VALGRIND = ("valgrind", "--fair-sched=yes")
CACHEGRIND = (*VALGRIND, "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
CALLGRIND = (*VALGRIND, "--tool=callgrind", "--compress-strings=no", "--compress-pos=no")
OPENSSL = re.compile(r"/lib(ssl|crypto)[.\w-]*\.so")


def instructions(valgrind_log: str) -> int:
    """What cachegrind counted, from what it logged."""
    found = re.search(r"I +refs: +([\d,]+)", valgrind_log)
    if not found:
        raise SystemExit(f"cachegrind counted nothing:\n{valgrind_log}")
    return int(found[1].replace(",", ""))


def instructions_but_openssl(profile: str) -> int:
    """What callgrind counted, from its profile, without what OpenSSL's libraries did themselves.

    A line of a profile names the object that the next ones are about (``ob=``), or is a position
    and a count; the line behind ``calls=`` is what the called ones counted already.
    """
    counts: Counter[str] = Counter()
    where, lines = "", iter(profile.splitlines())
    for line in lines:
        if line.startswith("ob="):
            where = line[3:]
        elif line.startswith("calls="):
            next(lines)
        elif line[:1].isdigit():
            counts[where] += int(line.split()[1])
    found = re.search(r"^totals: (\d+)$", profile, re.MULTILINE)
    if not found or counts.total() != int(found[1]):
        raise SystemExit(f"callgrind's profile was not understood: {counts}")
    own = {where: n for where, n in counts.items() if OPENSSL.search(where)}
    if len(own) < 2:
        raise SystemExit(f"no libssl and libcrypto among {sorted(counts)}: what did the TLS?")
    return counts.total() - sum(own.values())


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


def work_send(size: int, messages: int, port: int, credentials: Credentials | None) -> None:
    """Bursts of MsgApp; a MsgSnap ends each and is waited for."""
    gc.disable()
    raft = Awaited()
    with running("core", port, size, raft, credentials=credentials) as subject:
        send, last = subject.pipe.send, snapshots("core", size)(1)
        for burst in range(messages // BURST):
            for index in range(1, BURST):
                send(subject.build(burst * BURST + index))
            send(last)
            raft.finished.acquire()
        subject.drain(poll_s=0.1)


def work_marshal(size: int, messages: int, _port: int, _credentials: object) -> None:
    """Build, encode and decode; no I/O."""
    gc.disable()
    build = builder("core", size)
    for index in range(messages):
        message = build(index)
        type(message).unmarshal(message.marshal())


Work = Callable[[int, int, int, Credentials | None], None]
WORK: dict[str, Work] = {"send": work_send, "marshal": work_marshal}
#: What ``receive.py`` does. Taken as they came, the messages of a batch, which costs by itself,
#: would be as many as chance would have it.
RECEIVING = {"receive": ["core"], "inbox": ["inbox", "--late"]}
#: What ``streams.py`` does: which end is counted.
STREAMING = {"stream-send": "lead", "stream-receive": "follow"}


def run(kind: str, size: int, messages: int, valgrind: list[str], *, tls: bool) -> None:
    """One whole process that carries ``messages``, under valgrind."""
    flags = tls_flags() if tls else []
    if kind in STREAMING:
        program = [sys.executable, STREAMS_PY]
        ends: dict[str, list[object]] = {
            end: [*(valgrind if end == STREAMING[kind] else []), *program, end, *flags]
            for end in ("lead", "follow")
        }
        with Listening(*ends["follow"]) as follower:
            words = [*ends["lead"], "--size", size, "--bursts", messages // BATCH]
            lead(follower, words, f"{'https' if tls else 'http'}://127.0.0.1:{{}}")
    elif kind in RECEIVING:
        receive = [*valgrind, sys.executable, HERE / "receive.py", *RECEIVING[kind], *flags]
        with tempfile.NamedTemporaryFile() as body, Listening(*receive) as receiver:
            body.write(builder("core", size)(100_000).marshal())
            body.flush()
            run_json(
                *bare_sender(tls=tls), "--port", receiver.port, "--body", body.name,
                "--messages", messages, "--warmup", 0,
            )  # fmt: skip
    else:
        with Sink(tls=tls) as sink:
            work = [kind, size, messages, sink.port]
            command = [*valgrind, sys.executable, __file__, *flags, "--work", *work]
            subprocess.run([str(word) for word in command], check=True)


def count(kind: str, size: int, messages: int, *, tls: bool) -> int:
    """The instructions of that process; over TLS without OpenSSL's own."""
    with tempfile.TemporaryDirectory() as scratch:
        log, profile = Path(scratch) / "log", Path(scratch) / "profile"
        tool = [*CALLGRIND, f"--callgrind-out-file={profile}"] if tls else [*CACHEGRIND]
        run(kind, size, messages, [*tool, f"--log-file={log}"], tls=tls)
        if tls:
            return instructions_but_openssl(profile.read_text())
        return instructions(log.read_text())


#: What is done, with how much, and whether over TLS.
CASES = {
    "send-128B": ("send", 128, False),
    "send-64KiB": ("send", 64 << 10, False),
    "receive-128B": ("receive", 128, False),
    "receive-64KiB": ("receive", 64 << 10, False),
    "inbox-128B": ("inbox", 128, False),
    "marshal-128B": ("marshal", 128, False),
    **{f"{kind}-128B": (kind, 128, False) for kind in STREAMING},
    "tls-send-128B": ("send", 128, True),
    "tls-send-64KiB": ("send", 64 << 10, True),
    "tls-receive-128B": ("receive", 128, True),
    "tls-receive-64KiB": ("receive", 64 << 10, True),
    "tls-inbox-128B": ("inbox", 128, True),
}


def measure(case: str) -> float:
    """Instructions per message of ``case``."""
    kind, size, tls = CASES[case]
    few, many = (FEW_TLS, MANY_TLS) if tls else (FEW, MANY)
    if kind in STREAMING:
        few, many = FEW_BATCHES * BATCH, MANY_BATCHES * BATCH
    return (count(kind, size, many, tls=tls) - count(kind, size, few, tls=tls)) / (many - few)


def measure_all(cases: list[str]) -> dict[str, float]:
    """Instructions per message of each of ``cases``; as many at once as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(measure, cases), strict=True))


def lay_out_anew(layout: int) -> None:
    """Give the processes to come another layout: ``os.environ`` is among Python's first objects."""
    os.environ.update({f"LAYOUT_{index}": "" for index in range(50 * layout)})


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
    add_tls_options(parser)
    args = parser.parse_args()
    if args.work:
        size, messages, port = map(int, args.work[1:])
        WORK[args.work[0]](size, messages, port, credentials_of(args))
        return
    if not shutil.which("valgrind"):
        raise SystemExit("bench-check needs valgrind")
    cases = args.cases.split(",")
    if not (BIN / "sink-tls").exists():
        skipped = [case for case in cases if CASES[case][2]]
        cases = [case for case in cases if case not in skipped]
        print(f"Skipped: {', '.join(skipped)}: bin/sink-tls is not built, for OpenSSL's headers.")
    else:
        tls_flags()  # one certificate, and not one for each thread
    os.environ["PYTHONHASHSEED"] = "0"
    counts = measure_all(cases)
    here = environment()
    reference = json.loads(REFERENCE.read_text())
    if args.write:
        # Counts that were made elsewhere are not kept beside these.
        kept = reference["cases"] if reference["environment"] == here else {}
        merged = {**kept, **{case: round(n) for case, n in counts.items()}}
        reference = {"environment": here, "cases": {k: merged[k] for k in CASES if k in merged}}
        REFERENCE.write_text(json.dumps(reference, indent=1) + "\n")
    tolerance = TOLERANCE
    if reference["environment"] != here:
        tolerance = FOREIGN_TOLERANCE
        print(
            f"The reference was made with {reference['environment']}, this is {here}: "
            f"+{tolerance:.0%} is allowed instead of +{TOLERANCE:.0%}."
        )

    def slower() -> list[str]:
        return [case for case in cases if counts[case] / reference["cases"][case] - 1 > tolerance]

    for layout in range(1, LAYOUTS):
        if again := slower():
            print(f"Counted again in another layout of memory: {', '.join(again)}")
            lay_out_anew(layout)
            for case, n in measure_all(again).items():
                counts[case] = min(n, counts[case])
    for case, n in counts.items():
        change = n / reference["cases"][case] - 1
        print(f"{case:23} {n:10,.0f} instructions/message {change:+7.1%}")
        if change < -tolerance:
            print(f"{'':23} Better: commit the new reference (make bench-reference) to keep it.")
    if slower():
        raise SystemExit(f"more than {tolerance:+.0%}: {', '.join(slower())}")


if __name__ == "__main__":
    main()
