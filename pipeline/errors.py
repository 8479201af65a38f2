"""The error tree, by who is at fault: the caller, the message, the peer, the network, or us.

Texts that etcd defines are kept to the letter (rafthttp ``errors.go``, ``pipeline.go``).
"""

from __future__ import annotations

__all__ = [
    "ClusterIDMismatchError",
    "IncompatibleVersionError",
    "InternalError",
    "MarshalError",
    "MemberRemovedError",
    "PeerUnreachableError",
    "PipelineError",
    "PostError",
    "RequestRejected",
    "UnexpectedStatusError",
    "UnmarshalError",
    "UsageError",
]


class PipelineError(Exception):
    """Base of everything this package raises on purpose."""


class UsageError(PipelineError, ValueError):
    """The caller is wrong: a bad URL, a bad setting, ``send`` before ``start``.

    The text names the argument, its value and the rule it breaks.
    """


class MarshalError(PipelineError, ValueError):
    """A message cannot be encoded: a field has the wrong type or is out of its protobuf range.

    The text names the field, its value and the rule.
    """


class UnmarshalError(PipelineError, ValueError):
    """Bytes are not a raftpb message.

    Attributes
    ----------
    field : str
        Dotted name of the field being read, such as ``Message.entries.data``;
        ``Message`` when no field could be told.
    offset : int
        Offset in bytes, from the start of the buffer, of what could not be read.
    """

    def __init__(self, field: str, offset: int, reason: str) -> None:
        super().__init__(f"{field} at offset {offset}: {reason}")
        self.field = field
        self.offset = offset
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnmarshalError], tuple[str, int, str]]:
        return type(self), (self.field, self.offset, self.reason)


class PostError(PipelineError):
    """A message was not delivered: the peer or the network is at fault.

    ``send`` never raises it; it reaches the peer's status, the metrics and, for
    :class:`MemberRemovedError`, the critical-error callback. ``__cause__`` is the
    underlying error (urllib3's or an ``OSError``) where there is one.

    Attributes
    ----------
    peer_id : int
        The member the message was for.
    url : str
        The URL that was tried.
    status : int or None
        The HTTP status, when there was an answer.
    """

    def __init__(self, reason: str, *, peer_id: int, url: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.peer_id = peer_id
        self.url = url
        self.status = status


class PeerUnreachableError(PostError):
    """No answer: refused, reset, timed out, stalled, or cancelled by ``stop``."""


class UnexpectedStatusError(PostError):
    """An answer that is neither 204 nor one of the refusals with a meaning of their own."""


class IncompatibleVersionError(PostError):
    """412 ``incompatible version``: the peer does not speak our protocol version."""


class ClusterIDMismatchError(PostError):
    """412 ``cluster ID mismatch``: the peer belongs to another cluster."""


class MemberRemovedError(PostError):
    """403: we have been removed from the cluster. Also given to the critical-error callback."""


class InternalError(PipelineError):
    """We are at fault; please report it with the text."""


class RequestRejected(PipelineError):
    """Raised by ``Raft.process`` to choose the HTTP answer itself (etcd's ``WriteTo`` hook).

    Any other exception is answered 500 and the connection is closed. Beware of 403: an
    etcd member that is answered 403 shuts itself down.

    Parameters
    ----------
    status : int
        200 to 599.
    body : bytes
        Sent as it is.
    content_type : str
        The Content-Type of the answer.
    """

    def __init__(
        self, status: int, body: bytes = b"", content_type: str = "text/plain; charset=utf-8"
    ) -> None:
        if not 200 <= status <= 599:
            raise UsageError(f"status: {status!r} is not in 200..599")
        super().__init__(f"rejected with status {status}")
        self.status = status
        self.body = body
        self.content_type = content_type
