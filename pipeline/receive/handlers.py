"""What a node answers its peers: pure functions from request to answer, no sockets.

A listener reads the head and calls ``check``. An answer is final; None means: read the body, then
call ``deliver``, or ``read_failed`` or ``body_too_large`` when that did not work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import quote

from pipeline.callbacks import Callbacks, NotAwaitedError, require_no_awaitable
from pipeline.config import ReceiverConfig
from pipeline.errors import RequestRejected, UnmarshalError, UsageError
from pipeline.identity import Identity, Version
from pipeline.logs import About, Fields, Throttle, get_logger
from pipeline.net._budget import SMALL_BODY_BYTES, BodyBudget
from pipeline.net._sockets import OwnSocket
from pipeline.raft import AnyRaft
from pipeline.receive.detached import BegunRequest, Connection
from pipeline.receive.inbox import Inbox
from pipeline.receive.places import Place
from pipeline.receive.received import Received
from pipeline.types import APP, MessageType
from pipeline.wire._messages import EncodedMessage, Message, decode
from pipeline.wire.answers import Answer, Request, sender_of, text_answer
from pipeline.wire.protocol import (
    CLUSTER_ID,
    CLUSTER_ID_MISMATCH,
    INCOMPATIBLE_VERSION,
    PEER_URLS,
    PROBING_PATH,
    RAFT_PATH,
    RAFT_TO,
    SERVER_FROM,
    SERVER_VERSION,
    SNAPSHOT_PATH,
    STREAM_KINDS,
    STREAM_PREFIX,
    VERSION_PATH,
    check_version_compatibility,
    format_id,
    min_cluster_version,
    parse_stream_path,
    server_version,
)
from pipeline.wire.versions import Versions

__all__ = ["Handlers", "behind_prefix"]

logger = get_logger(__name__)

# Never on the network between honest members. Differs from etcd: there raft itself ignores them,
# but a node's own core may not.
_PROCESS_LOCAL = frozenset(
    (
        MessageType.HUP,
        MessageType.BEAT,
        MessageType.UNREACHABLE,
        MessageType.SNAP_STATUS,
        MessageType.CHECK_QUORUM,
        MessageType.STORAGE_APPEND,
        MessageType.STORAGE_APPEND_RESP,
        MessageType.STORAGE_APPLY,
        MessageType.STORAGE_APPLY_RESP,
    )
)
#: As plain numbers: to find one of them among members of an enumeration takes twice as long.
_DELIVERED_TYPES = frozenset(map(int, MessageType)) - frozenset(map(int, _PROCESS_LOCAL))
_LAST_TYPE = max(map(int, MessageType))
#: As bits; the last of 64 is for all types that only a later raft may have.
_DELIVERED_BITS = sum(1 << kind for kind in _DELIVERED_TYPES)
_LATER_BITS = sum(1 << kind for kind in range(_LAST_TYPE + 1, 64))


class SenderWatch(Protocol):
    """Who wants to know who sends us messages (``remote.Remotes``)."""

    def note(
        self, sender: int, urls: tuple[str, ...], caller: object, *, is_authenticated: bool
    ) -> None:
        """See a sender's X-Server-From and X-PeerURLs, before its message is read."""

    def is_watched(self, sender: int, *, is_authenticated: bool) -> bool:
        """Tell whether every request of this sender is to be shown."""


class Connections(Protocol):
    """The connections of one listener on which snapshots arrive, out of the loop."""

    #: Of the threads, before ``-<n>``; set before the first connection.
    name: str

    def take(self, connection: Connection, begun: BegunRequest) -> None:
        """Receive on a connection that has left the loop. Does not block."""

    def begin_close(self) -> None:
        """End what is still being read; what is being stored or processed may go on."""

    def wait_closed(self, deadline: float) -> bool:
        """Wait for the threads until ``deadline`` (monotonic seconds); whether all have ended."""

    def forget_after_fork(self) -> None:
        """In a forked child, which has none of the threads: let go of what is the parent's."""


class Snapshots(Protocol):
    """Who receives snapshots: ``snapshot.receiver.SnapshotReceiver``."""

    #: Whether there is a place to store them.
    is_taking: bool

    def prepare(self) -> None:
        """Make the place; ``OSError`` if it cannot be made."""

    def take_place(self) -> Place | None:
        """Take one of the places for receives; None when all are taken."""

    def refused(self) -> None:
        """Count a request that was answered without its body being looked at."""

    def connections(self) -> Connections:
        """Return what takes the connections of one listener on which snapshots arrive."""

    def forget(self, sender: int) -> None:
        """Drop what was counted for a member that is one no more."""


