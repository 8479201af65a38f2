"""Places: how many of a kind may be at once, and each as a thing that is given back once."""

from __future__ import annotations

from pipeline.locks import lock_of

__all__ = ["Place", "Places"]


class Places:
    """So many places, free or taken. Thread-safe.

    Parameters
    ----------
    count : int
        How many there are.

    Attributes
    ----------
    free : int
        How many are free.
    """

    def __init__(self, count: int) -> None:
        self._lock = lock_of(self)  # guards the one below, and whether a place is taken
        self.free = count

    def take(self) -> Place | None:
        """Take a place; None when all are taken."""
        with self._lock:
            if self.free == 0:
                return None
            self.free -= 1
            return Place(self)

    def give_back(self, place: Place) -> None:
        """Make a place free; nothing if it is already. ``Place.give_back`` for who has it."""
        with self._lock:
            if place.is_taken:
                place.is_taken = False
                self.free += 1


class Place:
    """One of ``Places``, taken. It travels with what it was taken for, which gives it back."""

    __slots__ = ("_places", "is_taken")

    def __init__(self, places: Places) -> None:
        self._places = places
        self.is_taken = True

    def give_back(self) -> None:
        """Give it back. Any thread; twice is once."""
        self._places.give_back(self)
