"""The extensions and their build modes; everything else is in pyproject.toml.

Modes are environment variables, so that they work through pip as well:

PIPELINE_DEBUG=1            -O0 -g3, bounds checks, invariants checked at run time
PIPELINE_SANITIZE=address   address and undefined-behaviour sanitizers (make asan)
PIPELINE_SANITIZE=thread    thread sanitizer
PIPELINE_COVERAGE=1         line tracing
PIPELINE_ANNOTATE=1         Cython's annotated HTML next to each .pyx
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("PIPELINE_DEBUG") == "1"
COVERAGE = os.environ.get("PIPELINE_COVERAGE") == "1"
ANNOTATE = os.environ.get("PIPELINE_ANNOTATE") == "1"
SANITIZE = os.environ.get("PIPELINE_SANITIZE", "")

SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
if SANITIZE not in SANITIZERS:
    raise SystemExit(f"PIPELINE_SANITIZE={SANITIZE!r}: must be one of {sorted(SANITIZERS)}")

compile_args = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unused-parameter",
                "-Wno-missing-field-initializers", "-Wno-cast-function-type"]
link_args = list(SANITIZERS[SANITIZE])
if DEBUG:
    compile_args += ["-O0", "-g3", "-UNDEBUG"]
elif SANITIZE:
    compile_args += ["-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG"]
else:
    compile_args += ["-O3"]
compile_args += SANITIZERS[SANITIZE]

macros = [("PIPELINE_DEBUG", "1" if DEBUG or SANITIZE else "0")]
if COVERAGE:
    macros.append(("CYTHON_TRACE_NOGIL", "1"))


def extension(name: str) -> Extension:
    """One compiled module; its header-only .pxd parts are found by cimport."""
    return Extension(
        f"pipeline.{name}",
        [f"pipeline/{name}.pyx"],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


# A directive line in a .pyx does not reach the functions of a cimported header,
# so the directives stand here. cdivision: a checked division would need the GIL.
directives = {
    "language_level": "3",
    "binding": True,
    "embedsignature": True,
    "cdivision": True,
    "wraparound": False,
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "linetrace": COVERAGE,
    "show_performance_hints": True,
}

setup(
    ext_modules=cythonize(
        [extension("_messages"), extension("_core")],
        # A directory per set of directives: cythonize looks at time stamps only.
        build_dir="build/cython" + ("-debug" if DEBUG else "") + ("-trace" if COVERAGE else ""),
        compiler_directives=directives,
        annotate=ANNOTATE,
    ),
)
