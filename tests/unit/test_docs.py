"""What the documents say of the code: programs, names, numbers, files and tests they point to."""

from __future__ import annotations

import ast
import dataclasses
import errno
import functools
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pipeline
from pipeline import (
    PeerStats,
    PipelineConfig,
    PipelineStats,
    ProbeStats,
    ReceiverConfig,
    TransportConfig,
    TransportStats,
)
from pipeline.stats import ReceiverStats
from tests.support import MIB
from tests.support.processes import TIMEOUT_S

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
SETTINGS = ROOT / "docs" / "reference" / "settings.md"
SUPPORT = ROOT / "docs" / "support.md"
EXAMPLE = ROOT / "examples" / "two_transports.py"
HOWTO = ROOT / "docs" / "howto"
SECURITY = ROOT / "docs" / "security.md"
TESTS = ROOT / "tests" / "README.md"
DOCUMENTS = sorted(
    path
    for folder in ("", "docs/", "docs/*/", "benchmarks/", "tests/", "tests/fuzz/")
    for path in ROOT.glob(f"{folder}*.md")
)

KIB = 1 << 10

# A public CI tries a wheel with the tests alone; `make test-wheel` has the sources beside it.
needs_sources = pytest.mark.skipif(
    not (ROOT / "pipeline").is_dir(), reason="the package's sources are not beside the tests"
)

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def test_the_program_of_the_readme_is_the_example_and_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert program == EXAMPLE.read_text()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "2 got Message(type=MessageType.HEARTBEAT, to=2, from_=1, term=1)",
        "1 got Message(type=MessageType.HEARTBEAT_RESP, to=1, from_=2, term=1)",
    ]


def test_the_readme_can_be_read_in_two_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 160


