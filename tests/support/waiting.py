"""Waiting for what no event tells of: the books, the kernel, the disk, another process."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import LONG_TIMEOUT

# Of <linux/netlink.h> and <linux/sock_diag.h>.
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST = 4, 20, 1
#: Between the first looks, and between later ones: what takes long is looked at less often.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.001, 0.02


def _looks(
    condition: Callable[[], object],
    what: str | Callable[[], object],
    timeout: float,
    error: type[Exception],
) -> Iterator[float]:
    """Yield how long to pause between two looks at a condition, until it holds."""
    pause_s = FIRST_PAUSE_S
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            if callable(what):
                what = str(what())
            if not what:
                try:
                    what = " ".join(inspect.getsource(condition).split())
                except OSError:  # of a program given with -c
                    what = repr(condition)
            raise error(f"not within {timeout:g} s: {what}")
        yield pause_s
        pause_s = min(1.1 * pause_s, LAST_PAUSE_S)


def eventually(
    condition: Callable[[], object],
    what: str | Callable[[], object] = "",
    timeout: float = LONG_TIMEOUT,
    *,
    error: type[Exception] = AssertionError,
) -> None:
    """Wait until a condition holds; ``error`` says what was waited for, the code unless ``what``.

    A ``what`` that can be called is called then: it shows how things stand.
    """
    for pause_s in _looks(condition, what, timeout, error):
        time.sleep(pause_s)


async def eventually_async(
    condition: Callable[[], object], what: str | Callable[[], object] = ""
) -> None:
    """As :func:`eventually`, on the loop."""
    for pause_s in _looks(condition, what, LONG_TIMEOUT, AssertionError):
        await asyncio.sleep(pause_s)


def until_read(sock: socket.socket) -> None:
    """Wait until the other end, over IPv4 on this machine, has read what it was sent.

    The kernel says what is in its receive queue, and has put there what was sent when the call
    returns, but on a machine so busy that this is left to another thread.
    """
    eventually(lambda: _unread_by_peer_of(sock) == 0, f"{sock} is read from")


def _unread_by_peer_of(sock: socket.socket) -> int:
    """Ask the kernel (sock_diag(7)) for the bytes in the receive queue of a connection's other end.

    /proc/net/tcp says it, too, but takes 50 ms to read once some tests have been run.
    """
    addresses = (sock.getpeername(), sock.getsockname())
    ends = [(struct.pack("!H", port), socket.inet_aton(host)) for host, port in addresses]
    # struct inet_diag_req_v2: family, protocol, no extensions, any state, inet_diag_sockid.
    request = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
    request += b"".join(port for port, _ in ends)
    request += b"".join(host.ljust(16, b"\0") for _, host in ends)
    request += bytes(4) + b"\xff" * 8  # any interface, no cookie
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        header = struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0)
        netlink.send(header + request)
        reply = netlink.recv(4096)
    if int.from_bytes(reply[4:6], sys.byteorder) != SOCK_DIAG_BY_FAMILY:
        return 0  # an error: it is closed
    unread: int = struct.unpack_from("=I", reply, 72)[0]  # inet_diag_msg.idiag_rqueue
    return unread


def dials_to(port: int) -> int:
    """How many dials to a port of 127.0.0.1 wait for an answer: the kernel's SYN_SENT."""
    ends = re.compile(f" 0100007F:[0-9A-F]{{4}} 0100007F:{port:04X} 02 ")
    return len(ends.findall(Path("/proc/net/tcp").read_text()))


def exit_status_of(child: int) -> int:
    """Wait for a forked child, and return how it ended; one that hangs is killed."""
    ended: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        ended.append(status)
        return pid == child

    try:
        eventually(has_ended, f"the child {child} ends")
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        raise
    return ended[-1]


def is_listening(url: str) -> bool:
    """Tell whether somebody accepts connections at a loopback URL."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def connections_to(url: str) -> int:
    """Count the established TCP connections of this machine to a loopback URL."""
    port = int(url.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2] == f"0100007F:{port:04X}" and row[3] == "01" for row in rows)
