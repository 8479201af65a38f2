"""Pause, resume, cut_peer and mend_peer (spec 4.5), and calling the transport from callbacks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest

from pipeline import (
    Message,
    MessageType,
    PeerChange,
    PipelineConfig,
    SnapshotStatus,
    Transport,
    TransportConfig,
    UsageError,
)
from tests.support import LONG_TIMEOUT
from tests.support.http import post_heartbeat
from tests.support.raft import FakeRaft
from tests.support.senders import message
from tests.support.server import ScriptedServer, answer
from tests.support.waiting import eventually

ONE = TransportConfig(pipeline=PipelineConfig(connections=1))
NOWHERE = "http://127.0.0.1:1"


def test_transport_cut_mend() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        transport.add_peer(2, [server.url])
        transport.cut_peer(2)
        transport.send([message(), message()])
        transport.mend_peer(2)
        mended = [message(MessageType.PROP, b"a"), message(MessageType.APP, b"b")]
        transport.send(mended)
        got = server.wait_requests(2)
        assert [request.body for request in got] == [m.marshal() for m in mended]
        eventually(lambda: transport.stats()[2].sent == 2)


def test_what_is_dropped_while_paused_is_counted_and_told_to_nobody() -> None:
    raft = FakeRaft()
    with ScriptedServer() as server, Transport(1, 1, raft, config=ONE) as transport:
        transport.add_peer(2, [server.url])
        transport.add_peer(3, [server.url])
        transport.cut_peer(2)
        transport.send([message(), message(MessageType.SNAP), message(to=3)])
        server.wait_requests(1)
        stats = transport.peer_stats()
        assert (stats[2].is_paused, stats[2].paused_drops) == (True, 2)
        assert (stats[3].is_paused, stats[3].paused_drops) == (False, 0)
        assert transport.stats()[2].offered == 0
        assert (raft.unreachable, raft.snapshots) == ([], [])


def test_what_was_queued_before_a_pause_still_goes() -> None:
    with ScriptedServer() as server, Transport(1, 1, FakeRaft(), config=ONE) as transport:
        server.script = server.hold
        transport.add_peer(2, [server.url])
        transport.send([message()] * 5)
        server.wait_requests(1)
        transport.pause()
        server.release.set()
        server.wait_requests(5)


def test_what_a_paused_node_is_sent_still_reaches_it() -> None:
    raft = FakeRaft()
    with Transport(2, 0xCDF818194E3A8C32, raft) as transport:
        transport.add_peer(1, [NOWHERE])
        transport.pause()
        assert post_heartbeat(transport.listen("http://127.0.0.1:0").url).status == 204
        raft.wait_processed(1)


Step = Callable[[Transport], object]


@pytest.mark.parametrize(
    ("steps", "is_paused"),
    [
        pytest.param([lambda t: t.pause()], [True, True], id="pause takes all"),
        pytest.param([lambda t: t.cut_peer(2)], [True, False], id="cut takes one"),
        pytest.param(
            [lambda t: t.pause(), lambda t: t.pause(), lambda t: t.resume()],
            [False, False],
            id="paused twice, resumed once",
        ),
        pytest.param(
            [lambda t: t.cut_peer(2), lambda t: t.cut_peer(2), lambda t: t.mend_peer(2)],
            [False, False],
            id="cut twice, mended once",
        ),
        pytest.param(
            [lambda t: t.cut_peer(2), lambda t: t.resume()], [False, False], id="cut, resumed"
        ),
        pytest.param(
            [lambda t: t.pause(), lambda t: t.mend_peer(2)], [False, True], id="paused, one mended"
        ),
        pytest.param(
            [lambda t: t.resume(), lambda t: t.mend_peer(2)], [False, False], id="never paused"
        ),
        pytest.param(
            [lambda t: t.cut_peer(9), lambda t: t.mend_peer(9)], [False, False], id="unknown"
        ),
        pytest.param(
            [lambda t: t.cut_peer(4), lambda t: t.add_peer(4, [NOWHERE])],
            [False, False, False],
            id="cut before it is added",
        ),
        pytest.param(
            [lambda t: t.pause(), lambda t: t.add_peer(4, [NOWHERE])],
            [True, True, False],
            id="added while the others are paused",
        ),
        pytest.param(
            [lambda t: t.cut_peer(2), lambda t: t.add_peer(2, [NOWHERE])],
            [True, False],
            id="added again while it is cut",
        ),
        pytest.param(
            [lambda t: t.cut_peer(2), lambda t: t.update_peer(2, [NOWHERE])],
            [True, False],
            id="updated while it is cut",
        ),
        pytest.param(
            [
                lambda t: t.cut_peer(2),
                lambda t: t.remove_peer(2),
                lambda t: t.mend_peer(2),
                lambda t: t.add_peer(2, [NOWHERE]),
            ],
            [False, False],
            id="removed while it is cut, and added",
        ),
        pytest.param(
            [lambda t: t.pause(), lambda t: t.remove_all_peers(), lambda t: t.resume()],
            [],
            id="all removed while paused",
        ),
    ],
)
def test_each_peer_is_paused_or_not(steps: list[Step], is_paused: list[bool]) -> None:
    with Transport(1, 1, FakeRaft()) as transport:
        transport.add_peer(2, [NOWHERE])
        transport.add_peer(3, [NOWHERE])
        for step in steps:
            step(transport)
        stats = transport.peer_stats()
        assert [stats[peer].is_paused for peer in sorted(stats)] == is_paused


def test_a_paused_transport_stops() -> None:
    transport = Transport(1, 1, FakeRaft())
    for step in (transport.pause, transport.resume):
        step()  # there is nobody yet
    transport.start()
    transport.add_peer(2, [NOWHERE])
    transport.pause()
    transport.stop()
    for step in (transport.pause, transport.resume):
        step()
    transport.cut_peer(2)
    transport.mend_peer(2)
    assert transport.peer_stats() == {}


# Re-entrance: whatever a node calls from a callback returns, or says why not.

METHODS: dict[str, Step] = {
    "start": lambda t: t.start(),
    "stop": lambda t: t.stop(),
    "send": lambda t: t.send([message(to=3)]),
    "send to the same peer": lambda t: t.send([message(to=2)]),
    "send_snapshot": lambda t: t.send_snapshot(message(MessageType.SNAP, to=3), b"x"),
    "send_snapshot to the same peer": lambda t: t.send_snapshot(message(MessageType.SNAP), b"x"),
    "set_snapshot_rate_limit": lambda t: t.set_snapshot_rate_limit(1e6),
    "add_peer": lambda t: t.add_peer(4, [NOWHERE]),
    "add_remote": lambda t: t.add_remote(4, [NOWHERE]),
    "update_peer": lambda t: t.update_peer(2, [NOWHERE]),
    "remove_peer": lambda t: t.remove_peer(2),
    "remove_all_peers": lambda t: t.remove_all_peers(),
    "active_since": lambda t: t.active_since(2),
    "active_peers": lambda t: t.active_peers(),
    "stats": lambda t: t.stats(),
    "snapshot": lambda t: t.snapshot(),
    "peer_stats": lambda t: t.peer_stats(),
    "probe_stats": lambda t: t.probe_stats(),
    "remote_stats": lambda t: t.remote_stats(),
    "leader_stats": lambda t: t.leader_stats(),
    "server_stats": lambda t: t.server_stats(),
    "transport_stats": lambda t: t.transport_stats(),
    "follower_stats": lambda t: t.follower_stats(),
    "pause": lambda t: t.pause(),
    "resume": lambda t: t.resume(),
    "cut_peer": lambda t: t.cut_peer(2),
    "mend_peer": lambda t: t.mend_peer(2),
    "listen": lambda t: t.listen("http://127.0.0.1:0"),
    "snapshot_path": lambda t: t.snapshot_path(1),
    "metrics_collector": lambda t: t.metrics_collector(),
    "reload_tls": lambda t: t.reload_tls(),
    "certificate_expires_at": lambda t: t.certificate_expires_at,
    "asgi_app": lambda t: t.asgi_app,
    "wsgi_app": lambda t: t.wsgi_app,
}
CALLBACKS = (
    *("process", "report_unreachable", "report_snapshot"),
    *("on_critical_error", "on_peer_change"),
)
REFUSED = {"start", "snapshot_path"}  # with a UsageError: it was started; no snapshot_dir


class Calling(FakeRaft):
    """Calls ``method`` once, from the callback named ``callback``."""

    def __init__(self, callback: str, method: Step) -> None:
        super().__init__()
        self.transport: Transport | None = None
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._callback = callback
        self._method = method
        self._once = threading.Lock()

    def call(self, callback: str) -> None:
        if callback != self._callback or not self._once.acquire(blocking=False):
            return
        assert self.transport is not None
        try:
            self._method(self.transport)
        except BaseException as error:
            self.error = error
        self.done.set()

    def process(self, message: Message) -> None:
        self.call("process")

    def report_unreachable(self, member_id: int) -> None:
        self.call("report_unreachable")

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        self.call("report_snapshot")

    def on_critical_error(self, error: Exception) -> None:
        self.call("on_critical_error")

    def on_peer_change(self, change: PeerChange) -> None:
        self.call("on_peer_change")


def test_every_public_method_is_in_the_table() -> None:
    public = {name for name in dir(Transport) if not name.startswith("_")}
    assert public == {name.partition(" ")[0] for name in METHODS}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_called_from_a_callback_returns_or_is_refused(callback: str, method: str) -> None:
    raft = Calling(callback, METHODS[method])
    with (
        ScriptedServer(lambda *_: answer("403 Forbidden")) as bad,
        ScriptedServer() as good,
        # One dispatcher thread: what would wait for another one waits for ever.
        Transport(
            1,
            0xCDF818194E3A8C32,
            raft,
            config=TransportConfig(dispatchers=1, stop_timeout_s=0.2),
            on_critical_error=raft.on_critical_error,
            on_peer_change=raft.on_peer_change,
        ) as transport,
    ):
        raft.transport = transport
        transport.add_peer(2, [bad.url])
        transport.add_peer(3, [good.url])
        if callback == "process":
            url = transport.listen("http://127.0.0.1:0").url
            poster = threading.Thread(target=post_and_forget, args=(url,))
            poster.start()
        else:
            transport.send([message(MessageType.SNAP)])
        assert raft.done.wait(LONG_TIMEOUT), f"{method} does not return from {callback}"
        assert isinstance(raft.error, UsageError) == (method in REFUSED), raft.error
        assert raft.error is None or method in REFUSED
    if callback == "process":
        poster.join(LONG_TIMEOUT)
        assert not poster.is_alive()


def post_and_forget(url: str) -> None:
    """Post, whatever becomes of the connection: the listener may be closed meanwhile."""
    with contextlib.suppress(OSError):
        post_heartbeat(url)