@pytest.fixture
def overview(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("overview")


def test_chart_and_table_of_the_readme_are_made_of_the_results(overview: ModuleType) -> None:
    """``python benchmarks/overview.py`` makes them."""
    results = overview.load()
    assert overview.chart(results) == overview.CHART.read_text()
    assert f"\n{overview.table(results)}\n" in README.read_text()
    assert str(overview.CHART.relative_to(ROOT)) in README.read_text()


def test_a_figure_that_is_worse_than_that_of_etcd_stands_out(overview: ModuleType) -> None:
    def row(ratio: float, *, is_more_good: bool) -> str:
        return str(overview.row("it", ["1"], [ratio, None], is_more_good=is_more_good))

    assert row(1.2, is_more_good=False) == "| it | 1 | **1.20** |  |"
    assert row(0.8, is_more_good=False) == "| it | 1 | 0.80 |  |"
    assert row(0.8, is_more_good=True) == "| it | 1 | **0.80** |  |"


def test_the_readme_has_of_each_etcd_what_the_whole_table_has() -> None:
    whole = {
        version: (claimed, plain, tls, nodes, interop)
        for version, _, claimed, plain, tls, nodes, interop, *_ in (
            line.strip("| ").split(" | ")
            for line in re.findall(r"^\| \d.*", SUPPORT.read_text(), re.MULTILINE)
        )
    }
    rows = re.findall(r"^\| (3\.\d.*?) \|$", README.read_text(), re.MULTILINE)
    short = {
        version: (claimed.split(",")[0], *demos.split(", "), nodes, interop)
        for versions, claimed, demos, nodes, interop in (row.split(" | ") for row in rows)
        for version in versions.split(", ")
    }
    assert short == whole
    assert len(whole) >= 5


GLUE = re.compile(r"Glue: (\d+) lines, those of (.*?) without blank lines", re.DOTALL)


def lines_of_code(path: Path) -> set[int]:
    """Number the lines that hold more than a comment or a docstring."""
    text = path.read_text()
    prose = set[int]()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                prose.update(range(node.lineno, (node.end_lineno or 0) + 1))
    space = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    code = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in space | {tokenize.ENDMARKER}:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - prose


def test_the_lines_of_glue_are_as_many_as_each_program_says() -> None:
    counted = 0
    for path in sorted((ROOT / "examples").glob("*.py")):
        tree = ast.parse(path.read_text())
        if (said := GLUE.search(ast.get_docstring(tree) or "")) is None:
            continue
        counted += 1
        parts = {
            node.name: node
            for node in tree.body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        }
        code = lines_of_code(path)
        lines = sum(
            len(code.intersection(range(parts[name].lineno, (parts[name].end_lineno or 0) + 1)))
            for name in re.findall(r"``(\w+)``", said[2])
        )
        assert lines == int(said[1]), path.name
        table = (HOWTO / "index.md").read_text()
        assert re.search(rf"\.\./examples/{path.name}\).*\| {lines}\b", table)
    assert counted >= 5


def test_every_program_of_the_examples_is_explained() -> None:
    """But for those that are parts of others."""
    text = "".join(page.read_text() for page in HOWTO.glob("*.md"))
    for path in (ROOT / "examples").glob("*.py"):
        if '__name__ == "__main__"' in path.read_text():
            assert f"](../../examples/{path.name})" in text, path.name


def shown(name: str, value: object) -> str:
    """Write a setting's value as the reference does."""
    if value is None:
        return "None"
    if name.endswith("_bytes"):
        assert isinstance(value, int)
        return f"{value // MIB} MiB" if value >= MIB else f"{value // KIB} KiB"
    return f"{value:g} s" if name.endswith("_s") else str(value)


@pytest.mark.streams
def test_the_reference_has_every_setting_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+Config\.\w+)` \| ([^|]+) \|", SETTINGS.read_text(), re.MULTILINE)
    defaults = [
        (f"{config.__name__}.{field.name}", shown(field.name, getattr(config(), field.name)))
        for config in (TransportConfig, PipelineConfig, ReceiverConfig)
        for field in dataclasses.fields(config)
        if not field.name.startswith(("pipeline", "receiver"))
    ]
    assert rows == defaults


def test_there_is_one_place_for_each_table_of_figures() -> None:
    assert re.findall(r"<!-- ([\w-]+:\w+) -->", README.read_text()) == [
        "overview:begin",
        "overview:end",
    ]
    assert re.findall(r"<!-- ([\w-]+:\w+) -->", BENCHMARKS.read_text()) == [
        "bench-peers-tls:begin",
        "bench-peers-tls:end",
        "bench-streams:begin",
        "bench-streams:end",
        "bench-cluster:begin",
        "bench-cluster:end",
        "bench-peers:begin",
        "bench-peers:end",
        "bench:begin",
        "bench:end",
        "bench-snapshot:begin",
        "bench-snapshot:end",
    ]


@each_document
def test_what_a_document_links_to_exists(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text())
    missing = [
        target
        for target in targets
        if not target.startswith("https://") and not (document.parent / target).exists()
    ]
    assert missing == []


@needs_sources
@each_document
def test_files_and_tests_a_document_names_exist(document: Path) -> None:
    named = re.findall(
        r"\b((?:tests|pipeline|docs|examples|benchmarks)/[\w./]+\.(?:pyx|pxd|py|md|proto))(?:::(\w+))?",
        document.read_text(),
    )
    missing = [
        f"{path}::{test}" if test else path
        for path, test in named
        if not (ROOT / path).exists() or (test and test not in functions_of(ROOT / path))
    ]
    assert missing == []


def test_every_test_module_answers_a_question() -> None:
    named = re.findall(r"`(\w+/test_\w+\.py)`", TESTS.read_text())
    modules = (ROOT / "tests").glob("*/test_*.py")
    assert sorted(set(named)) == sorted(str(path.relative_to(ROOT / "tests")) for path in modules)
    helpers = set(re.findall(r"`(\w+\.py)`", TESTS.read_text().partition("`support/`")[2]))
    assert all((ROOT / "tests" / "support" / name).exists() for name in helpers)


def test_every_how_to_is_in_their_table() -> None:
    table = (HOWTO / "index.md").read_text().partition("## Whole nodes")[0]
    named = re.findall(r"^\| .*\]\(([\w-]+\.md)\)", table, re.MULTILINE)
    pages = {page.name for page in HOWTO.glob("*.md")} - {"index.md"}
    assert sorted(named) == sorted(pages)


def upstream_tests() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "upstream-tests.md").read_text()
    return re.findall(r"^\| `((?:Test|Benchmark)\w+)` \| (.*) \|$", text, re.MULTILINE)


def test_every_upstream_test_has_a_row() -> None:
    names = [name for name, _ in upstream_tests()]
    assert len(set(names)) == len(names) == 43


@pytest.mark.parametrize(
    ("name", "ours"), [row for row in upstream_tests() if not row[1].startswith("streams")]
)
def test_an_upstream_test_is_found_under_its_name(name: str, ours: str) -> None:
    """That what is named exists is checked for every document."""
    named = re.findall(r"\w+\.py::(\w+)", ours)
    words = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z][a-z]+", name)
    under_its_name = "_".join(words).lower()
    assert named[0] == under_its_name or name.startswith("Benchmark")
    assert all(test.startswith(under_its_name) for test in named[1:])


@functools.cache
def functions_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_the_security_page_points_to_tests() -> None:
    assert len(re.findall(r"\.py::test_\w+", SECURITY.read_text())) > 20


@each_document
def test_a_document_names_no_machine_and_nothing_outside_the_project(document: Path) -> None:
    text = document.read_text()
    assert re.findall(r"/(?:home|root|tmp|work)/\w+|\.\./shared|site-packages", text) == []


OPERATIONS = ROOT / "docs" / "operations.md"
_PLACEHOLDER = re.compile(r"%\.?\d*[a-z]|\{[^}]*\}")


def log_rows() -> list[tuple[list[str], str]]:
    """The lines that operations.md says the log may have, of each row, and the level."""
    text = OPERATIONS.read_text()
    rows = re.findall(r"^\| (`.*?) \| ((?:info|warning|error|once)[^|]*) \|", text, re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", lines), level) for lines, level in rows]