class PeerStreams(Protocol):
    """Who has the streams to the peers: ``stream.streams.NodeStreams``."""

    #: Whether they are all about to end.
    is_stopping: bool

    def has_peer(self, peer_id: int) -> bool:
        """Tell whether a stream to a member would have messages to carry."""

    def take(self, connection: OwnSocket, begun: BegunRequest) -> None:
        """Take over a connection on which a peer has asked for a stream. Does not block."""


class Handlers:
    """Everything a node serves on its peer port.

    Parameters
    ----------
    raft : Raft
        Its ``process`` is called by ``deliver``, concurrently, unless there is an inbox.
    identity : Identity
        Ours. Senders of another cluster are refused, and those whose version does not suit ours.
    config : ReceiverConfig
        For ``max_body_bytes``, and what the budget has.
    senders : SenderWatch, optional
        Shown who posts; by default the two headers are not looked at.
    on_append : callable, optional
        Called with the sender and the bytes of each MsgApp, before Raft has it; with an inbox with
        those of several, and how many they were, as they are taken.
    inbox : Inbox, optional
        Where messages go instead of to ``process``.
    allow_member : callable, optional
        ``TLSInfo.allow_member``: asked with the certificate and X-Server-From of each request
        that comes with a certificate.
    callbacks : Callbacks, optional
        How the application is called; counts what it raises.
    versions : Versions, optional
        Told what version each sender claims.

    Attributes
    ----------
    budget : BodyBudget
        What the bodies of all requests hold together, however they come in.
    received : Received
        What was received, counted.
    source : Source or None
        What puts messages into the inbox.
    delivered_types : int
        The types of messages that go there, as bits; the last of 64 is for all from there on.
    is_encoded : bool
        Whether Raft reads messages itself.
    streams : PeerStreams or None
        Has the streams to the peers. Without it, as at first, who asks for one is refused, in a way
        that has him neither take us for unreachable nor ask again.
    stream_headers : tuple of (str, str)
        Header lines of every answer to who asks for a stream.
    snapshots : Snapshots or None
        Does ``POST /raft/snapshot`` from the body on. Without it, as at first, every snapshot is
        answered 501.

    Notes
    -----
    Thread-safe. Only ``deliver`` may block, in ``raft.process``.
    Source: etcd ``rafthttp/http.go`` ``pipelineHandler``, ``Transport.Handler``.
    """

    def __init__(
        self,
        raft: AnyRaft,
        identity: Identity,
        *,
        config: ReceiverConfig | None = None,
        senders: SenderWatch | None = None,
        on_append: Callable[..., None] | None = None,
        allow_member: Callable[[Mapping[str, Any], int], bool] | None = None,
        callbacks: Callbacks | None = None,
        versions: Versions | None = None,
        inbox: Inbox[Any] | None = None,
    ) -> None:
        self._senders = senders
        self._versions = versions
        self._on_append = on_append
        self._allow_member = allow_member
        #: Where the lines of all that is received go.
        self.log = logger.about(local=format_id(identity.member_id))
        self._callbacks = callbacks or Callbacks(self.log)
        self.config = config or ReceiverConfig()
        # Whoever reads bodies for us takes from it. As many small ones as there are connections
        # have a room of their own.
        self.budget = BodyBudget(
            self.config.max_buffered_bytes, self.config.max_connections * SMALL_BODY_BYTES
        )
        self.received = Received()
        self.source = None if inbox is None else inbox.open_source(self.count_taken)
        self.is_encoded = self.config.encoded if inbox is None else inbox.encoded
        self.delivered_types = _DELIVERED_BITS | (_LATER_BITS if self.is_encoded else 0)
        self.snapshots: Snapshots | None = None
        self.streams: PeerStreams | None = None
        self._raft: Any = raft  # what its process returns is looked at, whatever it is declared as
        self._cluster_id = format_id(identity.cluster_id)
        self._member_id = format_id(identity.member_id)
        self._local = Version.parse(identity.server_version)
        self._local_min = Version.parse(identity.min_cluster_version)
        # An etcd leader asks every member, and raises the cluster's version to the lowest answer.
        # Differs from etcd: we do not know what version the cluster has; it has at least this.
        answer = f'{{"etcdserver":"{self._local}","etcdcluster":"{self._local_min}"}}'
        self._version = Answer(200, (("Content-Type", "application/json"),), answer.encode())
        self._cluster_header = ((CLUSTER_ID, self._cluster_id),)
        self.stream_headers = (
            *self._cluster_header,
            (SERVER_VERSION, identity.server_version),
        )
        #: The header line of every answer, as the compiled receiver writes it.
        self.cluster_header = f"{CLUSTER_ID}: {self._cluster_id}\r\n".encode()
        self._warn = Throttle(self.log).warning
        self._is_foreign = False
        self._is_stopped = False

    def check(self, request: Request, *, can_detach: bool = False) -> Answer | None:
        """Answer a request that needs no body; None if it is a message to be delivered.

        Nothing of the body needs to have arrived. With ``can_detach`` None may also mean a
        snapshot, which the caller has received elsewhere. Differs from etcd: paths are matched
        exactly, as they are written; Go's mux cleans them.
        """
        path = request.path
        if self._is_foreign or self._is_stopped:
            if self._is_foreign:
                text = "refused a request from %s: a forked child cannot answer it"
                self._refuse(
                    "forked", _from(request), text, request.remote, reason="a forked child"
                )
            return self.shutting_down()
        if path == RAFT_PATH:
            return self._check_post(request) or self._note_sender(request)
        if path == PROBING_PATH:
            return _probing()
        if path == SNAPSHOT_PATH:
            return self._check_snapshot(request, can_detach=can_detach)
        if path == VERSION_PATH or path.startswith(STREAM_PREFIX):
            return self._get(request, can_detach=can_detach)
        return text_answer(404, "404 page not found")

    def is_learnable(self, request: Request) -> bool:
        """Tell whether ``check`` need not see the next request with the same head.

        For a request that ``check`` let pass. The compiled receiver remembers such heads.
        """
        if self._senders is None:
            return True
        sender = sender_of(request)
        is_authenticated = request.certificate is not None
        return sender is None or not self._senders.is_watched(
            sender, is_authenticated=is_authenticated
        )

    def deliver(self, request: Request, body: bytes | bytearray | memoryview) -> Answer:
        """Decode a message and hand it to Raft. Blocks as long as ``raft.process`` does.

        Whatever ``process`` raises becomes an answer. With an inbox it blocks while there is no
        room, and until a MsgProp or MsgSnap is taken.
        """
        try:
            # The inbox decodes it itself; here it is only looked at.
            is_only_looked_at = self.source is not None or self.is_encoded
            message, has_unknown_fields, _ = decode(body, encoded=is_only_looked_at)
        except UnmarshalError as error:
            return self.undecodable(request.remote, error)
        if self.source is not None and self._is_for_raft(message.type):
            return self.no_content() if self.source.deliver(body) else self.shutting_down()
        if has_unknown_fields and not self.is_encoded:
            self.lost_fields(message.from_, request.remote)
        return self.process(message, len(body), request.remote) or self.no_content()

    def deliver_at_once(
        self, request: Request, body: bytes | bytearray | memoryview
    ) -> Answer | None:
        """Put a small message into the inbox without waiting; None if it is for ``deliver``.

        What waits in a few threads keeps nothing of another lane waiting that way.
        """
        if self.source is None or len(body) > SMALL_BODY_BYTES:
            return None
        try:
            message, _, _ = decode(body, encoded=True)
            if not self._is_for_raft(message.type):
                return None
            is_in = self.source.deliver(body, may_wait=False)
        except UnmarshalError:
            return None
        if is_in is None:
            return None
        return self.no_content() if is_in else self.shutting_down()

    def undecodable(self, remote: object, error: UnmarshalError) -> Answer:
        """Answer a body that is no message."""
        text = "failed to unmarshal Raft message from %s: %s"
        self._refuse("undecodable", _at(remote), text, remote, error, reason=str(error))
        self.received.count_failure(remote)
        return self._answer(400, "error unmarshalling raft message")

    def lost_fields(self, sender: int, remote: object, messages: int = 1) -> None:
        """Count messages that were decoded without some of their fields; the log hears once of each
        member.

        It is of a raft with another schema, whose replicas would come to differ without a word.
        """
        if self.received.count_unknown_fields(sender, messages):
            self.log.warning(
                "Raft message from member %s at %s has fields that raftpb does not have: they are "
                "lost, as in all of its messages; encoded=True, of ReceiverConfig or of the Inbox, "
                "would keep them",
                format_id(sender),
                remote,
                **_by(sender, remote),
                reason="fields that raftpb does not have",
            )

    def process(
        self, message: Message | EncodedMessage, size_bytes: int | None, remote: object
    ) -> Answer | None:
        """Hand a decoded message to Raft; None is the plain 204. Blocks as ``deliver`` does.

        ``remote`` is shown in the log when something is wrong. Without a size it is counted
        already: it was taken from an inbox.
        """
        kind, sender = message.type, message.from_
        if size_bytes is not None:
            if kind not in _DELIVERED_TYPES and not self._is_for_raft(kind):
                return self._not_delivered(kind, sender, size_bytes, remote)
            self.received.count_bytes(sender, size_bytes)
            if kind == APP and self._on_append is not None:
                self._on_append(sender, size_bytes)
        try:
            result = self._raft.process(message)
            if result is not None:  # a coroutine has not processed anything
                require_no_awaitable("process", result)
        except BaseException as error:  # whatever a node raises, its listener goes on
            return self._not_processed(error, sender, remote)
        return None

    def _is_for_raft(self, kind: int) -> bool:
        """Tell whether Raft is given messages of a type: one that only a later raft knows, if it
        reads them itself.
        """
        return kind >= 0 and bool(self.delivered_types >> min(kind, 63) & 1)

    def count_taken(
        self, sender: int, messages: int, size_bytes: int, is_append: bool, lossy: int
    ) -> None:
        """Hear of messages of a member that were taken from the inbox.

        ``lossy`` of them were taken without some of their fields.
        """
        self.received.count_bytes(sender, size_bytes)
        if lossy:
            self.lost_fields(sender, "an address that the inbox does not keep", lossy)
        if is_append and self._on_append is not None:
            self._on_append(sender, size_bytes, messages)

    def _not_delivered(
        self, kind: int, sender: int, size_bytes: int, remote: object
    ) -> Answer | None:
        """Answer a message of a type that is not for Raft; None is the plain 204."""
        if kind < 0:
            text = "refused Raft message from %s: type %d is negative"
            reason = f"type {kind} is negative"
            self._refuse("undecodable", _at(remote), text, remote, kind, reason=reason)
            self.received.count_failure(remote)
            return self._answer(400, "error unmarshalling raft message")
        self.received.count_bytes(sender, size_bytes)
        if kind in _PROCESS_LOCAL:
            self.received.count_ignored()
        else:
            self._ignore_unknown(kind, sender, remote)
        return None

    def _not_processed(self, error: BaseException, sender: int, remote: object) -> Answer:
        answer = self.rejected(error)
        if answer is None:
            text = "failed to process Raft message of %s from %s"
            trace = None if isinstance(error, NotAwaitedError) else error  # it is told elsewhere
            whose, reason = _by(sender, remote), "process raised"
            self._warn(text, format_id(sender), remote, exc_info=trace, reason=reason, **whose)
            # Differs from etcd: the answer is complete. etcd breaks it off, so that a Go sender
            # sees an unexpected EOF; to both it is a failure.
            answer = self._answer(500, "error processing raft message", close=True)
        return answer

    def _ignore_unknown(self, kind: int, sender: int, remote: object) -> None:
        """Count a message of a type that a later raft has; the log hears once of each type.

        A member that is upgraded before us may send it. It is no failure of that member's: answered
        400, an etcd takes us for unreachable at each one. Differs from etcd: its raft is given the
        message and does nothing with it.
        """
        if self.received.count_unknown(kind):
            self.log.warning(
                "Raft message of type %d from member %s at %s is of a later raft than we know: "
                "answered 204 and not delivered, like all of this type from now on",
                kind,
                format_id(sender),
                remote,
                **_by(sender, remote),
                reason="of a later raft",
            )

    def read_failed(self, remote: object) -> Answer:
        """Answer a request whose body broke off or stalled."""
        text = "failed to read Raft message from %s: the body is incomplete"
        self._refuse("incomplete", _at(remote), text, remote, reason="the body is incomplete")
        self.received.count_failure(remote)
        return self._answer(400, "error reading raft message", close=True)

    def body_too_large(self, remote: object) -> Answer:
        """Answer a request whose body is larger than ``max_body_bytes``."""
        text = "refused Raft message from %s: the body is too large"
        self._refuse("too-large", _at(remote), text, remote, reason="the body is too large")
        self.received.count_failure(remote)
        return self._answer(413, "request body too large", close=True)

    def head_too_large(self) -> Answer:
        """Answer a request whose head is larger than ``max_head_bytes``."""
        return text_answer(431, "request header fields too large", close=True)

    def overloaded(self, remote: object) -> Answer:
        """Answer a request whose body there is no memory for just now."""
        text = "no memory for a Raft message from %s"
        self._refuse("no-memory", _at(remote), text, remote, reason="no memory")
        self.received.count_failure(remote)
        return self._answer(503, "too many bytes in requests", close=True)

    def too_many_snapshots(self, remote: object) -> Answer:
        """Answer a snapshot while as many as may be are being received.

        Differs from etcd: there is no limit there.
        """
        text = "refused a snapshot from %s: others are being received"
        self._refuse("busy", _at(remote), text, remote, reason="others are being received")
        self._count_refused_snapshot()
        return self._answer(503, "too many snapshots at once", close=True)

    def snapshot_failed(
        self,
        remote: object,
        sender: str,
        status: int,
        text: str,
        error: BaseException | None = None,
    ) -> Answer:
        """Answer a snapshot that was not taken; ``error`` is shown in the log."""
        about = Fields(peer=sender, address=str(remote), reason=text, channel="snapshot")
        line = "refused a snapshot of %s from %s: %s"
        self._warn(line, sender, remote, text, exc_info=error, **about)
        return self._answer(status, text)

    def shutting_down(self) -> Answer:
        """Answer a request that will not be waited for; its message may have been processed."""
        return self._answer(503, "shutting down", close=True)

    def _get(self, request: Request, *, can_detach: bool) -> Answer | None:
        if request.method != "GET":
            return _not_allowed("GET")
        if request.path == VERSION_PATH:
            return self._version
        return self._check_stream(request, can_detach=can_detach)

    def _check_stream(self, request: Request, *, can_detach: bool) -> Answer | None:
        """Do what etcd does for a stream (spec section 8.2); None if it is to be had.

        Who cannot detach a connection has none to give.
        """
        if self.streams is None or not can_detach:
            return self._refuse_stream(request)
        if self.streams.is_stopping:
            return self.shutting_down()
        refusal = self._check_sender(request)
        if refusal is None:
            refusal = self._check_dialler(request, self.streams)
        if refusal is None:
            return None
        version = self.stream_headers[1:]
        return replace(refusal, headers=(*version, *refusal.headers))

    def _check_dialler(self, request: Request, streams: PeerStreams) -> Answer | None:
        try:
            _, sender = parse_stream_path(request.path)
        except UsageError as error:
            return self._answer(404, str(error))
        about, whose = format_id(sender), _by(sender, request.remote)
        if self.binds_members and request.certificate and sender != sender_of(request):
            # Differs from etcd: what is for one member is not given to another.
            text = "refused stream of %s from %s: it says it is another"
            reason = "it says it is another"
            self._refuse("wrong-member", whose, text, about, request.remote, reason=reason)
            return self._answer(412, "certificate not allowed for this member")
        ask = self._callbacks.ask
        if ask("is_id_removed", about, self._raft.is_id_removed, sender, fields=whose):
            text = "refused stream of %s from %s: it was removed"
            self._refuse("removed", whose, text, about, request.remote, reason="it was removed")
            return self._answer(410, "removed member")
        if not streams.has_peer(sender):
            self._show_sender(request, sender)
            text = "refused stream of %s from %s: it is no peer"
            reason = "it is no peer"
            self._refuse("unknown-member", whose, text, about, request.remote, reason=reason)
            return self._answer(404, "error sender not found")
        to = request.headers.get(RAFT_TO.lower(), "")
        if to != self._member_id:
            text = "refused stream of %s: it is for %r, we are not"
            reason = f"it is for {to[:64]!r}"
            self._refuse("wrong-peer", whose, text, about, to[:64], reason=reason)
            return self._answer(412, "to field mismatch")
        return None

    def _refuse_stream(self, request: Request) -> Answer:
        # Without X-Server-Version etcd takes us for a member from before streams and
        # keeps the peer active; with it, every dial would deactivate the peer (spec section 13.2).
        answer = text_answer(404, "404 page not found")
        if request.headers.get(CLUSTER_ID.lower()) != self._cluster_id:
            return answer
        self._note_version(request)
        # It dials again as soon as it has read the answer, ten times a second for each kind, for
        # ever. So it is given one that does not end (spec section 8.4).
        kind, _, member = request.path.removeprefix(STREAM_PREFIX).partition("/")
        return replace(answer, is_endless=kind in STREAM_KINDS and bool(member))

    def _check_post(self, request: Request) -> Answer | None:
        """Do what etcd does before it reads a body; None if all is well."""
        return _not_allowed("POST") if request.method != "POST" else self._check_sender(request)

    def _check_sender(self, request: Request) -> Answer | None:
        """Refuse a sender of another cluster, one that does not suit us, and an impostor."""
        headers = request.headers
        server, min_cluster = server_version(headers), min_cluster_version(headers)
        reason = check_version_compatibility(
            server, min_cluster, local=self._local, local_min=self._local_min
        )
        if reason is not None:
            self._refuse(
                "wrong-version",
                _from(request),
                "failed to check version compatibility with %s: %s "
                "(remote server %.64s, min cluster %.64s; local server %s, min cluster %s)",
                request.remote,
                reason,
                server,
                min_cluster,
                self._local,
                self._local_min,
                reason=reason,
            )
            return self._answer(412, INCOMPATIBLE_VERSION)
        # The text is compared, as etcd does: another spelling of the same number is a mismatch.
        cluster_id = headers.get(CLUSTER_ID.lower(), "")
        if cluster_id != self._cluster_id:
            self._refuse(
                "wrong-cluster",
                _from(request),
                "request cluster ID mismatch from %s: %r is not %s",
                request.remote,
                cluster_id[:64],
                self._cluster_id,
                reason=CLUSTER_ID_MISMATCH,
            )
            return self._answer(412, CLUSTER_ID_MISMATCH)
        refusal = self.check_member(request)
        if refusal is None:
            self._note_version(request)
        return refusal

    @property
    def binds_members(self) -> bool:
        """Whether ``check_member`` refuses any that has shown a certificate."""
        return self._allow_member is not None

    def check_member(self, request: Request) -> Answer | None:
        """Refuse a sender whose certificate is not that of the member it says it is.

        Differs from etcd: it binds no member to a certificate. Of 412 an etcd logs the text, and
        a sender is told as unreachable; 403 would shut it down.
        """
        if self._allow_member is None or request.certificate is None:
            return None
        sender = sender_of(request)
        if sender is not None:
            about, certificate = f"{request.remote}", request.certificate
            ask = self._callbacks.ask
            whose = _by(sender, about)
            if ask("allow_member", about, self._allow_member, certificate, sender, fields=whose):
                return None
        name = request.headers.get(SERVER_FROM.lower(), "")[:64]
        text = "refused Raft message from %s: not the certificate of %r"
        reason = "not its certificate"
        self._refuse("wrong-member", _from(request), text, request.remote, name, reason=reason)
        return self._answer(412, "certificate not allowed for this member")

    def handshake_failed(self, remote: object, reason: str) -> None:
        """Hear of a caller that TLS does not let in."""
        text, about = "rejected connection from %s: %s", Fields(address=str(remote), reason=reason)
        self._warn(text, remote, reason, **about)

    def _check_snapshot(self, request: Request, *, can_detach: bool) -> Answer | None:
        """Do the same for a snapshot. Differs from etcd: 501 where it is not to be stored."""
        refusal = self._check_post(request)
        is_taking = self.snapshots is not None and self.snapshots.is_taking
        if refusal is None and not (can_detach and is_taking):
            refusal = self._answer(501, "Not Implemented")
        if refusal is None:
            refusal = self._note_sender(request)
        if refusal is not None:
            self._count_refused_snapshot()
        return refusal

    def _count_refused_snapshot(self) -> None:
        if self.snapshots is not None:
            self.snapshots.refused()

    def _note_version(self, request: Request) -> None:
        if self._versions is not None and (sender := sender_of(request)) is not None:
            self._versions.note(sender, request.headers)

    def _note_sender(self, request: Request) -> Answer | None:
        """Show who sends to who wants to know, and go on."""
        if (sender := sender_of(request)) is not None:
            self._show_sender(request, sender)
        return self._check_body(request)

    def _show_sender(self, request: Request, sender: int) -> None:
        """Source: etcd ``addRemoteFromRequest``."""
        urls = request.headers.get(PEER_URLS.lower(), "")
        if self._senders is not None and urls:
            self._senders.note(
                sender,
                tuple(urls.split(",")),
                request.remote,
                is_authenticated=request.certificate is not None,
            )

    def _check_body(self, request: Request) -> Answer | None:
        """Refuse a body that would be refused once it had arrived.

        Differs from etcd: it limits nothing and takes compressed bytes for a message.
        """
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            text = "refused Raft message from %s: content encoding %r"
            reason = f"content encoding {encoding[:64]!r}"
            self._refuse(
                "encoded", _from(request), text, request.remote, encoding[:64], reason=reason
            )
            self.received.count_failure(request.remote)
            return self._answer(415, "unsupported content encoding", close=True)
        # Framing is for the listener to check. Numbers of more than 19 digits are not even read.
        length = request.headers.get("content-length", "")
        is_long = length.isdecimal() and (
            len(length) > 19 or int(length) > self.config.max_body_bytes
        )
        if is_long and request.path == RAFT_PATH:
            return self.body_too_large(request.remote)
        return None

    def rejected(self, error: BaseException) -> Answer | None:
        """Answer as ``process`` has chosen by what it raised.

        None if it has not: then it has failed, which is counted.
        """
        if isinstance(error, RequestRejected):
            try:
                # Whatever the node's own subclass made of it: made anew, it is checked again.
                chosen = RequestRejected(error.status, error.body, error.content_type)
            except BaseException as failure:
                error = failure
            else:
                if chosen.status in (204, 205, 304):
                    return Answer(chosen.status, self._cluster_header)
                headers = (*self._cluster_header, ("Content-Type", chosen.content_type))
                return Answer(chosen.status, headers, chosen.body)
        self.received.count_process_failure()
        self._callbacks.count("process", error)
        return None

    def _refuse(self, verdict: str, whose: About, text: str, *args: object, reason: str) -> None:
        """Count a request that is not taken, by one word that says why, and warn of it."""
        self.received.count_refusal(verdict)
        self._warn(text, *args, reason=reason, verdict=verdict, **whose)

    def _answer(self, status: int, text: str, *, close: bool = False) -> Answer:
        return text_answer(status, text, self._cluster_header, close=close)

    def no_content(self) -> Answer:
        """Answer a message that was taken."""
        return Answer(204, self._cluster_header)

    def forget_after_fork(self, *, is_foreign: bool) -> None:
        """Hear, in a forked child, whether the node is another process'.

        An ASGI or WSGI server that was forked with it refuses what it is given: here nobody would
        ever learn of the messages.
        """
        self._is_foreign = is_foreign

    def stop(self) -> None:
        """Refuse whatever comes from now on: a server of the application's may outlive the node."""
        self._is_stopped = True

    def forget(self, sender: int) -> None:
        """Drop what was counted for a member that is one no more."""
        self.received.forget(sender)
        if self.snapshots is not None:
            self.snapshots.forget(sender)


