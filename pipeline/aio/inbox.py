"""The inbox: what has arrived is awaited."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, cast, overload

from pipeline.arguments import require_number
from pipeline.receive.inbox import Inbox as ThreadedInbox
from pipeline.receive.inbox import Taken
from pipeline.stats import InboxStats

if TYPE_CHECKING:
    from pipeline.wire._messages import EncodedMessage, Message

__all__ = ["Inbox"]


class Inbox(Generic[Taken]):
    """What has arrived, decoded, until the node takes it. ``pipeline.Inbox`` says how it works.

    Given to ``pipeline.aio.Transport``. ``async for batch in inbox`` takes until it is closed.

    Parameters
    ----------
    max_messages, max_bytes, encoded
        As ``pipeline.Inbox`` has them.

    Notes
    -----
    ``take`` belongs to the loop that runs when it is first awaited; many tasks may wait. The loop
    watches ``fileno()``, so that it wakes once for a batch and not for a message. What is plain may
    be called from any thread.
    """

    @overload
    def __init__(
        self: Inbox[Message],
        *,
        max_messages: int = ...,
        max_bytes: int = ...,
        encoded: Literal[False] = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Inbox[EncodedMessage],
        *,
        max_messages: int = ...,
        max_bytes: int = ...,
        encoded: Literal[True],
    ) -> None: ...
    def __init__(
        self, *, max_messages: int = 4096, max_bytes: int = 64 << 20, encoded: bool = False
    ) -> None:
        make: Any = ThreadedInbox  # which of the two it makes, ``encoded`` says
        #: What ``pipeline.Transport`` would be given.
        self.threaded = cast(
            "ThreadedInbox[Taken]",
            make(max_messages=max_messages, max_bytes=max_bytes, encoded=encoded),
        )
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._watching: asyncio.AbstractEventLoop | None = None

    async def take(self, max_messages: int = 256, timeout: float | None = None) -> list[Taken]:
        """Take what has arrived, the oldest first.

        Parameters
        ----------
        max_messages : int
            How many at most.
        timeout : float or None
            Seconds to wait when there is nothing; 0 does not wait. None waits until something
            comes, or the inbox is closed.

        Returns
        -------
        list of Message, or of EncodedMessage
            Empty when nothing came in time, and always once the inbox is closed.

        Raises
        ------
        asyncio.CancelledError
            Nothing is taken then, and nothing lost.
        UsageError, OSError
            As ``pipeline.Inbox.take`` raises them.
        """
        if timeout is not None:
            require_number("timeout", timeout, 0.0, 1e9)
        messages = self.threaded.take(max_messages)
        if messages or timeout == 0:
            return messages
        try:
            async with asyncio.timeout(timeout):
                while not messages and not self.closed:
                    await self._arrival()
                    messages = self.threaded.take(max_messages)
        except TimeoutError:
            pass
        return messages

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Taken]:
        """Wait for the next batch; ends when the inbox is closed."""
        messages = await self.take()
        if not messages:
            raise StopAsyncIteration
        return messages

    def fileno(self) -> int:
        """As ``pipeline.Inbox`` has it; ``take`` watches it itself."""
        return self.threaded.fileno()

    @property
    def closed(self) -> bool:
        """Whether the last transport that it was given to has been stopped."""
        return self.threaded.closed

    def stats(self) -> InboxStats:
        """Return the books at this instant."""
        return self.threaded.stats()

    def __len__(self) -> int:
        """How many messages are there."""
        return len(self.threaded)

    def __bool__(self) -> bool:
        """An inbox is one, also when it is empty."""
        return True

    def __repr__(self) -> str:
        return repr(self.threaded).replace("<", "<aio.", 1)

    async def _arrival(self) -> None:
        """Wait until the descriptor is readable."""
        loop = asyncio.get_running_loop()
        if self._watching is not loop:
            loop.add_reader(self.fileno(), self._wake, loop)
            self._watching = loop
        waiter = loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:  # cancelled
                self._waiters.remove(waiter)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the next task look; called in each turn of the loop, as long as there is something.

        With nobody to take it the loop looks away, until somebody waits again.
        """
        while self._waiters:
            waiter = self._waiters.popleft()
            # One of a loop that was closed while it waited is nobody's any more.
            if not waiter.done() and waiter.get_loop() is loop:
                waiter.set_result(None)
                return
        loop.remove_reader(self.fileno())
        self._watching = None
