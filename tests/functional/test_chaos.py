"""``make chaos``: half a minute of it, and the links that it breaks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.link import Fault, Link, Network, faults
from tests.support import LONG_TIMEOUT, SHORT_TIMEOUT
from tests.support.processes import assert_nothing_is_left

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.etcd
@pytest.mark.slow
def test_no_acknowledged_write_is_lost(tmp_path: Path) -> None:
    """Kills for 8 s, as this seed has them; the members start and catch up besides."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.chaos", "--duration", "8", "--seed", "5"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": os.fspath(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    last = result.stdout.splitlines()[-1]
    assert last == "every acknowledged write is in all 3 logs, once, and in one order"
    assert_nothing_is_left(tmp_path)


class Echo:
    """Answers each connection with what it says, in capitals."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.heard: list[bytes] = []
        self.has_heard = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.socket.accept()
            except OSError:
                return
            self._threads.append(thread := threading.Thread(target=self._serve, args=(peer,)))
            thread.start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(1000):
                    self.heard.append(data)
                    self.has_heard.set()
                    peer.sendall(data.upper())
            except OSError:
                pass  # reset

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def network(echo: Echo) -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def link(network: Network, echo: Echo) -> Link:
    return network.link("here to there", echo.port)


def connect(link: Link) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), LONG_TIMEOUT)


def ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return connection.recv(1000)


def test_a_link_without_a_fault_carries_both_ways(link: Link) -> None:
    with connect(link) as connection:
        assert ask(connection, b"hello") == b"HELLO"
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_cut_resets_connections_and_refuses_new_ones(network: Network, link: Link) -> None:
    with connect(link) as connection:
        assert ask(connection, b"hello") == b"HELLO"
        with faults(network, [link], Fault.CUT):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
            with pytest.raises(ConnectionRefusedError):
                connect(link)
    with connect(link) as connection:
        assert ask(connection, b"again") == b"AGAIN"


def test_in_a_hole_nothing_moves_until_it_is_mended(
    network: Network, link: Link, echo: Echo
) -> None:
    with ExitStack() as stack:
        before = stack.enter_context(connect(link))
        assert ask(before, b"hello") == b"HELLO"
        with faults(network, [link], Fault.HOLE):
            after = stack.enter_context(connect(link))  # is accepted
            for connection in (before, after):
                connection.sendall(b"lost?")
                connection.settimeout(SHORT_TIMEOUT)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            assert echo.heard == [b"hello"]
        for connection in (before, after):
            connection.settimeout(LONG_TIMEOUT)
            assert connection.recv(1000) == b"LOST?"


def test_a_mute_link_carries_what_is_sent_and_no_answer(
    network: Network, link: Link, echo: Echo
) -> None:
    with connect(link) as connection:
        with faults(network, [link], Fault.MUTE):
            connection.sendall(b"hello")
            assert echo.has_heard.wait(LONG_TIMEOUT)
            connection.settimeout(SHORT_TIMEOUT)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        connection.settimeout(LONG_TIMEOUT)
        assert connection.recv(1000) == b"HELLO"


def test_where_nobody_listens_a_connection_ends(network: Network) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        link = network.link("to nobody", unused.getsockname()[1])

        def use() -> None:
            with connect(link) as connection:  # a reset may come as early as this
                connection.recv(1)

        with pytest.raises(ConnectionResetError):
            use()
