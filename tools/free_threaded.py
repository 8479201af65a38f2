"""Run the suite on a CPython without a GIL, which is built out of Debian's source if need be.

``make free-threaded`` takes the interpreter that ``PYTHON`` names, one on the path, or builds one
(some minutes, once) below ``build/free-threaded``. The package is built with it, in place. Its
modules must leave the GIL off; then the suite runs with ``PYTHON_GIL=0``. What of the tests'
requirements has no wheel for such an interpreter is named, and what needs it is skipped by pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

from wheels import ASK_VERSION, ROOT, run

WORK = ROOT / "build" / "free-threaded"
#: What is built where none is at hand: the oldest that we support without a GIL.
SOURCE = "python3.13"
#: What Debian signs its lists with, where that is installed.
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: What a Python lacks that was built without their headers, and the package that has these.
NEEDED_MODULES = {
    "ssl": "libssl-dev",
    "zlib": "zlib1g-dev",
    "ctypes": "libffi-dev",
    "lzma": "liblzma-dev",
    "bz2": "libbz2-dev",
    "sqlite3": "libsqlite3-dev",
}
#: Without one of these there is nothing to run.
NEEDED = ("pytest", "pytest-timeout", "pytest-benchmark", "hypothesis", "Cython", "setuptools")
_IS_FREE = "import sysconfig; print(sysconfig.get_config_var('Py_GIL_DISABLED') == 1)"
# The environment says nothing here: it is the modules that must not ask for a GIL.
_LOOK = """
import importlib, pathlib, sys, sysconfig
import pipeline
root = pathlib.Path(pipeline.__file__).parent
modules = sorted(root.rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"))
for path in modules:
    name = ".".join(["pipeline", *path.relative_to(root).parent.parts, path.name.split(".")[0]])
    importlib.import_module(name)
    assert not sys._is_gil_enabled(), f"{name} has turned the GIL on"
assert modules
print(f"{sys.version.split()[0]}, {len(modules)} compiled modules imported: the GIL is off")
"""


def is_free_threaded(python: str | Path) -> bool:
    """Tell whether an interpreter is there and has no GIL."""
    try:
        return run(python, "-c", _IS_FREE).strip() == "True"
    except (OSError, SystemExit):
        return False


def find_python(source: str) -> Path:
    """Return an interpreter without a GIL: one on the path, or the one that is built."""
    for name in ("python3.14t", "python3.13t"):
        found = shutil.which(name)
        if found and is_free_threaded(found):
            return Path(found)
    built = WORK / source / "bin" / "python3"
    if not built.exists():
        build_python(source, built.parent.parent)
    return built


def build_python(source: str, prefix: Path) -> None:
    """Build an interpreter of Debian's source package, without Debian's patches."""
    archive = fetch(source)
    folder = WORK / "source"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    print(f"building {unpacked.name} without a GIL", flush=True)
    partial = prefix.with_name(f"{prefix.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    settings = ("--disable-gil", "--with-ensurepip=install", f"--prefix={prefix}", "--quiet")
    run("nice", "./configure", *settings, cwd=unpacked)
    run("nice", "make", "--silent", f"--jobs={os.cpu_count()}", cwd=unpacked)
    run("make", "--silent", "install", f"DESTDIR={partial}", cwd=unpacked)
    installed = partial / prefix.relative_to("/")
    lacking = [
        package
        for module, package in NEEDED_MODULES.items()
        if subprocess.run(
            [installed / "bin" / "python3", "-c", f"import {module}"],
            capture_output=True,
            check=False,
        ).returncode
    ]
    if lacking:
        raise SystemExit(f"headers are missing. On Debian: apt-get install {' '.join(lacking)}")
    installed.rename(prefix)
    shutil.rmtree(partial)
    shutil.rmtree(folder)


def fetch(source: str) -> Path:
    """Have apt fetch the newest source of a Python that the mirrors still have; its archive.

    With lists of its own, and of the place that this system's packages come from.
    """
    if shutil.which("apt-get") is None:
        raise SystemExit("no free-threaded Python, and no Debian to have one of: give PYTHON=PATH")
    configured = run(
        *("apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)"),
        *("Created-By: Packages", "Component: main"),
    )
    release = Path("/etc/os-release").read_text("utf-8")
    codename = re.search(r"^VERSION_CODENAME=(\w+)$", release, re.MULTILINE)
    places = dict(line.split() for line in configured.splitlines())
    if codename is None or codename[1] not in places:
        raise SystemExit("apt has no list of this system's own release: give PYTHON=PATH")
    apt = WORK / "apt"
    for name in ("lists/partial", "cache/archives/partial", "sources"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    lines = ["Types: deb-src", "Suites: unstable testing stable", "Components: main"]
    lines.append(f"URIs: {places[codename[1]]}")
    if KEYS.exists():
        lines.append(f"Signed-By: {KEYS}")
    (apt / "sources" / "debian.sources").write_text("\n".join([*lines, ""]))
    options = (
        *("-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={apt}/sources"),
        *("-o", f"Dir::State::Lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache"),
        *("-o", "APT::Sandbox::User=root"),
    )
    run("apt-get", *options, "-qq", "update")
    shown = run("apt-cache", *options, "showsrc", source)
    versions = set(re.findall(r"^Version: (\S+)$", shown, re.MULTILINE))
    refusals = []
    # The lists may be a day ahead of what a mirror has; the next version is as good.
    for version in sorted(versions, key=_number, reverse=True):
        try:
            run(
                *("apt-get", *options, "-qq", "source", "--download-only", f"{source}={version}"),
                cwd=apt,
            )
        except SystemExit as error:
            refusals.append(str(error))
            continue
        (archive,) = apt.glob(f"{source}_{version.partition('-')[0]}.orig.tar.*z")
        return archive
    raise SystemExit("\n".join([f"no source of {source} is to be had", *refusals]))


def _number(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)]


def requirements() -> list[str]:
    """Return what the package and its tests need, by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [each for name in ("test", "cli", "metrics", "demo") for each in extras[name]]
    return [each for each in dict.fromkeys(wanted) if not each.startswith("raft-pipeline")]


def prepare(python: Path) -> tuple[Path, list[str]]:
    """Make an environment for the suite; its interpreter, and what could not be installed."""
    folder = WORK / f"venv-{run(python, '-c', ASK_VERSION).strip()}"
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        run(python, "-m", "venv", folder)
    skipped = []
    for requirement in requirements():
        command = (interpreter, "-m", "pip", "install", "--quiet", "--only-binary", ":all:")
        try:
            run(*command, requirement)
        except SystemExit as error:
            # Cython's own modules and the like are there in any case.
            if re.split(r"[<>=\[]", requirement)[0] in NEEDED:
                raise
            reason = [line for line in str(error).splitlines() if line.startswith("ERROR")]
            skipped.append(requirement)
            print(f"SKIPPED: {requirement}: {reason[-1] if reason else 'no wheel'}", flush=True)
    return interpreter, skipped


def build_package(python: Path) -> None:
    """Build the package where it lies: the modules' names say which Python they are for."""
    for old in (ROOT / "pipeline").rglob("*.cpython-3*t-*.so"):
        old.unlink()
    pip = (python, "-m", "pip", "--quiet")
    run(*pip, "install", "--no-deps", "--no-build-isolation", "--editable", ROOT)


def main() -> int:
    """Do what the command line asks for; pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="an interpreter without a GIL")
    parser.add_argument("--source", default=SOURCE, help=f"Debian's source package ({SOURCE})")
    parser.add_argument("tests", nargs="*", help="what pytest is given (the whole suite)")
    given = parser.parse_args()
    if given.python is not None and not is_free_threaded(given.python):
        raise SystemExit(f"{given.python}: not a CPython without a GIL")
    WORK.mkdir(parents=True, exist_ok=True)
    python = Path(given.python) if given.python else find_python(given.source)
    interpreter, skipped = prepare(python)
    build_package(interpreter)
    settings = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    print(run(interpreter, "-W", "error", "-c", _LOOK, env=settings).strip(), flush=True)
    command = [
        *(str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"),
        *(given.tests or ["tests"]),
    ]
    settings["PYTHON_GIL"] = "0"
    status = subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode
    if skipped:
        print(f"not installed, for want of wheels: {', '.join(skipped)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
