"""Dialling: names and addresses, for messages, snapshots and probes alike."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import (
    MessageType,
    PipelineConfig,
    SnapshotCancelledError,
    SnapshotStatus,
    Transport,
    TransportConfig,
)
from pipeline.net import dialling as module
from pipeline.net.dialling import Dial, Dialer, DialError
from pipeline.net.poller import Poller
from pipeline.net.pool import PooledConnection
from pipeline.send.picker import URLPicker
from pipeline.snapshot import link as link_module
from tests.support import LONG_TIMEOUT, SHORT_TIMEOUT, ipv6
from tests.support.descriptors import assert_all_closed, copies_of_sockets, open_descriptors
from tests.support.names import Names
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import PROBED, ScriptedServer, black_hole, refused_port
from tests.support.tls import Authority
from tests.support.waiting import eventually

PEER, OTHER = 2, 3
CHANNELS = ("message", "snapshot", "probe")
HERE = "127.0.0.1"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller("test")
    yield poller
    poller.stop(time.monotonic() + LONG_TIMEOUT)


@pytest.fixture
def dialer(poller: Poller) -> Dialer:
    dialer = Dialer(poller)
    poller.start()
    return dialer


def config(channel: str = "message", **pipeline: float) -> TransportConfig:
    return TransportConfig(
        probe_interval_s=0.01 if channel == "probe" else 0,
        pipeline=PipelineConfig(**{"connections": 1, **pipeline}),  # type: ignore[arg-type]
    )


def outcome(channel: str, transport: Transport, peer: int = PEER) -> str:
    """Use a channel once, which waits for what comes of it; empty, or why it failed."""
    if channel == "probe":
        before = transport.probe_stats()[peer].total
        eventually(lambda: transport.probe_stats()[peer].total > before)
        return transport.probe_stats()[peer].last_error
    if channel == "snapshot":
        transfer = transport.send_snapshot(message(MessageType.SNAP, to=peer), b"x")
        return str(transfer.future.exception(LONG_TIMEOUT) or "")
    reasons: list[str] = []
    status = transport._peers[peer].status
    deactivate = status.deactivate

    def note(source: str, action: str, reason: str, *, url: str | None = None) -> bool:
        reasons.append(reason)
        return deactivate(source, action, reason, url=url)

    status.deactivate = note  # type: ignore[method-assign]
    done = transport.stats()[peer].sent + transport.stats()[peer].failed
    transport.send([message(to=peer)])
    eventually(lambda: transport.stats()[peer].sent + transport.stats()[peer].failed == done + 1)
    status.deactivate = deactivate  # type: ignore[method-assign]
    return "".join(reasons)


def dial_of(
    dialer: Dialer, host: str, port: int, timeout_s: float = LONG_TIMEOUT
) -> tuple[Dial, threading.Event]:
    """Begin a dial; it, and what is set when it has ended."""
    is_done = threading.Event()
    dial = Dial(host, port, timeout_s, (), lambda _: is_done.set())
    dialer.begin(dial)
    return dial, is_done


def resolver_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("pipeline-resolve-")]


# Addresses


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_an_address_that_swallows_everything_does_not_hide_the_next(
    names: Names, tmp_path: Path, channel: str, scheme: str
) -> None:
    authority = Authority(tmp_path)
    tls = authority.server("server", "two.test") if scheme == "https" else None
    with (
        ScriptedServer(tls=tls) as server,
        black_hole() as hole,
        Transport(
            1, 1, FakeRaft(), tls=authority.info(), config=config(channel, dial_timeout_s=60.0)
        ) as transport,
    ):
        names.of["two.test"] = [(HERE, hole), (HERE, server.port)]
        transport.add_peer(PEER, [f"{scheme}://two.test:2380"])
        assert outcome(channel, transport) == ""


def test_who_answered_last_is_tried_first(
    names: Names, dialer: Dialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer() as server, black_hole() as hole:
        names.of["two.test"] = [(HERE, hole), (HERE, server.port)]
        dial, is_done = dial_of(dialer, "two.test", 1)
        assert is_done.wait(LONG_TIMEOUT)
        dial.take().close()
        # Now the first one tried is the only one.
        monkeypatch.setattr(module, "ATTEMPT_DELAY_S", LONG_TIMEOUT * 2)
        dial, is_done = dial_of(dialer, "two.test", 1)
        assert is_done.wait(LONG_TIMEOUT)
        dial.take().close()


def test_who_answers_one_dial_is_tried_at_once_by_those_that_wait_for_others(
    names: Names, dialer: Dialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer() as server, black_hole() as hole, refused_port() as refused:
        monkeypatch.setattr(module, "ATTEMPT_DELAY_S", LONG_TIMEOUT * 2)
        names.of["two.test"] = [(HERE, hole), (HERE, server.port)]
        first, first_is_done = dial_of(dialer, "two.test", 1)
        eventually(lambda: bool(first.attempts))
        names.of["two.test"] = [(HERE, refused), (HERE, server.port)]
        second, second_is_done = dial_of(dialer, "two.test", 1)
        assert second_is_done.wait(LONG_TIMEOUT)
        assert first_is_done.wait(LONG_TIMEOUT)
        first.take().close()
        second.take().close()


def test_an_address_that_refuses_is_followed_by_the_next_at_once(
    names: Names, dialer: Dialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTEMPT_DELAY_S", LONG_TIMEOUT * 2)
    with ScriptedServer() as server, refused_port() as refused:
        names.of["two.test"] = [(HERE, refused), (HERE, server.port)]
        dial, is_done = dial_of(dialer, "two.test", 1)
        assert is_done.wait(LONG_TIMEOUT)
        dial.take().close()


def test_families_take_turns() -> None:
    four, six = socket.AF_INET, socket.AF_INET6
    found = [(six, ("a", 1)), (six, ("b", 1)), (six, ("a", 1)), (four, ("c", 1)), (six, ("d", 1))]
    assert [address[0] for _, address in module._interleaved(found)] == ["a", "c", "b", "d"]


def test_the_addresses_that_lost_are_let_go_of(names: Names, dialer: Dialer) -> None:
    with ScriptedServer() as server, black_hole() as hole:
        names.of["two.test"] = [(HERE, hole), (HERE, hole), (HERE, server.port)]
        before = len(open_descriptors())
        dial, is_done = dial_of(dialer, "two.test", 1)
        assert is_done.wait(LONG_TIMEOUT)
        server.wait_connections(1)
        # The connection's two ends.
        eventually(lambda: len(open_descriptors()) == before + 2)
        dial.take().close()


def test_a_dial_that_fails_names_every_address(names: Names, dialer: Dialer) -> None:
    with refused_port() as refused, black_hole() as hole:
        names.of["two.test"] = [(HERE, refused), (HERE, hole)]
        dial, is_done = dial_of(dialer, "two.test", 1, timeout_s=1.0)
        assert is_done.wait(LONG_TIMEOUT)
        with pytest.raises(DialError) as caught:
            dial.take()
    assert str(caught.value) == (
        f"dial timeout: no answer from {HERE}:{hole} in 1 s; {HERE}:{refused}: Connection refused"
    )


# Names


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_names_that_hang_hold_up_nobody_else(names: Names, tmp_path: Path, scheme: str) -> None:
    """Many of them, beside one thread for callbacks and TLS: what is healthy goes on."""
    authority = Authority(tmp_path)
    gone = [f"gone{i}.test" for i in range(10)]
    gate = names.hang(*gone)
    with (
        ScriptedServer(tls=authority.server() if scheme == "https" else None) as server,
        Transport(
            1,
            1,
            FakeRaft(),
            tls=authority.info(),
            config=TransportConfig(
                dispatchers=1,
                probe_interval_s=0.01,
                stop_timeout_s=LONG_TIMEOUT,
                pipeline=PipelineConfig(dial_timeout_s=LONG_TIMEOUT),
            ),
        ) as transport,
    ):
        for peer, name in enumerate(gone, 10):
            transport.add_peer(peer, [f"{scheme}://{name}:2380"])
            transport.send([message(to=peer)] * 4)
            transport.send_snapshot(message(MessageType.SNAP, to=peer), b"x")
        eventually(lambda: len(resolver_threads()) == len(gone))
        transport.add_peer(PEER, [server.url])
        for channel in CHANNELS:
            assert outcome(channel, transport) == ""
        assert len([name for name, _ in names.asked if name in gone]) == len(gone)  # once each
        began_at = time.monotonic()
        transport.stop()
        assert time.monotonic() - began_at < LONG_TIMEOUT / 2
    gate.set()


def test_a_name_that_hangs_does_not_stop_its_peer_s_open_connections(names: Names) -> None:
    with (
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=config(connections=4)) as transport,
    ):
        names.of["node.test"] = [(HERE, server.port)]
        transport.add_peer(PEER, ["http://node.test:2380"])
        assert outcome("message", transport) == ""
        gate = names.hang("node.test")
        snapshot = transport.send_snapshot(message(MessageType.SNAP), b"x")
        eventually(lambda: len(resolver_threads()) == 1)
        for _ in range(10):
            assert outcome("message", transport) == ""
        assert len(server.connections) == 1
        assert not snapshot.done()
        gate.set()


def test_a_name_is_looked_up_once_at_a_time_for_all_who_wait_for_it(
    names: Names, dialer: Dialer
) -> None:
    with ScriptedServer() as one, ScriptedServer() as two:
        names.gates["node.test"] = gate = threading.Event()
        names.of["node.test"] = [(HERE, one.port)]
        dials = [dial_of(dialer, "node.test", server.port) for server in (one, two, one, two)]
        eventually(lambda: len(names.asked) == 1)
        given_up, is_done = dial_of(dialer, "node.test", one.port, timeout_s=0.01)
        assert is_done.wait(LONG_TIMEOUT)
        with pytest.raises(
            DialError, match=r"dial timeout: 'node\.test' was not resolved in 0\.01"
        ):
            given_up.take()
        assert given_up.took_s >= 0.01
        gate.set()
        for dial, is_done in dials:
            assert is_done.wait(LONG_TIMEOUT)
            dial.take().close()
        assert len(names.asked) == 1
        one.wait_connections(2)
        two.wait_connections(2)


def test_what_a_look_up_takes_is_part_of_the_dial_timeout(names: Names, dialer: Dialer) -> None:
    """What is left after a quarter of it is the connect's, and not all of it or nothing."""
    with black_hole() as hole:
        names.gates["node.test"] = gate = threading.Event()
        names.of["node.test"] = [(HERE, hole)]
        dial, is_done = dial_of(dialer, "node.test", hole, timeout_s=2.0)
        assert not is_done.wait(0.5)
        gate.set()
        assert is_done.wait(LONG_TIMEOUT)
        with pytest.raises(DialError, match="no answer from"):
            dial.take()
        assert dial.deadline == dial.began_at + 2.0
        assert dial.took_s >= 2.0


