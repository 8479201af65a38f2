"""What a user reads when the compiled core cannot be imported: the reason and what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pipeline
from tests.support.processes import TIMEOUT_S

PACKAGE = Path(pipeline.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the package without its compiled modules; return the folder it is in."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "pipeline", ignore=ignored)
    return tmp_path


def import_in(folder: Path, *flags: str, path: Path | None = None) -> str:
    """Import pipeline with ``folder`` as the current one; return the last line of the traceback."""
    code = "import sys; sys.path.insert(1, sys.argv[1]); import pipeline"
    result = subprocess.run(
        [sys.executable, *flags, "-c", code, str(path or folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_sources_that_were_never_built_say_so(copy: Path) -> None:
    line = import_in(copy, "-I", "-S")
    assert line.startswith(f"ImportError: pipeline's compiled core is not in {copy / 'pipeline'}")
    assert "make build" in line


def test_sources_before_the_installed_package_are_named(copy: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "pipeline").mkdir(parents=True)
    (site / "pipeline" / f"_core{SUFFIX}").touch()
    info = site / "raft_pipeline-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: raft-pipeline\nVersion: 9\n")
    (info / "RECORD").write_text(f"pipeline/_core{SUFFIX},,\n")
    line = import_in(copy, "-S", path=site)
    assert f"{copy / 'pipeline'} is a copy of the sources that was never built" in line
    assert f"installed pipeline in {site / 'pipeline'}" in line
    assert "-P" in line


def test_a_core_for_another_python_is_named(copy: Path) -> None:
    (copy / "pipeline" / "_core.cpython-39-x86_64-linux-gnu.so").touch()
    line = import_in(copy, "-I", "-S")
    assert "was built for another Python: _core.cpython-39-x86_64-linux-gnu.so" in line
    assert f"this is Python {sys.version_info.major}.{sys.version_info.minor}" in line


def test_a_core_that_cannot_be_loaded_says_why(copy: Path) -> None:
    for module in PACKAGE.rglob(f"*{SUFFIX}"):
        (copy / "pipeline" / module.relative_to(PACKAGE)).write_bytes(b"not a module")
    line = import_in(copy, "-I", "-S")
    assert "cannot be loaded" in line
    assert "invalid ELF header" in line or "file too short" in line


def test_a_missing_dependency_is_named_and_not_the_core(copy: Path) -> None:
    for module in PACKAGE.rglob(f"*{SUFFIX}"):
        shutil.copy(module, copy / "pipeline" / module.relative_to(PACKAGE))
    (copy / "pipeline" / "types.py").write_text("import a_module_that_is_nowhere\n")
    line = import_in(copy, "-I", "-S")
    assert "a_module_that_is_nowhere" in line
    assert "built" not in line
