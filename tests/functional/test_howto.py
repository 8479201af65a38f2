"""The programs of the how-to pages, as a reader runs them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import urllib3

from pipeline.examples.etcd import find_etcd, free_port
from tests.support.pages import programs
from tests.support.processes import TIMEOUT_S, Program
from tests.support.waiting import eventually

PROGRAMS = programs()
#: What takes arguments and runs until it is ended has a test of its own below.
ENDLESS = {"node-1", "asyncio-2", "etcd-1"}
#: What is not everywhere where the tests run.
NEEDS = {"asyncio-2": "fastapi", "prometheus-1": "prometheus_client", "tls-1": "trustme"}

Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a page's program with arguments."""
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> Program:
            path = tmp_path / f"{name}.py"
            path.write_text(PROGRAMS[name][0])
            return stack.enter_context(Program(path, *arguments))

        yield start


def urls(count: int) -> list[str]:
    return [f"http://127.0.0.1:{free_port()}" for _ in range(count)]


def test_pages_have_programs() -> None:
    assert PROGRAMS.keys() >= ENDLESS
    assert len(PROGRAMS) >= 7


@pytest.mark.parametrize("name", PROGRAMS.keys() - ENDLESS)
def test_a_program_prints_what_its_page_shows(tmp_path: Path, name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    text, printed = PROGRAMS[name]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""

    def lines(output: str) -> list[str]:
        """Two threads print, and how often a snapshot tells of bytes depends on the time."""
        return sorted(line for line in output.splitlines() if not line.startswith("sending: "))

    assert printed
    assert lines(result.stdout) == lines(printed)
    assert list(tmp_path.iterdir()) == []


def test_nodes_tell_of_one_that_ends_and_comes_back(start: Start) -> None:
    members = urls(3)
    first = start("node-1", "1", *members)
    second = start("node-1", "2", *members)
    for other in ("2 is ACTIVE", "3 is INACTIVE"):
        first.wait_line(other)
    second.wait_line("1 is ACTIVE")
    seen = len(first.lines)
    second.process.send_signal(signal.SIGINT)
    assert second.process.wait(TIMEOUT_S) == 0
    first.wait_line("2 is INACTIVE .", seen)
    seen = len(first.lines)
    start("node-1", "2", *members)
    first.wait_line("2 is ACTIVE", seen)


def test_a_service_has_a_node_on_its_loop(start: Start) -> None:
    pytest.importorskip(NEEDS["asyncio-2"])
    members, ports = urls(2), [str(free_port()), str(free_port())]
    for number, port in enumerate(ports, start=1):
        start("asyncio-2", str(number), port, *members)

    def has_heard(port: str) -> bool:
        try:
            url = f"http://127.0.0.1:{port}/"
            told = urllib3.request("GET", url, retries=False, timeout=10.0).json()
        except urllib3.exceptions.HTTPError:
            return False  # not listening yet
        return bool(told["peers"] == 1 and told["heartbeats"] > 1)

    for port in ports:
        eventually(lambda port=port: has_heard(port), "heartbeats of the other")


@pytest.mark.etcd
def test_a_learner_of_a_real_etcd_is_named_and_becomes_a_voter(
    start: Start, tmp_path: Path
) -> None:
    """Then nothing is committed without it."""
    client, peer, ours = urls(3)
    flags = {
        "name": "default",
        "data-dir": str(tmp_path / "data"),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        "log-outputs": str(tmp_path / "etcd.log"),
        "logger": "zap",
    }
    etcd = subprocess.Popen(
        [find_etcd(), *(f"--{flag}={value}" for flag, value in flags.items())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    http = urllib3.PoolManager(retries=False)

    def put(timeout_s: float = 30.0) -> int:
        body = {"key": "a2V5", "value": "dmFsdWU="}
        try:
            url = f"{client}/v3/kv/put"
            return http.request("POST", url, json=body, timeout=timeout_s).status
        except urllib3.exceptions.HTTPError:
            return 0

    try:
        eventually(lambda: put() == 200, "etcd leads")
        program = start("etcd-1", ours, client)
        program.wait_line("learner [0-9a-f]+ has the log up to [1-9]")
        program.wait_line("^python voter$")
        program.wait_line("^default voter$")
        assert put() == 200
        program.process.send_signal(signal.SIGSTOP)
        # Its threads stop one by one: a write may still be acknowledged.
        eventually(lambda: put(timeout_s=1.0) != 200, "nothing is committed without it")
        program.process.send_signal(signal.SIGCONT)
        eventually(lambda: put() == 200, "a majority")
        program.write("\n")
        assert program.process.wait(TIMEOUT_S) == 0
        assert not any(re.search("Traceback|ERROR", line) for line in program.lines)
    finally:
        etcd.kill()
        etcd.wait()