def test_look_ups_are_bounded_and_those_nobody_waits_for_are_left_out(
    names: Names, dialer: Dialer
) -> None:
    hosts = [f"gone{i}.test" for i in range(module.LOOKUPS_MAX + 8)]
    gate = names.hang(*hosts)
    dials = [dial_of(dialer, host, 1) for host in hosts]
    eventually(lambda: len(names.asked) == module.LOOKUPS_MAX)
    time.sleep(SHORT_TIMEOUT)
    assert len(resolver_threads()) == len(names.asked) == module.LOOKUPS_MAX
    cancelled, cancelled_is_done = dials[-1]
    dialer.cancel(cancelled)
    assert cancelled_is_done.wait(LONG_TIMEOUT)
    gate.set()
    for dial, is_done in dials[:-1]:
        assert is_done.wait(LONG_TIMEOUT)
        with pytest.raises(DialError, match="Temporary failure in name resolution"):
            dial.take()
    assert sorted(name for name, _ in names.asked) == sorted(hosts[:-1])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", pytest.param("[::1]", marks=ipv6)])
def test_an_address_is_looked_up_by_no_thread(names: Names, dialer: Dialer, host: str) -> None:
    with ScriptedServer(host="::1" if ":" in host else HERE) as server:
        dial, is_done = dial_of(dialer, host, server.port)
        assert is_done.wait(LONG_TIMEOUT)
        dial.take().close()
    assert [thread for _, thread in names.asked] == ["pipeline-poll-test"]


