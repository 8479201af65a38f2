"""The node behind commands that send or receive: it hears everything and does nothing."""

from __future__ import annotations

from pipeline import SnapshotStatus

__all__ = ["Quiet"]


class Quiet:
    """What a Transport tells, to nobody (``RaftReports``)."""

    def is_id_removed(self, member_id: int) -> bool:
        """Nobody was removed."""
        return False

    def report_unreachable(self, member_id: int) -> None:
        """The command looks at the books instead."""

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        """The transfer's result says it."""
