"""Event loops that tests run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

#: Those there are; ``loop_factory`` skips a test where one is not installed.
LOOPS = ("asyncio", "uvloop")


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes such a loop, as ``asyncio.Runner`` takes it; None is Python's own."""
    if name == "asyncio":
        return None
    uvloop = pytest.importorskip("uvloop", reason="no uvloop for this Python")
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