def texts_of_the_source() -> list[str]:
    """Every text of the package, with ``?`` where something is put in."""
    texts = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(
                        str(p.value) if isinstance(p, ast.Constant) else "?" for p in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [_PLACEHOLDER.sub("?", text) for text in texts]


def _pattern(line: str) -> re.Pattern[str]:
    parts = re.split(r"<[^>]*>|\.\.\.", line)
    return re.compile(r".*?".join(map(re.escape, parts)), re.DOTALL)


@needs_sources
def test_every_line_that_operations_md_shows_is_one_the_code_logs() -> None:
    texts = texts_of_the_source()
    shown = [line for lines, _ in log_rows() for line in lines]
    assert len(shown) > 25
    # What a failure's line is made of stands in two places.
    made_of_two = "failed to ? ? on ? (?)"
    assert made_of_two in texts
    for line in shown:
        begin = line.partition(": failed to write <id>")[0]
        assert any(_pattern(begin).match(text) for text in texts), line


@needs_sources
def test_operations_md_shows_every_warning_and_error() -> None:
    """What an operator may find in the log is explained."""
    shown = [
        _pattern(line.partition(": failed to write <id>")[0])
        for lines, _ in log_rows()
        for line in lines
    ]
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for line in logged_by(function):
                text = _PLACEHOLDER.sub("?", line)
                if len(text) > len("?"):
                    assert any(pattern.match(text) for pattern in shown), (path.name, line)


def logged_by(function: ast.FunctionDef) -> Iterator[str]:
    """The texts of the warnings and errors of a function, given as they are or by a name."""
    named: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    named.setdefault(getattr(name, "id", ""), []).append(value)
    for call in ast.walk(function):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        # What is passed over: levels, and of `_refuse` the verdict and the request.
        passed = {"warning": 0, "error": 0, "exception": 0, "_warn": 0, "log": 1, "_refuse": 2}
        texts = call.args[passed[call.func.attr] :][:1] if call.func.attr in passed else []
        for text in [value for it in texts for value in named.get(getattr(it, "id", ""), [it])]:
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield text.value


def test_the_signs_of_operations_md_are_numbers_there_are() -> None:
    kinds = (PipelineStats, TransportStats, PeerStats, ProbeStats, ReceiverStats)
    fields = {field for kind in kinds for field in kind._fields}
    (section,) = re.findall(
        r"^## What to watch$(.*?)^## ", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL
    )
    signs = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert len(signs) > 15
    for sign in signs:
        first = re.findall(r"`([a-z_]+)`", sign)[0]
        assert first in fields, sign
        for call in re.findall(r"`(?:Transport\.)?([a-z_]+)\(\)`", sign):
            assert callable(getattr(pipeline.Transport, call)), sign


@needs_sources
def test_the_reasons_of_operations_md_are_those_the_code_gives() -> None:
    (paragraph,) = re.findall(
        r"^Reasons: (.*?)\n\n", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL
    )
    reasons = re.findall(r"`([^`]+)`", paragraph.replace("\n", " "))
    assert len(reasons) >= 8
    source = "".join(
        path.read_text()
        for path in sorted((ROOT / "pipeline").rglob("*.py*"))
        if path.suffix != ".pyc"
    )
    for reason in reasons:
        if any(reason.endswith(os.strerror(number)) for number in errno.errorcode):
            continue  # the system's
        text = re.split("'?<", reason)[0]  # what is put in for <...> is not in the source
        assert text, reason
        assert f'"{text}' in source, reason
