"""FakeRaft: a node that records what it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from pipeline.types import SnapshotStatus
from pipeline.wire._messages import Message
from tests.support import LONG_TIMEOUT

T = TypeVar("T")


class FakeRaft:
    """Implements ``pipeline.Raft``. Thread-safe.

    Attributes
    ----------
    processed : list of Message
    unreachable : list of int
    snapshots : list of (int, SnapshotStatus)
        What was called, recorded before anything below takes effect.
    removed : set of int
        Members that ``is_id_removed`` knows as removed.
    process_error, report_error : BaseException or None
        Raised by ``process``; by both reports.
    gate : threading.Event or None
        ``process`` and the reports wait for it before they return or raise.
    """

    def __init__(
        self,
        *,
        process_error: BaseException | None = None,
        report_error: BaseException | None = None,
        gate: threading.Event | None = None,
    ) -> None:
        self.processed: list[Message] = []
        self.unreachable: list[int] = []
        self.snapshots: list[tuple[int, SnapshotStatus]] = []
        self.removed: set[int] = set()
        self.process_error = process_error
        self.report_error = report_error
        self.gate = gate
        self._changed = threading.Condition()

    def process(self, message: Message) -> None:
        self._record(self.processed, message, self.process_error)

    def is_id_removed(self, member_id: int) -> bool:
        return member_id in self.removed

    def report_unreachable(self, member_id: int) -> None:
        self._record(self.unreachable, member_id, self.report_error)

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        self._record(self.snapshots, (member_id, status), self.report_error)

    def wait_processed(self, count: int, timeout: float = LONG_TIMEOUT) -> list[Message]:
        """Wait until ``process`` was called ``count`` times; return the messages."""
        return self._wait(self.processed, count, timeout)

    def wait_unreachable(self, count: int, timeout: float = LONG_TIMEOUT) -> list[int]:
        """Wait until ``report_unreachable`` was called ``count`` times; return the ids."""
        return self._wait(self.unreachable, count, timeout)

    def wait_snapshots(
        self, count: int, timeout: float = LONG_TIMEOUT
    ) -> list[tuple[int, SnapshotStatus]]:
        """Wait until ``report_snapshot`` was called ``count`` times; return the calls."""
        return self._wait(self.snapshots, count, timeout)

    def wait_for(self, predicate: Callable[[], bool], timeout: float = LONG_TIMEOUT) -> None:
        """Wait until ``predicate`` holds; it is looked at after every call."""
        with self._changed:
            if not self._changed.wait_for(predicate, timeout):
                raise AssertionError(f"did not happen within {timeout:g} s")

    def _record(self, calls: list[T], call: T, error: BaseException | None) -> None:
        with self._changed:
            calls.append(call)
            self._changed.notify_all()
        if self.gate is not None and not self.gate.wait(LONG_TIMEOUT):
            raise AssertionError("the gate was never opened")
        if error is not None:
            raise error

    def _wait(self, calls: list[T], count: int, timeout: float) -> list[T]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(calls) >= count, timeout):
                raise AssertionError(f"{len(calls)} calls within {timeout:g} s, expected {count}")
            return list(calls)
