"""The error tree, by who is at fault: the caller, the message, the peer, the network, or us.

Texts that etcd defines are kept to the letter (rafthttp ``errors.go``, ``pipeline.go``).
"""

from __future__ import annotations

from typing import Any

from pipeline.logs import show

__all__ = [
    "ClusterIDMismatchError",
    "IncompatibleVersionError",
    "InternalError",
    "MarshalError",
    "MemberNotFoundError",
    "MemberRemovedError",
    "PeerUnreachableError",
    "PipelineError",
    "PostError",
    "RequestRejected",
    "SnapshotCancelledError",
    "SnapshotSourceError",
    "UnexpectedStatusError",
    "UnmarshalError",
    "UsageError",
]

#: The reason of what a stop ended: of no interest for a peer that was not active.
STOPPED = "stopped"


class PipelineError(Exception):
    """Base of everything this package raises on purpose. Can be copied and pickled."""

    # Exception's own way calls the class with ``args``, which lack the keyword-only ones.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def without_frames(error: BaseException) -> None:
    """Have an error that is kept, and its causes, hold no frames: they would hold who keeps it."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and not any(at is one for one in seen):
        seen.append(at)
        at.__traceback__ = None
        at = at.__cause__ or at.__context__


def _rebuild(
    cls: type[PipelineError], args: tuple[Any, ...], state: dict[str, Any]
) -> PipelineError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class UsageError(PipelineError, ValueError):
    """The caller is wrong: a bad URL, a bad setting, ``send`` before ``start`` or after ``stop``.

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
    reason : str
        Why it could not; the text says all three.
    """

    def __init__(self, field: str, offset: int, reason: str) -> None:
        super().__init__(f"{field} at offset {offset}: {reason}")
        self.field = field
        self.offset = offset
        self.reason = reason


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
    reason : str
        The text, as in the log.
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
    """412 ``cluster ID mismatch``: the peer belongs to another cluster.

    Attributes
    ----------
    remote_cluster_id : str
        The peer's cluster id as its answer has it; empty if it has none.
    """

    def __init__(
        self,
        reason: str,
        *,
        peer_id: int,
        url: str,
        status: int | None = None,
        remote_cluster_id: str = "",
    ) -> None:
        super().__init__(reason, peer_id=peer_id, url=url, status=status)
        self.remote_cluster_id = remote_cluster_id


class MemberRemovedError(PostError):
    """We have been removed from the cluster: 403 to a post, 410 to the dial of a stream.

    Also given to the critical-error callback.
    """


class MemberNotFoundError(PipelineError):
    """A snapshot is for a member that is not a peer, or not any more."""


class SnapshotSourceError(PipelineError):
    """The source of a snapshot raised, cannot be read, or has fewer or more bytes than declared.

    ``__cause__`` is what it raised; where it did so is in a note (``__notes__``). The receiver
    publishes nothing, and the peer is not blamed: it stays active, and ``report_unreachable`` is
    not called.
    """


class SnapshotCancelledError(PipelineError):
    """A transfer was ended here: ``cancelled``, ``stopped`` or superseded by a newer snapshot."""


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
        Sent as it is; not at all with 204, 205 and 304, which have none.
    content_type : str
        The Content-Type of the answer, printable ASCII.
    """

    def __init__(
        self, status: int, body: bytes = b"", content_type: str = "text/plain; charset=utf-8"
    ) -> None:
        if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 599:
            raise UsageError(f"status: {show(status)} is not a whole number in 200..599")
        if not isinstance(body, bytes):
            raise UsageError(f"body: {show(body)} is not bytes")
        if not isinstance(content_type, str) or not (
            content_type.isascii() and content_type.isprintable()
        ):
            raise UsageError(f"content_type: {show(content_type)} is not printable ASCII")
        super().__init__(f"rejected with status {status}")
        self.status = status
        self.body = body
        self.content_type = content_type
