"""Listener: where it listens, each of its limits of time, how it closes, and what is left then.

Not here: what is answered (test_http.py), many connections and memory (test_receiver.py), bad input
(fault/test_receiver_attacks.py), https (test_tls_receive.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import subprocess
import sys
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest

from pipeline.config import ReceiverConfig
from pipeline.errors import RequestRejected, UsageError
from pipeline.receive import listener as listener_module
from pipeline.receive.listener import Listener
from tests.support import LONG_TIMEOUT, ipv6
from tests.support.descriptors import assert_all_closed, copies_of_sockets, open_descriptors
from tests.support.http import (
    HEARTBEAT,
    handlers_of,
    peer_headers,
    post_heartbeat,
    reply_of_socket,
)
from tests.support.listening import (
    A_SECOND,
    ANY,
    GOOD,
    catch_up,
    dial,
    is_closed,
    listen,
    listener_threads,
    post,
    read_status,
)
from tests.support.processes import TIMEOUT_S
from tests.support.raft import FakeRaft
from tests.support.waiting import eventually


@pytest.mark.parametrize(
    "url",
    [
        ANY,
        "http://localhost:0",
        pytest.param("http://[::1]:0", marks=ipv6),
    ],
)
def test_says_where_it_listens_with_the_real_port(url: str) -> None:
    raft = FakeRaft()
    with listen(raft, url) as listener:
        prefix, _, port = listener.url.rpartition(":")
        assert prefix == url.rpartition(":")[0]
        assert int(port) > 0
        assert post_heartbeat(listener.url).status == 204
    assert raft.processed == [HEARTBEAT]


@ipv6
def test_the_ipv6_wildcard_takes_ipv4_as_gos_does() -> None:
    with listen(FakeRaft(), "http://[::]:0") as listener:
        port = urlsplit(listener.url).port
        assert post_heartbeat(f"http://127.0.0.1:{port}").status == 204
        assert post_heartbeat(f"http://[::1]:{port}").status == 204


def resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    """Have the names stand for these addresses."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        if host.endswith(".invalid"):  # without asking the machine's resolver, which may be slow
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = [real(address, *args, **kwargs) for address in names.get(host, [host])]
        return [entry for entries in found for entry in entries]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param(["127.0.0.1", "127.0.0.2"], id="two"),
        pytest.param(["::1", "127.0.0.1"], marks=ipv6, id="two families"),
        pytest.param(["127.0.0.1", "127.0.0.1"], id="one twice"),
        pytest.param(["192.0.2.7", "127.0.0.1"], id="one of another machine"),
    ],
)
def test_all_addresses_of_a_name_are_listened_at(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    raft = FakeRaft()
    resolve(monkeypatch, {"both.test": addresses})
    with listen(raft, "http://both.test:0") as listener:
        prefix, _, port = listener.url.rpartition(":")
        assert prefix == "http://both.test"
        ours = [address for address in addresses if address != "192.0.2.7"]
        for address in ours:
            host = f"[{address}]" if ":" in address else address
            assert post_heartbeat(f"http://{host}:{port}").status == 204
        has_told = "(192.0.2.7:0): Cannot assign requested address" in caplog.text
        assert has_told == (len(ours) < len(addresses))
        again = listener.url
    with listen(raft, again) as listener:  # all of it was let go of
        assert listener.url == again


def test_a_free_port_is_free_at_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel chooses one that is free at the first address only."""
    resolve(monkeypatch, {"both.test": ["127.0.0.1", "127.0.0.2"]})
    chosen: list[int] = []
    real = listener_module._bind_address

    def bind(family: int, address: tuple[Any, ...], backlog: int) -> socket.socket:
        if address[0] == "127.0.0.2" and len(chosen) < 3:
            chosen.append(address[1])
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return real(family, address, backlog)

    monkeypatch.setattr(listener_module, "_bind_address", bind)
    with listen(FakeRaft(), "http://both.test:0") as listener:
        port = urlsplit(listener.url).port
        for host in ("127.0.0.1", "127.0.0.2"):
            assert post_heartbeat(f"http://{host}:{port}").status == 204
    assert len(chosen) == 3
    monkeypatch.setattr(listener_module, "PORT_TRIES", 2)
    chosen.clear()
    before = open_descriptors()
    with pytest.raises(OSError, match=r"http://both\.test:0: no port is free at all of its"):
        listen(FakeRaft(), "http://both.test:0")
    assert_all_closed(before)


@pytest.mark.parametrize(
    "failure", ["in use", "at one of two", "another machine's", "no name", "resolver", "no text"]
)
def test_an_address_that_cannot_be_listened_at_is_named(
    monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    taken = socket.create_server(("127.0.0.2", 0))
    port = taken.getsockname()[1]
    resolve(monkeypatch, {"both.test": ["127.0.0.1", "127.0.0.2"]})
    url, text, kind = {
        "in use": (f"http://127.0.0.2:{port}", f"(127.0.0.2:{port}): Address already", OSError),
        "at one of two": (f"http://both.test:{port}", f"(127.0.0.2:{port}): Addr", OSError),
        "another machine's": ("http://192.0.2.7:1", "(192.0.2.7:1): Cannot assign", OSError),
        "no name": ("http://no-such.invalid:1", "'no-such.invalid' cannot", socket.gaierror),
        "resolver": ("http://busy.test:1", "resolved: Device or resource busy", OSError),
        "no text": (f"http://{'a' * 64}.test:1", "is not a host name", UsageError),
    }[failure]
    config = ReceiverConfig()
    handlers = handlers_of(FakeRaft(), config)
    free = "http://127.0.0.3:0"
    if failure == "resolver":
        free = url
        monkeypatch.setattr(socket, "getaddrinfo", busy)
    before = open_descriptors()
    with pytest.raises(kind) as caught:
        Listener(handlers, [free, url], config)
    assert url in str(caught.value)
    assert text in str(caught.value)
    if isinstance(caught.value, OSError):
        assert caught.value.errno
    del caught  # it holds what could not be made
    assert listener_threads() == []
    assert_all_closed(before)
    taken.close()


def busy(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:0", "http://127.0.0.1", "http://127.0.0.1:0/raft", "https://127.0.0.1:0",
            "unix://localhost:0"]
)  # fmt: skip
def test_refuses_a_url_it_cannot_listen_on(url: str) -> None:
    with pytest.raises(UsageError):
        listen(FakeRaft(), url)
    assert listener_threads() == []


def test_a_port_in_use_is_an_os_error() -> None:
    with listen(FakeRaft()) as listener, pytest.raises(OSError, match="in use"):
        listen(FakeRaft(), listener.url)


def test_the_port_is_free_at_once_although_connections_were_open() -> None:
    raft = FakeRaft()
    url = ANY
    for _ in range(3):
        listener = listen(raft, url)
        url = listener.url
        with dial(url) as idle, dial(url) as used:
            used.sendall(GOOD)
            assert read_status(used) == 204
            listener.close()
            assert is_closed(idle)
            assert is_closed(used)
    assert len(raft.processed) == 3


def test_close_leaves_no_thread_and_no_descriptor() -> None:
    listen(FakeRaft()).close()  # whatever is imported or cached at first use
    before = open_descriptors()
    listener = listen(FakeRaft())
    post_heartbeat(listener.url)
    listener.close()
    assert listener_threads() == []
    assert_all_closed(before)
    with pytest.raises(ConnectionRefusedError):
        dial(listener.url)


def test_close_twice_and_from_several_threads_is_harmless() -> None:
    listener = listen(FakeRaft())
    threads = [threading.Thread(target=listener.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_TIMEOUT)
    listener.close()
    assert listener_threads() == []


def is_refused(url: str) -> bool:
    """Tell whether nobody listens."""
    try:
        dial(url).close()
    except ConnectionError:
        return True
    return False


def test_close_waits_for_a_running_process_and_not_for_its_deadline(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    raft = FakeRaft(gate=gate)
    listener = listen(raft)
    with dial(listener.url) as sock:
        sock.sendall(GOOD)
        raft.wait_processed(1)
        catch_up(listener)  # the loop has another leader by now
        closing = threading.Thread(target=listener.close, args=(LONG_TIMEOUT,))
        closing.start()
        eventually(lambda: is_refused(listener.url))
        assert closing.is_alive()
        gate.set()
        assert read_status(sock) == 204
        closing.join(LONG_TIMEOUT / 2)
        assert not closing.is_alive()
    assert "unanswered" not in caplog.text


def test_close_gives_up_at_the_deadline_and_says_so_to_the_sender(gate: threading.Event) -> None:
    raft = FakeRaft(gate=gate)
    config = ReceiverConfig(handlers=1)
    listener = listen(raft, config=config)
    with dial(listener.url) as running, dial(listener.url) as waiting, dial(listener.url) as half:
        running.sendall(GOOD)
        raft.wait_processed(1)
        waiting.sendall(GOOD)
        half.sendall(GOOD[:-1])
        # Answered on the loop, so the loop has seen what was sent before it.
        assert reply_of_socket(listener.url, "GET", "/raft/probing", {}, b"").status == 200
        listener.close(deadline_s=0.3)
        (blocked,) = listener_threads(expected=1)
        assert "handler" in blocked
        for sock in (running, waiting):
            assert read_status(sock) == 503
            assert is_closed(sock)
        assert read_status(half) is None
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("pipeline-handler-"):
            thread.join(LONG_TIMEOUT)
    assert len(raft.processed) == 1, "a message was processed after close"


def test_close_does_not_wait_for_a_peer_that_does_not_read_its_answer() -> None:
    before = open_descriptors()
    raft = FakeRaft(process_error=RequestRejected(500, bytes(32 << 20)))
    listener = listen(raft)
    with dial(listener.url) as sock:
        sock.sendall(GOOD)
        assert read_status(sock) == 500
        listener.close(deadline_s=0.1)
        assert listener_threads() == []
    assert_all_closed(before)


def sockets() -> set[str]:
    """Name the sockets that this process has open."""
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the directory's own
            names.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {name for name in names if name.startswith("socket:")}


def test_a_socket_is_not_closed_while_a_thread_may_still_write_to_it(gate: threading.Event) -> None:
    """The descriptor could be somebody else's by then, who would be sent our answer."""
    raft = FakeRaft(gate=gate)
    with listen(raft) as listener:
        before = sockets()
        with dial(listener.url) as sock:
            sock.sendall(GOOD)
            raft.wait_processed(1)
            (accepted,) = sockets() - before - {f"socket:[{os.fstat(sock.fileno()).st_ino}]"}
            listener.close(deadline_s=0.0)
            assert read_status(sock) == 503
            assert is_closed(sock)
        assert accepted in sockets()
        gate.set()
        assert listener_threads() == []
        assert accepted not in sockets()


def test_close_logs_no_traceback(gate: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    raft = FakeRaft(gate=gate)
    listener = listen(raft)
    with dial(listener.url) as sock:
        sock.sendall(GOOD)
        raft.wait_processed(1)
        listener.close(deadline_s=0.0)
    assert not [record for record in caplog.records if record.exc_info]


def test_blocked_calls_of_process_hold_up_only_their_own_connections(
    gate: threading.Event,
) -> None:
    raft = FakeRaft(gate=gate)
    config = ReceiverConfig(handlers=2)
    with listen(raft, config=config) as listener:
        blocked = [dial(listener.url) for _ in range(3)]
        for sock in blocked:
            sock.sendall(GOOD)
        raft.wait_processed(2)
        assert reply_of_socket(listener.url, "GET", "/raft/probing", {}, b"").status == 200
        strange = peer_headers(x_etcd_cluster_id="1")
        assert reply_of_socket(listener.url, "POST", "/raft", strange, b"").status == 412
        assert len(raft.processed) == 2, "more calls at once than config.handlers"
        gate.set()
        assert [read_status(sock) for sock in blocked] == [204, 204, 204]
        for sock in blocked:
            sock.close()


def test_a_connection_too_many_takes_the_place_of_the_one_idle_longest() -> None:
    config = ReceiverConfig(max_connections=2)
    with listen(FakeRaft(), config=config) as listener:
        first, second = dial(listener.url), dial(listener.url)
        for sock in (first, second):
            sock.sendall(GOOD)
            assert read_status(sock) == 204
        with dial(listener.url) as third:
            assert is_closed(first)
            for sock in (third, second):
                sock.sendall(GOOD)
                assert read_status(sock) == 204
            assert listener.stats().closed_for_room == 1
        first.close()
        assert post_heartbeat(listener.url).status == 204
        second.close()


@pytest.mark.parametrize(
    "sent", [b"", GOOD[:20], GOOD + GOOD[:20]], ids=["nothing", "part of a head", "of the second"]
)
def test_a_head_that_does_not_come_in_time_ends_the_connection(sent: bytes) -> None:
    config = ReceiverConfig(head_timeout_s=0.1, idle_timeout_s=0.1)
    with listen(FakeRaft(), config=config) as listener, dial(listener.url) as sock:
        sock.sendall(sent)
        assert is_closed(sock)


def test_a_head_that_trickles_in_ends_the_connection() -> None:
    config = ReceiverConfig(head_timeout_s=0.1)
    with listen(FakeRaft(), config=config) as listener, dial(listener.url) as sock:
        sock.settimeout(0.01)
        answer: bytes | None = None
        while answer is None:
            try:
                sock.sendall(b"P")
                answer = sock.recv(1)
            except TimeoutError:  # neither answered nor closed: go on trickling
                pass
            except ConnectionError:
                answer = b""
        assert answer == b""


def test_an_idle_connection_is_closed_in_time() -> None:
    config = ReceiverConfig(idle_timeout_s=0.1, head_timeout_s=LONG_TIMEOUT * 10)
    with listen(FakeRaft(), config=config) as listener, dial(listener.url) as sock:
        sock.sendall(GOOD)
        assert read_status(sock) == 204
        assert is_closed(sock)


def test_a_connection_answered_late_is_idle_from_then_on(gate: threading.Event) -> None:
    """The handler thread answers without waking the loop, which has no deadline left by then."""
    config = ReceiverConfig(idle_timeout_s=0.1, head_timeout_s=A_SECOND)
    with listen(FakeRaft(gate=gate), config=config) as listener, dial(listener.url) as sock:
        sock.sendall(GOOD)
        with dial(listener.url) as silent:
            assert is_closed(silent)  # in time: no earlier deadline is left
        gate.set()
        assert read_status(sock) == 204
        assert is_closed(sock)


def test_an_idle_connection_is_not_taken_for_a_late_head() -> None:
    config = ReceiverConfig(head_timeout_s=A_SECOND)
    with listen(FakeRaft(), config=config) as listener, dial(listener.url) as sock:
        sock.sendall(GOOD)
        assert read_status(sock) == 204
        sock.settimeout(1.3 * A_SECOND)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_a_body_that_stalls_is_answered_400() -> None:
    config = ReceiverConfig(stall_timeout_s=0.1, head_timeout_s=LONG_TIMEOUT * 10)
    raft = FakeRaft()
    with listen(raft, config=config) as listener, dial(listener.url) as sock:
        sock.sendall(GOOD[:-1])
        assert read_status(sock) == 400
        assert is_closed(sock)
    assert raft.processed == []


def test_a_slow_process_is_not_taken_for_an_idle_connection(gate: threading.Event) -> None:
    config = ReceiverConfig(
        idle_timeout_s=A_SECOND, head_timeout_s=A_SECOND, stall_timeout_s=A_SECOND
    )
    raft = FakeRaft(gate=gate)
    with listen(raft, config=config) as listener, dial(listener.url) as sock:
        sock.sendall(GOOD)
        raft.wait_processed(1)
        sock.settimeout(1.3 * A_SECOND)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(LONG_TIMEOUT)
        gate.set()
        assert read_status(sock) == 204


def test_answers_carry_date_and_no_server_as_gos_do() -> None:
    with listen(FakeRaft()) as listener:
        reply = post_heartbeat(listener.url)
    assert "date" in reply.headers
    assert "server" not in reply.headers


BLOCKED_AT_EXIT = """
import threading
from tests.support.listening import GOOD, dial, listen
from tests.support.raft import FakeRaft
class Raft(FakeRaft):
    def process(self, message):
        super().process(message)
        threading.Event().wait()
raft = Raft()
listener = listen(raft)
sock = dial(listener.url)
sock.sendall(GOOD)
raft.wait_processed(1)
print("blocked", flush=True)
"""


def test_a_blocked_process_does_not_hang_interpreter_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_AT_EXIT],
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (0, "blocked\n"), done.stderr


@pytest.mark.parametrize(
    ("sent", "limits"),
    [
        pytest.param(b"", {"head_timeout_s": 0.1}, id="nothing sent"),
        pytest.param(GOOD[:-1], {"stall_timeout_s": 0.1}, id="a body that stalls"),
        pytest.param(GOOD, {"idle_timeout_s": 0.1}, id="idle"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", {}, id="an odd request, answered"),
        pytest.param(b"\x00\r\n\r\n", {}, id="no request at all"),
        pytest.param(GOOD, {"max_connections": 1}, id="closed to make room"),
    ],
)
def test_the_end_of_a_connection_is_heard_of_whoever_has_a_copy(
    sent: bytes, limits: dict[str, Any]
) -> None:
    """A forked child has copies of our sockets, and to close ours does not end the connection."""
    config = ReceiverConfig(**limits)
    with listen(FakeRaft(), config=config) as listener, dial(listener.url) as sock:
        eventually(lambda: listener.stats().accepted == 1)
        with copies_of_sockets():
            sock.sendall(sent)
            if "max_connections" in limits:
                assert read_status(sock) == 204
                dial(listener.url).close()
            assert is_closed(sock)


@pytest.mark.parametrize("sent", [b"", GOOD[:20], GOOD[:-1], GOOD], ids=len)
def test_close_is_heard_of_whoever_has_a_copy_of_a_socket(sent: bytes) -> None:
    listener = listen(FakeRaft())
    with dial(listener.url) as sock:
        sock.sendall(sent)
        post_heartbeat(listener.url)  # so that the other connection has been read from
        with copies_of_sockets():
            listener.close()
            assert is_closed(sock)
            with pytest.raises(ConnectionRefusedError):
                dial(listener.url)
            listen(FakeRaft(), listener.url).close()


def test_a_caller_is_shown_although_another_library_has_broken_socket(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PySyncObj replaces this function for the whole process by one that fails on Linux."""
    monkeypatch.setattr(socket, "inet_ntop", lambda: None)
    with listen(FakeRaft()) as listener, dial(listener.url) as sock:
        host, port = sock.getsockname()
        sock.sendall(post(b"no message"))
        assert read_status(sock) == 400
    text = f"failed to unmarshal Raft message from {host}:{port}: "
    assert any(record.getMessage().startswith(text) for record in caplog.records)
