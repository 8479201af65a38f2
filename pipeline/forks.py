"""What a forked child finds of its parent's: objects of which every method says whose they are.

A child has none of our threads. What it sent would stay where it is, and what it counted would be
what the parent had counted when it forked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from pipeline.errors import UsageError

__all__ = ["disown", "foreign_error", "is_foreign", "nothing_to_stop", "public_names"]


class _Foreign:
    """Marks the classes that ``disown`` makes."""

    __slots__ = ()


def foreign_error(name: str, noun: str) -> UsageError:
    """Return what a forked child is told that uses what its parent has started."""
    return UsageError(
        f"{name}: this {noun} belongs to the process that forked this one; "
        "a forked child makes one of its own"
    )


def public_names(kind: type) -> tuple[str, ...]:
    """Return the methods and properties that applications use, but for ``stop``."""
    names = (name for name in dir(kind) if not name.startswith("_") and name != "stop")
    return (*names, *(name for name in ("__enter__", "__aenter__") if hasattr(kind, name)))


def nothing_to_stop(_: object) -> int:
    """Be the ``stop`` of what another process runs: no message is dropped by it."""
    return 0


def is_foreign(thing: object) -> bool:
    """Tell whether ``thing`` belongs to the process that forked this one."""
    return isinstance(thing, _Foreign)


def disown(thing: object, noun: str, names: Iterable[str], **harmless: Callable[..., Any]) -> None:
    """Have methods and properties raise ``UsageError`` from now on. In a forked child.

    The object is given another class, so that in the process that owns it nothing is asked.

    Parameters
    ----------
    thing : object
    noun : str
        What it is called in the errors.
    names : iterable of str
        The methods and properties.
    **harmless : callable
        Methods that do something else instead: of a ``stop`` there is nothing left to do.
    """
    if not is_foreign(thing):
        kind: Any = type(thing)
        thing.__class__ = _foreign_class(kind, noun, tuple(names), tuple(harmless.items()))


@cache
def _foreign_class(
    kind: type, noun: str, names: tuple[str, ...], harmless: tuple[tuple[str, Any], ...]
) -> type:
    members = {name: _refusing(getattr(kind, name), name, noun) for name in names}
    members["__slots__"] = ()  # an object can be given a class that adds nothing to it
    members["__repr__"] = lambda _: f"<{noun} of the process that forked this one>"
    return type(kind.__name__, (kind, _Foreign), {**members, **dict(harmless)})


def _refusing(member: object, name: str, noun: str) -> object:
    def refuse(*_: object, **__: object) -> Any:
        raise foreign_error(name, noun)

    return property(refuse) if isinstance(member, property) else refuse
