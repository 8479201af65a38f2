"""What a node has received, counted: bytes by member, and what became of bodies and messages."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.locks import lock_of

__all__ = ["REFUSALS", "Received", "ReceivedCounts"]

# Members whose bytes are counted one by one. Clusters have 3 to 7; the rest is what a stranger
# who makes up ids can cost us. Of addresses with failures, where asked for, as many are kept.
_MAX_SENDERS = 128
# Types past the last we know that are told of in the log: raft has added two or three a release.
_MAX_TYPES = 32

#: Why a request is not taken, in one word; those that ``reasons`` has as well mean the same there.
REFUSALS = (
    *("wrong-cluster", "wrong-version", "wrong-member", "removed", "unknown-member", "wrong-peer"),
    *("undecodable", "incomplete", "too-large", "no-memory", "encoded", "busy", "forked"),
)


class ReceivedCounts(NamedTuple):
    """What a node has received, counted, at one instant."""

    #: Body bytes by sending member; None for all past the first 128.
    received_bytes: dict[int | None, int]
    #: Failures by the caller's ``ip:port``; "" for those not told by address, 0 included.
    received_failures: dict[str, int]
    #: Messages of process-local types, answered 204 and not delivered.
    ignored: int
    #: Messages of types past the last we know, answered 204 and not delivered.
    unknown: int
    #: Messages delivered without some of their fields, which a ``Message`` does not have.
    unknown_fields: int
    #: Calls of ``process`` that raised anything but ``RequestRejected``.
    process_failures: int
    #: Requests that were not taken, by one word that says why.
    refusals: dict[str, int]


class Received:
    """Counts what callers sent. Thread-safe.

    Attributes
    ----------
    bytes_by_sender : dict of int to int
        Body bytes by sending member (``Message.from_``), for the first 128 senders.
    bytes_of_others : int
        Body bytes of all further senders together.
    failures : int
        Bodies that could not be read, were refused or could not be decoded.
    ignored : int
        Messages of process-local types, answered 204 and not delivered.
    unknown : int
        Messages of types past the last we know, answered 204 and not delivered.
    unknown_fields : int
        Messages decoded without some of their fields, which a ``Message`` does not have.
    process_failures : int
        Calls of ``process`` that raised anything but ``RequestRejected``.
    """

    def __init__(self) -> None:
        self._lock = lock_of(self)  # guards what follows
        self.bytes_by_sender: dict[int, int] = {}
        self.bytes_of_others = 0
        self.failures = 0
        self.ignored = 0
        self.unknown = 0
        self.unknown_fields = 0
        self.process_failures = 0
        self._refusals = dict.fromkeys(REFUSALS, 0)
        self._failures_by_address: dict[str, int] | None = None
        self._unknown_types: set[int] = set()  # that the log has been told of
        self._losing_senders: set[int] = set()  # likewise

    def count_bytes(self, sender: int, size_bytes: int) -> None:
        """Count bytes of a member."""
        with self._lock:
            try:
                self.bytes_by_sender[sender] += size_bytes
            except KeyError:  # its first, or the first since it was forgotten
                if len(self.bytes_by_sender) < _MAX_SENDERS:
                    self.bytes_by_sender[sender] = size_bytes
                else:
                    self.bytes_of_others += size_bytes

    def count_failure(self, remote: object) -> None:
        """Count a body that could not be read, was refused or could not be decoded."""
        with self._lock:
            self.failures += 1
            counts = self._failures_by_address
            if counts is not None:
                address = str(remote)
                if address in counts or len(counts) < _MAX_SENDERS:
                    counts.setdefault(address, 0)
                    counts[address] += 1

    def count_refusal(self, verdict: str) -> None:
        """Count a request that was not taken, by one of ``REFUSALS``."""
        with self._lock:
            self._refusals[verdict] += 1

    def count_ignored(self) -> None:
        """Count a message of a process-local type."""
        with self._lock:
            self.ignored += 1

    def count_unknown(self, kind: int) -> bool:
        """Count a message of a type that we do not know; whether the log is to hear of the type.

        A stranger can make up types: past the first 32 the log hears of no more.
        """
        with self._lock:
            self.unknown += 1
            is_news = kind not in self._unknown_types and len(self._unknown_types) < _MAX_TYPES
            if is_news:
                self._unknown_types.add(kind)
        return is_news

    def count_unknown_fields(self, sender: int, messages: int) -> bool:
        """Count messages of which fields are lost; whether the log is to hear of their sender.

        A stranger can make up members, too: past the first 128 the log hears of no more.
        """
        with self._lock:
            self.unknown_fields += messages
            is_news = (
                sender not in self._losing_senders and len(self._losing_senders) < _MAX_SENDERS
            )
            if is_news:
                self._losing_senders.add(sender)
        return is_news

    def count_process_failure(self) -> None:
        """Count a call of ``process`` that failed."""
        with self._lock:
            self.process_failures += 1

    def counts(self) -> ReceivedCounts:
        """Return everything counted, for the metrics."""
        with self._lock:
            received: dict[int | None, int] = dict(self.bytes_by_sender.items())
            if self.bytes_of_others:
                received[None] = self.bytes_of_others
            failures = dict(self._failures_by_address or {})
            failures[""] = self.failures - sum(failures.values())
            return ReceivedCounts(
                received,
                failures,
                self.ignored,
                self.unknown,
                self.unknown_fields,
                self.process_failures,
                self._refusals.copy(),
            )

    def count_failures_by_address(self) -> None:
        """Tell failures by the caller's address from now on, for the first 128 addresses."""
        with self._lock:
            if self._failures_by_address is None:
                self._failures_by_address = {}

    def forget(self, sender: int) -> None:
        """Drop what was counted for a member that is one no more."""
        with self._lock:
            self.bytes_by_sender.pop(sender, None)
            self._losing_senders.discard(sender)
