"""What arguments may be. Each rule is here once, and what breaks it is one ``UsageError``.

The text names the argument, shows the value and states the rule.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pipeline.errors import UsageError
from pipeline.logs import show

__all__ = [
    "absolute_path",
    "require_bool",
    "require_id",
    "require_instance",
    "require_iterable",
    "require_number",
    "require_one_of",
    "require_whole",
]

T = TypeVar("T")

#: Member and cluster IDs, and indexes of the log.
ID_MAX = (1 << 64) - 1


def require_number(name: str, value: object, low: float, high: float) -> None:
    """Refuse what is no number in ``low..high``. True and NaN are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{name}: {show(value)} is not a number in {low:g}..{high:g}")


def require_whole(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no int in ``low..high``. True is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name}: {show(value)} is not a whole number in {low}..{high}")


def require_id(name: str, value: object) -> None:
    """Refuse what is no ID: an int of 64 bits, unsigned."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= ID_MAX:
        raise UsageError(f"{name}: {show(value)} is not an int in 0..2**64-1")


def require_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name}: {show(value)} is not True or False")


def require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse what is none of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise UsageError(f"{name}: {show(value)} is not one of {', '.join(allowed)}")


def require_instance(name: str, value: object, kind: type[T], called: str = "") -> T:
    """Return ``value``, if it is a ``kind``; ``called`` is the name by which it is imported."""
    if not isinstance(value, kind):
        raise UsageError(f"{name}: {show(value)} is not a {called or kind.__name__}")
    return value


def require_iterable(name: str, value: Iterable[T], of: str) -> Iterator[T]:
    """Return an iterator over ``value``, if there is one."""
    try:
        return iter(value)
    except TypeError:
        raise UsageError(f"{name}: {show(value)} is not a list of {of}") from None


def absolute_path(name: str, value: object) -> str:
    """Return a path as one that means the same file after the process has changed directory.

    ``str``, ``bytes`` and ``os.PathLike`` mean the same. Links and ``..`` stay as they are.
    """
    try:
        text = os.fsdecode(value)  # type: ignore[arg-type]
    except Exception:  # an object's own __fspath__ may raise anything
        text = ""
    if not text or "\0" in text:
        raise UsageError(f"{name}: {show(value)} is not a path")
    try:
        return str(Path(text).absolute())
    except OSError as error:
        raise UsageError(
            f"{name}: {show(value)} is relative, and there is no current directory: {error}"
        ) from error