# What goes wrong


FAILURES = [
    pytest.param(
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        "cannot resolve 'node.test': Name or service not known",
        id="no such name",
    ),
    pytest.param(
        OSError(errno.EBUSY, os.strerror(errno.EBUSY)),
        "cannot resolve 'node.test': Device or resource busy",
        id="OSError",
    ),
    pytest.param(
        OSError("no number"), "cannot resolve 'node.test': no number", id="OSError without a number"
    ),
    pytest.param(
        UnicodeError("label too long"),
        "cannot resolve 'node.test': label too long",
        id="UnicodeError",
    ),
    pytest.param(RuntimeError(), "cannot resolve 'node.test': RuntimeError", id="RuntimeError"),
    pytest.param([], "cannot resolve 'node.test': no address", id="no address"),
]


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(("found", "reason"), FAILURES)
def test_a_resolver_s_error_is_a_failure_like_another(
    names: Names,
    caplog: pytest.LogCaptureFixture,
    channel: str,
    found: list[tuple[str, int]] | Exception,
    reason: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    raft = FakeRaft()
    with (
        ScriptedServer() as server,
        Transport(1, 1, raft, config=config(channel)) as transport,
    ):
        names.of["node.test"] = found
        transport.add_peer(PEER, ["http://node.test:2380"])
        assert outcome(channel, transport) == reason
        if channel == "message":
            assert transport.stats()[PEER].failed == 1
        if channel != "probe":
            raft.wait_unreachable(1)
        if channel == "snapshot":
            assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
        # And when it is over, all is well.
        names.of["node.test"] = [(HERE, server.port)]
        eventually(lambda: outcome(channel, transport) == "")
    assert "internal error" not in caplog.text


@pytest.mark.parametrize(
    "patched",
    [
        pytest.param((URLPicker, "pick"), id="before the dial"),
        pytest.param((PooledConnection, "open"), id="after it"),
    ],
)
def test_a_fault_of_ours_is_a_failure_like_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, patched: tuple[type, str]
) -> None:
    """It costs the message, and neither the worker nor the thread that dials."""
    faults = [RuntimeError("a fault")]
    real = getattr(*patched)

    def faulty(self: object) -> object:
        if faults:
            raise faults.pop()
        return real(self)

    monkeypatch.setattr(*patched, faulty)
    raft = FakeRaft()
    with ScriptedServer() as server, Transport(1, 1, raft, config=config()) as transport:
        transport.add_peer(PEER, [server.url])
        assert "internal error: RuntimeError('a fault')" in outcome("message", transport)
        assert raft.wait_unreachable(1) == [PEER]
        assert outcome("message", transport) == ""
    assert "internal error, please report: a dial" in caplog.text


