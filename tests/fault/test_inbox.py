"""An inbox, in processes of their own: a GIL that is held, memory, fork, exit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run

each_scheme = pytest.mark.parametrize("scheme", ["http", "https"])


def assert_runs(*args: str) -> None:
    result = run("inbox.py", *args)
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr
    assert result.stderr == ""


@each_scheme
def test_10_000_heartbeats_are_answered_while_one_call_holds_the_gil(
    scheme: str, tmp_path: Path
) -> None:
    assert_runs("held GIL", *([str(tmp_path)] if scheme == "https" else []))


@pytest.mark.parametrize("seconds", ["1", pytest.param("60", marks=pytest.mark.slow)])
def test_an_inbox_that_nobody_takes_from_keeps_its_bound_and_loses_nothing(seconds: str) -> None:
    assert_runs("memory", seconds)


@each_scheme
def test_a_forked_child_leaves_the_inbox_to_its_parent(scheme: str, tmp_path: Path) -> None:
    assert_runs("fork", *([str(tmp_path)] if scheme == "https" else []))


def test_forks_while_messages_come_and_go() -> None:
    assert_runs("fork while it changes")


@pytest.mark.parametrize("state", ["busy", "taking", "delivering", "taken", "thrown away"])
@each_scheme
def test_the_interpreter_exits_without_stop(state: str, scheme: str, tmp_path: Path) -> None:
    assert_runs("exits", state, *([str(tmp_path)] if scheme == "https" else []))
