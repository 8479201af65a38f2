"""PeerStatus (spec section 3.3). Upstream: ``peer_status.go``, which has no test of its own."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from pipeline.status import PeerStatus
from tests.support import LONG_TIMEOUT

PEER = 0x8E9E05C52164694D


class Flag:
    def __init__(self) -> None:
        self.value = False
        self.writes = 0

    def set(self, active: bool, /) -> None:
        self.value = active
        self.writes += 1

    def get(self) -> bool:
        return self.value


@pytest.fixture
def flag() -> Flag:
    return Flag()


@pytest.fixture
def status(flag: Flag, caplog: pytest.LogCaptureFixture) -> PeerStatus:
    caplog.set_level(logging.DEBUG, "pipeline.status")
    return PeerStatus(1, PEER, flag)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_starts_inactive(status: PeerStatus, flag: Flag) -> None:
    assert not status.is_active
    assert status.active_since is None
    assert status.disconnects == 0
    assert flag.writes == 0


def test_activate_is_noted_and_logged_once(
    status: PeerStatus, flag: Flag, caplog: pytest.LogCaptureFixture
) -> None:
    before = time.time()
    status.activate()
    since = status.active_since
    assert since is not None
    assert before <= since <= time.time()
    status.activate()
    assert status.is_active
    assert flag.value
    assert status.active_since == since
    assert flag.writes == 1
    assert lines(caplog) == [("INFO", "peer became active: 8e9e05c52164694d")]


def test_deactivate_is_warned_of_once_and_then_debug(
    status: PeerStatus, flag: Flag, caplog: pytest.LogCaptureFixture
) -> None:
    status.activate()
    caplog.clear()
    status.deactivate("pipeline", "write", "connection refused")
    status.deactivate("sendMsgSnap", "post", "stopped")
    assert not status.is_active
    assert not flag.value
    assert status.active_since is None
    assert status.disconnects == 1
    assert lines(caplog) == [
        (
            "WARNING",
            "peer became inactive (message send to peer failed): "
            "failed to write 8e9e05c52164694d on pipeline (connection refused)",
        ),
        (
            "DEBUG",
            "peer deactivated again: failed to post 8e9e05c52164694d on sendMsgSnap (stopped)",
        ),
    ]


def test_a_peer_never_active_has_not_disconnected(
    status: PeerStatus, caplog: pytest.LogCaptureFixture
) -> None:
    status.deactivate("pipeline", "write", "refused")
    assert status.disconnects == 0
    assert [level for level, _ in lines(caplog)] == ["DEBUG"]


def test_each_going_away_counts(status: PeerStatus) -> None:
    for _ in range(3):
        status.activate()
        status.deactivate("pipeline", "write", "refused")
    assert status.disconnects == 3


def test_activate_while_active_waits_for_no_lock(status: PeerStatus) -> None:
    status.activate()
    done = threading.Event()

    def activate() -> None:
        status.activate()
        done.set()

    with status._lock:
        thread = threading.Thread(target=activate)
        thread.start()
        assert done.wait(LONG_TIMEOUT)
    thread.join()


def test_a_log_handler_may_ask_the_status(status: PeerStatus) -> None:
    class Nosy(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            status.deactivate("pipeline", "write", "asked by a handler")

    nosy, log = Nosy(level=logging.INFO), logging.getLogger("pipeline.status")
    log.addHandler(nosy)
    try:
        status.activate()
    finally:
        log.removeHandler(nosy)
    assert status.disconnects == 1


def test_two_first_successes_at_once_are_one_transition(caplog: pytest.LogCaptureFixture) -> None:
    both_looked = threading.Barrier(2)
    looked = threading.local()

    class Racing(Flag):
        def get(self) -> bool:
            value = self.value
            if not hasattr(looked, "once"):
                looked.once = True
                both_looked.wait(LONG_TIMEOUT)
            return value

    caplog.set_level(logging.INFO, "pipeline.status")
    flag = Racing()
    status = PeerStatus(1, PEER, flag)
    threads = [threading.Thread(target=status.activate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_TIMEOUT)
    assert flag.writes == 1
    assert len(caplog.records) == 1


def test_many_threads_make_one_transition_each_way(
    status: PeerStatus, flag: Flag, caplog: pytest.LogCaptureFixture
) -> None:
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait(LONG_TIMEOUT)
        status.activate()
        barrier.wait(LONG_TIMEOUT)
        status.deactivate("pipeline", "write", "refused")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_TIMEOUT)
    assert status.disconnects == 1
    assert flag.writes == 2
    assert [level for level, _ in lines(caplog)].count("WARNING") == 1


def test_the_first_failure_after_a_success_or_the_start_is_told_apart(status: PeerStatus) -> None:
    told = [status.deactivate("pipeline", "write", "x") for _ in range(2)]
    status.activate()
    assert not status.is_unreachable
    told += [status.deactivate("pipeline", "write", "x") for _ in range(2)]
    assert status.is_unreachable
    assert told == [True, False, True, False]