def test_callbacks_that_block_hold_up_no_dial() -> None:
    """Even if they have every dispatcher thread there is."""
    raft = FakeRaft(gate=threading.Event())
    made = dataclasses.replace(config(), dispatchers=1)
    with (
        refused_port() as refused,
        ScriptedServer() as server,
        Transport(1, 1, raft, config=made) as transport,
    ):
        assert raft.gate is not None
        transport.add_peer(PEER, [f"http://127.0.0.1:{refused}"])
        transport.add_peer(OTHER, [server.url])
        transport.send([message(to=PEER)])
        raft.wait_unreachable(1)
        transport.send([message(to=OTHER)])
        server.wait_requests(1)
        raft.gate.set()


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_no_descriptor_is_a_failure_like_another(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    channel: str,
    number: int,
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    with (
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=config(channel)) as transport,
    ):
        monkeypatch.setattr(module, "open_socket", refuse)
        transport.add_peer(PEER, [server.url])
        reason = outcome(channel, transport)
        assert reason == f"{HERE}:{server.port}: {os.strerror(number)}"
        monkeypatch.undo()
        if channel == "snapshot":
            monkeypatch.setattr(link_module.os, "eventfd", refuse)
            assert outcome(channel, transport) == f"no descriptor: {os.strerror(number)}"
            monkeypatch.undo()
        eventually(lambda: outcome(channel, transport) == "")
    assert "internal error" not in caplog.text


def test_no_thread_for_a_name_is_a_failure_like_another(
    names: Names, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("pipeline-resolve-"):
            raise RuntimeError("can't start new thread")
        real(thread)

    with (
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=config()) as transport,
    ):
        names.of["node.test"] = [(HERE, server.port)]
        transport.add_peer(PEER, ["http://node.test:2380"])
        monkeypatch.setattr(threading.Thread, "start", start)
        assert "can't start new thread" in outcome("message", transport)
        monkeypatch.setattr(threading.Thread, "start", real)
        assert outcome("message", transport) == ""
    assert "internal error" not in caplog.text


# Ends


@pytest.mark.parametrize("is_resolved", [False, True], ids=["a name", "a connect"])
@pytest.mark.parametrize("end", ["stop", "remove_peer", "cancel"])
def test_what_waits_for_a_dial_ends_at_once(names: Names, end: str, *, is_resolved: bool) -> None:
    raft = FakeRaft()
    with black_hole() as hole:
        gate = names.hang("gone.test")
        url = f"http://{HERE}:{hole}" if is_resolved else "http://gone.test:2380"
        transport = Transport(1, 1, raft, config=config(dial_timeout_s=LONG_TIMEOUT * 2))
        transport.start()
        transport.add_peer(PEER, [url])
        if end != "cancel":
            transport.send([message()])
        snapshot = transport.send_snapshot(message(MessageType.SNAP), b"x")
        waiting = 1 if end == "cancel" else 2
        eventually(lambda: len(transport._dispatcher.dialer._dials) == waiting)
        if end == "cancel":
            snapshot.cancel()
        elif end == "remove_peer":
            books = transport._peers[PEER].pipeline
            transport.remove_peer(PEER)
            eventually(lambda: books.stats().failed == 1)
        else:
            books = transport._peers[PEER].pipeline
            transport.stop()
            assert books.stats().failed == 1
        with pytest.raises(SnapshotCancelledError):
            snapshot.result(LONG_TIMEOUT)
        eventually(lambda: not transport._dispatcher.dialer._dials)
        transport.stop()
        gate.set()


