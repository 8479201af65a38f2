"""``raft-pipeline snapshot``: a database goes from one file to another, or it is said why not."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from pipeline import Inbox, ReceiverConfig, Transport, TransportConfig
from pipeline.cli.commands import commands
from pipeline.cli.nodes import Quiet
from pipeline.cli.snapshot import Arriving
from tests.support import LONG_TIMEOUT
from tests.support.processes import TIMEOUT_S
from tests.support.server import ScriptedServer, always, answer, refused_port
from tests.support.snapshots import snapshot
from tests.support.tls import Authority
from tests.support.waiting import eventually

ABOUT = [
    *("--cluster-id", "7", "--from", "1", "--to", "2", "--index", "26", "--term", "3"),
    *("--voter", "1", "--voter", "2"),
]
MIB = 1 << 20


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "database"
    path.write_bytes(os.urandom(3 * MIB + 1))
    return path


class Receiving:
    """``snapshot receive`` as a process of its own."""

    def __init__(self, url: str, directory: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline", "snapshot", "receive", url, str(directory)),
                *("--cluster-id", "7", "--member-id", "2", "--json", *options),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url: str = json.loads(self._process.stdout.readline())["url"]

    def rest(self) -> tuple[list[dict[str, Any]], int]:
        """Wait for its end; what it has said since, and its exit code."""
        out, _ = self._process.communicate(timeout=TIMEOUT_S)
        return [json.loads(line) for line in out.splitlines()], self._process.returncode

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def receive(tmp_path: Path) -> Iterator[Any]:
    started: list[Receiving] = []

    def start(url: str = "http://127.0.0.1:0", *options: str) -> Receiving:
        started.append(Receiving(url, tmp_path / "received", *options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def send(url: str, database: Path, *options: str) -> tuple[dict[str, Any], int]:
    arguments = ["snapshot", "send", url, str(database), *ABOUT, "--json", *options]
    result = CliRunner().invoke(commands, arguments)
    said: dict[str, Any] = json.loads(result.output)
    return said, result.exit_code


def test_what_one_sends_the_other_has(receive: Any, database: Path) -> None:
    receiving = receive()
    said, exit_code = send(receiving.url, database)
    assert (said["verdict"], exit_code) == ("ok", 0)
    assert said["sent_bytes"] == said["total_bytes"] == database.stat().st_size
    (told,), code = receiving.rest()
    assert code == 0
    assert told["message"]["snapshot"]["index"] == 26
    assert told["message"]["snapshot"]["voters"] == ["1", "2"]
    assert told["bytes"] == database.stat().st_size
    assert Path(told["path"]).read_bytes() == database.read_bytes()


def test_what_arrives_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    may_go_on = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield b"x" * 400
        assert may_go_on.wait(LONG_TIMEOUT)
        yield b"x" * 600

    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path))
    screen = io.StringIO()
    with (
        Transport(1, 7, Quiet(), inbox=Inbox()) as sender,
        Transport(2, 7, Quiet(), inbox=Inbox(), config=config) as taker,
        Arriving(taker, Console(file=screen, force_terminal=True, width=80)) as arriving,
    ):
        arriving.show()
        assert arriving.progress.tasks == []
        sender.add_peer(2, [taker.listen("http://127.0.0.1:0").url])
        transfer = sender.send_snapshot(snapshot(), chunks(), size=1000)

        def shown() -> list[tuple[float, float | None]]:
            arriving.show()
            return [(task.completed, task.total) for task in arriving.progress.tasks]

        eventually(lambda: shown() == [(400, 1000)])
        may_go_on.set()
        eventually(lambda: shown() == [(1000, 1000)])  # until the node takes its message
        arriving.end()
        assert arriving.progress.tasks == []
        transfer.cancel()
    assert "receiving" in screen.getvalue()


def test_over_tls_as_well(receive: Any, database: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    cert, key = map(str, authority.issue("node"))
    files = ("--cert", cert, "--key", key, "--cacert", str(authority.ca_file))
    receiving = receive("https://127.0.0.1:0", *files)
    assert send(receiving.url, database, *files)[1] == 0
    (told,), _ = receiving.rest()
    assert Path(told["path"]).read_bytes() == database.read_bytes()


def test_what_went_wrong_has_the_verdict_and_the_exit_code_of_probe(database: Path) -> None:
    with refused_port() as port:
        said, exit_code = send(f"http://127.0.0.1:{port}", database)
    assert (said["verdict"], exit_code) == ("refused", 3)
    assert "Connection refused" in said["reason"]
    mismatch = answer("412 Precondition Failed", b"cluster ID mismatch\n")
    with ScriptedServer(always(mismatch)) as server:
        said, exit_code = send(server.url, database)
    assert (said["verdict"], exit_code) == ("wrong-cluster", 6)


def test_a_database_that_is_too_large_is_refused_and_nothing_is_left(
    receive: Any, database: Path, tmp_path: Path
) -> None:
    receiving = receive("http://127.0.0.1:0", "--max-bytes", "1000")
    said, exit_code = send(receiving.url, database)
    assert (said["verdict"], exit_code) == ("cannot-process", 1)
    receiving.interrupt()
    assert receiving.rest() == ([], 130)
    assert list((tmp_path / "received").iterdir()) == []


def test_a_rate_of_none_is_a_wrong_command_line(database: Path) -> None:
    arguments = ["snapshot", "send", "http://127.0.0.1:1", str(database), *ABOUT, "--rate", "0"]
    assert CliRunner().invoke(commands, arguments).exit_code == 2


def test_an_interrupt_cancels_and_is_told(database: Path) -> None:
    with ScriptedServer(on_head=lambda connection, head: server.release.wait() and False) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline", "snapshot", "send", server.url),
                *(str(database), *ABOUT, "--json", "--rate", "1"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        server.wait_connections(1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert json.loads(out)["verdict"] == "ended-here"
