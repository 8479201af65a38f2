"""Every argument of every public call: what it may not be is told by its name, and nothing else
happens. The tables have a row for each parameter; a parameter without one fails a test."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import (
    EncodedMessage,
    Inbox,
    MarshalError,
    Message,
    MessageType,
    PeerStatus,
    Pipeline,
    PipelineConfig,
    ReceiverConfig,
    RequestRejected,
    TLSInfo,
    Transport,
    TransportConfig,
    URLPicker,
    UsageError,
    aio,
)
from pipeline._core import ActiveFlag
from pipeline.logs import show
from tests.support import LONG_TIMEOUT
from tests.support.raft import FakeRaft
from tests.support.senders import CLUSTER, message
from tests.support.tls import Authority

URL = "http://127.0.0.1:1"
NAN, INF = math.nan, math.inf


class Rude:
    """Raises whatever is asked of it."""

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __index__(self) -> int:
        raise RuntimeError("index")

    def __fspath__(self) -> str:
        raise RuntimeError("fspath")


NOT_AN_ID = (None, "2", b"2", 2.0, True, -1, 1 << 64, NAN, [2], Rude())
NOT_URLS: tuple[object, ...] = (
    None,
    5,
    URL,
    URL.encode(),
    [],
    [None],
    [b"http://h:1"],
    ["h:1"],
    ["http://h"],
    Rude(),
)
NOT_A_LIST_OF_URLS = tuple(bad for bad in NOT_URLS if bad != [])
NOT_A_BOOL = (None, 0, 1, "yes", Rude())
NOT_A_TIME = ("1", True, False, -1.0, NAN, INF, 1e9, [1.0], Rude())
NOT_A_COUNT = (None, "1", 1.0, True, -1, 1 << 70, NAN, Rude())
NOT_A_PATH = ("", b"", "a\0b", 5, True, ["f"], Rude())
NOT_A_VERSION = ("", "3.5", "v3.5.0", "3.5.x", "3.05.0", "3.5.0\r\nX: 1", 3.5, b"3.5.0", Rude())
NOT_A_TUPLE_OF_NAMES = ("cn", ["cn"], ("",), (None,), 5, None, Rude())
NOT_MESSAGES = (
    *(None, 5, message(), [None], [b"bytes"], ["text"], [Rude()], [object]),
    *([SimpleNamespace(to="x")], [SimpleNamespace(to=[2])], [SimpleNamespace(to=None)]),
)
NOT_CALLABLE = ("yes", 5, True, Rude())
NOT_A_RAFT = (None, *NOT_CALLABLE, object())
NOT_CONFIG: tuple[object, ...] = ({}, {"queue_bytes": 1}, "config", 5, True, PipelineConfig, Rude())

NOT_AN_INBOX = ("inbox", 5, True, [], Inbox, Rude())

Table = dict[str, tuple[object, ...]]  # by parameter, what it may not be


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Spare the collector what was there before: it is asked for some five hundred times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def complaint(
    call: Callable[[], object], name: str, error: type[Exception] = UsageError
) -> str | None:
    """Tell what is wrong with how a call refuses an argument; None if nothing is."""
    try:
        call()
    except error as refusal:
        text = str(refusal)
        if type(refusal) is not error or len(text) > 500:
            return f"{type(refusal)} of {len(text)} characters"
        # The argument's name, or in a message the field's dotted one.
        return None if text.partition(":")[0].split(".")[-1] == name else text
    except BaseException as failure:
        return repr(failure)
    return "accepted"


def complaints(
    call: Callable[[object], object],
    name: str,
    values: Iterable[object],
    error: type[Exception] = UsageError,
) -> list[tuple[str, str]]:
    """Tell which values are not refused as they should be, and what was left behind."""
    gc.collect()
    files, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    found = [(show(v), complaint(lambda v=v: call(v), name, error)) for v in values]  # type: ignore[misc]
    gc.collect()
    left = (set(threading.enumerate()) - threads) | (set(os.listdir("/proc/self/fd")) - files)
    return [(value, text) for value, text in found if text] + [("left", str(it)) for it in left]


# Constructors


def pipeline(**given: Any) -> object:
    arguments = {"peer_id": 2, "urls": [URL], "raft": FakeRaft(), "member_id": 1}
    return Pipeline(**{**arguments, "cluster_id": CLUSTER, **given})


def transport(**given: Any) -> object:
    return Transport(**{"member_id": 1, "cluster_id": CLUSTER, "raft": FakeRaft(), **given})


def aio_transport(**given: Any) -> object:
    return aio.Transport(**{"member_id": 1, "cluster_id": CLUSTER, "raft": FakeRaft(), **given})


def tls_info(**given: Any) -> object:
    return TLSInfo(**{"cert_file": "c", "key_file": "k", "trusted_ca_file": "t", **given})


def rejected(**given: Any) -> object:
    return RequestRejected(**{"status": 503, **given})


def peer_status(**given: Any) -> object:
    return PeerStatus(**{"member_id": 1, "peer_id": 2, "flag": ActiveFlag(), **given})


OF_A_TRANSPORT: Table = {
    "raft": NOT_A_RAFT,
    "on_critical_error": NOT_CALLABLE,
    "on_peer_change": NOT_CALLABLE,
    "remote_policy": NOT_CALLABLE,
    "member_id": NOT_AN_ID,
    "cluster_id": NOT_AN_ID,
    "peer_urls": NOT_A_LIST_OF_URLS,
    "tls": NOT_CONFIG,
    "config": NOT_CONFIG,
    "allow_loopback_remotes": NOT_A_BOOL,
    "inbox": NOT_AN_INBOX,
}
OF_AN_INBOX: Table = {
    "max_messages": (*NOT_A_COUNT, 0),
    "max_bytes": (*NOT_A_COUNT, 0),
    "encoded": NOT_A_BOOL,
}
CONSTRUCTORS: dict[Callable[..., object], tuple[type, Table]] = {
    transport: (Transport, OF_A_TRANSPORT),
    Inbox: (Inbox, OF_AN_INBOX),
    aio.Inbox: (aio.Inbox, OF_AN_INBOX),
    aio_transport: (
        aio.Transport,
        {**OF_A_TRANSPORT, "inbox": (*NOT_AN_INBOX, Inbox())},
    ),
    pipeline: (
        Pipeline,
        {
            "peer_id": NOT_AN_ID,
            "urls": NOT_URLS,
            "raft": NOT_A_RAFT,
            "on_critical_error": NOT_CALLABLE,
            "member_id": NOT_AN_ID,
            "cluster_id": NOT_AN_ID,
            "config": NOT_CONFIG,
            "peer_urls": NOT_A_LIST_OF_URLS,
            "server_version": NOT_A_VERSION,
            "min_cluster_version": (*NOT_A_VERSION, None, "3.9.0"),
            "credentials": NOT_CONFIG,
            "picker": NOT_CONFIG,
            "status": NOT_CONFIG,
        },
    ),
    URLPicker: (URLPicker, {"urls": NOT_URLS}),
    peer_status: (PeerStatus, {"member_id": NOT_AN_ID, "peer_id": NOT_AN_ID}),
    tls_info: (
        TLSInfo,
        {
            "cert_file": (None, *NOT_A_PATH),
            "key_file": (None, *NOT_A_PATH),
            "trusted_ca_file": (None, *NOT_A_PATH),
            "client_cert_auth": NOT_A_BOOL,
            "allowed_cn": NOT_A_TUPLE_OF_NAMES,
            "allowed_hostnames": NOT_A_TUPLE_OF_NAMES,
            "allowed_uris": NOT_A_TUPLE_OF_NAMES,
            "crl_file": NOT_A_PATH,
            "server_name": ("", 5, b"name", True, "a\0b", Rude()),
            "min_version": (None, 1.2, "1.1", "TLSv1.2", ["1.2"], Rude()),
            "allow_member": ("yes", 5, True),
        },
    ),
    rejected: (
        RequestRejected,
        {
            "status": (None, "503", 503.0, True, 199, 600, -1, 1 << 70, NAN, Rude()),
            "body": (None, "text", bytearray(1), 5, Rude()),
            "content_type": (None, b"text/plain", "a\r\nb", "\u00e9", 5, Rude()),
        },
    ),
    PipelineConfig: (
        PipelineConfig,
        {
            "connections": (*NOT_A_COUNT, 0, 65),
            "queue_length": (*NOT_A_COUNT, 0, (1 << 16) + 1),
            "queue_bytes": (*NOT_A_COUNT, 0),
            "profile": (None, 3.5, "3.4", "", ["3.5"], Rude()),
            "dial_timeout_s": (*NOT_A_TIME, None, 0),
            "response_timeout_s": (*NOT_A_TIME, None, 0),
            "stall_timeout_s": (*NOT_A_TIME, None, 0),
            "idle_timeout_s": (*NOT_A_TIME, None, 0),
            "dead_link_timeout_s": (*NOT_A_TIME, None, 0, 0.5),
            "max_queue_age": (*NOT_A_TIME, 1e-9),
            "unreachable_reports": (None, "", "never", True, ["every"], Rude()),
        },
    ),
    ReceiverConfig: (
        ReceiverConfig,
        {
            "max_body_bytes": (*NOT_A_COUNT, 0),
            "max_head_bytes": (*NOT_A_COUNT, 255, 1 << 16),
            "handlers": (*NOT_A_COUNT, 0, 257),
            "max_connections": (*NOT_A_COUNT, 0),
            "encoded": NOT_A_BOOL,
            "max_buffered_bytes": (*NOT_A_COUNT, 0),
            "idle_timeout_s": (*NOT_A_TIME, None, 0),
            "head_timeout_s": (*NOT_A_TIME, None, 0),
            "stall_timeout_s": (*NOT_A_TIME, None, 0),
            "min_body_rate": NOT_A_COUNT,
            "handshake_timeout_s": (*NOT_A_TIME, None, 0),
            "snapshot_dir": NOT_A_PATH,
            "snapshot_receives": (*NOT_A_COUNT, 0, 65),
            "snapshot_max_bytes": ("1", 1.0, True, -1, 0, 1 << 70, NAN, Rude()),
            "snapshot_dir_max_bytes": ("1", 1.0, True, -1, 0, 1 << 70, NAN, Rude()),
        },
    ),
    TransportConfig: (
        TransportConfig,
        {
            "pipeline": (None, *NOT_CONFIG, ReceiverConfig()),
            "receiver": (None, *NOT_CONFIG, PipelineConfig()),
            "streams": NOT_A_BOOL,
            "stream_queue_length": (*NOT_A_COUNT, 0, 1 << 17),
            "queue_bytes": (*NOT_A_COUNT, 0),
            "server_version": (None, *NOT_A_VERSION),
            "min_cluster_version": (None, *NOT_A_VERSION, "3.9.0"),
            "dispatchers": (*NOT_A_COUNT, 0, 257),
            "probe_interval_s": (*NOT_A_TIME, None, 1e-9),
            "snapshot_rate_limit": ("1", True, False, 0, 0.5, -1, NAN, INF, [1], Rude()),
            "snapshot_answer_timeout_s": (*NOT_A_TIME, None, 0),
            "stop_timeout_s": (*NOT_A_TIME, None, 0),
        },
    ),
}
FLAGS = {"flag"}  # is judged by what reads it


def parameters(function: Callable[..., object]) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name != "self"} - FLAGS


@pytest.mark.parametrize("make", CONSTRUCTORS)
def test_every_parameter_of_a_constructor_has_a_row(make: Callable[..., object]) -> None:
    kind, table = CONSTRUCTORS[make]
    wanted = parameters(kind)
    if dataclasses.is_dataclass(kind):
        wanted = {field.name for field in dataclasses.fields(kind)}
    assert table.keys() == wanted


@pytest.mark.parametrize(
    ("make", "name"), [(make, name) for make, (_, table) in CONSTRUCTORS.items() for name in table]
)
def test_a_constructor_refuses(make: Callable[..., object], name: str) -> None:
    values = CONSTRUCTORS[make][1][name]
    assert complaints(lambda value: make(**{name: value}), name, values) == []


def test_contradicting_settings_name_the_one_to_change() -> None:
    with pytest.raises(UsageError, match=r"^trusted_ca_file: "):
        TLSInfo(cert_file="c", key_file="k")
    with pytest.raises(UsageError, match=r"^allow_member: "):
        TLSInfo(cert_file="c", key_file="k", client_cert_auth=False, allow_member=lambda *_: True)


def test_a_transport_whose_tls_files_are_missing_leaves_nothing_behind(tmp_path: Path) -> None:
    info = TLSInfo(cert_file=tmp_path / "c", key_file=tmp_path / "k", client_cert_auth=False)
    assert complaints(lambda tls: transport(tls=tls), "tls", [info]) == []


# Methods

SNAP = Message(type=MessageType.SNAP, to=2)
NOT_A_SNAP = (None, 5, "snap", message(to=2), Message(type=MessageType.SNAP), [SNAP], Rude())
NOT_A_SOURCE = (None, 5, 1.5, "a\0b", "", object(), Rude())
METHODS: dict[str, Table] = {
    "send": {"messages": NOT_MESSAGES},
    "send_snapshot": {
        "message": NOT_A_SNAP,
        "source": NOT_A_SOURCE,
        "size": ("1", 1.0, True, -1, 1 << 63, NAN, Rude()),
        "on_progress": NOT_CALLABLE,
    },
    "set_snapshot_rate_limit": {"rate": ("1", True, 0, 0.5, -1, NAN, INF, [1], Rude())},
    "add_peer": {"peer_id": NOT_AN_ID, "urls": NOT_URLS},
    "add_remote": {"member_id": NOT_AN_ID, "urls": NOT_URLS},
    "update_peer": {"peer_id": NOT_AN_ID, "urls": NOT_URLS},
    "remove_peer": {"peer_id": NOT_AN_ID},
    "cut_peer": {"peer_id": NOT_AN_ID},
    "mend_peer": {"peer_id": NOT_AN_ID},
    "active_since": {"peer_id": NOT_AN_ID},
    "metrics_collector": {"received_failures_by_address": NOT_A_BOOL},
    "listen": {"url": (5, b"http://h:1", "h:1", "", [], [None], [5], ["http://h"], Rude())},
    "snapshot_path": {"index": NOT_AN_ID},
}
VALID: dict[str, object] = {
    "peer_id": 3,
    "member_id": 4,
    "urls": [URL],
    "message": SNAP,
    "source": b"",
}


def given(method: Callable[..., object], name: str, value: object) -> dict[str, object]:
    """Make arguments of which only one is wrong."""
    return {k: v for k, v in VALID.items() if k in parameters(method)} | {name: value}


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}


def test_every_parameter_of_a_method_has_a_row() -> None:
    of_methods = {name: parameters(getattr(Transport, name)) for name in public(Transport)}
    assert {name: table.keys() for name, table in METHODS.items()} == {
        name: wanted for name, wanted in of_methods.items() if wanted
    }
    for name in METHODS.keys() & public(aio.Transport):
        assert parameters(getattr(aio.Transport, name)) == of_methods[name]


@pytest.fixture(scope="module")
def running() -> Iterator[Transport]:
    config = TransportConfig(probe_interval_s=0)
    with Transport(1, CLUSTER, FakeRaft(), config=config) as transport:
        transport.add_peer(2, [URL])
        yield transport


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, table in METHODS.items() for name in table]
)
def test_a_method_refuses(running: Transport, method: str, name: str) -> None:
    call = getattr(running, method)
    values = METHODS[method][name]
    assert complaints(lambda value: call(**given(call, name, value)), name, values) == []
    assert set(running.stats()) == {2}
    assert running.remote_stats() == {}
    assert running._listeners == []


def test_the_methods_of_a_transport_on_a_loop_refuse_the_same() -> None:
    async def complaint_of(call: Callable[..., Any], arguments: Any, name: str) -> str | None:
        try:
            result = call(**arguments)
            if inspect.isawaitable(result):
                await result
        except UsageError as refusal:
            return None if str(refusal).startswith(f"{name}: ") else str(refusal)
        except BaseException as failure:
            return repr(failure)
        return "accepted"

    async def run() -> list[tuple[str, str, str]]:
        found = []
        config = TransportConfig(probe_interval_s=0)
        async with aio.Transport(1, CLUSTER, FakeRaft(), config=config) as transport:
            for method in METHODS.keys() & public(aio.Transport):
                call = getattr(transport, method)
                for name, value in [(k, v) for k, bad in METHODS[method].items() for v in bad]:
                    text = await complaint_of(call, given(call, name, value), name)
                    found.append((f"{method}({name})", show(value), text))
        return [(call, value, text) for call, value, text in found if text]

    assert asyncio.run(run()) == []


def test_the_methods_of_a_pipeline_refuse() -> None:
    not_a_message = (None, 5, "text", b"", [message()], Rude())
    with Pipeline(2, [URL], FakeRaft(), member_id=1, cluster_id=CLUSTER) as pipeline:
        assert complaints(pipeline.update, "urls", NOT_URLS) == []  # type: ignore[arg-type]
        assert complaints(pipeline.picker.update, "urls", NOT_URLS) == []  # type: ignore[arg-type]
        assert complaints(pipeline.send, "message", not_a_message) == []  # type: ignore[arg-type]
        assert pipeline.picker.urls == (URL,)
        assert pipeline.stats().offered == 0


def test_the_deadline_of_a_listener_is_a_time(running: Transport) -> None:
    listener = running.listen("http://127.0.0.1:0")
    bad = ("1", None, True, -1, NAN, INF, [1], Rude())
    assert complaints(listener.close, "deadline_s", bad) == []  # type: ignore[arg-type]
    assert not listener.is_closed
    listener.close()


def test_the_time_to_wait_for_a_snapshot_is_a_time(running: Transport) -> None:
    transfer = running.send_snapshot(Message(type=MessageType.SNAP, to=9), b"")
    bad = ("1", True, -1, NAN, INF, [1], Rude())
    assert complaints(transfer.result, "timeout", bad) == []  # type: ignore[arg-type]


# Messages. Of Message and its parts tests/unit/test_messages.py has the rows.

NOT_A_TYPE = (None, "APP", 3.0, True, 1 << 31, -(1 << 31) - 1, [3], Rude())


def strided() -> memoryview:
    return memoryview(b"abcdef")[::2]


def released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


ENCODED = {
    "data": (None, "text", 5, [1], Rude(), strided(), memoryview(b"abc")[::-1], released()),
    "type": NOT_A_TYPE,
    "to": NOT_AN_ID,
    "from_": NOT_AN_ID,
    "term": NOT_AN_ID,
}


@pytest.mark.parametrize("name", ENCODED)
def test_an_encoded_message_refuses(name: str) -> None:
    def make(value: Any) -> EncodedMessage:
        return EncodedMessage(**{"data": b"", "type": 3, "to": 2, name: value})

    assert complaints(make, name, ENCODED[name], MarshalError) == []


GOOD_TYPES = (0, 3, MessageType.SNAP, 23, 1000, -1, (1 << 31) - 1, -(1 << 31))


@pytest.mark.parametrize(
    ("is_good", "values"), [(True, GOOD_TYPES), (False, NOT_A_TYPE)], ids=["good", "bad"]
)
def test_message_and_encoded_message_judge_a_type_by_one_rule(
    is_good: bool, values: tuple[Any, ...]
) -> None:
    def judge(make: Callable[[], Message | EncodedMessage]) -> int | None:
        try:
            return int(make().type)
        except MarshalError:
            return None

    for value in values:
        wanted = int(value) if is_good else None
        assert judge(lambda: EncodedMessage(b"", type=value, to=2)) == wanted  # noqa: B023
        assert judge(lambda: Message(type=value, to=2)) == wanted  # noqa: B023


# Paths


class Odd(os.PathLike[bytes]):
    """A path that is bytes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return self.path.encode()


