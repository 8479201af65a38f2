"""PeerChanges: each change told once, one at a time, in order. What a change is: test_status.py."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.callbacks import Callbacks
from pipeline.logs import get_logger
from pipeline.send.changes import WAITING_MAX, PeerChange, PeerChanges, PeerState
from tests.support import LONG_TIMEOUT
from tests.support.callbacks import RudeError, Unawaited

PEER = 0x8E9E05C52164694D
UP = PeerChange(PEER, PeerState.ACTIVE, "")
DOWN = PeerChange(PEER, PeerState.INACTIVE, "refused")


class Recorder:
    """Records what it is told; if it blocks, not before ``release`` is set."""

    def __init__(self, *, blocks: bool = False) -> None:
        self.told: list[PeerChange] = []
        self.callbacks = Callbacks(get_logger(__name__))
        self.changes = PeerChanges(PEER, self, self.callbacks)
        self.is_blocked = threading.Event()
        self.release = threading.Event()
        if not blocks:
            self.release.set()

    def __call__(self, change: PeerChange) -> None:
        self.is_blocked.set()
        assert self.release.wait(LONG_TIMEOUT)
        self.told.append(change)


def test_what_is_noted_is_told_in_order_and_once() -> None:
    it = Recorder()
    for change in (DOWN, UP, DOWN):
        it.changes.note(change)
    assert it.told == []
    it.changes.tell()
    it.changes.tell()
    assert it.told == [DOWN, UP, DOWN]


def test_a_thread_that_finds_another_telling_leaves_its_change_to_it() -> None:
    it = Recorder(blocks=True)
    it.changes.note(DOWN)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(it.changes.tell)
        assert it.is_blocked.wait(LONG_TIMEOUT)
        it.changes.note(UP)
        it.changes.tell()  # returns at once
        assert it.told == []
        it.release.set()
        first.result(LONG_TIMEOUT)
    assert it.told == [DOWN, UP]


def test_what_a_callback_brings_about_is_told_after_it_and_not_within() -> None:
    told: list[PeerChange] = []

    def on_peer_change(change: PeerChange) -> None:
        if change is DOWN:
            changes.note(UP)
            changes.tell()
        told.append(change)

    changes = PeerChanges(PEER, on_peer_change, Callbacks(get_logger(__name__)))
    changes.note(DOWN)
    changes.tell()
    assert told == [DOWN, UP]


def test_many_threads_tell_each_change_once_and_never_two_at_a_time() -> None:
    threads, rounds = 8, 200
    told: list[PeerChange] = []
    inside = threading.Lock()
    room = threading.Semaphore(WAITING_MAX)  # of more than that some would be left out

    def on_peer_change(change: PeerChange) -> None:
        assert inside.acquire(blocking=False)
        told.append(change)
        inside.release()
        room.release()

    callbacks = Callbacks(get_logger(__name__))
    changes = PeerChanges(PEER, on_peer_change, callbacks)
    noting = threading.Lock()  # as a status notes, under its own
    noted: list[PeerChange] = []

    def news() -> None:
        for _ in range(rounds):
            assert room.acquire(timeout=LONG_TIMEOUT)
            with noting:
                change = UP._replace(reason=str(len(noted)))
                noted.append(change)
                changes.note(change)
            changes.tell()

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(news) for _ in range(threads)]:
            done.result(LONG_TIMEOUT)
    assert callbacks.errors == 0
    assert told == noted


@pytest.mark.parametrize("flips", range(1, 6))
def test_of_too_many_that_wait_pairs_are_left_out_and_the_last_one_holds(flips: int) -> None:
    it = Recorder()
    noted = [(DOWN, UP)[i % 2] for i in range(WAITING_MAX + flips)]
    for change in noted:
        it.changes.note(change)
    it.changes.tell()
    assert len(it.told) <= WAITING_MAX
    assert it.told == [(DOWN, UP)[i % 2] for i in range(len(it.told))]  # still in turn
    assert it.told[-1] == noted[-1]


def test_a_change_to_a_third_state_takes_the_place_of_the_newest() -> None:
    it = Recorder()
    for i in range(WAITING_MAX):
        it.changes.note((DOWN, UP)[i % 2])
    removed = PeerChange(PEER, PeerState.REMOVED, "gone")
    it.changes.note(removed)
    it.changes.tell()
    assert it.told[-2:] == [DOWN, removed]


def test_after_close_nothing_is_told() -> None:
    it = Recorder(blocks=True)
    it.changes.note(DOWN)
    it.changes.note(UP)
    with ThreadPoolExecutor(1) as pool:
        telling = pool.submit(it.changes.tell)
        assert it.is_blocked.wait(LONG_TIMEOUT)
        it.changes.close()
        it.changes.note(DOWN)
        it.release.set()
        telling.result(LONG_TIMEOUT)
    it.changes.tell()
    assert it.told == [DOWN]  # the one that was being told


def test_a_callback_that_raises_is_logged_and_counted_and_the_next_change_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[PeerChange] = []

    def on_peer_change(change: PeerChange) -> None:
        told.append(change)
        raise RudeError

    caplog.set_level(logging.ERROR)
    callbacks = Callbacks(get_logger(__name__))
    changes = PeerChanges(PEER, on_peer_change, callbacks)
    for change in (DOWN, UP):
        changes.note(change)
    # Not in the main thread: there what ends a program would be raised on.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(changes.tell).result(LONG_TIMEOUT)
    assert told == [DOWN, UP]
    assert callbacks.errors == 2
    assert "on_peer_change raised for 8e9e05c52164694d" in caplog.text


def test_a_callback_that_only_makes_a_coroutine_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callbacks = Callbacks(get_logger(__name__))
    changes = PeerChanges(PEER, Unawaited(), callbacks)
    for change in (DOWN, UP):
        changes.note(change)
    changes.tell()
    assert callbacks.errors == 2
    assert caplog.text.count("on_peer_change: returned") == 1
