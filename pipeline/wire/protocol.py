"""What rafthttp means by HTTP: paths, headers, versions, and which error an answer stands for.

No sockets here. Source: etcd ``rafthttp/util.go``, ``http.go`` and ``pipeline.go``.
"""

from __future__ import annotations

import http
import re
from collections.abc import Mapping

from pipeline._version import __version__
from pipeline.arguments import require_id
from pipeline.errors import (
    ClusterIDMismatchError,
    IncompatibleVersionError,
    MemberRemovedError,
    PostError,
    UnexpectedStatusError,
    UsageError,
)
from pipeline.identity import Identity, Version, compare_major_minor
from pipeline.logs import show
from pipeline.names import zoneless
from pipeline.wire.urls import parse_peer_urls

__all__ = [
    "PROBING_PATH",
    "RAFT_PATH",
    "SNAPSHOT_PATH",
    "STREAM_PREFIX",
    "VERSION_PATH",
    "StreamNotSupportedError",
    "check_answer",
    "check_stream_answer",
    "check_version_compatibility",
    "format_id",
    "min_cluster_version",
    "parse_id",
    "parse_stream_path",
    "post_url",
    "probe_head",
    "reason_phrase",
    "request_head",
    "server_version",
    "stream_head",
]

RAFT_PATH = "/raft"
SNAPSHOT_PATH = "/raft/snapshot"
PROBING_PATH = "/raft/probing"
STREAM_PREFIX = "/raft/stream/"
STREAM_KINDS = ("msgapp", "message")
VERSION_PATH = "/version"

# As Go's net/http writes them: etcd's source says X-Etcd-Cluster-ID and X-PeerURLs, the wire does
# not.
CLUSTER_ID = "X-Etcd-Cluster-Id"
MIN_CLUSTER = "X-Min-Cluster-Version"
PEER_URLS = "X-Peerurls"
SERVER_FROM = "X-Server-From"
SERVER_VERSION = "X-Server-Version"

#: The status of a POST whose text means something: which of two refusals it is.
TELLING_STATUS = 412

#: The member that a stream is asked of: its ID, as it writes it.
RAFT_TO = "X-Raft-To"

CONTENT_TYPE = "application/protobuf"

#: How the User-Agent of every member of this library begins.
PRODUCT_NAME = "raft-pipeline/"
PRODUCT = f"{PRODUCT_NAME}{__version__}"

INCOMPATIBLE_VERSION = "incompatible version"
CLUSTER_ID_MISMATCH = "cluster ID mismatch"
MEMBER_REMOVED = "the member has been permanently removed from the cluster"

_ID = re.compile(r"[0-9A-Fa-f]+")
_TOKEN = re.compile(r"[!-~]+(?: [!-~]+)*")


def format_id(value: int, /) -> str:
    """Write a member's or cluster's ID as etcd does, and our headers, labels and logs.

    Parameters
    ----------
    value : int
        0 to 2**64-1.

    Returns
    -------
    str
        Hexadecimal digits, lower case, without leading zeros: ``8e9e05c52164694d``. ``etcdctl``
        shows the same; its ``--write-out=json`` has decimal numbers.

    Raises
    ------
    UsageError
        If it is not an int of 64 bits, unsigned.

    Notes
    -----
    Thread-safe. Source: etcd ``types.ID.String``.
    """
    require_id("id", value)
    return f"{value:x}"


def parse_id(text: str, /) -> int:
    """Read what :func:`format_id` writes, and what else etcd takes for an ID.

    Parameters
    ----------
    text : str
        ASCII hexadecimal digits of any case; leading zeros are allowed, a sign, a prefix such as
        ``0x``, underscores and spaces are not.

    Returns
    -------
    int
        0 to 2**64-1.

    Raises
    ------
    UsageError
        If it is no such text, or has more than 64 bits.

    Notes
    -----
    Thread-safe. Source: etcd ``types.IDFromString``.
    """
    # int() alone would take "0x1", "1_0", " 1" and "-1".
    if isinstance(text, str) and _ID.fullmatch(text):
        significant = text.lstrip("0")
        if len(significant) <= 16:
            return int(significant or "0", 16)
    raise UsageError(f"id: {show(text)} is not a hexadecimal number of at most 64 bits")


# What a peer that does not say is taken for: etcd 2.0 had no version headers.
_UNSTATED = Version(2, 0, "2.0.0")
_FIRST_WITH_STREAMS = Version(2, 1, "2.1.0")


def server_version(headers: Mapping[str, str]) -> Version | None:
    """Return the sender's version, 2.0.0 if it does not say, None if it cannot be read.

    ``headers`` has names in lower case, or is case-insensitive.
    """
    return _version_header(headers, SERVER_VERSION)


def min_cluster_version(headers: Mapping[str, str]) -> Version | None:
    """Return the lowest cluster version the sender takes part in; see :func:`server_version`."""
    return _version_header(headers, MIN_CLUSTER)


