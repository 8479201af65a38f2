"""Compile ``_machine.pyx`` against the headers of the installed package."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent

#: As make asan and make fuzz build the extensions; the machine runs the same code.
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "fuzzer": [
        "-fsanitize=fuzzer-no-link,address,undefined",
        "-fno-sanitize-recover=undefined",
    ],
}

#: What the machine does in place of the system.
WRAPPED = ("accept4", "clock_gettime", "epoll_wait")


def missing() -> str | None:
    """Tell what is missing to build a machine; None if nothing is."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"a C compiler ({compiler})"
    try:
        import Cython.Build  # noqa: F401
        import setuptools  # noqa: F401
    except ImportError as error:
        return error.name
    return None


def build_machine(into: Path, sanitize: str = "") -> Path:
    """Build the module ``_machine`` in ``into``; returns its file."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    import pipeline

    into.mkdir(parents=True, exist_ok=True)
    source = into / "_machine.pyx"
    shutil.copyfile(HERE / "_machine.pyx", source)
    machine = Extension(
        "_machine",
        [str(source)],
        include_dirs=[str(Path(pipeline.__file__).parent / "tls")],  # libssl.h
        extra_compile_args=["-std=gnu11", "-O1", "-g", "-UNDEBUG", "-w", *SANITIZERS[sanitize]],
        extra_link_args=[
            *SANITIZERS[sanitize],
            *(f"-Wl,--wrap={name}" for name in WRAPPED),
        ],
    )
    # The directives of setup.py: a directive in a .pyx does not reach the headers' functions.
    directives = {
        "language_level": "3",
        "cdivision": True,
        "wraparound": False,
        "boundscheck": False,
    }
    command = build_ext(
        Distribution(
            {
                "ext_modules": cythonize(
                    [machine],
                    include_path=[str(Path(pipeline.__file__).parent.parent)],
                    compiler_directives=directives,
                    quiet=True,
                )
            }
        )
    )
    command.build_lib = str(into)
    command.build_temp = str(into / "temp")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath("_machine"))
