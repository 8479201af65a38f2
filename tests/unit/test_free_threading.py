"""Without a GIL nothing of ours turns it on; with one, what it would need is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig

import pytest

import pipeline

IS_FREE = sysconfig.get_config_var("Py_GIL_DISABLED") == 1

# The names of all modules, the compiled ones among them; none has to be built for another reason.
LOOK = """
import importlib, pkgutil, sys
import pipeline
names = [found.name for found in pkgutil.walk_packages(pipeline.__path__, "pipeline.")]
names = [name for name in names if not name.startswith(("pipeline.examples", "pipeline.__main__"))]
for name in names:
    importlib.import_module(name)
    assert not sys._is_gil_enabled(), f"{name} has turned the GIL on"
print("off", len(names))
"""


@pytest.mark.skipif(not IS_FREE, reason="this Python has a GIL")
def test_no_module_turns_the_gil_on() -> None:
    # What the suite is run with must not keep it off: PYTHON_GIL=0 does.
    settings = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    looked = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK],
        check=False,
        capture_output=True,
        text=True,
        env=settings,
    )
    assert looked.returncode == 0, looked.stderr
    state, count = looked.stdout.split()
    assert state == "off"
    assert int(count) > 50


@pytest.mark.skipif(IS_FREE, reason="this Python has no GIL")
def test_with_a_gil_a_message_has_no_guards() -> None:
    # A guard is four bytes, which would show in some of these; the fields are listed in order.
    kinds = (pipeline.Entry, pipeline.SnapshotMetadata)
    head = object.__basicsize__
    sizes = [kind.__basicsize__ - head for kind in kinds]
    # type, term, index, data, its length, and what keeps it; the members, index and term.
    assert sizes == [6 * 8, 3 * 8]
