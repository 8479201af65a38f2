"""``tools/demo_all.py``: what it makes of what it sees."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "demo_all.py"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("demo_all", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["demo_all"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_all"]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.interop.test_etcd_tls" name="test_one"/>
<testcase classname="tests.interop.test_etcd" name="test_a_snapshot_of_etcd_is_stored[plain]"/>
<testcase classname="tests.interop.test_etcd" name="test_a_snapshot_of_etcd_is_stored[TLS]">{}
</testcase>
<testcase classname="tests.interop.test_etcd" name="test_etcd_stores_a_snapshot[plain]"/>
<testcase classname="tests.interop.test_etcd" name="test_the_leader_learns_our_version"/>
</testsuite></testsuites>"""


def test_what_all_passed_is_no_failure(tool: ModuleType) -> None:
    cells, failed = tool.judge(tool.outcomes_of(REPORT.format("")))
    assert failed == []
    assert cells == {
        "interop tests": "5/5",
        "mutual TLS": "2/2",
        "snapshot to us": "2/2",
        "snapshot to etcd": "1/1",
        "cluster version": "1/1",
    }


@pytest.mark.parametrize("mark", ["failure", "error", "skipped"])
def test_a_test_that_did_not_pass_fails_each_column_it_is_in(tool: ModuleType, mark: str) -> None:
    cells, failed = tool.judge(tool.outcomes_of(REPORT.format(f"<{mark}/>")))
    assert failed == ["interop tests", "mutual TLS", "snapshot to us"]
    assert (cells["interop tests"], cells["mutual TLS"]) == ("4/5", "1/2")


def test_no_test_at_all_is_a_failure(tool: ModuleType) -> None:
    _, failed = tool.judge({})
    assert failed == ["interop tests", *tool.GROUPS]


def test_every_group_has_tests(tool: ModuleType) -> None:
    """Else a renamed test would only be seen when the table is made."""
    interop = TOOL.parent.parent / "tests" / "interop"
    source = "".join(f"{path.stem}\n{path.read_text()}" for path in interop.glob("*.py"))
    named = [part for parts in tool.GROUPS.values() for part in parts if part.isidentifier()]
    assert [part for part in named if part not in source] == []
    assert len(named) == len(tool.GROUPS)


def tried(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, **outputs: str) -> Any:
    """Let both programs print this; the row, with its version and failures."""
    monkeypatch.setattr(tool, "run", lambda command, binary, log: outputs[log.stem])
    row = tool.Row("3.9.1", {})
    for step in (tool.try_demo, partial(tool.try_demo, has_tls=True), tool.try_three_nodes):
        row = step(row, Path("etcd"), Path("logs"))
    return row


DEMO = '{"committed": %d, "books_balance": true, "server_version": "3.9.0", "tls_handshakes": null}'
DEMO_TLS = DEMO.replace("null", "7")


def test_a_run_that_commits_everything_is_good(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "etcd leads\n240/240 writes are in all three\n"
    row = tried(tool, monkeypatch, demo=DEMO % 500, demo_tls=DEMO_TLS % 500, three_nodes=told)
    assert row.failed == []
    assert row.cells == {
        "server_version": "3.9.0",
        "demo": "500/500",
        "demo --tls": "500/500",
        "three nodes": "240/240",
    }
    line = tool.table([row]).splitlines()[-1]
    assert line.startswith("| 3.9.1 | - | 3.9.0 | 500/500 | 500/500 | 240/240 |")


@pytest.mark.parametrize(
    ("outputs", "failed"),
    [
        ({"demo": DEMO % 499}, "demo"),
        ({"demo": (DEMO % 500).replace("true", "false")}, "demo"),
        ({"demo": "Error: etcd ended instead of starting"}, "demo"),
        ({"demo_tls": DEMO_TLS % 499}, "demo --tls"),
        ({"demo_tls": DEMO_TLS.replace("7", "0") % 500}, "demo --tls"),
        ({"demo_tls": ""}, "demo --tls"),
        ({"three_nodes": "239/240 writes are in all three"}, "three nodes"),
        ({"three_nodes": "not within 60 s: etcd leads"}, "three nodes"),
        ({"three_nodes": ""}, "three nodes"),
    ],
)
def test_a_run_that_does_not_stands_out_in_the_table(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, outputs: dict[str, str], failed: str
) -> None:
    good = {
        "demo": DEMO % 500,
        "demo_tls": DEMO_TLS % 500,
        "three_nodes": "240/240 writes are in all three",
    }
    row = tried(tool, monkeypatch, **{**good, **outputs})
    assert row.failed == [failed]
    assert tool.table([row]).count("FAILED**") == 1


def test_what_cannot_be_had_is_named_with_the_reason(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "WORK", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    go, debian = tool.sources()[-1], tool.sources()[0]
    for source, reason in ((go, "skipped: no go"), (debian, "skipped: no apt-get")):
        row = tool.try_one(source, is_fetch_only=False, is_quick=True)
        assert (row.version, row.cells, row.failed) == (source.name, {"from": reason}, ())


def test_a_download_that_fails_is_tried_again(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "PAUSE_S", 0.0)
    once = 'echo >> tried; test "$(wc -l < tried)" -gt 2 || { echo no network >&2; exit 1; }'
    with pytest.raises(tool.Unavailable, match=r"^sh: no network$"):
        tool.succeed("sh", "-c", once, cwd=tmp_path, tries=2)
    tool.succeed("sh", "-c", once, cwd=tmp_path)


def test_the_versions_are_those_that_the_modules_pin(tool: ModuleType) -> None:
    names = [source.name for source in tool.sources()]
    assert names[:2] == ["3.4", "3.5.1"]
    assert [name.rpartition(".")[0] for name in names[2:]] == ["3.5", "3.6", "3.7"]
