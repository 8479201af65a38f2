"""Programs run as processes of their own, and what they leave."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
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


def run_under(command: tuple[str, ...], script: str, *args: str) -> Run:
    """Do that by a command that is given another one."""
    return run_python(str(ISOLATED / script), *args, under=command)


def run_python(*args: str, under: tuple[str, ...] = ()) -> Run:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        [*under, sys.executable, "-W", "error", *args],
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


class Program:
    """A module, or a file, that runs as a process of its own, its output read as it comes.

    Attributes
    ----------
    lines : list of str
        What it has written so far, to either output.
    """

    def __init__(self, program: str | Path, *arguments: str) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._has_ended = False
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-W", "error"),
                *(("-m", program) if isinstance(program, str) else (program,)),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it if it runs; nothing of it is left."""
        self.process.kill()
        self._reader.join()  # it reads until nobody can write
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def write(self, text: str) -> None:
        """Give it input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text)

    def wait_line(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line that a pattern is found in, of those from ``after`` on."""
        found: list[re.Match[str]] = []

        def is_there() -> bool:
            found[:] = filter(None, (re.search(pattern, line) for line in self.lines[after:]))
            return bool(found) or self._has_ended

        with self._news:
            self._news.wait_for(is_there, TIMEOUT_S)
        assert found, f"no {pattern!r} in\n" + "\n".join(self.lines)
        return found[0]

    def terminate(self) -> int:
        """Ask it to end, and wait until it has; how it ended."""
        self.process.terminate()
        return self.process.wait(TIMEOUT_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._has_ended = True
            self._news.notify_all()
