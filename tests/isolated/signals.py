"""A signal's handler at every line of every public method: ``signals.py KIND DIRECTORY [deep]``.

What runs in a handler is Python's main thread, between two instructions of whatever it was at. So
the method under test is traced, and at each line that it reaches, in the library and, if ``deep``,
in what the library calls, another method is called: no luck is needed to find a lock that is held,
or a state that is half made. Prints "ok"; a call that never returns is shown by a traceback.

Each method is played in a fresh world. The kinds of interruption are

- ``gentle``: at every line all methods that leave everything where it is;
- ``changes``: at every line those that add, remove and replace;
- ``stop``, ``Pipeline.stop``, ``Listener.close``: what ends it, at one line of each run;
- ``Ctrl-C``, at one line of each run. Then the method is called once more, if it ends something,
  and has to finish what it had begun;
- ``timer``: the methods in turn, by a timer, while the methods are called in turn.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import pipeline
from pipeline import (
    Message,
    MessageType,
    Pipeline,
    PipelineConfig,
    Snapshot,
    Transport,
    TransportConfig,
    URLPicker,
)
from pipeline.config import ReceiverConfig
from pipeline.errors import (
    MemberNotFoundError,
    PeerUnreachableError,
    PipelineError,
    SnapshotCancelledError,
    UsageError,
)
from pipeline.receive.listener import Listener
from pipeline.snapshot.sender import SnapshotTransfer
from tests.support.raft import FakeRaft
from tests.support.server import black_hole
from tests.support.tls import Authority
from tests.support.waiting import eventually

#: No call of these takes a second, but a busy machine takes some; what takes this long hangs.
HANG_S = 100.0
#: Whether Python's own lines, too, are places to be interrupted at, where that makes sense.
IS_DEEP = "deep" in sys.argv[3:]
#: Peers of a world: one that is there, one that does not answer, one that is added and removed, and
#: one that does not answer and was not sent anything.
THERE, SILENT, OTHER, LATE = 2, 3, 4, 5

Call = Callable[["World"], object]
Place = tuple[str, int, str, int]
PACKAGE = os.path.dirname(pipeline.__file__)

directory = Path(sys.argv[2])
logging.getLogger("pipeline").addHandler(logging.NullHandler())
logging.getLogger("pipeline").propagate = False

# One listener for all worlds: somebody has to answer.
answering = Transport(THERE, 1, FakeRaft(), config=TransportConfig(probe_interval_s=0))
answering.start()
THERE_URL = answering.listen("http://127.0.0.1:0").url
hole = black_hole()
SILENT_URL = f"http://127.0.0.1:{hole.__enter__()}"
authority = Authority(directory)
INFO = authority.info()


def append(to: int) -> Message:
    return Message(type=MessageType.APP, to=to, from_=1, term=1)


def snapshot(to: int) -> Message:
    return Message(type=MessageType.SNAP, to=to, from_=1, snapshot=Snapshot(data=b"x"))


class World:
    """A running transport with what is around it.

    ``about`` are the scene and the kind of interruption: what neither concerns is left out, unless
    the world is ``whole``.
    """

    def __init__(self, *about: str, is_whole: bool = False) -> None:
        self._about = None if is_whole else " ".join(about).lower()
        is_started = not any(scene in BEGINNING for scene in about)
        has_tls = "reload_tls" in about
        config = TransportConfig(
            probe_interval_s=60.0,
            pipeline=PipelineConfig(queue_length=4),
            receiver=ReceiverConfig(snapshot_dir=directory / "snapshots", handlers=2),
        )
        self.raft = FakeRaft()
        self.transport = Transport(
            1, 1, self.raft, config=config, tls=INFO if has_tls else None, on_critical_error=print
        )
        self.pipeline = Pipeline(THERE, [THERE_URL], self.raft, member_id=1, cluster_id=1)
        self.picker = URLPicker([SILENT_URL, THERE_URL])
        self.collector = self.transport.metrics_collector()
        self.is_other = False
        self.listeners: list[Listener] = []
        self.transfers: list[SnapshotTransfer] = []
        if is_started:
            self.start()

    def start(self) -> None:
        self.transport.start()
        self.transport.add_peer(THERE, [THERE_URL])
        if self._needs("remote", "cut", "send", "collect", "stop"):
            self.transport.add_remote(7, [THERE_URL])
        if self._needs("pipeline."):
            self.pipeline.start()
        if self._needs("listen", "collect"):
            self.listeners.append(self.transport.listen("http://127.0.0.1:0"))
        if self._needs("update", "snapshot", "transfers", "cancel", "result", "stop"):
            self.transport.add_peer(SILENT, [SILENT_URL])
            self.transport.add_peer(LATE, [SILENT_URL])
            self.send_snapshot(SILENT)

    def _needs(self, *words: str) -> bool:
        return self._about is None or any(word in self._about for word in words)

    # What is called, and interrupted.

    def send(self) -> None:
        self.transport.send([append(THERE), append(SILENT), append(OTHER), append(7)])

    def send_snapshot(self, to: int = LATE) -> None:
        self.transfers.append(self.transport.send_snapshot(snapshot(to), b"database"))

    def send_snapshot_to_nobody(self) -> None:
        self.transfers.append(self.transport.send_snapshot(snapshot(9), b"database"))

    def add_or_remove(self) -> None:
        """Change how many there are: what was being looked at has changed."""
        self.is_other = not self.is_other
        if self.is_other:
            self.transport.add_peer(OTHER, [THERE_URL])
        else:
            self.transport.remove_peer(OTHER)

    def add_and_remove(self) -> None:
        self.transport.add_peer(OTHER, [THERE_URL])
        self.transport.remove_peer(OTHER)

    def remove_all(self) -> None:
        self.transport.remove_all_peers()
        self.transport.add_peer(THERE, [THERE_URL])

    def listen(self) -> None:
        self.listeners.append(self.transport.listen("http://127.0.0.1:0"))

    def collect(self) -> None:
        assert list(self.collector.collect())

    def cancel(self) -> None:
        for transfer in (*self.transfers[:2], *self.transfers[-2:]):
            transfer.cancel()

    def result(self) -> None:
        for transfer in self.transfers[-1:]:
            with contextlib.suppress(PipelineError, TimeoutError):
                transfer.result(0.0)

    def look_at_transfers(self) -> None:
        for transfer in (*self.transfers[:2], *self.transfers[-2:]):
            transfer.done()
            assert transfer.progress.total_bytes
            transfer.add_done_callback(lambda _: None)

    def unreachable(self) -> None:
        self.picker.unreachable(self.picker.pick())
        self.picker.subscribe(lambda: None)

    def change_picker(self) -> None:
        self.picker.update([THERE_URL, SILENT_URL])
        assert self.picker.urls

    def status(self) -> None:
        peer = self.transport._peers.get(THERE)
        if peer is not None:
            peer.status.activate()
            peer.status.deactivate("pipeline", "write", "a reason", url=None)

    def close_last(self) -> None:
        while len(self.listeners) > 1:
            self.listeners.pop().close(0.2)

    def stop_pipeline(self) -> None:
        self.pipeline.stop()

    def stop(self) -> None:
        self.transport.stop()

    def close(self) -> None:
        for listener in self.listeners:
            listener.close(0.2)

    # Afterwards.

    def end(self) -> None:
        self.transport.stop()
        self.pipeline.stop()
        self.assert_stopped()
        for transfer in self.transfers:
            with contextlib.suppress(PipelineError):
                transfer.result(HANG_S)
        eventually(
            lambda: not any(map(is_ours, threading.enumerate())), "no thread is left", HANG_S / 2
        )

    def assert_stopped(self) -> None:
        """There is nothing left to be stopped, nor will there be."""
        assert not self.transport._peers
        assert not self.transport._live_peers, self.transport._live_peers
        assert not self.transport._listeners
        assert not self.transport._dispatcher.loop.senders
        remotes = self.transport._remotes
        assert not remotes._live
        assert not remotes._remotes
        for transfer in self.transfers:
            with contextlib.suppress(SnapshotCancelledError, MemberNotFoundError):
                try:
                    transfer.result(HANG_S / 2)
                except PeerUnreachableError as error:
                    if str(error) != "stopped":  # it began in the middle of the stop
                        raise
        with pytest.raises(UsageError, match="stopped"):
            self.transport.send([])


def is_ours(thread: threading.Thread) -> bool:
    return thread.name.startswith("pipeline-") and thread not in before


#: What leaves everything where it is.
GENTLE: dict[str, Call] = {
    "send": World.send,
    "send_snapshot": World.send_snapshot,
    "send_snapshot to nobody": World.send_snapshot_to_nobody,
    "pause": lambda w: (w.transport.pause(), w.send(), w.transport.resume()),
    "cut_peer": lambda w: (w.transport.cut_peer(7), w.send(), w.transport.mend_peer(7)),
    "active_since": lambda w: (w.transport.active_since(THERE), w.transport.active_peers()),
    "stats": lambda w: w.transport.stats(),
    "peer_stats": lambda w: w.transport.peer_stats(),
    "probe_stats": lambda w: w.transport.probe_stats(),
    "remote_stats": lambda w: w.transport.remote_stats(),
    "follower_stats": lambda w: (w.transport.follower_stats(), w.transport.leader_stats()),
    "server_stats": lambda w: w.transport.server_stats(),
    "set_snapshot_rate_limit": lambda w: w.transport.set_snapshot_rate_limit(1e12),
    "snapshot_path": lambda w: w.transport.snapshot_path(1),
    "apps": lambda w: (w.transport.asgi_app, w.transport.wsgi_app),
    "collect": World.collect,
    "cancel": World.cancel,
    "result": World.result,
    "transfers": World.look_at_transfers,
    "Listener.stats": lambda w: [
        (listener.stats(), listener.is_closed) for listener in w.listeners
    ],
    "Pipeline.send": lambda w: w.pipeline.send(append(THERE)),
    "Pipeline.stats": lambda w: (w.pipeline.stats(), w.pipeline.follower_stats()),
    "URLPicker.unreachable": World.unreachable,
    "PeerStatus": World.status,
    "reload_tls": lambda w: (w.transport.reload_tls(), w.transport.certificate_expires_at),
}
#: What replaces the objects that the interrupted call has in its hands.
CHANGING: dict[str, Call] = {
    "remove_all_peers": World.remove_all,
    "add_peer or remove_peer": World.add_or_remove,
    "update_peer": lambda w: w.transport.update_peer(SILENT, [SILENT_URL, THERE_URL]),
    "add_remote": lambda w: w.transport.add_remote(8, [THERE_URL]),
    "Pipeline.update": lambda w: w.pipeline.update([THERE_URL, SILENT_URL]),
    "URLPicker.update": World.change_picker,
}
#: Too dear to be called at every line of everything.
DEAR: dict[str, Call] = {
    "add_peer, remove_peer": World.add_and_remove,
    "listen": lambda w: (w.listen(), w.close_last()),
}
ENDING: dict[str, Call] = {
    "stop": World.stop,
    "Pipeline.stop": World.stop_pipeline,
    "Listener.close": World.close,
}
BEGINNING: dict[str, Call] = {
    "start": lambda w: w.transport.start(),
    "Pipeline.start": lambda w: w.pipeline.start(),
}


AT_EVERY_LINE = {"gentle": GENTLE, "changes": CHANGING}
#: What of the scenes' names concerns a class.
ABOUT = {"Pipeline": "Pipeline", "Listener": "isten"}


def ctrl_c(_: World) -> None:
    raise KeyboardInterrupt


class Interruption:
    """Calls at lines that the main thread reaches in a method.

    Parameters
    ----------
    world : World
    calls : dict of callables
        What is called at a line.
    seen : set
        The places where they were called before, in other runs, and are not called any more. A
        place is a line, be it Python's own, and the line of the library that led there.
    once : bool
        Whether they are called at the first new place only.
    is_deep : bool
        Whether Python's own lines are places, too.
    """

    def __init__(
        self,
        world: World,
        calls: dict[str, Call],
        seen: set[Place],
        *,
        once: bool = False,
        is_deep: bool = True,
    ) -> None:
        self.errors: list[str] = []
        self.count = 0
        self._world = world
        self.calls = calls
        self._seen = seen
        self._once = once
        self._is_deep = is_deep

    def run(self, method: Call) -> None:
        sys.settrace(self._trace)
        try:
            method(self._world)
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        is_own = name.startswith(PACKAGE)
        if name == __file__:
            return self._trace
        if not is_own and (not self._is_deep or "importlib" in name):
            return None
        if event == "line" and not (self._once and self.count):
            place = (name, frame.f_lineno, *_leads_to(frame))
            if place not in self._seen:
                self._seen.add(place)
                self.count += 1
                self._interrupt(f"{name}:{frame.f_lineno}")
        return self._trace

    def _interrupt(self, where: str) -> None:
        for name, call in self.calls.items():
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            try:
                call(self._world)
            except Exception as error:
                if not is_told(error):
                    self.errors.append(f"{name} at {where}: {error!r}")
            faulthandler.dump_traceback_later(HANG_S, exit=True)


def _leads_to(frame: FrameType) -> tuple[str, int]:
    """Return the line of the library that a frame of Python's own was called from."""
    at: FrameType | None = frame
    while at is not None and not at.f_code.co_filename.startswith(PACKAGE):
        at = at.f_back
    return ("", 0) if at is None else (at.f_code.co_filename, at.f_lineno)