def _version_header(headers: Mapping[str, str], name: str) -> Version | None:
    text = headers.get(name.lower())
    if not text:
        return _UNSTATED
    try:
        return Version.parse(text)
    except UsageError:
        return None


def check_version_compatibility(
    server: Version | None,
    min_cluster: Version | None,
    *,
    local: Version,
    local_min: Version,
) -> str | None:
    """Tell why a sender's versions and ours do not go together; None if they do.

    Differs from etcd: a version that cannot be read (None) is incompatible; etcd's handler panics.
    Source: etcd ``rafthttp/util.go`` ``checkVersionCompatibility``.
    """
    if server is None or min_cluster is None:
        return "remote version is malformed"
    if compare_major_minor(server, local_min) < 0:
        return "remote version is too low"
    if compare_major_minor(min_cluster, local) > 0:
        return "local version is too low"
    return None


def post_url(url: str, path: str = RAFT_PATH) -> str:
    """Return the full URL that a peer URL (``http://10.0.0.2:2380``) is posted to."""
    return url + path


def request_head(
    identity: Identity, url: str, *, path: str = RAFT_PATH, content_type: str = CONTENT_TYPE
) -> bytes:
    r"""Build what stands before the body of a POST, up to and including ``Content-Length: ``.

    The sender appends the digits and ``\r\n\r\n``.

    Parameters
    ----------
    identity : Identity
        Who posts. The header with our URLs is left out if there are none.
    url : str
        The peer's URL, ``http`` or ``https``, as ``urls.parse_peer_urls`` takes it.

    Raises
    ------
    UsageError
        If a value is not valid, above all if it could smuggle a line into the head.

    Notes
    -----
    Source: etcd ``rafthttp/util.go`` ``createPostRequest``; header order is Go's. Differs from
    etcd: Content-Length comes last, for it is what changes from message to message; User-Agent is
    ours; nothing compressed is asked for.
    """
    (checked,) = parse_peer_urls((url,))
    scheme, _, host = zoneless(checked).partition("://")
    if scheme not in ("http", "https"):
        raise UsageError(f"url: {url!r}: must be http or https to be posted to")
    if not _TOKEN.fullmatch(content_type):
        raise UsageError(f"content_type: {content_type!r} is not printable ASCII")
    if path not in (RAFT_PATH, SNAPSHOT_PATH):
        raise UsageError(f"path: {path!r} is neither {RAFT_PATH} nor {SNAPSHOT_PATH}")
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        f"User-Agent: {PRODUCT}",
        f"Content-Type: {content_type}",
        f"{CLUSTER_ID}: {format_id(identity.cluster_id)}",
        f"{MIN_CLUSTER}: {identity.min_cluster_version}",
    ]
    if identity.peer_urls:
        urls = map(zoneless, parse_peer_urls(identity.peer_urls))
        lines.append(f"{PEER_URLS}: {','.join(urls)}")
    lines += [
        f"{SERVER_FROM}: {format_id(identity.member_id)}",
        f"{SERVER_VERSION}: {identity.server_version}",
        # A refusal is a line of text: nothing to compress, and nothing to inflate.
        "Accept-Encoding: identity",
        "Content-Length: ",
    ]
    return "\r\n".join(lines).encode("ascii")


def parse_stream_path(path: str) -> tuple[str, int]:
    """Return the kind of stream that a path asks for, and the member that does.

    ``UsageError``, with what an etcd answers, if it is no such path. Source: etcd
    ``rafthttp/http.go`` ``streamHandler``, which looks at the last element and what is before it.
    """
    before, _, member = path.rpartition("/")
    if before not in [STREAM_PREFIX + kind for kind in STREAM_KINDS]:
        raise UsageError("invalid path")
    try:
        return before.removeprefix(STREAM_PREFIX), parse_id(member)
    except UsageError:
        raise UsageError("invalid from") from None


class StreamNotSupportedError(PostError):
    """A member from before streams, or one that wants to be taken for such: it says no version."""


def stream_head(identity: Identity, url: str, kind: str, peer_id: int) -> bytes:
    """Build the whole request for a stream, at an ``http`` or ``https`` URL of a peer.

    Source: etcd ``rafthttp/stream.go`` ``streamReader.dial``.
    """
    (checked,) = parse_peer_urls((url,))
    lines = [
        f"GET {STREAM_PREFIX}{kind}/{format_id(identity.member_id)} HTTP/1.1",
        f"Host: {zoneless(checked).partition('://')[2]}",
        f"User-Agent: {PRODUCT}",
        f"{CLUSTER_ID}: {format_id(identity.cluster_id)}",
        f"{MIN_CLUSTER}: {identity.min_cluster_version}",
    ]
    if identity.peer_urls:
        urls = map(zoneless, parse_peer_urls(identity.peer_urls))
        lines.append(f"{PEER_URLS}: {','.join(urls)}")
    lines += [
        f"{RAFT_TO}: {format_id(peer_id)}",
        f"{SERVER_FROM}: {format_id(identity.member_id)}",
        f"{SERVER_VERSION}: {identity.server_version}",
        "Accept-Encoding: identity",
        "",
        "",
    ]
    return "\r\n".join(lines).encode("ascii")


