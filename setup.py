"""The extensions, their build modes and the long description; everything else is in pyproject.toml.

Modes are environment variables, so that they work through pip as well:

PIPELINE_DEBUG=1            -O0 -g3, bounds checks, invariants checked at run time
PIPELINE_SANITIZE=address   address and undefined-behaviour sanitizers (make asan)
PIPELINE_SANITIZE=thread    thread sanitizer
PIPELINE_SANITIZE=fuzzer    address, and what libFuzzer needs; clang only (make fuzz)
PIPELINE_COVERAGE=1         line tracing
PIPELINE_ANNOTATE=1         Cython's annotated HTML next to each .pyx
"""

import os
import re
import tomllib
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("PIPELINE_DEBUG") == "1"
COVERAGE = os.environ.get("PIPELINE_COVERAGE") == "1"
ANNOTATE = os.environ.get("PIPELINE_ANNOTATE") == "1"
SANITIZE = os.environ.get("PIPELINE_SANITIZE", "")

SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
    "fuzzer": [
        "-fsanitize=fuzzer-no-link,address,undefined",
        "-fno-sanitize-recover=undefined",
    ],
}
if SANITIZE not in SANITIZERS:
    raise SystemExit(f"PIPELINE_SANITIZE={SANITIZE!r}: must be one of {sorted(SANITIZERS)}")

compile_args = [
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
]
link_args = list(SANITIZERS[SANITIZE])
if DEBUG:
    compile_args += ["-O0", "-g3", "-UNDEBUG"]
elif SANITIZE:
    compile_args += ["-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG"]
else:
    # Debug symbols are three quarters of a module's size and name the folder it was built in.
    compile_args += ["-O3", "-g0"]
compile_args += SANITIZERS[SANITIZE]

macros = [("PIPELINE_DEBUG", "1" if DEBUG or SANITIZE else "0")]
if COVERAGE:
    macros.append(("CYTHON_TRACE_NOGIL", "1"))


def extension(name: str) -> Extension:
    """One compiled module; its header-only .pxd parts are found by cimport."""
    return Extension(
        f"pipeline.{name}",
        [f"pipeline/{name.replace('.', '/')}.pyx"],
        include_dirs=["pipeline/tls"],  # libssl.h
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


class BuildExt(build_ext):
    """Leaves out the run paths that a Python of a folder of its own links its modules with."""

    def build_extensions(self) -> None:
        linker = self.compiler.linker_so
        self.compiler.set_executable(
            "linker_so", [word for word in linker if not word.startswith("-Wl,-rpath")]
        )
        super().build_extensions()


def long_description(repository: str, version: str) -> str:
    """Return the README for a package index, where a relative link leads nowhere.

    With a repository each link leads to the file of this version there. Without one, links become
    their texts and pictures are left out.
    """
    text = Path(__file__).with_name("README.md").read_text("utf-8")
    picture = re.compile(r"(!\[[^]]*\])\((?!https?:)([^)]*)\)(\n*)")
    link = re.compile(r"(?<!!)\[([^]]*)\]\((?!https?:|#)([^)]*)\)")
    if not repository:
        return link.sub(r"\1", picture.sub("", text))
    text = picture.sub(rf"\1({repository}/raw/v{version}/\2)\3", text)
    return link.sub(rf"[\1]({repository}/blob/v{version}/\2)", text)


settings = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text("utf-8"))
repository = settings["tool"]["raft-pipeline"]["repository"].rstrip("/")
version = re.search(
    '"(.+)"', Path(__file__).with_name("pipeline").joinpath("_version.py").read_text("utf-8")
)[1]
urls = {
    "Homepage": repository,
    "Documentation": f"{repository}/tree/v{version}/docs",
    "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
    "Issues": f"{repository}/issues",
}

# A directive line in a .pyx does not reach the functions of a cimported header,
# so the directives stand here. cdivision: a checked division would need the GIL.
directives = {
    "language_level": "3",
    "binding": True,
    "cdivision": True,
    "wraparound": False,
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "linetrace": COVERAGE,
    "show_performance_hints": True,
    # Without a GIL they run as they are (docs/architecture.md, Without a GIL).
    "freethreading_compatible": True,
}

setup(
    ext_modules=cythonize(
        [
            extension(name)
            for name in (
                "wire._messages",
                "tls._engine",
                "send._jobs",
                "net._budget",
                "wire._chunks",
                "wire._frames",
                "net._sockets",
                "_core",
                "receive._arrivals",
                "stream._streams",
                "receive._receiver",
            )
        ],
        # A directory per set of directives: cythonize looks at time stamps only.
        build_dir="build/cython" + ("-debug" if DEBUG else "") + ("-trace" if COVERAGE else ""),
        compiler_directives=directives,
        annotate=ANNOTATE,
    ),
    cmdclass={"build_ext": BuildExt},
    long_description=long_description(repository, version),
    long_description_content_type="text/markdown",
    project_urls=urls if repository else {},
)
