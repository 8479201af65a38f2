"""``raft-pipeline demo``, as a user runs it, and the program of the README."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click.testing
import pytest
import urllib3

import pipeline.cli
from pipeline.cli.demo import demo
from tests.support import has_trustme
from tests.support.etcd import hide_etcds, make_pretender
from tests.support.processes import TIMEOUT_S, assert_nothing_is_left, commands_with
from tests.support.waiting import eventually

#: For a run of 100 writes, which takes 3 s on an idle machine.
RUN_TIMEOUT_S = TIMEOUT_S


StartDemo = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[StartDemo]:
    """Start the installed command; its temporary files go below ``tmp_path``."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("raft-pipeline"), "demo", *options],
            env={**os.environ, "TMPDIR": os.fspath(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:  # only after a failure: its etcd must not stay
            process.terminate()
            process.communicate()


def has_committed(etcd: list[str]) -> bool:
    """Tell whether the etcd of a command line has committed some of the demo's writes."""
    url = etcd[etcd.index("--listen-client-urls") + 1]
    try:
        metrics = urllib3.request("GET", f"{url}/metrics", retries=False).data.decode()
    except urllib3.exceptions.HTTPError:
        return False  # not listening yet
    found = re.search(r"^etcd_server_proposals_committed_total (\S+)$", metrics, re.MULTILINE)
    return found is not None and float(found[1]) > 20


@pytest.mark.etcd
def test_every_write_is_committed_and_the_last_line_says_so(
    start_demo: StartDemo, tmp_path: Path
) -> None:
    process = start_demo("--writes", "100")
    out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    assert err == ""
    assert out.splitlines()[-1] == "committed 100/100 through pipeline"
    for shown in ("writes committed per second", "latency p50", "latency p99", "MsgAppResp"):
        assert shown in out
    assert re.search(r"the books balance\W+yes", out)
    assert_nothing_is_left(tmp_path)


@pytest.mark.etcd
def test_json_is_one_object_and_nothing_else(start_demo: StartDemo) -> None:
    process = start_demo("--writes", "20", "--json")
    out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    assert err == ""
    report = json.loads(out)
    assert report["writes"] == report["committed"] == 20
    assert report["server_version"] == re.sub(r"\.\d+$", ".0", report["etcd_version"])
    assert report["tls_handshakes"] is None
    assert report["messages"]["in"]["MsgApp"] > 0
    assert report["messages"]["out"]["MsgAppResp"] > 0
    assert 0 < report["acknowledgement_ms"]["p50"] <= report["acknowledgement_ms"]["p99"]
    books = report["books"]
    assert report["books_balance"] is True
    assert books["offered"] == books["accepted"] + books["refused"]


@pytest.mark.etcd
@has_trustme
def test_over_tls_every_write_is_committed_by_connections_that_shook_hands(
    start_demo: StartDemo, tmp_path: Path
) -> None:
    process = start_demo("--tls", "--writes", "20", "--json")
    etcds: list[list[str]] = []
    eventually(lambda: etcds.extend(commands_with(tmp_path)) or bool(etcds), "etcd runs")
    out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report["committed"] == 20
    assert report["tls_handshakes"] > 0
    assert "--peer-client-cert-auth" in etcds[0]
    url = etcds[0][etcds[0].index("--listen-peer-urls") + 1]
    assert url.startswith("https://")
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("options", [["--tls"], ["--tls", "--json"]])
def test_over_tls_without_trustme_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    result = click.testing.CliRunner().invoke(demo, [*options, "--etcd", "/bin/false"])
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "trustme" in line
    assert "raft-pipeline[demo]" in line


@pytest.mark.etcd
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", ["starting", "writing"])
def test_a_signal_leaves_no_etcd_and_no_directory(
    start_demo: StartDemo, tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    process = start_demo("--writes", "100000")

    def has_come() -> bool:
        assert process.poll() is None, process.communicate()
        if moment == "starting":
            return bool(list(tmp_path.glob("*/etcd.log")))
        return any(has_committed(command) for command in commands_with(tmp_path))

    eventually(has_come, moment)
    process.send_signal(number)
    out, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 128 + number
    assert "committed" not in out
    assert_nothing_is_left(tmp_path)


def test_an_etcd_that_does_not_start_is_reported(
    start_demo: StartDemo, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    binary = make_pretender(tmp_path_factory.mktemp("binary"))
    process = start_demo("--etcd", os.fspath(binary))
    _, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 1
    assert "etcd ended instead of starting" in err
    assert_nothing_is_left(tmp_path)


def test_what_is_no_etcd_is_reported(start_demo: StartDemo, tmp_path: Path) -> None:
    process = start_demo("--etcd", "/bin/false")
    _, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 1
    assert "/bin/false is no etcd" in err
    assert_nothing_is_left(tmp_path)


def test_without_an_etcd_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_etcds(monkeypatch)
    result = click.testing.CliRunner().invoke(demo)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "raft-pipeline[demo]" in line


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_click_or_rich_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "pipeline.cli.commands", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        pipeline.cli.main()
    assert (
        exit_info.value.code == f"raft-pipeline needs {missing}: pip install 'raft-pipeline[cli]'"
    )


def test_the_program_of_the_readme_exchanges_two_messages() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pipeline.examples.two_transports"],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "2 got Message(type=MessageType.HEARTBEAT, to=2, from_=1, term=1)",
        "1 got Message(type=MessageType.HEARTBEAT_RESP, to=1, from_=2, term=1)",
    ]
