"""The watch that ``conftest.py`` keeps over TLS sees a second thread."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from tests.support import LONG_TIMEOUT, tls_use
from tests.support.tls import Authority


def assert_kept_out(tls: ssl.SSLSocket | ssl.SSLObject, *names: str) -> None:
    for name in names:
        with pytest.raises(AssertionError, match=f"in {name} beside another thread"):
            getattr(tls, name)()
        assert f"in {name} beside" in tls_use.shared.pop()


def test_a_second_thread_is_kept_out_of_a_socket(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    context = Authority(tmp_path).client()
    with (
        theirs,
        context.wrap_socket(
            ours, server_hostname="127.0.0.1", do_handshake_on_connect=False
        ) as sock,
    ):
        first = threading.Thread(target=pytest.raises, args=(OSError, sock.do_handshake))
        first.start()
        theirs.recv(1)  # of its hello: it is within
        assert_kept_out(sock, "do_handshake", "read", "write", "send", "unwrap")
        theirs.close()
        first.join(LONG_TIMEOUT)


def test_a_second_thread_is_kept_out_of_an_object(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    hello, answer = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = authority.client().wrap_bio(answer, hello, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    is_within, may_go = threading.Event(), threading.Event()

    def stay(*_: object) -> None:
        is_within.set()
        may_go.wait(LONG_TIMEOUT)

    context = authority.server()
    context.sni_callback = stay  # nothing else waits within one
    server = context.wrap_bio(hello, answer, server_side=True)
    first = threading.Thread(target=pytest.raises, args=(ssl.SSLError, server.do_handshake))
    first.start()
    assert is_within.wait(LONG_TIMEOUT)
    assert_kept_out(server, "do_handshake", "read", "write", "unwrap")
    may_go.set()
    first.join(LONG_TIMEOUT)