def is_told(error: Exception) -> bool:
    """Tell whether a method says that it comes too late, or too early."""
    texts = ("stopped", "not started", "started once")
    return isinstance(error, UsageError) and any(text in str(error) for text in texts)


def play(scene: str, interruption: Interruption, world: World) -> None:
    """Run a scene with interruptions, and see its world to an end that leaves nothing."""
    method = SCENES[scene]
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        interruption.run(method)
    except KeyboardInterrupt:
        if scene in ENDING:
            method(world)  # has to finish what it had begun
    except UsageError as error:
        if not is_told(error):
            raise
    try:
        if interruption.count and "stop" in interruption.calls:
            world.assert_stopped()
        world.end()
    except AssertionError:
        print(f"after {scene}:", file=sys.stderr)
        raise
    faulthandler.cancel_dump_traceback_later()
    assert not interruption.errors, "\n".join(interruption.errors)


def play_by_the_clock(seconds: float) -> int:
    """Be interrupted by a timer, wherever it finds us; how often that was."""
    world = World(is_whole=True)
    everything = (*GENTLE.values(), *CHANGING.values(), *DEAR.values())
    calls = itertools.cycle(everything)
    count = depth = 0

    def handle(*_: object) -> None:
        nonlocal count, depth
        if depth < 2:  # a handler is interrupted as well
            count += 1
            depth += 1
            try:
                next(calls)(world)
            except UsageError as error:
                if not is_told(error):
                    raise
            depth -= 1

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    end = time.monotonic() + seconds
    faulthandler.dump_traceback_later(seconds + HANG_S, exit=True)
    while time.monotonic() < end:
        for call in everything:
            call(world)
    world.stop()
    signal.setitimer(signal.ITIMER_REAL, 0)
    world.end()
    return count


