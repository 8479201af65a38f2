"""Build what libFuzzer needs, run it on one target, merge what it has found (README.md).

``python tests/fuzz/fuzz.py build``, ``... run TARGET SECONDS SEED``, ``... merge TARGET``; make
fuzz and make fuzz-merge call these. Where clang is missing, that is said and nothing else happens.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.fuzz.build import build_machine  # noqa: E402
from tests.fuzz.targets import HERE, MAX_LENGTHS  # noqa: E402

BUILD = ROOT / "build" / "fuzz"
SITE = BUILD / "site"
BUILT = BUILD / ".built"

#: Seconds and memory that one input may take: above it hangs, or makes memory of nothing.
LIMITS = ("-timeout=20", "-rss_limit_mb=2048")


def runtime(name: str, suffix: str) -> str | None:
    """Return the path of a library of clang's."""
    # Newer versions have a folder for each machine, older ones have it in the name.
    for file in (f"libclang_rt.{name}{suffix}", f"libclang_rt.{name}-{platform.machine()}{suffix}"):
        printed = subprocess.run(
            ["clang", f"-print-file-name={file}"], check=True, capture_output=True, text=True
        )
        path = printed.stdout.strip()
        if os.path.isfile(path):
            return path
    return None


def missing() -> str | None:
    """Tell what is missing to run libFuzzer; None if nothing is."""
    if shutil.which("clang") is None:
        return "clang is not installed"
    for name, suffix in (("fuzzer_no_main", ".a"), ("asan", ".so")):
        if runtime(name, suffix) is None:
            return f"clang has no libclang_rt.{name}{suffix}"
    return None


def build() -> None:
    """Build the extensions and the machine with clang, and libFuzzer as a library to preload."""
    BUILD.mkdir(parents=True, exist_ok=True)
    os.environ.update(CC="clang", LDSHARED="clang -shared", PIPELINE_SANITIZE="fuzzer")
    library = runtime("fuzzer_no_main", ".a") or ""
    subprocess.run(
        [
            *("clang++", "-shared", "-o", BUILD / "libfuzzer.so"),
            *("-Wl,--whole-archive", library, "-Wl,--no-whole-archive", "-lpthread", "-lm"),
        ],
        check=True,
    )
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", BUILD, "--build-lib", SITE],
        check=True,
        cwd=ROOT,
    )
    build_machine(SITE, "fuzzer")
    BUILT.touch()


def libfuzzer(target: str, *arguments: str) -> int:
    """Run libFuzzer on a target; its exit status."""
    environment = {
        **os.environ,
        # libFuzzer first: of what it hears of coverage the sanitizer has a version that is deaf.
        "LD_PRELOAD": f"{BUILD / 'libfuzzer.so'} {runtime('asan', '.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:verify_asan_link_order=0"
        ":malloc_context_size=10:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # A parser is given memory of Python's. A receiver has its own, and Python's is faster.
        "PYTHONMALLOC": "pymalloc" if target in ("receiver", "inbox") else "malloc",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": f"{SITE}:{ROOT}",
    }
    return subprocess.run(
        [sys.executable, "-P", "-m", "tests.fuzz.targets", target, *arguments, *LIMITS],
        env=environment,
        check=False,
        cwd=BUILD,
    ).returncode


def inputs(target: str) -> list[str]:
    """Return the folders of the inputs that are checked in."""
    folders = [HERE / "corpus" / target, HERE / "regressions" / target]
    return [str(folder) for folder in folders if folder.is_dir()]


def run(target: str, seconds: int, seed: int) -> int:
    """Look for faults of a target, with inputs that follow from the seed; 0 makes one up."""
    found = BUILD / "corpus" / target
    found.mkdir(parents=True, exist_ok=True)
    print(f"fuzz: {target}, {seconds} s", flush=True)
    dictionary = HERE / f"{target}.dict"
    status = libfuzzer(
        target,
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={MAX_LENGTHS[target]}",
        f"-artifact_prefix={BUILD}/{target}-",
        *([f"-dict={dictionary}"] if dictionary.exists() else []),
        "-print_final_stats=1",
        str(found),
        *inputs(target),
    )
    if status != 0:
        print(
            f"fuzz: {target} has failed. Once it is mended, move the input from {BUILD} to "
            f"tests/fuzz/regressions/{target}, under a name that says what was wrong.",
            file=sys.stderr,
        )
    return status


def merge(target: str) -> int:
    """Make the corpus that is checked in anew, of itself and of what was found since: the fewest
    and smallest inputs that reach every edge, however often.
    """
    merged = BUILD / "merged" / target
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    found = BUILD / "corpus" / target
    found.mkdir(parents=True, exist_ok=True)
    kept = HERE / "corpus" / target
    kept.mkdir(parents=True, exist_ok=True)
    status = libfuzzer(
        target,
        "-merge=1",
        "-use_counters=0",
        f"-max_len={MAX_LENGTHS[target]}",
        *map(str, (merged, kept, found)),
    )
    if status == 0:
        shutil.rmtree(kept)
        shutil.copytree(merged, kept)
    return status


def main() -> int:
    lacking = missing()
    if lacking is not None:
        what = " ".join(sys.argv[1:])
        print(
            f"fuzz: SKIPPED ({what}): {lacking}. On Debian: apt-get install clang", file=sys.stderr
        )
        return 0
    match sys.argv[1:]:
        case ["build"]:
            build()
            return 0
        case ["run", target, seconds, seed]:
            return run(target, int(seconds), int(seed))
        case ["merge", target]:
            return merge(target)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