def behind_prefix(path: str, prefix: str) -> str:
    """Return what of a path is behind the prefix that a server has mounted an application at.

    Parameters
    ----------
    path : str
        As it was sent, with whatever is encoded, or behind the prefix already.
    prefix : str
        As WSGI's ``SCRIPT_NAME``: decoded, with a character for each byte.
    """
    for text in (prefix, quote(prefix, encoding="latin-1")):
        mounted = text.rstrip("/")
        if path.startswith(mounted) and path[len(mounted) :][:1] in ("", "/"):
            return path[len(mounted) :]
    return path


def _at(remote: object) -> About:
    """Return what a record says of who sends, while it has not said which member it is."""
    return About(address=f"{remote}")


def _from(request: Request) -> About:
    """Return what a record says of who sends a request, and says who it is."""
    sender = sender_of(request)
    return _at(request.remote) if sender is None else _by(sender, request.remote)


def _by(sender: int, remote: object) -> About:
    """Return what a record says of a member that sends."""
    return About(peer=format_id(sender), address=f"{remote}")


def _not_allowed(method: str) -> Answer:
    return text_answer(405, "Method Not Allowed", (("Allow", method),))


def _probing() -> Answer:
    """Say that we are there and what time it is here; source: xiang90/probing ``server.go``."""
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    body = f'{{"OK":true,"Now":"{now}"}}\n'
    # etcd leaves the type to Go, which sniffs text.
    return Answer(200, (("Content-Type", "text/plain; charset=utf-8"),), body.encode())
