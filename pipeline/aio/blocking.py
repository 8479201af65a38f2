"""What blocks, awaited: each in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from pipeline.errors import without_frames
from pipeline.threads import LibraryThread

__all__ = ["in_thread"]

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what blocks in a thread of its own.

    Not in the loop's executor: that may be full of what waits for us, and closing the loop waits
    for it.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # it cannot be cancelled, only not be waited for
    LibraryThread(_run, "pipeline-aio", (done, partial(function, *args, **kwargs))).start()
    waiting = asyncio.wrap_future(done)
    try:
        return await waiting
    finally:
        del done, waiting  # they hold what is raised, which holds this frame


def _run(done: concurrent.futures.Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        without_frames(error)  # this one holds where it is kept
        done.set_exception(error)
