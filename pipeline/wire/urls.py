"""Peer URLs: checked, and put into etcd's form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

from pipeline.arguments import require_iterable
from pipeline.errors import UsageError
from pipeline.logs import show
from pipeline.names import is_wildcard

__all__ = ["parse_peer_urls", "parse_urls"]

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
    from urllib3.util import parse_url

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
        raise UsageError(f"{name}: {show(url)}: the scheme must be http or https")
    if not _PRINTABLE.fullmatch(rest):
        raise UsageError(
            f"{name}: {show(url)}: an address of printable ASCII must follow the scheme"
        )
    if scheme in ("http", "https"):
        _require_host_and_port(f"{name}: {show(url)}", text)
    return f"{scheme}://{rest}"


def _require_host_and_port(what: str, text: str) -> None:
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

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
