"""The reference has every public name, and says of each what the code says; so do the stubs."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline
import pipeline.aio
import pipeline.metrics
from pipeline.forks import public_names
from tests.support.processes import TIMEOUT_S

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = "".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
#: What is made a page of, and how: a class with its parameters, and what is listed of it.
ENTRIES = dict(
    re.findall(r"^\.\. (?:auto\w+|py:type):: (pipeline\.[\w.]+)(.*)$", REFERENCE, re.MULTILINE)
)
LISTED = {
    name: re.findall(r":: (\w+)$", entries, re.MULTILINE)
    for name, entries in re.findall(
        r"^\.\. autoclass:: (pipeline\.\w+)\n\n((?:   \.\. auto\w+:: \w+\n)+)",
        REFERENCE,
        re.MULTILINE,
    )
} | {
    name: members.split(", ")
    for name, members in re.findall(
        r"^\.\. autoclass:: (pipeline\.[\w.]+).*\n   :members: (.+)$", REFERENCE, re.MULTILINE
    )
}
PUBLIC = [f"pipeline.{name}" for name in pipeline.__all__ if name != "__version__"] + [
    f"{package.__name__}.{name}"
    for package in (pipeline.aio, pipeline.metrics)
    for name in package.__all__
]
#: Of the site; those outside of docs/ are there by a link.
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "tests/*.md")
    for path in ROOT.glob(pattern)
)
COMPILED = (
    pipeline.ConfState,
    pipeline.EncodedMessage,
    pipeline.Entry,
    pipeline.Message,
    pipeline.Snapshot,
    pipeline.SnapshotMetadata,
)


def found(name: str) -> object:
    package, _, attribute = name.rpartition(".")
    return getattr(sys.modules[package], attribute)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_in_the_reference(name: str) -> None:
    assert name in ENTRIES


def test_everything_that_a_transport_has_is_in_the_reference() -> None:
    entries = {
        name.rpartition(".")[2] for name in ENTRIES if name.startswith("pipeline.Transport.")
    }
    assert entries == {*public_names(pipeline.Transport), "stop"} - {"__enter__"}


def test_the_reference_of_asyncio_says_what_is_the_same() -> None:
    own = {name for name in vars(pipeline.aio.Transport) if not name.startswith("_")}
    page = (DOCS / "reference" / "asyncio.md").read_text()
    (rest,) = re.findall(r"What is not here (.*?)\n\n", page, re.DOTALL)
    named = set(re.findall(r"``(\w+)``", rest))
    statistics = {
        name for name in dir(pipeline.Transport) if re.search("stats|active_|metrics", name)
    }
    testing = {"pause", "resume", "cut_peer", "mend_peer"}
    assert named | statistics | testing | {"snapshot"} == (
        {*public_names(pipeline.Transport)} - own - {"__enter__"}
    )


@pytest.mark.parametrize("name", [name for name in LISTED if "aio" not in name])
def test_a_class_whose_members_are_listed_has_no_other(name: str) -> None:
    kind = found(name)
    assert isinstance(kind, type)
    members = {
        member
        for member, value in vars(kind).items()
        if not member.startswith("_") and "For the library" not in (inspect.getdoc(value) or "")
    }
    library = {"attach", "enter", "moved", "finish", "forget_after_fork"}  # the sender's
    assert {*LISTED[name]} - {"__len__"} == members - library


@pytest.mark.parametrize("name", [name for name, rest in ENTRIES.items() if len(rest) > 2])
def test_parameters_that_the_reference_writes_out_are_those_of_the_code(name: str) -> None:
    text = re.sub(r"[~\s]", "", ENTRIES[name])
    written = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(written, ast.FunctionDef)
    named = {
        argument.arg: ast.unparse(default) if default is not None else None
        for argument, default in zip(
            [*written.args.args, *written.args.kwonlyargs],
            [
                *[None] * (len(written.args.args) - len(written.args.defaults)),
                *written.args.defaults,
                *written.args.kw_defaults,
            ],
            strict=True,
        )
    }
    kind = pipeline.metrics.MetricsCollector if "metrics" in name else found(name)
    assert callable(kind)
    actual = inspect.signature(kind).parameters
    assert list(named) == list(actual)
    for parameter, default in named.items():
        expected = actual[parameter].default
        if default is None:
            assert expected is inspect.Parameter.empty, parameter
        else:
            assert eval(default) == expected, parameter


@pytest.mark.parametrize("kind", COMPILED, ids=lambda kind: kind.__name__)
def test_a_compiled_class_tells_its_parameters(kind: Callable[..., Any]) -> None:
    """Their signature is written by hand, in front of the docstring."""
    parameters = inspect.signature(kind).parameters
    assert parameters.keys() == {
        name for name, value in vars(kind).items() if inspect.isgetsetdescriptor(value)
    }
    needed = {"type": pipeline.MessageType.APP, "to": 2, "data": b""}
    least = {
        name: needed[name]
        for name, it in parameters.items()
        if it.default is inspect.Parameter.empty
    }
    all_by_name = {name: it.default for name, it in parameters.items()} | least
    assert pickle.dumps(kind(**least)) == pickle.dumps(kind(**all_by_name))
    positional = [it for it in parameters.values() if it.kind is not inspect.Parameter.KEYWORD_ONLY]
    with pytest.raises(TypeError, match="positional"):
        kind(*[b""] * (len(positional) + 1), **least)


@pytest.mark.skipif(not (ROOT / "pipeline").is_dir(), reason="the sources are not beside the tests")
def test_stubs_have_the_docstrings_of_the_code() -> None:
    """``make stubs`` writes them."""
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "stubs.py", "--check"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_block_of_code_says_in_which_language_it_is(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert "" not in fences[::2]
    assert not any(fences[1::2])
