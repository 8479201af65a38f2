"""Programs run as processes of their own, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ISOLATED = ROOT / "tests" / "isolated"
# Reached by what hangs: a busy machine takes minutes for what takes 15 s of a quiet one. Below
# pytest's own, so that it is the program that is shown.
TIMEOUT_S = 240.0

Run = subprocess.CompletedProcess[str]


def run(script: str, *args: str) -> Run:
    """Run a script of tests/isolated with the package and the tests as they are here."""
    return run_python(str(ISOLATED / script), *args)


def run_python(*args: str) -> Run:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
        cwd=ROOT,
    )


def commands_with(directory: Path) -> Iterator[list[str]]:
    """Find the command lines of processes that were started with a file of this directory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # ended meanwhile
        if os.fsencode(directory) in command:
            yield os.fsdecode(command).split("\0")


def assert_nothing_is_left(directory: Path) -> None:
    """Neither files nor a process that was started with one of them."""
    assert list(directory.iterdir()) == []
    assert list(commands_with(directory)) == []
