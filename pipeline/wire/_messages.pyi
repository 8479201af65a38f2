from collections.abc import Callable, Iterable, Sized
from typing import Any, ClassVar, NamedTuple, final

from typing_extensions import Buffer

from pipeline.types import EntryType, MessageType

__all__ = [
    "ConfState",
    "Decoded",
    "EncodedMessage",
    "Entry",
    "Message",
    "Snapshot",
    "SnapshotMetadata",
    "byte_view",
    "decode",
]

def byte_view(value: Buffer) -> memoryview: ...

@final
class ConfState:
    """The members of a cluster: raftpb ``ConfState``.

    Parameters
    ----------
    voters, learners, voters_outgoing, learners_next : iterable of int, optional
        Member IDs, 0..2**64-1, at most 65,536 in each; kept in order, read back as tuples.
    auto_leave : bool, optional
        Whether a joint configuration is left without being asked.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.
    """
    def __init__(
        self,
        *,
        voters: Iterable[int] = (),
        learners: Iterable[int] = (),
        voters_outgoing: Iterable[int] = (),
        learners_next: Iterable[int] = (),
        auto_leave: bool = False,
    ) -> None: ...
    @property
    def voters(self) -> tuple[int, ...]:
        """tuple of int: members that vote."""
    @voters.setter
    def voters(self, value: Iterable[int]) -> None: ...
    @property
    def learners(self) -> tuple[int, ...]:
        """tuple of int: members that only receive."""
    @learners.setter
    def learners(self, value: Iterable[int]) -> None: ...
    @property
    def voters_outgoing(self) -> tuple[int, ...]:
        """tuple of int: voters of the configuration that is being left."""
    @voters_outgoing.setter
    def voters_outgoing(self, value: Iterable[int]) -> None: ...
    @property
    def learners_next(self) -> tuple[int, ...]:
        """tuple of int: voters that become learners when the joint configuration is left."""
    @learners_next.setter
    def learners_next(self, value: Iterable[int]) -> None: ...
    @property
    def auto_leave(self) -> bool:
        """bool: whether the joint configuration is left without being asked."""
    @auto_leave.setter
    def auto_leave(self, value: bool) -> None: ...
    def __eq__(self, value: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __reduce__(self) -> tuple[Callable[..., ConfState], tuple[Any, ...]]: ...

@final
class SnapshotMetadata:
    """Where in the log a snapshot stands: raftpb ``SnapshotMetadata``.

    Parameters
    ----------
    conf_state : ConfState, optional
        Kept by reference; a new empty one when left out.
    index, term : int, optional
        Of the last entry the snapshot covers, 0..2**64-1.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.
    """
    def __init__(
        self, *, conf_state: ConfState | None = None, index: int = 0, term: int = 0
    ) -> None: ...
    @property
    def conf_state(self) -> ConfState:
        """ConfState: the members at that index."""
    @conf_state.setter
    def conf_state(self, value: ConfState) -> None: ...
    @property
    def index(self) -> int:
        """int: index of the last entry the snapshot covers."""
    @index.setter
    def index(self, value: int) -> None: ...
    @property
    def term(self) -> int:
        """int: term of the last entry the snapshot covers."""
    @term.setter
    def term(self, value: int) -> None: ...
    def __eq__(self, value: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __reduce__(self) -> tuple[Callable[..., SnapshotMetadata], tuple[Any, ...]]: ...

@final
class Snapshot:
    """A state machine's snapshot: raftpb ``Snapshot``.

    Parameters
    ----------
    data : bytes-like or None, optional
        Kept by reference, never copied; must not change until the message is sent. None is
        absent on the wire, ``b""`` is present and empty.
    metadata : SnapshotMetadata, optional
        Kept by reference; a new empty one when left out.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type.
    """
    def __init__(
        self, *, data: Buffer | None = None, metadata: SnapshotMetadata | None = None
    ) -> None: ...
    @property
    def data(self) -> Buffer | None:
        """bytes-like or None: the object that was passed, or bytes when received."""
    @data.setter
    def data(self, value: Buffer | None) -> None: ...
    @property
    def metadata(self) -> SnapshotMetadata:
        """SnapshotMetadata: where in the log the snapshot stands."""
    @metadata.setter
    def metadata(self, value: SnapshotMetadata) -> None: ...
    def __eq__(self, value: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __reduce__(self) -> tuple[Callable[..., Snapshot], tuple[Any, ...]]: ...

@final
class Entry:
    """One entry of the log: raftpb ``Entry``.

    Parameters
    ----------
    term, index : int, optional
        0..2**64-1.
    type : EntryType or int, optional
        An int of 32 bits; unknown numbers are carried as they are.
    data : bytes-like or None, optional
        Kept by reference, never copied; must not change until the message is sent. None is
        absent on the wire, ``b""`` is present and empty.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.
    """
    def __init__(
        self,
        *,
        term: int = 0,
        index: int = 0,
        type: EntryType | int = ...,
        data: Buffer | None = None,
    ) -> None: ...
    @property
    def type(self) -> EntryType | int:
        """EntryType, or int where the number is unknown."""
    @type.setter
    def type(self, value: EntryType | int) -> None: ...
    @property
    def term(self) -> int:
        """int: term in which the entry was proposed."""
    @term.setter
    def term(self, value: int) -> None: ...
    @property
    def index(self) -> int:
        """int: position in the log."""
    @index.setter
    def index(self, value: int) -> None: ...
    @property
    def data(self) -> Buffer | None:
        """bytes-like or None: the object that was passed, or bytes when received."""
    @data.setter
    def data(self, value: Buffer | None) -> None: ...
    def __eq__(self, value: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __reduce__(self) -> tuple[Callable[..., Entry], tuple[Any, ...]]: ...

@final
class Message:
    """A message between members: raftpb ``Message``.

    Parameters
    ----------
    type : MessageType or int
        An int of 32 bits; unknown numbers are carried as they are.
    to, from_ : int, optional
        Member IDs, 0..2**64-1.
    term, log_term, index, commit, reject_hint : int, optional
        0..2**64-1.
    entries : iterable of Entry, optional
        Turned into a tuple; at most 131,072.
    snapshot : Snapshot or None, optional
        Kept by reference. A wholly empty one says the same as None: equal, and equal bytes.
    reject : bool, optional
        Whether the sender refuses.
    context : bytes-like or None, optional
        Kept by reference, never copied; must not change until the message is sent. None is
        absent on the wire, ``b""`` is present and empty.

    Raises
    ------
    MarshalError
        Here and on assignment, if a value has the wrong type or is out of range.

    Notes
    -----
    Thread-safe, field by field: whoever reads, sends or encodes a message that another thread
    assigns to sees the one value or the other of each field. The same holds for what is in it.
    Source: raft ``raftpb/raft.proto``. Its fields ``vote`` and ``responses`` never leave a node
    and are not here; the decoder skips them.
    """
    def __init__(
        self,
        *,
        type: MessageType | int,
        to: int = 0,
        from_: int = 0,
        term: int = 0,
        log_term: int = 0,
        index: int = 0,
        entries: Iterable[Entry] = (),
        commit: int = 0,
        snapshot: Snapshot | None = None,
        reject: bool = False,
        reject_hint: int = 0,
        context: Buffer | None = None,
    ) -> None: ...
    @property
    def type(self) -> MessageType | int:
        """MessageType, or int where the number is unknown."""
    @type.setter
    def type(self, value: MessageType | int) -> None: ...
    @property
    def to(self) -> int:
        """int: ID of the member the message is for."""
    @to.setter
    def to(self, value: int) -> None: ...
    @property
    def from_(self) -> int:
        """int: ID of the member that sends it."""
    @from_.setter
    def from_(self, value: int) -> None: ...
    @property
    def term(self) -> int:
        """int: the sender's term; 0 on MsgProp and MsgReadIndex."""
    @term.setter
    def term(self, value: int) -> None: ...
    @property
    def log_term(self) -> int:
        """int: term of the entry at ``index``."""
    @log_term.setter
    def log_term(self, value: int) -> None: ...
    @property
    def index(self) -> int:
        """int: index of the entry before ``entries``, or the one an answer is about."""
    @index.setter
    def index(self, value: int) -> None: ...
    @property
    def entries(self) -> tuple[Entry, ...]:
        """tuple of Entry."""
    @entries.setter
    def entries(self, value: Iterable[Entry]) -> None: ...
    @property
    def commit(self) -> int:
        """int: index up to which the sender has committed."""
    @commit.setter
    def commit(self, value: int) -> None: ...
    @property
    def snapshot(self) -> Snapshot | None:
        """Snapshot or None."""
    @snapshot.setter
    def snapshot(self, value: Snapshot | None) -> None: ...
    @property
    def reject(self) -> bool:
        """bool: whether the sender refuses."""
    @reject.setter
    def reject(self, value: bool) -> None: ...
    @property
    def reject_hint(self) -> int:
        """int: where the sender of a refusal suggests to go on."""
    @reject_hint.setter
    def reject_hint(self, value: int) -> None: ...
    @property
    def context(self) -> Buffer | None:
        """bytes-like or None: the object that was passed, or bytes when received."""
    @context.setter
    def context(self, value: Buffer | None) -> None: ...
    def marshal(self, profile: str = "3.5") -> bytes:
        """Encode the message.

        Parameters
        ----------
        profile : str, optional
            Whose encoder to repeat byte for byte: ``"3.5"`` (etcd 3.4 and 3.5), ``"3.6"`` or
            ``"3.7"``. Every etcd reads all three.

        Returns
        -------
        bytes
            Exactly ``byte_size(profile)`` of them.

        Raises
        ------
        UsageError
            If the profile is none of the three.
        """
    def byte_size(self, profile: str = "3.5") -> int:
        """Return the length of the encoded message in bytes, without encoding it.

        Parameters
        ----------
        profile : str, optional
            As for ``marshal``.

        Returns
        -------
        int
            What etcd's metrics count: no framing of any transport is in it.

        Raises
        ------
        UsageError
            If the profile is none of the three.
        """
    @staticmethod
    def unmarshal(data: Buffer) -> Message:
        """Decode a message that any etcd since 3.4 has encoded.

        Parameters
        ----------
        data : bytes-like
            The whole message and nothing else. Payloads are copied out of it.

        Returns
        -------
        Message
            Its payloads are bytes. A wholly empty snapshot, which etcd 3.4 and 3.5 attach to
            every message, is None.

        Raises
        ------
        UnmarshalError
            If the data is not a message; says which field, at which offset, and why.
        UsageError
            If ``data`` is not a C-contiguous buffer.
        """
    def __eq__(self, value: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __reduce__(self) -> tuple[Callable[..., Message], tuple[Any, ...]]: ...

@final
class EncodedMessage(Sized):
    """A message as its bytes: sent as it is, never looked into, and received whole.

    One that was received can be given to ``send`` as it is, and goes out byte for byte.

    Parameters
    ----------
    data : bytes-like
        The raftpb encoding, at most 2**31 - 1 bytes. Up to 16 KiB are copied at ``send``; more
        is borrowed until the message has its outcome, so do not change a mutable buffer.
    type : MessageType or int
        An int of 32 bits, as of a ``Message``; decides what is reported and counted.
    to : int
        The member it is for; unsigned 64-bit.
    from_, term : int, optional
        The member that sends it and its term, unsigned 64-bit. To send it they are not needed.

    Raises
    ------
    MarshalError
        If a field is out of range or ``data`` is no C-contiguous buffer.
    """
    def __init__(
        self, data: Buffer, *, type: MessageType | int, to: int, from_: int = 0, term: int = 0
    ) -> None: ...
    @property
    def data(self) -> Buffer:
        """bytes-like: the object that was passed; when received, bytes or a read-only view."""
    @property
    def type(self) -> MessageType | int:
        """MessageType, or int where the number is unknown."""
    @property
    def to(self) -> int:
        """int: ID of the member the message is for."""
    @property
    def from_(self) -> int:
        """int: ID of the member that sends it; 0 when not told."""
    @property
    def term(self) -> int:
        """int: the sender's term; 0 when not told."""
    @staticmethod
    def unmarshal(data: Buffer) -> EncodedMessage:
        """Check a message that is encoded and read whose it is and for whom.

        Parameters
        ----------
        data : bytes-like
            The whole message and nothing else. Kept by reference, as by the constructor.

        Returns
        -------
        EncodedMessage
            Of these bytes, with the type, members and term that they say.

        Raises
        ------
        UnmarshalError
            If the data is not a message; says which field, at which offset, and why.
        UsageError
            If ``data`` is not a C-contiguous buffer.
        """
    def __len__(self) -> int: ...
    def __reduce__(self) -> tuple[Callable[..., EncodedMessage], tuple[Any, ...]]: ...

class Decoded(NamedTuple):
    message: Message | EncodedMessage
    has_unknown_fields: bool
    snapshot_index: int

def decode(data: Buffer, *, encoded: bool = False) -> Decoded: ...
