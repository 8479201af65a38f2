"""Why a compiled module cannot be imported, in words; imported only when one could not be."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

__all__ = ["reason"]


def reason(error: ImportError) -> str:
    """Say why importing a module of ours failed, and what to do about it."""
    folder = Path(__file__).resolve().parent
    here = f"this is Python {sys.version_info.major}.{sys.version_info.minor}, {sys.platform}"
    if not isinstance(error, ModuleNotFoundError):
        return f"pipeline's compiled core in {folder} cannot be loaded ({error}; {here})"
    if not (error.name or "").startswith("pipeline."):
        return f"pipeline needs {error.name}, which is not installed: pip install raft-pipeline"
    built = sorted(path.name for path in folder.glob("_core.*.so"))
    if built:
        return (
            f"pipeline's compiled core in {folder} was built for another Python: {built[0]}; {here}"
        )
    if elsewhere := _installed(folder):
        return (
            f"{folder} is a copy of the sources that was never built, and comes before the "
            f"installed pipeline in {elsewhere}: start Python in another folder or with -P, or "
            "build the copy ('make build')"
        )
    return (
        f"pipeline's compiled core is not in {folder}: it was never built. Run 'make build', or "
        "'pip install .' with a C compiler; or install a wheel: pip install raft-pipeline"
    )


def _installed(folder: Path) -> Path | None:
    """Return the folder of an installed pipeline that is not this one."""
    for distribution in importlib.metadata.distributions(name="raft-pipeline"):
        for file in distribution.files or ():
            if file.match("pipeline/_core.*.so"):
                found = Path(str(distribution.locate_file(file))).resolve().parent
                if found != folder:
                    return found
    return None
