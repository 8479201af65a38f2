"""A snapshot on its way, whose end is awaited."""

from __future__ import annotations

import asyncio

from pipeline.snapshot.sender import SnapshotProgress
from pipeline.snapshot.sender import SnapshotTransfer as ThreadedTransfer

__all__ = ["SnapshotTransfer"]


class SnapshotTransfer:
    """A snapshot on its way: what ``Transport.begin_snapshot`` returns. Used on the loop.

    Attributes
    ----------
    peer_id : int
        The member it is for.
    """

    def __init__(self, transfer: ThreadedTransfer) -> None:
        self._transfer = transfer
        self.peer_id = transfer.peer_id

    @property
    def progress(self) -> SnapshotProgress:
        """How far it is at this moment."""
        return self._transfer.progress

    def cancel(self) -> None:
        """End it, in whatever phase; nothing if it has ended."""
        self._transfer.cancel()

    def done(self) -> bool:
        """Tell whether it has ended, and Raft has been told."""
        return self._transfer.done()

    async def result(self) -> None:
        """Wait until it has ended; raises what ``pipeline.SnapshotTransfer.result`` does.

        A task that is cancelled while it waits leaves it running: :meth:`cancel` ends it.
        """
        waiting = asyncio.wrap_future(self._transfer.future)
        try:
            await asyncio.wait((waiting,))
        finally:
            waiting.cancel()  # nothing, unless we were
        if not waiting.cancelled():
            waiting.exception()  # it is seen to
        self._transfer.result()
