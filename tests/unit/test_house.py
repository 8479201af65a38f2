"""The house: which folder may know which, and that no two modules know each other.

The table is docs/architecture.md's. It says nothing of imports for annotations alone (``if
TYPE_CHECKING``), for nothing runs through them; but they make circles like others.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pipeline"

#: Folders, each with those that it may import from, besides itself and what all may know.
MAY_KNOW: dict[str, set[str]] = {
    "raftpb": set(),
    "wire": {"raftpb"},
    "tls": set(),
    "net": {"wire", "tls"},
    "send": {"wire", "tls", "net"},
    "receive": {"wire", "tls", "net"},
    "snapshot": {"wire", "tls", "net", "send", "receive"},
    "stream": {"wire", "tls", "net", "send", "receive"},
    # peer.py, remote.py, node.py, and the face on it that waits in the caller's thread.
    "": {"raftpb", "wire", "tls", "net", "send", "receive", "snapshot", "stream"},
    # The face on node.py that is awaited; nothing at the root knows it.
    "aio": {"", "wire", "tls", "send", "receive", "snapshot", "stream"},
}
#: Modules at the root that know no folder, so that every folder may know them.
KNOWN_TO_ALL = {
    *("arguments", "callbacks", "config", "errors", "forks", "identity", "locks", "logs", "names"),
    *("raft", "reasons", "stats", "threads", "types", "_system", "_version"),
}
#: What one module knows of another that knows it, for annotations alone.
MAY_NAME = {("tls.rules", "tls.info")}
#: Sending's extension, at the root because that is where it is looked for.
OF_SEND = "_core"
#: Programs over the public names.
PROGRAMS = {"cli", "examples"}

pytestmark = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason="the package's sources are not beside the tests"
)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.p*")):
        if path.suffix in (".py", ".pyx", ".pxd"):
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            if name.split(".")[0] not in PROGRAMS:
                yield name, path


NAMES = {name for name, _ in modules()}


def imports_of(path: Path, *, for_annotations: bool) -> set[str]:
    """Return the modules of ours that a file imports or cimports, wherever in it."""
    text = path.read_text()
    if path.suffix == ".py" and not for_annotations:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        text = ast.unparse(tree)
    found = set()
    for package, names in re.findall(
        r"^\s*from (pipeline[\w.]*) c?import (\([^)]*\)|.*)$", text, re.MULTILINE
    ):
        for name in re.findall(r"\w+", re.sub(r"\bas \w+|#.*", "", names)):
            module = f"{package}.{name}".removeprefix("pipeline.")
            found.add(module if module in NAMES else package.partition(".")[2])
    found |= set(re.findall(r"^\s*c?import pipeline\.([\w.]+)", text, re.MULTILINE))
    return found & NAMES


def folder_of(module: str) -> str:
    if module == OF_SEND:
        return "send"
    folder, dot, _ = module.partition(".")
    return folder if dot else ""


KNOWS = {name: set[str]() for name in NAMES}
NAMED = {name: set[str]() for name in NAMES}  # those known for annotations alone included
for _name, _path in modules():
    KNOWS[_name] |= imports_of(_path, for_annotations=False)
    NAMED[_name] |= imports_of(_path, for_annotations=True)


@pytest.mark.parametrize("module", sorted(NAMES))
def test_arrows_only_point_down(module: str) -> None:
    folder = folder_of(module)
    may_know = {folder, *MAY_KNOW[folder]} if module not in KNOWN_TO_ALL else set[str]()
    wrong = {
        known
        for known in KNOWS[module] - KNOWN_TO_ALL
        if folder_of(known) not in may_know and module != "__init__"
    }
    assert wrong == set()


def test_no_two_modules_know_each_other() -> None:
    """Nor several in a circle: leaving out whoever knows none that is left, all are left out."""
    left = {
        name: {other for other in known if other != name and (name, other) not in MAY_NAME}
        for name, known in NAMED.items()
    }
    while leaves := {name for name, known in left.items() if not known & left.keys()}:
        left = {name: known for name, known in left.items() if name not in leaves}
    assert set(left) == set()


def test_no_file_has_grown_too_long_to_be_read() -> None:
    """Some 800 lines; ``_messages`` is five classes alike, each of them readable by itself."""
    long = {
        path.name: lines
        for name, path in modules()
        if (lines := len(path.read_text().splitlines())) > 900 and name != "wire._messages"
    }
    assert long == {}


def test_every_folder_is_in_the_table() -> None:
    folders = {folder_of(name) for name in NAMES if folder_of(name) != ""}
    assert folders | {""} == set(MAY_KNOW)
