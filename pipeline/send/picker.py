"""URLPicker: which of a peer's URLs is tried next."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pipeline.locks import lock_of
from pipeline.wire.urls import parse_peer_urls

__all__ = ["URLPicker"]


class _Choice:
    """URLs that do not change, and which of them is in use."""

    __slots__ = ("picked", "urls")

    def __init__(self, urls: tuple[str, ...]) -> None:
        self.urls = urls
        self.picked = 0


class URLPicker:
    """A peer's URLs and the one in use.

    Shared by everything that sends to the peer, so that one that fails turns all of them to
    the next URL.

    Parameters
    ----------
    urls : iterable of str
        ``http://host:port`` or ``https://host:port``; at least one.

    Notes
    -----
    Thread-safe; never blocks. Source: etcd ``rafthttp/urlpick.go``.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self._choice = _Choice(parse_peer_urls(urls))  # an update replaces it
        self._lock = lock_of(self)  # guards the picked one of a choice
        self._on_change: list[Callable[[], object]] = []

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs, sorted."""
        return self._choice.urls

    def subscribe(self, on_change: Callable[[], object]) -> None:
        """Have ``on_change`` called whenever ``pick`` may return another URL than before.

        It is called by the thread that made the change, and must neither block nor raise.
        """
        self._on_change.append(on_change)

    def pick(self) -> str:
        """Return the URL in use: the same one until it is reported unreachable."""
        choice = self._choice
        return choice.urls[choice.picked]

    def unreachable(self, url: str) -> None:
        """Go on to the next URL if ``url``, as ``pick`` gave it, is still the one in use.

        Several workers that failed on one URL advance once.
        """
        with self._lock:
            choice = self._choice
            at = choice.picked
            if url != choice.urls[at] or len(choice.urls) == 1:
                return
            choice.picked = (at + 1) % len(choice.urls)
        self._changed()

    def update(self, urls: Iterable[str]) -> None:
        """Replace the URLs and start from the first. After ``UsageError`` nothing has changed."""
        self._choice = _Choice(parse_peer_urls(urls))
        self._changed()

    def _changed(self) -> None:
        for on_change in self._on_change:
            on_change()