@pytest.mark.parametrize("kind", [str, str.encode, Path, Odd], ids=lambda kind: kind.__name__)
def test_a_relative_path_is_made_absolute_when_it_is_given(
    kind: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links and ``..`` are left: what they mean is decided by the file system."""
    monkeypatch.chdir(tmp_path)
    given = kind("a/../b")
    info = TLSInfo(cert_file=given, key_file=given, trusted_ca_file=given, crl_file=given)
    wanted = str(tmp_path / "a/../b")
    assert (info.cert_file, info.key_file, info.trusted_ca_file, info.crl_file) == (wanted,) * 4
    assert ReceiverConfig(snapshot_dir=given).snapshot_dir == wanted
    absolute = kind(str(tmp_path / "c"))
    assert ReceiverConfig(snapshot_dir=absolute).snapshot_dir == str(tmp_path / "c")


def test_a_relative_path_without_a_current_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match=r"^snapshot_dir: 's' is relative, and there is no"):
        ReceiverConfig(snapshot_dir="s")


def test_a_node_goes_on_after_its_process_has_changed_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As daemons do, after they have read their settings."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("node")
    (tmp_path / "database").write_bytes(b"database")
    monkeypatch.chdir(tmp_path)
    ours = TLSInfo(cert_file=cert.name, key_file=Path(key.name), trusted_ca_file=b"ca.pem")
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir="snapshots"))
    raft = FakeRaft()
    with (
        Transport(1, CLUSTER, FakeRaft(), tls=ours) as one,
        Transport(2, CLUSTER, raft, tls=ours, config=config) as two,
    ):
        one.add_peer(2, [two.listen("https://127.0.0.1:0").url])
        transfer = one.send_snapshot(SNAP, "database")
        monkeypatch.chdir("/")
        assert one.reload_tls()
        transfer.result(LONG_TIMEOUT)
        assert two.snapshot_path(0) == tmp_path / "snapshots" / f"{0:016x}.snap.db"
