"""Pace: how a thread of ours makes way for others while it is given work in small pieces."""

from __future__ import annotations

import time

__all__ = ["PIECE_S", "Pace"]

#: A piece below this size, on average, is small: to look at it costs more than to copy it.
SMALL_BYTES = 1024
#: The rest for each small piece: ten times what the interpreter has to do with it.
PIECE_S = 0.00005
#: No rest is shorter: a wake-up takes as long as some pieces.
REST_S = 0.001


class Pace:
    """Counts pieces, and rests when they are many and small.

    A thread that goes from piece to piece has the GIL again before others have woken up, who then
    wait for the switch interval of 5 ms each time they want it: four connections that dribbled cut
    the rate of messages to a five-hundredth. Resting, a thread that is kept busy so takes a tenth
    of the interpreter.

    Notes
    -----
    Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._due_s = 0.0

    def took(self, pieces: int, size_bytes: int, piece_s: float = PIECE_S) -> None:
        """Count pieces with so many bytes together; rest when it is due."""
        if size_bytes >= pieces * SMALL_BYTES:
            return
        self._due_s += pieces * piece_s
        if self._due_s >= REST_S:
            time.sleep(self._due_s)
            self._due_s = 0.0
