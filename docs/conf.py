"""How ``make docs`` makes the site: of the pages in this folder, and of the docstrings."""

from __future__ import annotations

import ast
import copy
import dataclasses
import enum
import html
import inspect
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import pipeline

DOCS = Path(__file__).parent
ROOT = DOCS.parent

logger = logging.getLogger(__name__)

# What Sphinx and its extensions read.
project = "raft-pipeline"
author = copyright = "The raft-pipeline authors"
version = release = pipeline.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "numpydoc"]
html_css_files = ["site.css"]
html_static_path = ["_static"]
html_theme = "furo"
html_title = f"raft-pipeline {version}"
html_copy_source = False
html_show_sphinx = False
# A name that leads nowhere is a warning, and `make docs` fails.
nitpicky = True
myst_heading_anchors = 4
# Those of Python's names that we use. It is read from here: nothing is downloaded.
intersphinx_mapping = {"python": ("https://docs.python.org/3", "python.inv")}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
numpydoc_show_class_members = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
# What only type checkers need: type variables, and applications as their servers have them.
nitpick_ignore_regex = [
    ("py:class", r"(ASGIApp|WSGIApplication|Credentials|.*\.(Received_contra|Taken))"),
]


# A page that begins with a link to a Markdown file outside of this folder has the text of that file
# on the site, and its own is for a Git host; but for lists of pages, which only the site reads.

_ELSEWHERE = re.compile(r"\[[^]]+\]\(\.\./([\w/]+\.md)\)\n")
_LISTS = re.compile(r"```{toctree}.*?```\n", re.DOTALL)
# Code, which is left as it is, or a link to a file: its text, the file and the place in it.
_LINK = re.compile(
    r"```.*?```|`[^`]*`|\[([^]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", re.DOTALL
)


@cache
def _pages_of_others() -> dict[str, str]:
    """Name the page that stands for each file outside of this folder, both from the root."""
    found = {}
    for page in sorted(DOCS.glob("*.md")):
        if match := _ELSEWHERE.match(page.read_text("utf-8")):
            found[match[1]] = f"docs/{page.name}"
    return found


