"""Write the docstrings of compiled classes into their stubs, where editors look for them.

python tools/stubs.py           writes them; the .pyx is the source, and must have been built
python tools/stubs.py --check   fails if a stub says something else

Only what applications use has them: the public classes, and what ``Pipeline`` has from ``Sender``.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pipeline

ROOT = Path(__file__).parents[1]


def subjects() -> dict[str, set[str]]:
    """Name what is to have a docstring, by module: classes, and their methods and properties."""
    found: dict[str, set[str]] = {}
    for public in pipeline.__all__:
        for kind in getattr(getattr(pipeline, public), "__mro__", ()):
            if not _stub(kind.__module__).exists():
                continue
            names = found.setdefault(kind.__module__, set())
            members = [name for name in vars(kind) if not name.startswith("_")]
            if kind.__name__ == public:
                names.add(public)
            else:
                members = [name for name in members if name in pipeline.Pipeline._ASKED]
            names.update(f"{kind.__name__}.{name}" for name in members)
    return found


def with_docstrings(module: str, names: set[str]) -> str:
    """Return what the stub of a module is to be."""
    text = _stub(module).read_text("utf-8")
    lines = text.splitlines(keepends=True)
    for name, node in reversed(
        list(_definitions(ast.parse(text)))
    ):  # lines before stay as they are
        if name not in names:
            continue
        thing: object = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
        docstring = _docstring(inspect.getdoc(thing), node.col_offset + 4)
        first = node.body[0]
        begin, end = first.lineno - 1, first.end_lineno
        if ast.get_docstring(node) is not None:
            lines[begin:end] = docstring
        elif isinstance(node, ast.ClassDef):
            lines[begin:begin] = docstring
        else:  # "def name(...) -> type: ..."
            lines[begin:end] = [lines[begin][: first.col_offset].rstrip() + "\n", *docstring]
    return "".join(lines)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name, node
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not _is_setter(member):
                    yield f"{node.name}.{member.name}", member


def _is_setter(member: ast.FunctionDef) -> bool:
    return any(
        isinstance(it, ast.Attribute) and it.attr == "setter" for it in member.decorator_list
    )


def _docstring(text: str | None, indent: int) -> list[str]:
    if not text:
        raise SystemExit("a public name has no docstring")
    text = text.replace("\\", "\\\\")
    lines = f'"""{text}\n"""'.splitlines() if "\n" in text else [f'"""{text}"""']
    return [f"{' ' * indent}{line}".rstrip() + "\n" for line in lines]


def _stub(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.pyi"


def main() -> int:
    """Write the stubs, or say which differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one differs")
    check = parser.parse_args().check
    differing = 0
    for module, names in subjects().items():
        path, text = _stub(module), with_docstrings(module, names)
        if text == path.read_text("utf-8"):
            continue
        differing += 1
        if check:
            print(f"{path.relative_to(ROOT)}: differs from the docstrings; make stubs", flush=True)
        else:
            path.write_text(text, "utf-8")
    return int(check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
