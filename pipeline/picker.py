"""URLPicker: which of a peer's URLs is tried next."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from typing import cast

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from pipeline.arguments import require_iterable
from pipeline.errors import UsageError
from pipeline.logs import show
from pipeline.names import is_wildcard

__all__ = ["URLPicker", "parse_peer_urls", "parse_urls"]

# A URL ends up in a request line, in Host and, joined by commas, in X-PeerURLs.
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")


def parse_urls(
    urls: Iterable[str], name: str = "urls", *, may_be_empty: bool = False
) -> tuple[str, ...]:
    """Check peer URLs and put them into etcd's form: trimmed, scheme in lower case, sorted.

    Parameters
    ----------
    urls : iterable of str
        ``http`` and ``https`` need ``host:port`` and nothing after it, not even a slash; ``unix``
        and ``unixs`` need an address.
    name : str
        The argument's, for errors.
    may_be_empty : bool
        Otherwise at least one is needed.

    Raises
    ------
    UsageError
        Naming the value and the rule it breaks.

    Notes
    -----
    Source: etcd ``client/pkg/types/urls.go`` ``NewURLs``.
    Differs from etcd: user names, queries, fragments and empty hosts are refused as well.
    """
    if isinstance(urls, (str, bytes)):
        raise UsageError(f"{name}: {show(urls)} is one URL, not a list of URLs")
    parsed = sorted(_parse_url(name, url) for url in require_iterable(name, urls, "URLs"))
    if not parsed and not may_be_empty:
        raise UsageError(f"{name}: at least one URL is needed")
    return tuple(parsed)


def parse_peer_urls(
    urls: Iterable[str], name: str = "urls", *, may_be_empty: bool = False
) -> tuple[str, ...]:
    """Check URLs that a member is to be reached at, as :func:`parse_urls` does.

    Raises
    ------
    UsageError
        Also of a wildcard address: who dials that reaches itself.

    Notes
    -----
    Differs from etcd: it advertises whatever it is told to.
    """
    parsed = parse_urls(urls, name, may_be_empty=may_be_empty)
    for url in parsed:
        if url.startswith(("http://", "https://")) and is_wildcard(cast(str, parse_url(url).host)):
            raise UsageError(
                f"{name}: {url!r}: a wildcard address can be listened at but not reached; "
                "give the address or the name that the other members dial"
            )
    return parsed


def _parse_url(name: str, url: str) -> str:
    if not isinstance(url, str):
        raise UsageError(f"{name}: {show(url)} is not a str")
    text = url.strip()
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in ("http", "https", "unix", "unixs"):
        raise UsageError(f"{name}: {show(url)}: the scheme must be http, https, unix or unixs")
    if not _PRINTABLE.fullmatch(rest):
        raise UsageError(
            f"{name}: {show(url)}: an address of printable ASCII must follow the scheme"
        )
    if scheme in ("http", "https"):
        _require_host_and_port(f"{name}: {show(url)}", text)
    return f"{scheme}://{rest}"


def _require_host_and_port(what: str, text: str) -> None:
    try:
        parsed = parse_url(text)
    except LocationParseError as error:
        raise UsageError(f"{what}: must be host:port: {error}") from None
    if parsed.auth is not None:
        raise UsageError(f"{what}: must not hold a user name")
    if parsed.path or parsed.query is not None or parsed.fragment is not None:
        raise UsageError(f"{what}: must end after the port, without path or slash")
    if not parsed.host or not _HOST.fullmatch(parsed.host) or parsed.port is None:
        raise UsageError(f"{what}: must be host:port")


class URLPicker:
    """A peer's URLs and the one in use.

    Shared by everything that sends to the peer, so that one that fails turns all of them to
    the next URL.

    Parameters
    ----------
    urls : iterable of str
        See :func:`parse_peer_urls`.

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
