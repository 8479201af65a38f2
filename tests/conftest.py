"""Fixtures that check what a test leaves behind, and the settings of hypothesis."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from pipeline.send import probing
from tests.support import DEFAULTS, LONG_TIMEOUT, tls_use
from tests.support.logs import FieldsWatch

tls_use.watch()

# What answers a probe has a second to. Who answers on a machine so busy that it takes longer is
# there all the same.
probing.STEP_TIMEOUT_S = LONG_TIMEOUT

# A shell has what it starts in the background ignore Ctrl-C; so would what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples everywhere, every time: what is new comes from `make fuzz`. A busy machine makes
# a deadline per example meaningless, and how long it takes to make one. HYPOTHESIS_PROFILE=ci takes
# ten times as many.
settings.register_profile(
    "default",
    max_examples=200,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("ci", settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A thread told to end may need a moment to do so; only a leak takes this long.
GRACE_S = LONG_TIMEOUT


def _leaked(before: set[threading.Thread]) -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and (not thread.daemon or thread.name.startswith("pipeline-"))
    ]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread that is not a daemon, or one of ours."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + GRACE_S
    while (leaked := _leaked(before)) and time.monotonic() < deadline:
        leaked[0].join(0.05)
    assert not leaked, f"threads left: {[thread.name for thread in leaked]}"


@pytest.fixture(autouse=True)
def no_tls_shared() -> Iterator[None]:
    """Fail a test in which two threads were in one TLS object at a time, ours or the test's."""
    tls_use.shared.clear()
    yield
    assert not tls_use.shared, tls_use.shared[0]


@pytest.fixture(autouse=True)
def every_record_has_its_fields() -> Iterator[None]:
    """Fail a test in which the library logged a line without what docs/operations.md promises."""
    watch = FieldsWatch()
    logging.getLogger("pipeline").addHandler(watch)
    yield
    logging.getLogger("pipeline").removeHandler(watch)
    assert watch.faults == []


@pytest.fixture(autouse=True)
def streams_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the nodes of a test that is marked ``streams`` have them, as is the library's default."""
    if request.node.get_closest_marker("streams") is not None:
        monkeypatch.setitem(DEFAULTS, "streams", True)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Hold every call of ``process``; opened at the end of the test."""
    gate = threading.Event()
    yield gate
    gate.set()
