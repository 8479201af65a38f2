"""Callbacks, and errors of the application's, that the library must survive."""

from __future__ import annotations

from typing import Any


class RudeError(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise SystemExit

    __repr__ = __str__


class Unawaited:
    """A callback that only makes a coroutine, of which nobody can see so before it is called."""

    def __init__(self, result: object = None) -> None:
        self.result = result

    def __call__(self, *_: object) -> Any:
        return self._later()

    async def _later(self) -> object:
        return self.result
