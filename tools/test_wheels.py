"""Try the wheels in dist/ as a user would get them: installed, outside the tree; print a table.

A wheel for this machine and a Python at hand is installed by pip alone into a bare environment, the
README's programs run there, and the suite runs from the sdist, whose ``pipeline`` folder is no
package there: nothing but the installed wheel can be imported. A wheel for another machine runs
the unit tests in qemu's user mode, with a Python out of Debian's packages, where both can be had.
What cannot run here is named as built and not run.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wheels import DIST, WORK, find_pythons, run, table, unpack

#: Python 3.11 for arm64 and what it is linked with, as Debian 12 has it.
_ARM64_PACKAGES = (
    *("libc6", "libgcc-s1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5"),
    *("libcrypt1", "libsqlite3-0", "libuuid1", "libnsl2", "libtirpc3", "libtinfo6", "libncursesw6"),
    *("libreadline8", "libgssapi-krb5-2", "libkrb5-3", "libk5crypto3", "libkrb5support0"),
    *("libcom-err2", "libkeyutils1", "libdb5.3", "media-types"),
    *("libpython3.11-minimal", "libpython3.11-stdlib", "python3.11-minimal", "python3.11"),
)
#: What the unit tests need that is in a wheel for every machine, or in one for arm64.
_UNIT_TEST_PACKAGES = (
    *("pytest", "pytest-timeout", "pytest-benchmark", "hypothesis", "trustme"),
    *("prometheus-client", "click", "rich"),
)
_OTHER_TESTS = ["tests", "--ignore=tests/functional"]


def last_line(output: str) -> str:
    """Return the last line a program printed, without pytest's frame."""
    return output.strip().splitlines()[-1].strip("= ") if output.strip() else ""


def sources() -> Path:
    """Unpack the sdist so that its package is there to be read and cannot be imported."""
    (sdist,) = DIST.glob("*.tar.gz")
    folder = unpack(sdist, Path(tempfile.mkdtemp(prefix="wheel-")))
    # Of a folder without it Python takes nothing as long as there is a package of that name.
    (folder / "pipeline" / "__init__.py").unlink()
    shutil.rmtree(folder / "raft_pipeline.egg-info", ignore_errors=True)
    return folder


