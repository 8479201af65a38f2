"""What the tests wait with (``support/waiting.py``): it waits, and its failure says for what."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading

import pytest

from tests.support.waiting import NETLINK_SOCK_DIAG, eventually, eventually_async, until_read


def emulates_no_netlink() -> bool:
    """Tell whether this runs in qemu's user mode, which has none of the kernel's sock_diag."""
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG).close()
    except OSError as error:
        return error.errno == errno.EPROTONOSUPPORT
    return False


def test_a_failure_says_what_was_waited_for() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: .*lambda: 1 \+ 1 == 3"):
        eventually(lambda: 1 + 1 == 3, timeout=0.01)
    with pytest.raises(OSError, match=r"^not within 0 s: the sun rises$"):
        eventually(lambda: False, "the sun rises", 0, error=OSError)
    with pytest.raises(AssertionError, match="not within 0 s: as it stands"):
        eventually(lambda: False, lambda: "as it stands", 0)


def test_what_holds_at_once_is_not_waited_for() -> None:
    eventually(lambda: True, timeout=0)
    asyncio.run(eventually_async(lambda: True))


@pytest.mark.skipif(emulates_no_netlink(), reason="no sock_diag: an emulated Linux")
def test_what_was_sent_is_waited_for_until_it_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        with ours, theirs:
            until_read(ours)  # nothing was sent
            ours.sendall(b"12345")
            waiting = threading.Thread(target=until_read, args=[ours])
            waiting.start()
            assert theirs.recv(4) == b"1234"
            waiting.join(0.05)
            assert waiting.is_alive()
            assert theirs.recv(4) == b"5"
            waiting.join()
