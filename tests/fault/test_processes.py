"""What takes a process of its own to find out: exit, fork, the GIL, memory, wild objects."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import MIB
from tests.support.processes import ISOLATED, TIMEOUT_S, run
from tests.support.tls import Authority


@contextlib.contextmanager
def sink(counter: Path, *files: str) -> Iterator[str]:
    """Run tests/isolated/sink.py, with TLS if ``files`` are given; its port."""
    counter.write_bytes(bytes(8))
    process = subprocess.Popen(
        [sys.executable, str(ISOLATED / "sink.py"), str(counter), *files],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process.stdout.readline().strip()  # type: ignore[union-attr]
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(TIMEOUT_S)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("mode", ["queued", "contended"])
def test_messages_leave_while_the_main_thread_holds_the_gil(
    mode: str, scheme: str, tmp_path: Path
) -> None:
    files: list[str] = []
    if scheme == "https":
        authority = Authority(tmp_path)
        files = [*map(str, authority.issue("node")), str(authority.ca_file)]
    with sink(tmp_path / "counter", *files) as port:
        result = run("spin.py", mode, port, str(tmp_path / "counter"), *files)
    assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)


def test_a_64_mib_snapshot_is_not_copied(tmp_path: Path) -> None:
    with sink(tmp_path / "counter") as port:
        result = run("memory.py", port)
    assert result.stderr == ""
    assert int(result.stdout) < 16 * MIB


@pytest.mark.parametrize(
    "state",
    [
        "made",
        "started",
        "idle",
        "dialling",
        "reading",
        "writing",
        "reading an odd answer",
        "in a blocked callback",
        "in a callback that sleeps",
        "in a callback that spins",
        "resolving",
        "thrown away",
        "sending a snapshot",
        "in a snapshot's source",
    ],
)
def test_the_interpreter_exits_without_stop(state: str) -> None:
    result = run("exits.py", state)
    assert (result.stdout, result.stderr, result.returncode) == ("exits\n", "", 0)


@pytest.mark.parametrize(
    "state",
    [
        "started",
        "shaking hands",
        "idle",
        "reading",
        "writing",
        "reading an odd answer",
        "in a blocked callback",
        "in a callback that spins",
        "thrown away",
        "sending a snapshot",
        "in a snapshot's source",
    ],
)
def test_the_interpreter_exits_without_stop_over_tls(state: str, tmp_path: Path) -> None:
    """OpenSSL has itself cleared away at exit, and nobody may be inside."""
    result = run("exits.py", state, str(tmp_path))
    assert (result.stdout, result.stderr, result.returncode) == ("exits\n", "", 0)


def test_an_exit_code_is_kept() -> None:
    assert run("exits.py", "failing").returncode == 3


@pytest.mark.parametrize("how", ["stops", "exits", "in flight"])
def test_fork(how: str) -> None:
    result = run("forks.py", how)
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_fork_of_a_transport_that_probes(scheme: str, tmp_path: Path) -> None:
    result = run("fork_transport.py", *([str(tmp_path)] if scheme == "https" else []))
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_a_forked_child_is_told_whose_transport_it_uses(tmp_path: Path) -> None:
    result = run("fork_foreign.py", str(tmp_path))
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_a_transport_made_before_a_fork_is_started_by_parent_and_child() -> None:
    result = run("fork_before_start.py")
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_fork_in_the_middle_of_a_snapshot() -> None:
    result = run("fork_snapshot.py")
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_fork_of_a_node_with_connections_in_every_state(tmp_path: Path) -> None:
    result = run("fork_sending.py", str(tmp_path))
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_a_forked_child_closes_its_copies_of_the_connections() -> None:
    """As long as it has them, the peer does not hear that the parent has closed them."""
    result = run("forks.py", "stops")
    assert "unclosed" not in result.stderr


@pytest.mark.parametrize(
    "place",
    [
        "a dial's alert",
        "a probe",
        "a probe over TLS",
        "a snapshot's bytes",
        "a snapshot's file",
        "a snapshot's ciphertext",
        "a snapshot's answer",
        "a snapshot's answer over TLS",
        "a snapshot's 100",
        "a snapshot's 100 over TLS",
    ],
)
def test_a_peer_that_is_gone_does_not_end_a_process_that_wants_sigpipe(
    place: str, tmp_path: Path
) -> None:
    result = run("sigpipe.py", place, str(tmp_path))
    assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("stop", marks=pytest.mark.slow),
        *("gentle", "changes", "Pipeline.stop", "Listener.close", "timer"),
    ],
)
def test_a_signals_handler_calls_any_method_at_any_line(kind: str, tmp_path: Path) -> None:
    result = run("signals.py", kind, str(tmp_path))
    assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)


def test_what_ctrl_c_interrupts_at_any_line_leaves_nothing_that_a_stop_does_not_end(
    tmp_path: Path,
) -> None:
    """``stop``, ``close`` and the like finish what they had begun when they are called again."""
    result = run("signals.py", "Ctrl-C", str(tmp_path))  # sockets that were dropped say so
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


@pytest.mark.slow  # a thousand and more failures, over TLS and not
def test_failures_leave_nothing_for_the_cyclic_collector(tmp_path: Path) -> None:
    """A program may have switched it off, and a peer that is down fails messages for days."""
    result = run("cycles.py", str(tmp_path))
    assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)


def test_what_runs_next_to_the_fork_may_listen_and_close() -> None:
    result = run("fork_hooks.py")
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_a_connection_a_forked_child_keeps_open_touches_no_freed_worker() -> None:
    """To close a descriptor takes it out of epoll only if no other process has it (epoll(7))."""
    result = run("stale.py")
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_callers_hear_of_the_end_of_a_node_although_its_forked_worker_lives(
    end: str, tmp_path: Path
) -> None:
    """The child has closed its copies of all our descriptors, and what we close is shut first."""
    result = run("fork_listener.py", end, str(tmp_path))
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr
