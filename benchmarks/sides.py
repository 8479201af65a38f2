"""What ``make bench-peers`` measures: who does what, over what, with how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from exchange import (
    BARE,
    BARE_THREADS,
    BESIDE,
    ETCD,
    INBOX,
    INBOXES,
    OURS,
    OURS_ANEW,
    OURS_ENCODED,
    Row,
    run_both,
    run_receive,
    run_receive_spinning,
    run_send,
    run_send_spinning,
    run_streams,
)
from handshakes import OPENSSL, run_accept, run_dial, run_flood, run_rotation
from peers.clients import SUBJECTS as CLIENTS

SMALL, LARGE = 128, 64 << 20
SIZES = (SMALL, 1 << 10, 16 << 10, 1 << 20, LARGE)
#: The reference of what is done over TLS by streams: the same subject without it.
PLAIN = "plain"


@dataclass(frozen=True)
class Side:
    """One kind of work, and the subjects that do it.

    ``reference`` is the subject in C, or what else ours is held to; ``counted`` is what there are
    so many of in a second.
    """

    title: str
    subjects: tuple[str, ...]
    run: Callable[[str, int, float], Row]
    sizes: tuple[int, ...] = SIZES
    reference: str = BARE
    counted: str = "messages"


#: In the order of the tables: TLS first, which is what people run.
SIDES = {
    "tls-send": Side(
        "Sending over mutual TLS, to one neutral sink",
        (ETCD, OURS, BARE),
        partial(run_send, tls=True),
        (SMALL, LARGE),
    ),
    "tls-receive": Side(
        "Receiving over mutual TLS, under one neutral load",
        (ETCD, OURS, *INBOXES, BARE),
        partial(run_receive, tls=True),
        (SMALL, LARGE),
    ),
    "tls-send-spinning": Side(
        "Sending over mutual TLS beside a thread that computes all the time, ours in Python",
        (OURS, BARE),
        partial(run_send_spinning, tls=True),
        (SMALL,),
    ),
    "tls-receive-spinning": Side(
        "Receiving over mutual TLS beside such a thread",
        (OURS, INBOX, BARE),
        partial(run_receive_spinning, tls=True),
        (SMALL,),
    ),
    "tls-dial": Side(
        "Mutual handshakes, as the client",
        (ETCD, OURS, OPENSSL),
        partial(run_dial, tls=True),
        (SMALL,),
        reference=OPENSSL,
        counted="handshakes",
    ),
    "tls-accept": Side(
        "Mutual handshakes, as the server",
        (ETCD, OURS, BARE),
        run_accept,
        (SMALL,),
        counted="handshakes",
    ),
    "tls-flood": Side(
        "A lone heartbeat while two clients shake hands as fast as they can",
        (ETCD, OURS, BARE),
        run_flood,
        (SMALL,),
        counted="handshakes",
    ),
    "tls-rotation": Side(
        "A lone message while the same node dials 16 other peers as fast as it can",
        (OURS,),
        run_rotation,
        (SMALL,),
        counted="handshakes",
    ),
    "send": Side(
        "Sending, to one neutral sink",
        (ETCD, OURS, OURS_ANEW, BARE, BARE_THREADS, "urllib3", *CLIENTS),
        run_send,
    ),
    "receive": Side(
        "Receiving, under one neutral load",
        (ETCD, OURS, *INBOXES, "uvicorn", BARE),
        run_receive,
    ),
    "receive-spinning": Side(
        "Receiving beside a thread that computes all the time, ours in Python",
        (OURS, INBOX, BARE),
        partial(run_receive_spinning, tls=False),
        (SMALL,),
    ),
    "both": Side("Into itself, both processes", (ETCD, OURS), run_both),
    "dial": Side(
        "Dialling without TLS, and one message",
        (ETCD, OURS),
        partial(run_dial, tls=False),
        (SMALL,),
        counted="connections",
    ),
    "stream-msgapp": Side(
        "By streams, MsgApps, into a node of the same kind",
        (ETCD, OURS_ANEW, OURS_ENCODED),
        run_streams,
        (SMALL,),
    ),
    "stream-message": Side(
        "By streams, heartbeats with a context, into a node of the same kind",
        (ETCD, OURS_ANEW, OURS_ENCODED),
        partial(run_streams, kind="message"),
        (SMALL,),
    ),
    "tls-stream-msgapp": Side(
        "The MsgApps over mutual TLS",
        (ETCD, OURS_ANEW, OURS_ENCODED),
        partial(run_streams, tls=True),
        (SMALL,),
        reference=PLAIN,
    ),
    "tls-stream-message": Side(
        "The heartbeats over mutual TLS",
        (ETCD, OURS_ANEW, OURS_ENCODED),
        partial(run_streams, kind="message", tls=True),
        (SMALL,),
        reference=PLAIN,
    ),
    "stream-spinning": Side(
        "By streams, MsgApps, while the receiver's main thread computes in Python",
        (OURS_ENCODED, BESIDE),
        partial(run_streams, spins=True),
        (SMALL,),
        reference=BESIDE,
    ),
}
STREAM_SIDES = tuple(name for name in SIDES if "stream-" in name)
TLS_SIDES = tuple(name for name in SIDES if name.startswith("tls-") and name not in STREAM_SIDES)
#: What can be named at once.
GROUPS = {
    "tls": TLS_SIDES,
    "plain": tuple(name for name in SIDES if name not in TLS_SIDES + STREAM_SIDES),
    "streams": STREAM_SIDES,
}


def label(size: int) -> str:
    for factor, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= factor:
            return f"{size // factor} {unit}"
    return f"{size} B"