def try_here(wheel: Path, python: Path, selection: list[str]) -> str:
    """Install a wheel into bare environments and run everything there; return what was seen."""
    folder = sources()
    try:
        user = folder.parent / "user"
        run(python, "-m", "venv", user)
        # pip alone, and nothing but what the wheel itself asks for.
        run(user / "bin" / "python", "-m", "pip", "install", "--quiet", wheel)
        programs = re.findall(r"\((examples/\w+\.py)\)\):\n\n```python", readme(folder))
        if not programs:
            raise SystemExit("README.md shows no program")
        for program in programs:
            run(user / "bin" / "python", "-P", folder / program, cwd=folder.parent, timeout=120)
        tester = folder.parent / "tester"
        run(python, "-m", "venv", tester)
        run(tester / "bin" / "python", "-m", "pip", "install", "--quiet", f"{wheel}[test]")
        python = tester / "bin" / "python"
        where = run(python, "-c", "import pipeline; print(pipeline.__file__)", cwd=folder).strip()
        if not Path(where).is_relative_to(tester):
            raise SystemExit(f"the suite would run on {where}, which is not the wheel's")
        # As make test has them: most tests wait longer than they work.
        sessions = [selection] if selection else [["tests/functional"], _OTHER_TESTS]
        command = (python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
        with ThreadPoolExecutor() as pool:
            runs = [pool.submit(run, *command, *words, cwd=folder) for words in sessions]
        failures = [error for error in (done.exception() for done in runs) if error]
        seen = "; ".join(last_line(str(done.exception() or done.result())) for done in runs)
        if failures:
            raise SystemExit("\n".join([*map(str, failures), seen]))
    finally:
        shutil.rmtree(folder.parent)
    return f"{len(programs)} programs of the README; {seen}"


def readme(folder: Path) -> str:
    """Return the README."""
    return (folder / "README.md").read_text("utf-8")


def arm64_root() -> Path | str:
    """Return a folder with a Python for arm64 and its libraries, or why there is none."""
    root = WORK / "arm64"
    if (root / "usr" / "bin" / "python3.11").exists():
        return root
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return "not a Debian"
    # Lists and packages of another architecture, without a change to this system's own.
    state = WORK / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = [
        *("-o", f"Dir::State={state}/state", "-o", f"Dir::Cache={state}/cache"),
        *("-o", f"Dir::State::status={state}/status", "-o", "APT::Sandbox::User=root"),
        *("-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64"),
    ]
    for command in (["update", "-qq"], ["download", "-qq", *_ARM64_PACKAGES]):
        done = subprocess.run(
            ["apt-get", *options, *command],
            cwd=state / "cache",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return f"no packages for arm64: {last_line(done.stderr)}"
    partial = WORK / "arm64.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for package in (state / "cache").glob("*.deb"):
        run("dpkg", "-x", package, partial)
    partial.rename(root)
    return root


def try_emulated(wheel: Path) -> str:
    """Run the unit tests on a wheel for arm64; return what was seen, or why not."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        return "built, not run: no qemu-aarch64 (Debian: qemu-user-static)"
    if "cp311-cp311-manylinux" not in wheel.name:
        return "built, not run: qemu has a Python 3.11 of Debian"
    root = arm64_root()
    if isinstance(root, str):
        return f"built, not run: {root}"
    folder = sources()
    try:
        site = folder.parent / "site"
        run(
            *(sys.executable, "-m", "pip", "install", "--quiet", "--target", site),
            *("--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_17_aarch64"),
            *("--platform", "manylinux2014_aarch64", "--python-version", "3.11"),
            *("--implementation", "cp", "--only-binary", ":all:"),
            *(wheel, *_UNIT_TEST_PACKAGES),
        )
        # What the tests start as ``sys.executable`` is emulated as well.
        python = folder.parent / "python3.11"
        command = f'{qemu} -0 "$0" -L {root} {root}/usr/bin/python3.11 "$@"'
        python.write_text(f"#!/bin/sh\nexec {command}\n")
        python.chmod(0o755)
        settings = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        return last_line(
            run(
                *(python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit"),
                cwd=folder,
                env=settings,
            )
        )
    finally:
        shutil.rmtree(folder.parent)


def main() -> None:
    """Try what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="3.11 and the like; all by default")
    parser.add_argument(
        "tests", nargs="*", help="what of the suite to run, as pytest takes it; all by default"
    )
    arguments = parser.parse_args()
    pythons = find_pythons()
    rows = [("wheel", "size", "tried")]
    failures = 0
    for wheel in sorted(DIST.glob("*.whl")):
        _, _, tag, target = wheel.stem.rsplit("-", 3)
        version = re.sub(r"cp3(\d+)", r"3.\1", tag)
        if arguments.python and version not in arguments.python:
            continue
        is_ours = target.endswith(f"_{platform.machine()}")
        try:
            if is_ours and target.startswith("musllinux"):
                seen = "built, not run: no Python on musl here"
            elif is_ours and version.endswith("t"):
                seen = "built, not run: the suite runs without a GIL by make free-threaded"
            elif is_ours and version in pythons:
                seen = try_here(wheel, pythons[version], arguments.tests)
            elif is_ours:
                seen = f"built, not run: no CPython {version} at hand"
            else:
                seen = try_emulated(wheel)
        except SystemExit as failure:
            failures += 1
            print(failure, file=sys.stderr)
            seen = f"FAILED: {last_line(str(failure))}"
        print(f"{wheel.name}: {seen}", flush=True)
        rows.append((wheel.name, f"{wheel.stat().st_size / 1024:.0f} KiB", seen))
    if len(rows) == 1:
        raise SystemExit("no wheel in dist/: make wheels")
    print(table(rows))
    if failures:
        raise SystemExit(f"{failures} of {len(rows) - 1} wheels failed")


if __name__ == "__main__":
    main()