def test_a_dial_that_is_cancelled_leaves_nothing_open(dialer: Dialer) -> None:
    with black_hole() as hole:
        before = open_descriptors()
        dial, is_done = dial_of(dialer, HERE, hole)
        eventually(lambda: bool(dial.attempts))
        dialer.cancel(dial)
        dialer.cancel(dial)
        assert is_done.wait(LONG_TIMEOUT)
        with pytest.raises(DialError, match="stopped"):
            dial.take()
        assert_all_closed(before)


def test_a_connection_that_nobody_wants_any_more_is_closed(dialer: Dialer) -> None:
    with ScriptedServer() as server:
        dial, is_done = dial_of(dialer, HERE, server.port)
        dial.discard()
        assert is_done.wait(LONG_TIMEOUT)
        server.wait_for(lambda: server.ended == 1)


def test_what_is_begun_after_the_end_ends_at_once(poller: Poller, dialer: Dialer) -> None:
    poller.stop(time.monotonic() + LONG_TIMEOUT)
    dial, is_done = dial_of(dialer, HERE, 1)
    assert is_done.is_set()
    with pytest.raises(DialError, match="stopped"):
        dial.take()


def be_late(poller: Poller) -> tuple[threading.Event, threading.Event]:
    """Keep the poller from its work: an event that says so, and one that ends it."""
    is_late, gate = threading.Event(), threading.Event()

    def wait() -> None:
        is_late.set()
        gate.wait(LONG_TIMEOUT)

    poller.ask(wait)
    return is_late, gate


def test_a_dial_answered_while_the_thread_was_late_has_not_failed(
    poller: Poller, dialer: Dialer
) -> None:
    with ScriptedServer() as server:
        _, first = be_late(poller)
        dial, is_done = dial_of(dialer, HERE, server.port)
        is_late, second = be_late(poller)  # behind the dial, in the same turn
        first.set()
        assert is_late.wait(LONG_TIMEOUT)
        server.wait_connections(1)
        assert not dial.is_done
        dial.deadline = time.monotonic()
        second.set()
        assert is_done.wait(LONG_TIMEOUT)
        dial.take().close()


def test_a_probe_answered_while_the_thread_was_late_is_no_loss() -> None:
    with (
        ScriptedServer() as server,
        Transport(1, 1, FakeRaft(), config=config("probe")) as transport,
    ):
        assert transport._prober is not None
        server.on_probe = lambda connection, request: server.hold(connection, request) and PROBED
        transport.add_peer(PEER, [server.url])
        server.wait_for(lambda: len(server.probes) == 1)
        target = transport._prober._targets[transport._peers[PEER].picker]
        is_late, gate = be_late(transport._dispatcher.poller)
        assert is_late.wait(LONG_TIMEOUT)
        server.release.set()
        assert select.select([target.connection.sock], [], [], LONG_TIMEOUT)[0]
        target.due = time.monotonic()
        gate.set()
        eventually(lambda: transport.probe_stats()[PEER].total >= 1)
        assert transport.probe_stats()[PEER].lost == 0


# Other copies of a descriptor


@contextlib.contextmanager
def open_connection(
    channel: str, server: ScriptedServer, transport: Transport
) -> Iterator[Callable[[], object]]:
    """Have a channel hold a connection; gives what ends it."""
    transport.add_peer(PEER, [server.url])
    if channel == "snapshot":
        server.script = server.hold
        snapshot = transport.send_snapshot(message(MessageType.SNAP), b"x")
        server.wait_requests(1)
        yield snapshot.cancel
    else:
        assert outcome(channel, transport) == ""
        yield transport.stop


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_the_peer_hears_of_a_close_whoever_has_a_copy(
    tmp_path: Path, channel: str, scheme: str
) -> None:
    """As a forked child has: to close one of two descriptors ends no connection."""
    authority = Authority(tmp_path)
    tls = authority.server() if scheme == "https" else None
    with (
        ScriptedServer(tls=tls) as server,
        Transport(1, 1, FakeRaft(), tls=authority.info(), config=config(channel)) as transport,
        open_connection(channel, server, transport) as end,
        copies_of_sockets(),
    ):
        end()
        server.release.set()
        server.wait_for(lambda: server.ended == len(server.connections))
