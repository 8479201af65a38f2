"""Probing (spec section 9): health and round trips of peers, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import pytest

from pipeline import ProbeStats, Transport, TransportConfig
from pipeline.send import probing as probing_module
from pipeline.wire.protocol import probe_head
from tests.support import LONG_TIMEOUT
from tests.support.logs import handler_that_raises
from tests.support.names import Names
from tests.support.raft import FakeRaft
from tests.support.senders import (
    FRAMINGS,
    INTERIMS,
    ParsedHeads,
    many_interims,
    message,
    unfinished,
)
from tests.support.server import (
    PROBED,
    Connection,
    Request,
    Script,
    ScriptedServer,
    always,
    answer,
    black_hole,
    close,
    in_turn,
    refused_port,
    reset,
    then_close,
)
from tests.support.waiting import eventually

QUICK = TransportConfig(probe_interval_s=0.01)


def prober(config: TransportConfig = QUICK) -> Transport:
    return Transport(1, 1, FakeRaft(), config=config)


def wait_probes(server: ScriptedServer, count: int) -> None:
    server.wait_for(lambda: len(server.probes) >= count)


def test_a_probe_is_etcd_s_request() -> None:
    with ScriptedServer() as server, prober() as transport:
        transport.add_peer(2, [server.url])
        wait_probes(server, 1)
        assert server.probes[0].head == probe_head(server.url)
        assert server.probes[0].line == "GET /raft/probing HTTP/1.1"
        assert server.probes[0].headers["Host"] == server.url.removeprefix("http://")


def test_a_healthy_peer_has_round_trips_on_one_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pipeline.send.probing")
    with ScriptedServer() as server, prober() as transport:
        transport.add_peer(2, [server.url])
        assert transport.probe_stats()[2] == ProbeStats()
        eventually(lambda: transport.probe_stats()[2].total >= 10)
        stats = transport.probe_stats()[2]
        assert (stats.is_healthy, stats.lost, stats.last_error) == (True, 0, "")
        assert stats.last_rtt_s is not None
        assert stats.last_rtt_s > 0
        assert 0 < stats.smoothed_rtt_s < LONG_TIMEOUT
        assert {request.connection for request in server.probes} == {0}
        assert transport.active_peers() == 0  # of no consequence for the status
    assert caplog.text.count("answers probes") == 1


def test_the_round_trip_is_smoothed_from_zero_as_tcp_does() -> None:
    told: list[float] = []
    with ScriptedServer() as server, prober() as transport:
        transport.add_peer(2, [server.url])
        seen = ProbeStats()
        while len(told) < 3:
            stats = transport.probe_stats()[2]
            if stats.total == seen.total + 1:
                assert stats.last_rtt_s is not None
                expected = 0.875 * seen.smoothed_rtt_s + 0.125 * stats.last_rtt_s
                assert stats.smoothed_rtt_s == pytest.approx(expected)
                told.append(stats.smoothed_rtt_s)
            seen = stats


def test_connecting_and_the_first_byte_are_timed_apart_from_the_round_trip() -> None:
    def in_two_pieces(connection: Connection, request: Request) -> None:
        connection.send(PROBED[:10])
        eventually(lambda: transport.probe_stats()[2].last_first_byte_s is not None)
        connection.send(PROBED[10:])

    with ScriptedServer() as server, prober() as transport:
        server.on_probe = in_two_pieces
        transport.add_peer(2, [server.url])
        eventually(lambda: transport.probe_stats()[2].total >= 1)
        stats = transport.probe_stats()[2]
        assert stats.last_dial_s is not None
        assert 0 < stats.last_dial_s < LONG_TIMEOUT
        assert stats.last_tls_s is None
        assert stats.last_first_byte_s is not None
        assert stats.last_rtt_s is not None
        assert 0 < stats.last_first_byte_s < stats.last_rtt_s
        server.on_probe = always(PROBED)
        eventually(lambda: transport.probe_stats()[2].total >= 5)
        assert transport.probe_stats()[2].last_dial_s == stats.last_dial_s  # one connection


def test_every_round_trip_is_in_the_histogram_and_a_loss_is_not() -> None:
    bad = answer("500 Oops")
    with ScriptedServer() as server, prober() as transport:
        assert transport._prober is not None
        server.on_probe = in_turn(PROBED, bad, PROBED, bad)
        transport.add_peer(2, [server.url])
        eventually(lambda: transport.probe_stats()[2].total >= 4)
        trips = transport._prober.round_trips()[2]
        assert sum(trips.counts) == 2
        assert 0 < trips.sum < LONG_TIMEOUT
        transport.update_peer(2, [server.url])  # a new URL is no new peer
        assert transport._prober.round_trips()[2].counts == trips.counts
        transport.remove_peer(2)
        assert transport._prober.round_trips() == {}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(always(answer("500 Oops")), "status 500", id="status"),
        pytest.param(always(answer("204 No Content")), "status 204", id="no content"),
        pytest.param(always(answer("200 OK", b'{"OK":false}')), "without OK", id="not OK"),
        pytest.param(always(answer("200 OK", b'{"OK":1}')), "without OK", id="1 is not true"),
        pytest.param(always(answer("200 OK", b"[" * 60000)), "without OK", id="deep"),
        pytest.param(always(answer("200 OK", b"[]")), "without OK", id="no object"),
        pytest.param(always(answer("200 OK", b"\xff{")), "without OK", id="no text"),
        pytest.param(always(b"SSH-2.0-\r\n\r\n"), "malformed", id="no HTTP"),
        pytest.param(then_close(b"HTTP/1.1 200 OK\r\n"), "incomplete", id="cut off"),
        pytest.param(close, "ended before an answer", id="closed"),
        pytest.param(reset, "reset", id="reset"),
    ],
)
def test_a_bad_answer_is_a_loss_and_told_once(
    script: Script, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer() as server, prober() as transport:
        server.on_probe = script
        transport.add_peer(2, [server.url])
        eventually(lambda: transport.probe_stats()[2].lost >= 3)
        stats = transport.probe_stats()[2]
        assert (stats.is_healthy, stats.last_rtt_s) == (False, None)
        assert stats.lost == stats.total
        assert reason in stats.last_error
    assert [r.levelname for r in caplog.records if "probe of" in r.message] == ["WARNING"]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_the_status_line_decides_although_the_body_does_not_come(framing: str) -> None:
    with ScriptedServer() as server, prober() as transport:
        server.on_probe = unfinished("500 Oops", framing)
        transport.add_peer(2, [server.url])
        eventually(lambda: transport.probe_stats()[2].total >= 1)
        assert transport.probe_stats()[2].last_error == "answered with status 500"


def test_interim_answers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = ParsedHeads(monkeypatch)
    config = TransportConfig(probe_interval_s=LONG_TIMEOUT)
    with ScriptedServer() as server, prober(config) as transport:
        assert transport._prober is not None
        server.on_probe = many_interims(PROBED)
        transport.add_peer(2, [server.url])
        transport._prober._targets[transport._peers[2].picker].due = 0.0  # now, and not again
        transport._dispatcher.poller.ask(lambda: None)
        eventually(lambda: transport.probe_stats()[2].total >= 1)
        assert transport.probe_stats()[2].is_healthy
    assert INTERIMS < parsed.count <= 2 * (INTERIMS + 1)


def test_health_comes_and_goes_and_each_change_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pipeline.send.probing")
    bad = answer("500 Oops")
    with ScriptedServer() as server, prober() as transport:
        server.on_probe = in_turn(PROBED, PROBED, bad, bad, PROBED)
        transport.add_peer(2, [server.url])
        eventually(lambda: transport.probe_stats()[2].total >= 6)
        stats = transport.probe_stats()[2]
        assert (stats.is_healthy, stats.lost, stats.last_error) == (True, 2, "")
    levels = [r.levelname for r in caplog.records if r.name == "pipeline.send.probing"]
    assert levels == ["INFO", "WARNING", "INFO"]


def test_a_connection_the_peer_closed_meanwhile_is_no_loss() -> None:
    with ScriptedServer() as server, prober() as transport:
        server.on_probe = in_turn(then_close(PROBED), PROBED, close, then_close(PROBED), PROBED)
        transport.add_peer(2, [server.url])
        eventually(lambda: transport.probe_stats()[2].total >= 6)
        assert transport.probe_stats()[2].lost == 0
        assert len(server.connections) >= 3


def test_the_next_url_is_tried_after_a_failure() -> None:
    with ScriptedServer() as server, refused_port() as port, prober() as transport:
        transport.add_peer(2, [f"http://127.0.0.1:{port}", server.url])
        eventually(lambda: transport.probe_stats()[2].is_healthy)
        assert transport.probe_stats()[2].lost <= 1


def test_all_addresses_of_a_name_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    with ScriptedServer() as server, refused_port() as port, prober() as transport:
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *args, **kwargs: [
                *real("127.0.0.1", port, type=socket.SOCK_STREAM),
                *real("127.0.0.1", server.port, type=socket.SOCK_STREAM),
            ],
        )
        transport.add_peer(2, ["http://two.example:2380"])
        eventually(lambda: transport.probe_stats()[2].is_healthy)
        assert transport.probe_stats()[2].lost == 0


def test_a_name_that_is_none_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch)
    names.of["nobody.invalid"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with prober() as transport:
        transport.add_peer(2, ["http://nobody.invalid:2380"])
        eventually(lambda: transport.probe_stats()[2].lost >= 1)
        assert "Name or service not known" in transport.probe_stats()[2].last_error


def test_dead_peers_delay_no_other() -> None:
    """One after the other, ten dead peers would take ten times what a probe may take."""
    with (
        ScriptedServer() as good,
        ScriptedServer() as silent,
        black_hole() as port,
        prober() as transport,
    ):
        silent.on_probe = silent.hold
        for peer in range(10, 15):
            transport.add_peer(peer, [f"http://127.0.0.1:{port}"])
            transport.add_peer(peer + 10, [silent.url])
        wait_probes(silent, 5)
        transport.add_peer(2, [good.url])
        eventually(lambda: transport.probe_stats()[2].total >= 10)
        dead = [stats for peer, stats in transport.probe_stats().items() if peer != 2]
        assert {stats.total for stats in dead} == {0}  # none was given up meanwhile


def test_what_does_not_answer_in_time_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing_module, "STEP_TIMEOUT_S", 0.02)
    with ScriptedServer() as silent, black_hole() as port, prober() as transport:
        silent.on_probe = silent.hold
        transport.add_peer(2, [f"http://127.0.0.1:{port}"])
        transport.add_peer(3, [silent.url])
        eventually(lambda: min(s.lost for s in transport.probe_stats().values()) >= 2)
        assert "no answer in" in transport.probe_stats()[3].last_error


def test_probing_follows_the_peers() -> None:
    with ScriptedServer() as old, ScriptedServer() as new, prober() as transport:
        transport.add_peer(2, [old.url])
        wait_probes(old, 2)
        transport.update_peer(2, [new.url])
        wait_probes(new, 2)
        old.wait_for(lambda: old.ended == 1)  # its connection was closed
        transport.add_remote(3, [old.url])  # remotes are not probed
        transport.remove_peer(2)
        assert transport.probe_stats() == {}
        new.wait_for(lambda: new.ended == 1)
        transport.add_peer(2, [new.url])
        transport.remove_all_peers()
        assert transport.probe_stats() == {}
        assert old.ended == len(old.connections)


def test_stop_ends_probes_under_way() -> None:
    with ScriptedServer() as silent, black_hole() as port:
        silent.on_probe = silent.hold
        transport = prober()
        transport.start()
        transport.add_peer(2, [f"http://127.0.0.1:{port}"])
        transport.add_peer(3, [silent.url])
        wait_probes(silent, 1)
        transport.stop()
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("pipeline-")])
        silent.release.set()
        silent.wait_for(lambda: silent.ended == 1)


def test_no_interval_is_no_probing() -> None:
    with ScriptedServer() as server, prober(TransportConfig(probe_interval_s=0)) as transport:
        transport.add_peer(2, [server.url])
        transport.update_peer(2, [server.url])
        transport.send([message()])
        server.wait_requests(1)
        assert transport.probe_stats() == {}
        transport.remove_peer(2)
        assert server.probes == []


@pytest.mark.parametrize(("interval_s", "first_s"), [(0.2, 0.2), (0.5, 0.2), (2.0, 0.4)])
def test_the_first_probe_comes_after_a_fifth_of_the_interval_or_soon(
    interval_s: float, first_s: float
) -> None:
    with (
        ScriptedServer() as server,
        prober(TransportConfig(probe_interval_s=interval_s)) as transport,
    ):
        assert transport._prober is not None
        begin = time.monotonic()
        transport.add_peer(2, [server.url])
        target = transport._prober._targets[transport._peers[2].picker]
        assert begin + first_s <= target.next_due <= time.monotonic() + first_s
        wait_probes(server, 1)
        assert time.monotonic() - begin >= first_s


def test_two_transports_answer_each_other_s_probes() -> None:
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(Transport(i, 7, FakeRaft(), config=QUICK)) for i in (1, 2))
        one.add_peer(2, [two.listen("http://127.0.0.1:0").url])
        two.add_peer(1, [one.listen("http://127.0.0.1:0").url])
        eventually(lambda: one.probe_stats()[2].total >= 3 and two.probe_stats()[1].total >= 3)
        assert one.probe_stats()[2].lost == two.probe_stats()[1].lost == 0


@pytest.mark.parametrize("log_error", [SystemExit, KeyboardInterrupt, RecursionError])
def test_the_prober_survives_a_log_handler_that_raises(log_error: type[BaseException]) -> None:
    bad = answer("500 Internal Server Error")
    with ScriptedServer() as server, prober() as transport:
        server.on_probe = in_turn(PROBED, bad, PROBED, bad, PROBED)
        transport.add_peer(2, [server.url])
        with handler_that_raises("", log_error) as handler:
            eventually(lambda: transport.probe_stats()[2].total >= 8)
        assert handler.raised > 0
