"""PeerStatus (spec section 3.3). Upstream: ``peer_status.go``, which has no test of its own."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from pipeline.callbacks import Callbacks
from pipeline.logs import FIELDS, get_logger
from pipeline.send.changes import PeerChange, PeerChanges, PeerState
from pipeline.send.status import PeerStatus
from tests.support import LONG_TIMEOUT

PEER = 0x8E9E05C52164694D
URL = "http://10.0.0.2:2380"


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
    caplog.set_level(logging.DEBUG, "pipeline.send.status")
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


@pytest.mark.parametrize(
    ("source", "channel"),
    [
        ("pipeline", "pipeline"),
        ("stream MsgApp v2", "msgapp"),
        ("stream Message", "message"),
        ("sendMsgSnap", "snapshot"),
    ],
)
def test_a_failure_is_logged_with_where_it_was_and_why(
    status: PeerStatus, caplog: pytest.LogCaptureFixture, source: str, channel: str
) -> None:
    status.deactivate(source, "dial", "10.0.0.2:2380: Connection refused", url=URL)
    (record,) = caplog.records
    assert {name: getattr(record, name) for name in FIELDS} == {
        "local": f"{status.member_id:x}",
        "peer": "8e9e05c52164694d",
        "url": URL,
        "reason": "10.0.0.2:2380: Connection refused",
        "verdict": "refused",
        "channel": channel,
        "address": None,
    }


def test_deactivate_is_warned_of_once_and_then_debug(
    status: PeerStatus, flag: Flag, caplog: pytest.LogCaptureFixture
) -> None:
    status.activate()
    caplog.clear()
    status.deactivate("pipeline", "write", "connection refused", url=URL)
    status.deactivate("sendMsgSnap", "post", "stopped", url=URL)
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


def test_a_peer_never_active_has_not_disconnected_and_is_warned_of_once(
    status: PeerStatus, caplog: pytest.LogCaptureFixture
) -> None:
    status.deactivate("pipeline", "write", "stopped", url=URL)
    for reason in ("refused", "refused", "timeout"):
        status.deactivate("pipeline", "write", reason, url=URL)
    assert status.disconnects == 0
    assert [level for level, _ in lines(caplog)] == ["DEBUG", "WARNING", "DEBUG", "DEBUG"]
    assert lines(caplog)[1][1] == (
        "peer was never active (message send to peer failed): "
        "failed to write 8e9e05c52164694d on pipeline (refused)"
    )


def test_a_mismatch_is_an_error_once_per_change(
    status: PeerStatus, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(reason: str) -> str:
        caplog.clear()
        status.deactivate("pipeline", "write", reason, url=URL)
        ((level, text),) = lines(caplog)
        assert text.endswith(f"failed to write 8e9e05c52164694d on pipeline ({reason})")
        return level

    assert fail("cluster ID mismatch") == "ERROR"
    assert fail("cluster ID mismatch") == "DEBUG"
    assert fail("refused") == "DEBUG"
    assert fail("cluster ID mismatch") == "DEBUG"
    assert fail("incompatible version") == "ERROR"
    assert fail("incompatible version") == "DEBUG"
    status.activate()
    assert fail("incompatible version") == "ERROR"
    assert status.disconnects == 1


def test_the_last_error_is_kept_with_its_time_and_how_often_in_a_row(status: PeerStatus) -> None:
    assert status.last_error is None
    before = time.time()
    told = []
    for reason in ("refused", "refused", "timeout", "refused"):
        status.deactivate("pipeline", "write", reason, url=URL)
        told.append(status.last_error)
    assert [(error.text, error.times) for error in told if error] == [
        ("refused", 1),
        ("refused", 2),
        ("timeout", 1),
        ("refused", 1),
    ]
    assert all(before <= error.at <= time.time() for error in told if error)
    status.activate()
    assert status.last_error == told[-1]
    status.deactivate("pipeline", "write", "refused", url=URL)
    assert status.last_error is not None
    assert status.last_error.times == 1


OK, REFUSED, CUT = "", "refused", "reset"
MISMATCH, VERSION = "cluster ID mismatch", "incompatible version"
GONE = "the member has been permanently removed from the cluster"


@pytest.mark.parametrize(
    ("heard", "told"),
    [
        ([], []),
        ([OK, OK, OK], [(PeerState.ACTIVE, "")]),
        ([REFUSED, REFUSED, CUT], [(PeerState.INACTIVE, REFUSED)]),
        (
            [OK, CUT, REFUSED, OK, REFUSED],
            [
                (PeerState.ACTIVE, ""),
                (PeerState.INACTIVE, CUT),
                (PeerState.ACTIVE, ""),
                (PeerState.INACTIVE, REFUSED),
            ],
        ),
        # What time does not heal is ended by a success, and not by failures of another kind.
        (
            [REFUSED, MISMATCH, REFUSED, MISMATCH, VERSION, OK, MISMATCH],
            [
                (PeerState.INACTIVE, REFUSED),
                (PeerState.MISMATCHED, MISMATCH),
                (PeerState.ACTIVE, ""),
                (PeerState.MISMATCHED, MISMATCH),
            ],
        ),
        ([OK, GONE, GONE, CUT], [(PeerState.ACTIVE, ""), (PeerState.REMOVED, GONE)]),
        ([GONE, VERSION], [(PeerState.REMOVED, GONE), (PeerState.MISMATCHED, VERSION)]),
    ],
    ids=["nothing", "up", "down", "flaps", "mismatch", "removed", "removed, mismatch"],
)
def test_a_change_is_told_once(
    status: PeerStatus, heard: list[str], told: list[tuple[PeerState, str]]
) -> None:
    changes: list[PeerChange] = []
    status.changes = PeerChanges(PEER, changes.append, Callbacks(get_logger(__name__)))
    for reason in heard:
        if reason:
            status.deactivate("pipeline", "write", reason, url=URL)
        else:
            status.activate()
    assert changes == []  # it is not for the status to call anybody
    status.changes.tell()
    assert changes == [PeerChange(PEER, *row) for row in told]


UNHEALED = [
    "the member has been permanently removed from the cluster",
    "incompatible version",
    "cluster ID mismatch",
    'unhandled error "certificate not allowed for this member\\n" when precondition failed',
    "TLS handshake: certificate verify failed: unable to get local issuer certificate",
    "TLS handshake: certificate refused: its common name 'x' is not allowed",
    "TLS: tlsv1 alert unknown ca",
    "sslv3 alert bad certificate",
]
HEALED = [
    "Connection refused",
    "dial timeout",
    "TLS handshake: wrong version number",
    'unexpected http status Internal Server Error while posting to "http://a:1/raft"',
]


@pytest.mark.parametrize("reason", [*UNHEALED, *HEALED])
def test_what_time_does_not_heal_is_an_error(
    status: PeerStatus, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    status.deactivate("pipeline", "write", "first", url=URL)
    status.deactivate("pipeline", "write", reason, url=URL)
    expected = "ERROR" if reason in UNHEALED else "DEBUG"
    assert [level for level, _ in lines(caplog)] == ["WARNING", expected]


def test_each_going_away_counts(status: PeerStatus) -> None:
    for _ in range(3):
        status.activate()
        status.deactivate("pipeline", "write", "refused", url=URL)
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
            status.deactivate("pipeline", "write", "asked by a handler", url=URL)

    nosy, log = Nosy(level=logging.INFO), logging.getLogger("pipeline.send.status")
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

    caplog.set_level(logging.INFO, "pipeline.send.status")
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
        status.deactivate("pipeline", "write", "refused", url=URL)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_TIMEOUT)
    assert status.disconnects == 1
    assert flag.writes == 2
    assert [level for level, _ in lines(caplog)].count("WARNING") == 1


def test_the_first_failure_after_a_success_or_the_start_is_told_apart(status: PeerStatus) -> None:
    told = [status.deactivate("pipeline", "write", "x", url=URL) for _ in range(2)]
    status.activate()
    assert not status.is_unreachable
    told += [status.deactivate("pipeline", "write", "x", url=URL) for _ in range(2)]
    assert status.is_unreachable
    assert told == [True, False, True, False]