def _take_from_elsewhere(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put a file into its page, and have the links of every page lead to pages."""
    folder = posixpath.dirname(f"docs/{docname}")

    def moved(link: re.Match[str]) -> str:
        if link[2] is None:
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        page = _pages_of_others().get(target)
        if page is not None:
            return f"[{link[1]}]({posixpath.relpath(page, folder)}{link[3] or ''})"
        if target.endswith(".md") and not target.startswith("docs/"):
            return f"{{download}}`{link[1]} <{link[2]}>`"  # no page, but a file to be had
        return link[0]

    if match := _ELSEWHERE.match(source[0]):
        path = ROOT / match[1]
        app.env.note_dependency(path)
        away = posixpath.relpath(posixpath.dirname(match[1]) or ".", folder)

        def from_here(link: re.Match[str]) -> str:
            return link[0] if link[2] is None else f"[{link[1]}]({away}/{link[2]}{link[3] or ''})"

        text = _LINK.sub(from_here, path.read_text("utf-8"))
        source[0] = "\n".join([text, *_LISTS.findall(source[0])])
    source[0] = _LINK.sub(moved, source[0])


# A link to a program, or another text of the repository, leads to a page that shows it.

_LANGUAGES = {
    ".json": "json",
    ".md": "markdown",
    ".proto": "protobuf",
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
}


def _page_of_file(file: str) -> str:
    return f"files/{posixpath.relpath(file, '..')}"


def _pages_of_files(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    assert isinstance(app.builder, StandaloneHTMLBuilder)
    for file, (_, copy_of_it) in sorted(app.env.dlfiles.items()):
        path = DOCS / file
        if path.suffix in _LANGUAGES:
            text = path.read_text("utf-8")
            shown = app.builder.highlighter.highlight_block(text, _LANGUAGES[path.suffix])
            page = _page_of_file(str(file))
            title = html.escape(page.removeprefix("files/"))
            there = posixpath.relpath(f"_downloads/{copy_of_it}", posixpath.dirname(page))
            link = f'<p><a href="{html.escape(there)}" download>Download</a></p>'
            yield page, {"title": title, "body": f"<h1>{title}</h1>{link}{shown}"}, "page.html"


# The reference. What autodoc finds in a compiled module has no types: its stub has them.


@cache
def _stub(module: str) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """Return what a stub defines, by name within the module, and where its imports are from."""
    path = ROOT / (module.replace(".", "/") + ".pyi")
    if not path.exists():
        return {}, {}
    defined: dict[str, ast.AST] = {}
    imported: dict[str, str] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            # What has come into Python since 3.11 is linked as Python's own.
            module = {"typing_extensions": "collections.abc"}.get(node.module, node.module)
            imported |= {name.name: f"{module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    defined.setdefault(f"{node.name}.{member.name}", member)
        elif isinstance(node, ast.FunctionDef):
            defined[node.name] = node
    return defined, imported


def _signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, *signature: str | None
) -> tuple[str | None, str | None] | None:
    if inspect.isclass(thing) and (issubclass(thing, tuple | enum.Enum)):
        return "", None  # no application makes one
    defined, imported = _stub(getattr(thing, "__module__", None) or "")
    qualified = getattr(thing, "__qualname__", "")
    node = defined.get(f"{qualified}.__init__" if what == "class" else qualified)
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = copy.deepcopy(node.args)
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]

    def whole(match: re.Match[str]) -> str:
        return f"~{imported[match[0]]}" if match[0] in imported else match[0]

    def typed(part: ast.AST | None) -> str | None:
        return None if part is None else re.sub(r"[A-Za-z_]\w*", whole, ast.unparse(part))

    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if argument.annotation is not None:
            argument.annotation = ast.Name(typed(argument.annotation) or "")
    return f"({ast.unparse(arguments)})", None if what == "class" else typed(node.returns)


def _default(app: Sphinx, what: str, name: str, *others: Any) -> None:
    """Say which value a setting has when none is given."""
    package, _, short = name.partition(".")
    kind = getattr(pipeline, short.partition(".")[0], None) if package == "pipeline" else None
    if what != "attribute" or not dataclasses.is_dataclass(kind):
        return
    for field in dataclasses.fields(kind):
        if field.name == name.rpartition(".")[2] and field.default is not dataclasses.MISSING:
            others[-1].extend(["", f"By default {_shown(field.name, field.default)}."])


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value >> 20} MiB" if value >> 20 else f"{value >> 10} KiB"
    return f"{value:g} s" if isinstance(value, float) and name.endswith("_s") else f"``{value!r}``"


def _names(env: BuildEnvironment, docname: str) -> Iterator[tuple[str, str]]:
    """Yield the names of the package by which the reference is linked, and each in full."""
    domain = env.domains["py"]
    assert isinstance(domain, PythonDomain)
    is_aio = docname == "reference/asyncio"
    for name, entry in domain.objects.items():
        if entry.objtype == "class" and not name.startswith("pipeline.aio."):
            yield name.rpartition(".")[2], name  # such as Histogram, of pipeline.stats
    for name in domain.objects:
        package, _, short = name.partition(".")
        if short.startswith("aio."):
            yield short, name
            if is_aio:
                yield short.removeprefix("aio."), name
        elif package == "pipeline" and not (is_aio and f"pipeline.aio.{short}" in domain.objects):
            yield short, name
        yield name, name


def _reference(app: Sphinx, docname: str, name: str, text: nodes.Node) -> nodes.reference:
    domain = app.env.domains["py"]
    assert isinstance(domain, PythonDomain)
    found = domain.objects[name]
    return make_refnode(app.builder, docname, found.docname, found.node_id, text, name)


class LinkNames(SphinxPostTransform):
    """Link public names of ours: those shown as code, and types; and files that are shown."""

    default_priority = 5  # before Sphinx looks for them, who finds several of one name

    def run(self, **_: Any) -> None:
        docname = self.env.docname
        known = dict(_names(self.env, docname))
        self._link_code(docname, known)
        self._link_types(docname, known)
        self._name_targets(known)
        self._link_files(docname)

    def _link_code(self, docname: str, known: dict[str, str]) -> None:
        for node in list(self.document.findall(nodes.literal)):
            if any(isinstance(at, nodes.reference) for at in _above(node)):
                continue
            text = node.astext()
            page = text.removeprefix("docs/").removesuffix(".md")
            name = known.get(re.sub(r"\(.*\)$", "", text, flags=re.DOTALL))
            if text == f"docs/{page}.md" and page in self.env.found_docs:
                uri = self.app.builder.get_relative_uri(docname, page)
                link = nodes.reference("", "", node.deepcopy(), refuri=uri, internal=True)
                node.replace_self(link)
            elif name is not None:
                node.replace_self(_reference(self.app, docname, name, node.deepcopy()))

    def _link_types(self, docname: str, known: dict[str, str]) -> None:
        """Link the types of parameters, and what is raised: numpydoc leaves them as texts."""
        for node in list(self.document.findall(_is_type)):
            words: list[nodes.Node] = []
            for word in re.split(r"(\w[\w.]*)", node.astext()):
                text = nodes.Text(word)
                is_class = word.rpartition(".")[2][:1].isupper() and word in known
                words.append(_reference(self.app, docname, known[word], text) if is_class else text)
            node.parent.replace(node, words)

    def _name_targets(self, known: dict[str, str]) -> None:
        """Have what Sphinx is going to look for lead to a class by its public name."""
        for node in self.document.findall(addnodes.pending_xref):
            if node.get("refdomain") != "py":
                continue
            module, _, name = node["reftarget"].rpartition(".")
            short = f"aio.{name}" if module.startswith("pipeline.aio") else name
            if name[:1].isupper() and short in known:
                node["reftarget"] = known[short]
            elif node["reftype"] == "class":
                # Else any attribute of that name would do: bytes, of StreamStats.
                node.attributes.pop("refspecific", None)

    def _link_files(self, docname: str) -> None:
        for node in list(self.document.findall(addnodes.download_reference)):
            file, _ = self.env.relfn2path(node["reftarget"], docname)
            if posixpath.splitext(file)[1] in _LANGUAGES:
                uri = self.app.builder.get_relative_uri(docname, _page_of_file(file))
                link = nodes.reference("", "", *node.children, refuri=uri, internal=True)
                node.replace_self(link)


def _is_type(node: nodes.Node) -> bool:
    """Tell whether a text is what numpydoc has for the type of something, or that is raised."""
    return (
        isinstance(node, nodes.Text)
        and isinstance(node.parent, nodes.classifier | nodes.term)
        and any(isinstance(at, addnodes.desc_content) for at in _above(node))
    )


def _above(node: nodes.Node) -> Iterator[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect("source-read", _take_from_elsewhere)
    app.connect("html-collect-pages", _pages_of_files)
    app.connect("autodoc-process-signature", _signature, priority=400)  # before numpydoc
    app.connect("autodoc-process-docstring", _default)
    app.add_post_transform(LinkNames)
