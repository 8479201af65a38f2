"""A listener whose closing is awaited."""

from __future__ import annotations

from typing import Self

from pipeline.aio.blocking import in_thread
from pipeline.receive.listener import Listener as ThreadedListener
from pipeline.stats import ReceiverStats

__all__ = ["Listener"]


class Listener:
    """A listener of :meth:`Transport.listen`. Also an async context manager.

    Attributes
    ----------
    url : str
        Where it is served, with the real port; of several the first one given.
    urls : tuple of str
        All of them, in the order given.
    """

    def __init__(self, listener: ThreadedListener) -> None:
        self._listener = listener
        self.url = listener.url
        self.urls = listener.urls

    def stats(self) -> ReceiverStats:
        """Return what was received and what had to be limited."""
        return self._listener.stats()

    async def close(self, deadline_s: float = 1.0) -> None:
        """Close as :meth:`pipeline.Listener.close` does, off the loop."""
        await in_thread(self._listener.close, deadline_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
