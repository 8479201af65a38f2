"""URLPicker: which of a peer's URLs is tried next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from pipeline.urls import parse_peer_urls

__all__ = ["URLPicker"]


class URLPicker:
    """A peer's URLs and the one in use.

    Shared by everything that sends to the peer, so that one that fails turns all of them to
    the next URL.

    Parameters
    ----------
    urls : iterable of str
        See :func:`pipeline.urls.parse_peer_urls`.

    Notes
    -----
    Thread-safe; never blocks. Source: etcd ``rafthttp/urlpick.go``.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self._lock = threading.Lock()  # guards the two below
        self._urls = parse_peer_urls(urls)
        self._picked = 0
        self._on_change: list[Callable[[], object]] = []

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs, sorted."""
        with self._lock:
            return self._urls

    def subscribe(self, on_change: Callable[[], object]) -> None:
        """Have ``on_change`` called whenever ``pick`` may return another URL than before.

        It is called by the thread that made the change, and must neither block nor raise.
        """
        self._on_change.append(on_change)

    def pick(self) -> str:
        """Return the URL in use: the same one until it is reported unreachable."""
        with self._lock:
            return self._urls[self._picked]

    def unreachable(self, url: str) -> None:
        """Go on to the next URL if ``url``, as ``pick`` gave it, is still the one in use.

        Several workers that failed on one URL advance once.
        """
        with self._lock:
            if url != self._urls[self._picked] or len(self._urls) == 1:
                return
            self._picked = (self._picked + 1) % len(self._urls)
        self._changed()

    def update(self, urls: Iterable[str]) -> None:
        """Replace the URLs and start from the first. After ``UsageError`` nothing has changed."""
        parsed = parse_peer_urls(urls)
        with self._lock:
            self._urls = parsed
            self._picked = 0
        self._changed()

    def _changed(self) -> None:
        for on_change in self._on_change:
            on_change()
