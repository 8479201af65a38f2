"""The body of a snapshot's request, as who stores it reads it, and how that may fail."""

from __future__ import annotations

from typing import Protocol

from pipeline.snapshot.store import Saving

__all__ = ["BodyError", "ClosingError", "NoRoomError", "SnapshotBody"]


class BodyError(Exception):
    """A body broke off, stalled or is malformed."""


class NoRoomError(BodyError):
    """There is no memory for a message just now."""


class ClosingError(BodyError):
    """The listener closes, and does not wait for the rest of a body."""


class SnapshotBody(Protocol):
    """The body of a request, read by one thread."""

    #: Bytes still to come, where that was announced.
    left: int | None
    #: Set while its database is being stored, for who has to end that from outside.
    saving: Saving | None

    def readinto(self, view: memoryview) -> int:
        """Read some bytes, at most ``len(view)``; 0 at the end. Raises ``BodyError``."""
