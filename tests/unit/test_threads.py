"""Threads of the library: whose they are, and what may be asked of them at any instant."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from pipeline import Pipeline, Transport, UsageError
from pipeline.config import ReceiverConfig
from pipeline.identity import Identity
from pipeline.receive.handlers import Handlers
from pipeline.receive.listener import Listener
from pipeline.threads import _REPLACED, LibraryThread, Once
from tests.support import LONG_TIMEOUT
from tests.support.processes import TIMEOUT_S
from tests.support.raft import FakeRaft

URL = "http://127.0.0.1:1"

MADE: dict[str, Callable[[], object]] = {
    "Transport": lambda: Transport(1, 1, FakeRaft()),
    "Pipeline": lambda: Pipeline(2, [URL], FakeRaft(), member_id=1, cluster_id=1),
    "Listener": lambda: Listener(
        Handlers(FakeRaft(), Identity(1, 1, (), "3.5.1")), URL, ReceiverConfig()
    ),
}


def replaced_by(kit: str, original: object) -> object:
    """A class or function that does what the original does, and says that it is the kit's."""
    if isinstance(original, type):
        return type(original.__name__, (original,), {"__module__": f"{kit}.some"})

    def function(*args: object) -> object:
        return original(*args)  # type: ignore[operator]

    function.__module__ = f"{kit}.some"
    return function


def replace(monkeypatch: pytest.MonkeyPatch, kit: str, what: str) -> None:
    module, name = _REPLACED[what]
    original = getattr(sys.modules[module], name)
    monkeypatch.setattr(sys.modules[module], name, replaced_by(kit, original))


@pytest.mark.parametrize("kit", ["gevent", "eventlet"])
@pytest.mark.parametrize("what", _REPLACED)
@pytest.mark.parametrize("made", MADE)
def test_what_gevent_or_eventlet_has_patched_is_refused_with_what_to_do(
    made: str, what: str, kit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, kit, what)
    with pytest.raises(UsageError, match=f"{kit} has replaced {what}, .* a process of its own"):
        MADE[made]()


def test_patching_between_construction_and_start_is_refused_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport = Transport(1, 1, FakeRaft())
    pipeline = Pipeline(2, [URL], FakeRaft(), member_id=1, cluster_id=1)
    with monkeypatch.context() as patched:
        replace(patched, "gevent", "thread")
        for made in (transport, pipeline):
            with pytest.raises(UsageError, match="gevent has replaced thread"):
                made.start()
    for made in (transport, pipeline):
        made.start()  # it was not held against them
        made.stop()


def test_what_a_test_replaces_is_no_kit_of_green_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    Transport(1, 1, FakeRaft())


@pytest.mark.parametrize(
    ("kit", "patch"),
    [
        ("gevent", "from gevent import monkey; monkey.patch_all()"),
        ("gevent", "from gevent import monkey; monkey.patch_all(thread=False)"),
        ("eventlet", "import eventlet; eventlet.monkey_patch()"),
        ("eventlet", "import eventlet; eventlet.monkey_patch(thread=False)"),
    ],
)
def test_a_patched_interpreter_imports_the_package_and_is_refused(kit: str, patch: str) -> None:
    if importlib.util.find_spec(kit) is None:
        pytest.skip(f"{kit} is not installed")
    program = f"""
{patch}
from pipeline import Transport, UsageError
class Raft:
    process = is_id_removed = report_unreachable = report_snapshot = lambda *_: None
try:
    Transport(1, 1, Raft())
except UsageError as error:
    print(str(error).partition(" has")[0])
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.stdout == f"{kit}\n"


def test_once_is_taken_by_one() -> None:
    once = Once()
    assert not once.is_taken()
    assert [once.take(), once.take()] == [True, False]
    assert once.is_taken()
    once.give_back()
    assert once.take()


def test_a_thread_is_waited_for_until_its_end_or_the_deadline() -> None:
    gate = threading.Event()
    thread = LibraryThread(gate.wait, "waited for")
    assert thread.wait_ended(0.0)  # it has not begun, and what begins it may wait for us
    thread.start()
    assert not thread.wait_ended(time.monotonic())
    gate.set()
    assert thread.wait_ended(time.monotonic() + LONG_TIMEOUT)
    assert not thread.is_alive()
    assert thread.wait_ended(0.0)


def test_a_thread_does_not_wait_for_its_own_end() -> None:
    results: list[bool] = []
    thread = LibraryThread(lambda: results.append(thread.wait_ended(LONG_TIMEOUT)), "its own")
    thread.start()
    thread.join()
    assert results == [True]