def play_all(kind: str, scenes: list[str]) -> int:
    """Play scenes with what ``kind`` names at their lines; at how many places that was."""
    seen: set[Place] = set()
    for scene in scenes:
        while True:
            world = World(scene, kind, is_whole=kind in AT_EVERY_LINE)
            if kind in AT_EVERY_LINE:
                interruption = Interruption(world, AT_EVERY_LINE[kind], seen, is_deep=IS_DEEP)
            else:
                calls = {kind: ENDING.get(kind, ctrl_c)}
                # Python's own classes are not made for Ctrl-C at any line of theirs.
                is_deep = IS_DEEP and (kind != "Ctrl-C" or scene in ENDING)
                interruption = Interruption(world, calls, seen, once=True, is_deep=is_deep)
            play(scene, interruption, world)
            if kind in AT_EVERY_LINE or interruption.count == 0:
                break
    return len(seen)


SCENES = {**GENTLE, **CHANGING, **DEAR, **ENDING, **BEGINNING}
before = set(threading.enumerate())

if __name__ == "__main__":
    warm = World(is_whole=True)
    for call in (*GENTLE.values(), *CHANGING.values(), *DEAR.values()):
        call(warm)  # what is imported when it is first used is imported now
    warm.end()
    # What ends a thing of its own can meet nothing but what that thing does.
    kind = sys.argv[1]
    if kind == "timer":
        count = play_by_the_clock(3.0)
    else:
        about = ABOUT.get(kind.partition(".")[0], "") if "." in kind else ""
        count = play_all(kind, [scene for scene in SCENES if about in scene])
    assert count > 0
    answering.stop()
    print("ok", flush=True)