def check_stream_answer(
    status: int,
    body: bytes,
    headers: Mapping[str, str],
    *,
    local: Version,
    peer_id: int,
    url: str,
) -> PostError | None:
    """Judge the answer to a request for a stream: None if what follows its head is one.

    Parameters are those of :func:`check_answer`; ``local`` is our version. Not raised. A
    ``StreamNotSupportedError`` says nothing of whether the peer can be reached.

    Source: etcd ``rafthttp/stream.go`` ``streamReader.dial``.
    """
    remote = server_version(headers)
    if remote is None or (
        compare_major_minor(remote, local) < 0
        and compare_major_minor(remote, _FIRST_WITH_STREAMS) < 0
    ):
        return StreamNotSupportedError("unsupported stream type", peer_id=peer_id, url=url)
    if status == 200:
        return None
    if status == 410:
        return MemberRemovedError(MEMBER_REMOVED, peer_id=peer_id, url=url, status=status)
    if status == 412:
        return check_answer(status, body, headers, peer_id=peer_id, url=url)
    if status == 404:
        reason = f"peer {format_id(peer_id)} failed to find local node"
    else:
        reason = f"unhandled http status {status}"
    return UnexpectedStatusError(reason, peer_id=peer_id, url=url, status=status)


def probe_head(url: str, path: str = PROBING_PATH) -> bytes:
    """Build a whole probe: ``GET /raft/probing`` at an ``http`` or ``https`` peer URL."""
    (checked,) = parse_peer_urls((url,))
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {zoneless(checked).partition('://')[2]}",
        f"User-Agent: {PRODUCT}",
        "Accept-Encoding: identity",
        "",
        "",
    ]
    return "\r\n".join(lines).encode("ascii")


def check_answer(
    status: int, body: bytes, headers: Mapping[str, str], *, peer_id: int, url: str
) -> PostError | None:
    """Judge the answer to a POST: None for success, which is 204 and nothing else.

    Parameters
    ----------
    status : int
        The HTTP status.
    body : bytes
        The body; looked at for 412 only. The caller bounds what it reads.
    headers : mapping
        Names in lower case, or case-insensitive.
    peer_id : int
        The peer that was posted to.
    url : str
        The full URL that was posted to (:func:`post_url`).

    Returns
    -------
    PostError or None
        Not raised, so that the caller chooses the moment. Texts are etcd's to the letter, but for
        what a 500 says besides.

    Notes
    -----
    Source: etcd ``rafthttp/util.go`` ``checkPostResponse``.
    """
    if status == 204:
        return None
    if status == 403:
        return MemberRemovedError(MEMBER_REMOVED, peer_id=peer_id, url=url, status=status)
    if status == 412:
        text = body.removesuffix(b"\n")
        if text == INCOMPATIBLE_VERSION.encode():
            return IncompatibleVersionError(
                INCOMPATIBLE_VERSION, peer_id=peer_id, url=url, status=status
            )
        if text == CLUSTER_ID_MISMATCH.encode():
            return ClusterIDMismatchError(
                CLUSTER_ID_MISMATCH,
                peer_id=peer_id,
                url=url,
                status=status,
                remote_cluster_id=headers.get(CLUSTER_ID.lower(), ""),
            )
        reason = f"unhandled error {_go_quote(body)} when precondition failed"
    else:
        reason = (
            f"unexpected http status {reason_phrase(status)} "
            f"while posting to {_go_quote(url.encode())}"
        )
        if status == 500:
            # What an etcd answers whose process fails: it breaks the answer off after this line.
            reason += " (500: the member could not process it)"
    return UnexpectedStatusError(reason, peer_id=peer_id, url=url, status=status)


# Where Go's http.StatusText and some version of Python's http.HTTPStatus differ.
_GO_PHRASES = {
    413: "Request Entity Too Large",
    414: "Request URI Too Long",
    416: "Requested Range Not Satisfiable",
    418: "I'm a teapot",
    422: "Unprocessable Entity",
}


def reason_phrase(status: int) -> str:
    """Return the text of a status as Go has it; empty for one that nobody knows."""
    phrase = _GO_PHRASES.get(status)
    if phrase is None:
        try:
            phrase = http.HTTPStatus(status).phrase
        except ValueError:
            phrase = ""
    return phrase


_GO_ESCAPES = {
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
    "\\": "\\\\",
    '"': '\\"',
}


def _go_quote(raw: bytes) -> str:
    """Quote as Go's ``%q`` does: what is not printable UTF-8 is escaped."""
    # surrogateescape keeps an undecodable byte b as U+DC00 + b.
    return '"' + "".join(map(_go_escape, raw.decode("utf-8", "surrogateescape"))) + '"'


def _go_escape(char: str) -> str:
    code = ord(char)
    if char in _GO_ESCAPES:
        return _GO_ESCAPES[char]
    if char.isprintable():
        return char
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
