"""The rule that ends a body that drips, where Python reads it."""

from __future__ import annotations

from pipeline.config import ReceiverConfig

__all__ = ["BodyTime"]


class BodyTime:
    """For how long more of a body is waited for: a stall at first, and at most.

    Each byte adds what it may take at the least rate, and each wait takes what it took. So a body
    may stop for a while and may be slow, but one that drips is ended, however quickly it began.
    ``caller_body_time`` of the loop is the same rule.

    Parameters
    ----------
    config : ReceiverConfig
        For ``stall_timeout_s`` and ``min_body_rate``.

    Attributes
    ----------
    left_s : float
        Seconds; below 0 when it is over.

    Notes
    -----
    Used by one thread at a time.
    """

    def __init__(self, config: ReceiverConfig) -> None:
        self._stall_s = self.left_s = config.stall_timeout_s
        self._rate = config.min_body_rate

    def arrived(self, n: int, waited_s: float) -> None:
        """Count ``n`` bytes that were waited for so long."""
        if self._rate:  # else any piece is worth a whole stall
            self.left_s = min(self.left_s - waited_s + n / self._rate, self._stall_s)
