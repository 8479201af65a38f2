"""Why a message or a probe failed, in words for whoever is to mend it.

A reason is the text in brackets of a log line, in ``last_error`` and in ``probe``. What it means
and what to do is said here, once; docs/operations.md says where it shows. Reasons name addresses
and times, so there is no end of them; verdicts are few, so metrics may have them as a label.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

__all__ = ["EXIT_FAILED", "EXIT_OK", "Explanation", "explanation_of"]

EXIT_OK = 0
#: Something that none of the others is.
EXIT_FAILED = 1
#: Not 2, which click has for a command line that is wrong.
EXIT_UNREACHABLE = 3
EXIT_TLS = 4
EXIT_NOT_A_PEER = 5
EXIT_MISMATCH = 6
EXIT_REMOVED = 7
EXIT_HERE = 8


class Explanation(NamedTuple):
    """What a reason means."""

    #: One word for programs; it does not change.
    verdict: str
    exit_code: int
    #: What is wrong.
    meaning: str
    #: What to do about it.
    advice: str


_SILENT = Explanation(
    "silent",
    EXIT_UNREACHABLE,
    "something takes the connection and does not answer",
    "see whether the process is stopped or overloaded, or another program has the port",
)

_ALERT = r"alert.*|certificate required|bad certificate"

#: Looked at in order; the first that is found in the text counts.
_KNOWN: tuple[tuple[str, Explanation], ...] = (
    (
        r"Too many open files|no descriptor",
        Explanation(
            "descriptors",
            EXIT_HERE,
            "this process has no file descriptor left; the peer has nothing to do with it",
            "raise `ulimit -n`: five per peer, three per snapshot, one per connection received",
        ),
    ),
    (
        r"permanently removed|removed member",
        Explanation(
            "removed",
            EXIT_REMOVED,
            "the peer says that this member was removed from its cluster, for good",
            "its ID cannot come back: add the node as a new member, with an empty log",
        ),
    ),
    (
        r"cluster ID mismatch",
        Explanation(
            "wrong-cluster",
            EXIT_MISMATCH,
            "the peer is a member of another cluster",
            "compare the cluster IDs: the URL, or a data directory, is one of another cluster",
        ),
    ),
    (
        r"incompatible version",
        Explanation(
            "wrong-version",
            EXIT_MISMATCH,
            "the peer does not go together with the version that was claimed",
            "set TransportConfig.server_version to X.Y.0 of the etcd members beside it",
        ),
    ),
    (
        r"certificate not allowed for this member",
        Explanation(
            "wrong-member",
            EXIT_TLS,
            "the peer trusts our certificate, but not for the member that we say we are",
            "look at the peer's allow_member, and at whose certificate this is",
        ),
    ),
    (
        r"sender not found|failed to find local node",
        Explanation(
            "unknown-member",
            EXIT_MISMATCH,
            "the peer does not know the member that we say we are",
            "add the member to the cluster first; compare the member ID",
        ),
    ),
    (
        r"to field mismatch",
        Explanation(
            "wrong-peer",
            EXIT_MISMATCH,
            "another member than the one meant answers at this URL",
            "compare the peer's ID with its URL: two addresses were exchanged, or one is reused",
        ),
    ),
    (
        r"unsupported stream type",
        Explanation(
            "no-streams",
            EXIT_MISMATCH,
            "the peer does not take streams; messages go by posts",
            "nothing, if it is meant to: TransportConfig(streams=False)",
        ),
    ),
    (
        rf"({_ALERT}).*expired|expired.*({_ALERT})",
        Explanation(
            "ours-expired",
            EXIT_TLS,
            "the peer refuses our certificate: it has expired",
            "renew our certificate; the files are looked at once a second",
        ),
    ),
    (
        rf"({_ALERT})",
        Explanation(
            "ours-refused",
            EXIT_TLS,
            "the peer refuses our certificate",
            "look at its log, which says why: another authority, another name, or expired; an "
            "extended key usage must name client and server authentication",
        ),
    ),
    (
        r"certificate has expired",
        Explanation(
            "expired",
            EXIT_TLS,
            "the peer's certificate, or one above it, has expired",
            "renew it there; a node of ours takes new files within a second",
        ),
    ),
    (
        r"certificate is not yet valid",
        Explanation(
            "not-yet-valid",
            EXIT_TLS,
            "the peer's certificate, or one above it, is not valid yet",
            "compare the clocks of the two machines, then the certificate's dates",
        ),
    ),
    (
        r"mismatch.*certificate|certificate verify failed: .*mismatch|[Hh]ostname mismatch|"
        r"IP address mismatch|not a name that a certificate",
        Explanation(
            "wrong-name",
            EXIT_TLS,
            "the peer's certificate is for other names than the one that was dialled",
            "have it issued with the URL's host among its alternative names, or set "
            "TLSInfo.server_name",
        ),
    ),
    (
        r"revoked|CRL|certificate refused",
        Explanation(
            "refused-certificate",
            EXIT_TLS,
            "the peer's certificate is good, but our rules refuse it",
            "look at crl_file, which must be PEM and current, and allowed_cn, allowed_hostnames "
            "and allowed_uris",
        ),
    ),
    (
        r"issuer certificate|self[- ]signed|unable to verify|certificate signature failure|"
        r"certificate verify failed",
        Explanation(
            "wrong-ca",
            EXIT_TLS,
            "the peer's certificate is not signed by an authority that we trust",
            "compare trusted_ca_file (--cacert) with what signed it; while an authority is "
            "replaced, every node needs both",
        ),
    ),
    (
        r"wrong version number|packet length too long|http request|record layer|"
        r"the peer speaks no TLS",
        Explanation(
            "no-tls",
            EXIT_TLS,
            "the peer does not speak TLS on this port",
            "use http:// for it, or have it listen at https://",
        ),
    ),
    (
        r"the peer speaks TLS",
        Explanation(
            "needs-tls",
            EXIT_TLS,
            "the peer speaks TLS on this port",
            "use https:// for it, with --cert, --key and --cacert",
        ),
    ),
    (
        r"handshake: not done|handshake timeout",
        _SILENT,
    ),
    (
        r"TLS",
        Explanation(
            "tls",
            EXIT_TLS,
            "TLS with the peer failed",
            "the reason is OpenSSL's; the peer's log has the other half",
        ),
    ),
    (
        r"was not resolved|cannot resolve",
        Explanation(
            "unresolved",
            EXIT_UNREACHABLE,
            "the name has no address, or the name server does not answer",
            "look the name up on this machine: `getent hosts NAME`; a name that ends in a dot "
            "skips the search list",
        ),
    ),
    (
        r"dial timeout",
        Explanation(
            "black-hole",
            EXIT_UNREACHABLE,
            "nothing answers at this address: no connection and no refusal",
            "see whether the machine is up, and what drops packets between: a firewall or a "
            "security group, or a route",
        ),
    ),
    (
        r"Connection refused",
        Explanation(
            "refused",
            EXIT_UNREACHABLE,
            "the machine is there, and nothing listens on this port",
            "see whether the peer runs, and whether it listens at this address and port",
        ),
    ),
    (
        r"unreachable|No route to host|Cannot assign requested address",
        Explanation(
            "no-route",
            EXIT_UNREACHABLE,
            "there is no way to this address from here",
            "look at the routes, and at whether the address is one of this network",
        ),
    ),
    (
        r"\bEOF\b|closed by the peer|Connection reset|Broken pipe",
        Explanation(
            "closed",
            EXIT_UNREACHABLE,
            "the peer, or something between, has closed the connection",
            "see whether the peer was stopped or restarted; the connection is made anew by itself",
        ),
    ),
    (
        r"is no peer port|malformed|before an answer",
        Explanation(
            "not-a-peer",
            EXIT_NOT_A_PEER,
            "something listens there, but it is no peer port of a Raft node",
            "compare the port: etcd's is 2380 for peers and 2379 for clients",
        ),
    ),
    (
        r"http status Internal Server Error|status 500|\(500",
        Explanation(
            "cannot-process",
            EXIT_FAILED,
            "the member is there and could not process the message",
            "look at its log; an etcd that was removed from its cluster answers so as well",
        ),
    ),
    (
        r"http status|answered with status|answered without OK|unhandled|no chunk|is no stream|"
        r"frame that is none|head of the answer|before everything was sent",
        Explanation(
            "odd-status",
            EXIT_NOT_A_PEER,
            "the answer is not one that a Raft node gives",
            "see what else is at this URL: a proxy, or another program",
        ),
    ),
    (
        r"dead link|timed out",
        Explanation(
            "dead-link",
            EXIT_UNREACHABLE,
            "the connection was there, and what was sent is not acknowledged any more",
            "see whether the machine or the link went down; the connection is made anew by itself",
        ),
    ),
    (
        r"stalled",
        Explanation(
            "stalled",
            EXIT_UNREACHABLE,
            "the peer does not read: for stall_timeout_s no byte moved",
            "see whether its process is stopped, or its node blocks",
        ),
    ),
    (
        r"no answer|not complete in time|i/o timeout",
        _SILENT,
    ),
    (
        r"waited longer than",
        Explanation(
            "too-old",
            EXIT_HERE,
            "messages waited in the queue for longer than max_queue_age",
            "the peer or the link is slower than this node sends: look at the peer's reason",
        ),
    ),
    (
        r"buffer is full",
        Explanation(
            "queue-full",
            EXIT_HERE,
            "messages come faster than the peer takes them, and the queue is full",
            "look at the round trip and at the peer's load; its last reason says more",
        ),
    ),
    (
        r"the source",
        Explanation(
            "source",
            EXIT_HERE,
            "the database of a snapshot could not be read here",
            "look at the source; the peer has nothing to do with it",
        ),
    ),
    (
        r"internal error",
        Explanation(
            "internal",
            EXIT_HERE,
            "a fault of this library",
            "report it, with the traceback that the log has",
        ),
    ),
    (
        r" raised\b|is not awaited|\bblocks$",
        Explanation(
            "application",
            EXIT_HERE,
            "the node's own code has raised, or does not return",
            "look at the log, which has the traceback of what was raised",
        ),
    ),
    (
        r"cancelled|stopped|replaced|the loop has ended",
        Explanation(
            "ended-here",
            EXIT_HERE,
            "this node ended it itself",
            "nothing: it was cancelled, or the node was stopped",
        ),
    ),
)

_UNKNOWN = Explanation(
    "failed", EXIT_FAILED, "a reason that is not known here", "the text is the system's own"
)


@functools.lru_cache(256)  # a peer that is sick says the same again and again
def explanation_of(reason: str) -> Explanation:
    """Return what a reason means; one that says so for a reason that nobody knows."""
    for pattern, explanation in _KNOWN:
        if re.search(pattern, reason, re.IGNORECASE):
            return explanation
    return _UNKNOWN
