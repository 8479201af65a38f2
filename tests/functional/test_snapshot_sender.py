"""Snapshots sent by the channel: exact bytes, outcomes, order of side effects, every way to end."""

from __future__ import annotations

import array
import ctypes
import errno
import gzip
import io
import itertools
import mmap
import os
import select
import socket
import struct
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from pipeline import (
    EncodedMessage,
    IncompatibleVersionError,
    InternalError,
    MemberNotFoundError,
    MemberRemovedError,
    Message,
    MessageType,
    PeerUnreachableError,
    PipelineConfig,
    ReceiverConfig,
    Snapshot,
    SnapshotCancelledError,
    SnapshotMetadata,
    SnapshotProgress,
    SnapshotSourceError,
    SnapshotStatus,
    SnapshotTransfer,
    TLSInfo,
    Transport,
    TransportConfig,
    UnexpectedStatusError,
    UsageError,
)
from pipeline.snapshot import sender as module
from pipeline.snapshot.link import SnapshotLink
from pipeline.snapshot.sender import RateLimiter
from pipeline.wire.odd_answer import PeerAnswer
from tests.support import LONG_TIMEOUT, MIB
from tests.support.callbacks import Unawaited
from tests.support.descriptors import assert_all_closed, open_descriptors
from tests.support.logs import handler_that_raises
from tests.support.memory import rss
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
    ERROR,
    OK,
    Connection,
    Request,
    Script,
    ScriptedServer,
    always,
    answer,
    black_hole,
    close,
    refused_port,
    reset,
    then_close,
)
from tests.support.tls import Authority
from tests.support.waiting import eventually

MEMBER, PEER, CLUSTER = 1, 2, 0xCDF818194E3A8C32
NO_PROBES = TransportConfig(probe_interval_s=0)


def snapshot_message(to: int = PEER, index: int = 1000) -> Message:
    metadata = SnapshotMetadata(index=index, term=1)
    return Message(
        type=MessageType.SNAP, to=to, from_=MEMBER, term=1, snapshot=Snapshot(metadata=metadata)
    )


def body_of(message: Message, database: bytes) -> bytes:
    """The body as spec 7.2 draws it."""
    encoded = message.marshal()
    return struct.pack(">Q", len(encoded)) + encoded + database


class Closing:
    """Chunks that can be closed, and raise where they are told to."""

    def __init__(self, *chunks: object) -> None:
        self._chunks = iter(chunks)
        self.closed = threading.Event()
        self.close_error: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        chunk = next(self._chunks)
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk

    def close(self) -> None:
        self.closed.set()
        if self.close_error is not None:
            raise self.close_error


class Order(FakeRaft):
    """Notes what is called in one list, the peer's status and picker with it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def watch(self, transport: Transport) -> None:
        peer = transport._peers[PEER]
        for thing, name in (
            (peer.status, "activate"),
            (peer.status, "deactivate"),
            (peer.picker, "unreachable"),
        ):
            setattr(thing, name, self._noting(name, getattr(thing, name)))

    def _noting(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        def noting(*args: object, **named: object) -> None:
            arguments = ", ".join(map(str, args))
            self.calls.append(f"{name}({arguments})")
            method(*args, **named)

        return noting

    def report_unreachable(self, member_id: int) -> None:
        self.calls.append(f"report_unreachable({member_id})")
        super().report_unreachable(member_id)

    def report_snapshot(self, member_id: int, status: SnapshotStatus) -> None:
        self.calls.append(f"report_snapshot({member_id}, {status.name})")
        super().report_snapshot(member_id, status)


@pytest.fixture
def raft() -> FakeRaft:
    return FakeRaft()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def info(authority: Authority) -> TLSInfo:
    return authority.info()


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest, authority: Authority) -> Iterator[ScriptedServer]:
    tls = authority.server() if request.param == "https" else None
    with ScriptedServer(tls=tls) as server:
        yield server


Make = Callable[..., Transport]


@pytest.fixture
def make(info: TLSInfo) -> Make:
    """Make a transport that can do both, without probes."""

    def make(raft: FakeRaft, config: TransportConfig = NO_PROBES, **settings: Any) -> Transport:
        return Transport(MEMBER, CLUSTER, raft, tls=info, config=config, **settings)

    return make


@pytest.fixture
def transport(server: ScriptedServer, raft: FakeRaft, make: Make) -> Iterator[Transport]:
    with make(raft, peer_urls=["http://10.0.0.1:2380"]) as transport:
        transport.add_peer(PEER, [server.url])
        yield transport


@pytest.fixture
def phases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell of progress when a phase begins, however long a busy machine is at one of them."""
    monkeypatch.setattr(module, "PROGRESS_INTERVAL_S", LONG_TIMEOUT)


def counts(transport: Transport) -> tuple[int, int, int, int]:
    """Success, failures, in flight, bytes."""
    return transport._peers[PEER].snapshots.counts()[:4]


def stuck(connection: Connection, head: bytes) -> bool:
    """An ``on_head`` that reads nothing more until the server is told to go on."""
    connection.server.release.wait(LONG_TIMEOUT)
    return False


def reading(connection: Connection, head: bytes, done: int = 0) -> bool:
    """An ``on_head`` that reads and forgets, to the end, and answers 204 if it is all there."""
    size = int(head.rpartition(b"Content-Length: ")[2]) - done
    buffer = bytearray(MIB)
    while size:
        n = connection.sock.recv_into(buffer)
        if n == 0:
            return False
        size -= n
    connection.send(OK)
    return False


# -- TestSnapshotSend


@pytest.mark.parametrize(
    ("chunks", "size", "is_sent"),
    [
        pytest.param((b"hello",), 5, True, id="a: 5 of 5 bytes"),
        pytest.param((OSError("broken"),), 1, False, id="b: a reader that raises"),
        pytest.param((b"hello",), 10000, False, id="c: 5 of 10000 bytes"),
        pytest.param((b"hello",), 1, False, id="d: 5 of 1 bytes"),
        pytest.param((), 0, True, id="0 of 0 bytes"),
        pytest.param((b"h",), 0, False, id="1 of 0 bytes"),
        pytest.param((b"", b"hel", b"", b"lo", b""), 5, True, id="empty chunks"),
        pytest.param((b"hel", b"lo", b"!"), 5, False, id="one more chunk"),
        pytest.param((b"hello", OSError("broken")), 5, False, id="raises behind the last byte"),
        pytest.param((b"hello", b"x" * MIB, OSError("b")), 2 * MIB, False, id="raises in between"),
        pytest.param(("text", b"hello"), 9, False, id="not bytes"),
        pytest.param((SystemExit(),), 1, False, id="exits"),
        pytest.param((bytearray(b"he"), memoryview(b"l-l-o")[::2]), 5, False, id="gaps"),
        pytest.param((bytearray(b"he"), memoryview(b"llo")), 5, True, id="other buffers"),
    ],
)
def test_snapshot_send(
    server: ScriptedServer,
    transport: Transport,
    chunks: tuple[object, ...],
    size: int,
    is_sent: bool,
) -> None:
    """etcd ``TestSnapshotSend``, and what it says of other lengths."""
    raft = transport._raft
    assert isinstance(raft, FakeRaft)
    source = Closing(*chunks)
    transfer = transport.send_snapshot(snapshot_message(), source, size=size)
    if is_sent:
        transfer.result(LONG_TIMEOUT)
        (request,) = server.requests
        data = b"".join(c for c in chunks if isinstance(c, (bytes, bytearray, memoryview)))
        assert request.body == body_of(snapshot_message(), data)
        assert raft.snapshots == [(PEER, SnapshotStatus.FINISH)]
        assert raft.unreachable == []
    else:
        with pytest.raises(SnapshotSourceError):
            transfer.result(LONG_TIMEOUT)
        server.wait_for(lambda: server.ended == len(server.connections) == 1)
        assert server.requests == []  # none of them whole
        assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
        assert raft.unreachable == []  # differs from etcd: the peer has done nothing
    assert source.closed.is_set()


def test_the_request_is_etcd_s_with_the_length_known(
    server: ScriptedServer, transport: Transport
) -> None:
    transport.send_snapshot(snapshot_message(), b"database").result(LONG_TIMEOUT)
    (request,) = server.requests
    assert request.line == "POST /raft/snapshot HTTP/1.1"
    headers = request.headers
    assert headers.pop("User-Agent").startswith("raft-pipeline/")
    assert headers == {
        "Host": f"127.0.0.1:{server.port}",
        "Content-Type": "application/octet-stream",
        "X-Etcd-Cluster-Id": "cdf818194e3a8c32",
        "X-Min-Cluster-Version": "3.0.0",
        "X-Peerurls": "http://10.0.0.1:2380",
        "X-Server-From": "1",
        "X-Server-Version": "3.5.0",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(request.body)),
    }
    assert request.body == body_of(snapshot_message(), b"database")


# -- sources

DATA = os.urandom(3 * MIB + 17)


def path_source(path: Path) -> Any:
    return path


def text_path(path: Path) -> Any:
    return str(path)


def buffered(path: Path) -> Any:
    return path.open("rb")


def unbuffered(path: Path) -> Any:
    return path.open("rb", buffering=0)


def written_and_read(path: Path) -> Any:
    file = path.open("r+b")
    file.seek(0)
    file.write(DATA[:10])  # stays in the buffer
    file.seek(0)
    return file


def in_memory(path: Path) -> Any:
    return io.BytesIO(path.read_bytes())


def mapped(path: Path) -> Any:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def spooled(path: Path) -> Any:
    file = tempfile.SpooledTemporaryFile(max_size=1 << 30)  # noqa: SIM115
    file.write(path.read_bytes())
    file.seek(0)
    return file


def named(path: Path) -> Any:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115
    file.write(path.read_bytes())
    file.seek(0)
    return file


def archived(path: Path) -> Any:
    packed = path.with_suffix(".zip")
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(path, "db")
    return zipfile.ZipFile(packed).open("db")


def array_of_bytes(path: Path) -> Any:
    return array.array("B", path.read_bytes())


def of_ctypes(path: Path) -> Any:
    data = path.read_bytes()
    return (ctypes.c_uint8 * len(data)).from_buffer_copy(data)


def matrix(path: Path) -> Any:
    data = path.read_bytes()
    return memoryview(data).cast("B", (len(data), 1))


def arrays(path: Path) -> Any:
    data = path.read_bytes()
    words = (ctypes.c_uint32.__ctype_be__ * (MIB // 4)).from_buffer_copy(data[:MIB])
    return [words, (ctypes.c_int * 0)(), memoryview(data)[MIB:], array.array("d")]


def one_buffer_again_and_again(path: Path) -> Any:
    """As who reads with ``readinto`` does, and clears the buffer at the end."""
    buffer = bytearray(100_000)
    with path.open("rb") as file:
        while n := file.readinto(buffer):
            yield memoryview(buffer)[:n]
            buffer[:] = bytes(len(buffer))


def a_socket(path: Path) -> Any:
    ours, theirs = socket.socketpair()

    def fill() -> None:
        with theirs:
            theirs.sendall(path.read_bytes())

    threading.Thread(target=fill, daemon=True).start()
    with ours:
        return ours.makefile("rb")


def not_seekable(path: Path) -> Any:
    read, write = os.pipe()

    def fill() -> None:
        with os.fdopen(write, "wb") as file:
            file.write(path.read_bytes())

    threading.Thread(target=fill, daemon=True).start()
    return os.fdopen(read, "rb")


def compressed(path: Path) -> Any:
    packed = path.with_suffix(".gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    return gzip.open(packed)


def generated(path: Path) -> Any:
    data = path.read_bytes()
    return (data[i : i + 100_000] for i in range(0, len(data), 100_000))


@pytest.mark.parametrize(
    ("opened", "is_sized"),
    [
        (path_source, True),
        (text_path, True),
        (buffered, True),
        (unbuffered, True),
        (written_and_read, True),
        (in_memory, True),
        (mapped, True),
        (spooled, True),
        (named, True),
        (compressed, True),
        (archived, True),
        (array_of_bytes, True),
        (of_ctypes, True),
        (matrix, True),
        (not_seekable, False),
        (generated, False),
        (arrays, False),
        (one_buffer_again_and_again, False),
        (a_socket, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sources(
    server: ScriptedServer,
    transport: Transport,
    tmp_path: Path,
    opened: Callable[[Path], Any],
    is_sized: bool,
) -> None:
    path = tmp_path / "db"
    path.write_bytes(DATA)
    source = opened(path)
    size = None if is_sized else len(DATA)
    transfer = transport.send_snapshot(snapshot_message(), source, size=size)
    transfer.result(LONG_TIMEOUT)
    (request,) = server.requests
    assert request.body == body_of(snapshot_message(), DATA)
    assert transfer.progress[:3] == ("done", len(DATA), len(DATA))
    assert getattr(source, "closed", True)


def test_a_file_is_sent_from_its_position_on(
    server: ScriptedServer, transport: Transport, tmp_path: Path
) -> None:
    path = tmp_path / "db"
    path.write_bytes(b"0123456789")
    for buffering in (0, -1):
        file = path.open("rb", buffering=buffering)
        file.seek(3)
        transport.send_snapshot(snapshot_message(), file).result(LONG_TIMEOUT)
    file = path.open("rb")
    file.seek(3)
    with pytest.raises(SnapshotSourceError, match="more than the 2 bytes"):
        transport.send_snapshot(snapshot_message(), file, size=2).result(LONG_TIMEOUT)
    expected = body_of(snapshot_message(), b"3456789")
    assert [r.body for r in server.requests] == [expected] * 2


def test_a_sparse_file_is_sent_with_its_holes(
    server: ScriptedServer, transport: Transport, tmp_path: Path
) -> None:
    path = tmp_path / "db"
    with path.open("wb") as file:
        file.seek(2 * MIB)
        file.write(b"data")
        file.truncate(3 * MIB)
    transport.send_snapshot(snapshot_message(), path).result(LONG_TIMEOUT)
    expected = bytes(2 * MIB) + b"data" + bytes(MIB - 4)
    assert server.requests[0].body == body_of(snapshot_message(), expected)


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM], ids=errno.errorcode.get
)
@pytest.mark.parametrize("calls", [0, 3], ids=["at once", "in the middle"])
def test_a_file_that_the_kernel_cannot_send_is_read_and_sent(
    *,
    transport: Transport,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
    calls: int,
) -> None:
    """A file system without splice, a sandbox without sendfile."""
    path = tmp_path / "db"
    path.write_bytes(DATA)
    sendfile, left = os.sendfile, itertools.count(calls, -1)

    def without(out: int, file: int, offset: int, count: int) -> int:
        if next(left) <= 0:
            raise OSError(number, os.strerror(number))
        return sendfile(out, file, offset, min(count, 100_000))

    monkeypatch.setattr(os, "sendfile", without)
    transfer = transport.send_snapshot(snapshot_message(), path)
    transfer.result(LONG_TIMEOUT)
    assert server.requests[0].body == body_of(snapshot_message(), DATA)
    assert transfer.progress[:3] == ("done", len(DATA), len(DATA))
    is_plain = server.url.startswith("http:")
    assert next(left) == (-1 if is_plain else calls)


def fails_to_read(monkeypatch: pytest.MonkeyPatch, keep: ExitStack, path: Path) -> Any:
    """A disk with a bad sector in the last MiB of the file."""

    def broken(call: Callable[..., int], at: Callable[..., int]) -> Callable[..., int]:
        def instead(*args: Any) -> int:
            if at(*args) >= len(DATA) - MIB:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args)

        return instead

    monkeypatch.setattr(os, "sendfile", broken(os.sendfile, lambda o, f, offset, count: offset))
    monkeypatch.setattr(os, "preadv", broken(os.preadv, lambda f, buffers, offset: offset))
    return path


def raises(monkeypatch: pytest.MonkeyPatch, keep: ExitStack, path: Path) -> Any:
    yield DATA[:MIB]
    raise RuntimeError("broken")


def does_not_block(monkeypatch: pytest.MonkeyPatch, keep: ExitStack, path: Path) -> Any:
    read, write = os.pipe()
    os.write(write, bytes(1000))
    os.set_blocking(read, False)
    file = os.fdopen(read, "rb", buffering=0)
    keep.callback(os.close, write)
    return file


def times_out(monkeypatch: pytest.MonkeyPatch, keep: ExitStack, path: Path) -> Any:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.01)
    keep.enter_context(theirs)
    with ours:
        return ours.makefile("rb")


@pytest.mark.parametrize(
    ("opened", "text"),
    [
        (fails_to_read, "Input/output error"),
        (raises, "broken"),
        (does_not_block, "set not to block"),
        (times_out, "timed out"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_source_that_fails_is_ours_and_the_peer_is_not_blamed(
    *,
    server: ScriptedServer,
    transport: Transport,
    raft: FakeRaft,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    opened: Callable[..., Any],
    text: str,
) -> None:
    peer = transport._peers[PEER]
    peer.status.activate()
    since = peer.status.active_since
    path = tmp_path / "db"
    path.write_bytes(DATA)
    with ExitStack() as keep:
        source = opened(monkeypatch, keep, path)
        transfer = transport.send_snapshot(snapshot_message(), source, size=len(DATA))
        with pytest.raises(SnapshotSourceError, match=text):
            transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
    assert raft.unreachable == []
    assert (peer.status.is_active, peer.status.active_since) == (True, since)
    assert counts(transport) == (0, 1, 0, 0)
    assert "internal error" not in caplog.text
    assert server.requests == []  # nothing whole
    monkeypatch.undo()
    transport.send_snapshot(snapshot_message(), path).result(LONG_TIMEOUT)
    assert raft.snapshots[1:] == [(PEER, SnapshotStatus.FINISH)]


def test_a_mapped_file_that_is_cut_is_ours_too(raft: FakeRaft, make: Make, tmp_path: Path) -> None:
    """Without TLS the kernel reads the memory, and says so. A process that did would be ended."""
    path = tmp_path / "db"
    path.write_bytes(DATA)
    with ScriptedServer() as server, make(raft) as transport:
        transport.add_peer(PEER, [server.url])
        mapping = mapped(path)
        os.truncate(path, 0)
        transfer = transport.send_snapshot(snapshot_message(), mapping)
        with pytest.raises(SnapshotSourceError, match="cannot be read: Bad address"):
            transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
    assert raft.unreachable == []
    assert mapping.closed


def test_a_mapping_that_failed_can_be_closed_by_its_owner(
    server: ScriptedServer, transport: Transport, tmp_path: Path
) -> None:
    """The error outlives the source: it must not hold a piece of it."""
    path = tmp_path / "db"
    path.write_bytes(DATA)
    mapping = mapped(path)
    transfer = transport.send_snapshot(snapshot_message(), mapping, size=len(DATA) + 1)
    with pytest.raises(SnapshotSourceError):
        transfer.result(LONG_TIMEOUT)
    assert mapping.closed


def test_a_buffer_that_others_use_is_left_open(transport: Transport, tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(DATA)
    mapping = mapped(tmp_path / "db")
    with memoryview(mapping):
        transport.send_snapshot(snapshot_message(), mapping).result(LONG_TIMEOUT)
        assert mapping[:] == DATA
    mapping.close()


def test_our_own_fault_is_not_the_peer_s(
    transport: Transport, raft: FakeRaft, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(module._RequestWriter, "write", broken)
    with pytest.raises(InternalError, match="ours"):
        transport.send_snapshot(snapshot_message(), b"x").result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
    assert raft.unreachable == []


def test_no_descriptor_left_is_told_as_such(
    transport: Transport,
    raft: FakeRaft,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def none_left(*args: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "eventfd", none_left)
    with pytest.raises(PeerUnreachableError, match="Too many open files"):
        transport.send_snapshot(snapshot_message(), b"x").result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
    assert "internal error" not in caplog.text


@pytest.mark.parametrize("change", [-1, 1], ids=["shrinks", "grows"])
def test_a_file_that_changes_its_size_is_not_sent_whole(
    server: ScriptedServer, transport: Transport, raft: FakeRaft, tmp_path: Path, change: int
) -> None:
    path = tmp_path / "db"
    path.write_bytes(bytes(64 * MIB))
    seen = threading.Event()
    server.on_head = lambda c, h: seen.set() or stuck(c, h) or reading(c, h)
    transfer = transport.send_snapshot(snapshot_message(), path)
    assert seen.wait(LONG_TIMEOUT)
    os.truncate(path, 64 * MIB + change)
    server.release.set()
    with pytest.raises(SnapshotSourceError):
        transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"message": message(MessageType.APP)}, "not a MsgSnap"),
        ({"message": snapshot_message(to=0)}, "for nobody"),
        ({"message": "snapshot"}, "not a message"),
        ({"source": 5}, "no path"),
        ({"source": io.StringIO("text")}, "binary"),
        ({"source": iter([b"x"])}, "size"),
        ({"size": -1}, "size"),
        ({"size": True}, "size"),
        ({"source": "/dev/null"}, "regular"),
        ({"source": "/"}, "regular"),
    ],
)
def test_what_cannot_be_sent_is_refused_and_closed(
    transport: Transport, change: dict[str, Any], text: str
) -> None:
    source = Closing(b"x")
    arguments = {"message": snapshot_message(), "source": source, "size": None, **change}
    with pytest.raises(UsageError, match=text):
        transport.send_snapshot(arguments["message"], arguments["source"], size=arguments["size"])
    assert source.closed.is_set() or "source" in change
    assert counts(transport) == (0, 0, 0, 0)


def test_a_path_that_cannot_be_opened_is_told_at_once(transport: Transport, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        transport.send_snapshot(snapshot_message(), tmp_path / "none")


def test_encoded_and_protobuf_messages_are_sent_too(
    server: ScriptedServer, transport: Transport
) -> None:
    from pipeline.raftpb import raft_pb2

    encoded = snapshot_message().marshal()
    for wrapped in (
        EncodedMessage(encoded, type=MessageType.SNAP, to=PEER),
        raft_pb2.Message.FromString(encoded),
    ):
        transport.send_snapshot(wrapped, b"x").result(LONG_TIMEOUT)
    for request in server.requests:
        (length,) = struct.unpack(">Q", request.body[:8])
        assert Message.unmarshal(request.body[8 : 8 + length]) == snapshot_message()


# -- outcomes


def test_success_has_etcd_s_side_effects_in_order(server: ScriptedServer, make: Make) -> None:
    raft = Order()
    with make(raft) as transport:
        transport.add_peer(PEER, [server.url])
        raft.watch(transport)
        source = Closing(b"hello")
        transport.send_snapshot(snapshot_message(), source, size=5).result(LONG_TIMEOUT)
        assert raft.calls == ["activate()", "report_snapshot(2, FINISH)"]
        size = snapshot_message().byte_size() + 5
        assert counts(transport) == (1, 0, 0, size)
        assert sum(transport._peers[PEER].snapshots.counts().durations.counts) == 1
        assert source.closed.is_set()
        assert transport.active_since(PEER) is not None


@pytest.mark.parametrize(
    ("reply", "error", "text"),
    [
        (ERROR, UnexpectedStatusError, "unexpected http status Internal Server Error"),
        (answer("403 Forbidden"), MemberRemovedError, "permanently removed"),
        (
            answer("412 Precondition Failed", b"incompatible version\n"),
            IncompatibleVersionError,
            "incompatible version",
        ),
        (answer("200 OK"), UnexpectedStatusError, "OK"),
        (b"HTTP/1.1 junk\r\n\r\n", PeerUnreachableError, "malformed"),
    ],
    ids=["500", "403", "412", "200", "junk"],
)
def test_failure_has_etcd_s_side_effects_in_order(
    server: ScriptedServer, reply: bytes, error: type[Exception], text: str, make: Make
) -> None:
    raft = Order()
    server.script = always(reply)

    def critical(failure: Exception) -> None:
        raft.calls.append(f"critical({type(failure).__name__})")

    with make(raft, on_critical_error=critical) as transport:
        transport.add_peer(PEER, [server.url])
        raft.watch(transport)
        source = Closing(b"hello")
        transfer = transport.send_snapshot(snapshot_message(), source, size=5)
        with pytest.raises(error, match=text) as caught:
            transfer.result(LONG_TIMEOUT)
        assert raft.calls == [
            *(["critical(MemberRemovedError)"] if error is MemberRemovedError else []),
            f"unreachable({server.url})",
            f"deactivate(sendMsgSnap, post, {caught.value})",
            "report_unreachable(2)",
            "report_snapshot(2, FAILURE)",
        ]
        assert counts(transport) == (0, 1, 0, 0)
        assert source.closed.is_set()


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("is_early", [False, True], ids=["at the end", "before the end"])
@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        ("500 Oops", UnexpectedStatusError, "500: the member could not process it"),
        ("403 Forbidden", MemberRemovedError, "permanently removed"),
        ("412 Precondition Failed", UnexpectedStatusError, 'unhandled error "" when'),
    ],
    ids=["500", "403", "412"],
)
def test_the_status_line_decides_although_the_body_does_not_come(
    *,
    server: ScriptedServer,
    raft: FakeRaft,
    make: Make,
    status: str,
    error: type[Exception],
    text: str,
    framing: str,
    is_early: bool,
) -> None:
    script = unfinished(status, framing)

    def early(connection: Connection, head: bytes) -> bool:
        script(connection, Request(head, b"", 0))
        return False

    if is_early:
        server.on_head = early
    else:
        server.script = script
    database = bytes(64 << 20) if is_early else b"x"
    with make(raft) as transport:
        transport.add_peer(PEER, [server.url])
        transfer = transport.send_snapshot(snapshot_message(), database)
        with pytest.raises(error, match=text):
            transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]


def test_interim_answers_are_read_once(
    server: ScriptedServer, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = ParsedHeads(monkeypatch)
    server.script = many_interims(OK)
    transport.send_snapshot(snapshot_message(), b"x").result(LONG_TIMEOUT)
    assert INTERIMS < parsed.count <= 2 * (INTERIMS + 1)


def test_nobody_listens(raft: FakeRaft, make: Make) -> None:
    with refused_port() as port, make(raft) as transport:
        transport.add_peer(PEER, [f"http://127.0.0.1:{port}"])
        transfer = transport.send_snapshot(snapshot_message(), b"x")
        with pytest.raises(PeerUnreachableError, match="Connection refused"):
            transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]


@pytest.mark.parametrize(("reports", "told"), [("every", 2), ("change", 1)])
def test_raft_hears_of_every_failure_or_of_the_change(
    raft: FakeRaft, make: Make, reports: Literal["every", "change"], told: int
) -> None:
    config = TransportConfig(
        probe_interval_s=0, pipeline=PipelineConfig(unreachable_reports=reports)
    )
    with refused_port() as port, make(raft, config=config) as transport:
        transport.add_peer(PEER, [f"http://127.0.0.1:{port}"])
        for _ in range(2):
            transfer = transport.send_snapshot(snapshot_message(), b"x")
            with pytest.raises(PeerUnreachableError):
                transfer.result(LONG_TIMEOUT)
    assert raft.unreachable == [PEER] * told
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)] * 2


def test_a_dial_that_is_not_answered_ends(raft: FakeRaft, make: Make) -> None:
    config = TransportConfig(probe_interval_s=0, pipeline=PipelineConfig(dial_timeout_s=0.1))
    with black_hole() as port, make(raft, config=config) as transport:
        transport.add_peer(PEER, [f"http://127.0.0.1:{port}"])
        transfer = transport.send_snapshot(snapshot_message(), b"x")
        with pytest.raises(PeerUnreachableError, match="dial timeout"):
            transfer.result(LONG_TIMEOUT)


def test_the_next_address_of_a_name_is_tried(
    raft: FakeRaft, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    with ScriptedServer() as server, refused_port() as port, make(raft) as transport:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", p))
            for p in (port, server.port)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        transport.add_peer(PEER, ["http://two.invalid:2380"])
        transport.send_snapshot(snapshot_message(), b"x").result(LONG_TIMEOUT)
    assert len(server.requests) == 1


@pytest.mark.parametrize("is_closed", [True, False], ids=["and closes", "and waits"])
def test_the_status_of_an_early_answer_is_reported(
    server: ScriptedServer, transport: Transport, is_closed: bool
) -> None:
    """The server says 500 before it has read the body; what we write may meet a reset."""

    def refuse(connection: Connection, head: bytes) -> bool:
        connection.send(ERROR)
        if not is_closed:
            connection.server.release.wait(LONG_TIMEOUT)
        return False

    server.on_head = refuse
    for source in ([bytes(MIB)] * 64, io.BytesIO(bytes(64 * MIB))):
        transfer = transport.send_snapshot(snapshot_message(), source, size=64 * MIB)
        with pytest.raises(UnexpectedStatusError, match="Internal Server Error"):
            transfer.result(LONG_TIMEOUT)


def test_a_204_before_everything_was_sent_is_a_failure(
    server: ScriptedServer, transport: Transport, raft: FakeRaft
) -> None:
    server.on_head = lambda connection, head: bool(connection.send(OK)) or stuck(connection, head)
    transfer = transport.send_snapshot(snapshot_message(), [bytes(64 * MIB)], size=64 * MIB)
    with pytest.raises(PeerUnreachableError, match="before everything was sent"):
        transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]


def test_a_peer_that_closes_in_between_is_a_failure(
    server: ScriptedServer, transport: Transport
) -> None:
    server.on_head = lambda connection, head: False
    transfer = transport.send_snapshot(snapshot_message(), [bytes(64 * MIB)], size=64 * MIB)
    with pytest.raises(PeerUnreachableError):
        transfer.result(LONG_TIMEOUT)


def test_an_answer_in_pieces_and_an_interim_one_are_read(
    server: ScriptedServer, transport: Transport
) -> None:
    def script(connection: Connection, request: Request) -> None:
        for piece in (b"HTTP/1.1 102 Processing\r\n\r\nHT", b"TP/1.1 204", b" No Content\r\n\r\n"):
            connection.send(piece)

    server.script = script
    transfer = transport.send_snapshot(snapshot_message(), b"x")
    transfer.result(LONG_TIMEOUT)
    assert transfer.progress.phase == "done"
    assert len(server.requests) == 1


def config_of(answer_timeout_s: float = 600.0, **pipeline: Any) -> TransportConfig:
    return TransportConfig(
        probe_interval_s=0,
        snapshot_answer_timeout_s=answer_timeout_s,
        pipeline=PipelineConfig(**pipeline),
    )


@pytest.mark.parametrize(
    ("config", "on_head", "text"),
    [
        pytest.param(config_of(stall_timeout_s=0.2), stuck, "stalled", id="does not read"),
        pytest.param(config_of(0.2), None, "no answer in time", id="does not answer"),
    ],
)
def test_a_stuck_peer_is_given_up(
    server: ScriptedServer, make: Make, config: TransportConfig, on_head: Any, text: str
) -> None:
    raft = FakeRaft()
    server.on_head = on_head
    server.script = server.hold
    with make(raft, config=config) as transport:
        transport.add_peer(PEER, [server.url])
        transfer = transport.send_snapshot(snapshot_message(), [bytes(64 * MIB)], size=64 * MIB)
        with pytest.raises(PeerUnreachableError, match=text):
            transfer.result(LONG_TIMEOUT)
        assert raft.unreachable == [PEER]
        server.release.set()


def test_a_slow_peer_is_not_given_up(server: ScriptedServer, raft: FakeRaft, make: Make) -> None:
    """Longer than the stall timeout in all, and never that long without a byte."""

    def slow(connection: Connection, head: bytes) -> bool:
        for _ in range(12):
            time.sleep(0.2)
            connection.read_body(MIB // 2)
        return reading(connection, head, 6 * MIB)

    server.on_head = slow
    with make(raft, config=config_of(stall_timeout_s=2.0)) as transport:
        transport.add_peer(PEER, [server.url])
        transfer = transport.send_snapshot(snapshot_message(), [bytes(16 * MIB)], size=16 * MIB)
        began = time.monotonic()
        transfer.result(LONG_TIMEOUT)
        assert time.monotonic() - began > 2.0
        assert transfer.progress[:3] == ("done", 16 * MIB, 16 * MIB)
    assert len(server.connections) == 1
    assert raft.snapshots == [(PEER, SnapshotStatus.FINISH)]
    assert raft.unreachable == []


def test_a_member_that_is_no_peer_is_not_found(transport: Transport, raft: FakeRaft) -> None:
    source = Closing(b"x")
    transport.add_remote(9, ["http://127.0.0.1:1"])
    for to in (9, 10):
        transfer = transport.send_snapshot(snapshot_message(to=to), source, size=1)
        assert transfer.done()
        with pytest.raises(MemberNotFoundError, match="member not found"):
            transfer.result(0)
        assert source.closed.is_set()
    transport.stop()
    source = Closing(b"x")
    with pytest.raises(UsageError, match="send_snapshot: transport stopped"):
        transport.send_snapshot(snapshot_message(), source, size=1)
    assert source.closed.is_set()
    assert raft.snapshots == []


def test_a_snapshot_before_start_is_a_usage_error() -> None:
    source = Closing(b"x")
    with pytest.raises(UsageError, match="send_snapshot: the transport was not started"):
        Transport(1, 1, FakeRaft()).send_snapshot(snapshot_message(), source, size=1)
    assert source.closed.is_set()


@pytest.mark.parametrize("method", ["read", "close"])
def test_a_file_for_asyncio_is_no_source(transport: Transport, method: str) -> None:
    """Its methods return coroutines, which nothing here awaits."""
    source: Any = Closing(b"hello")
    setattr(source, method, Unawaited(b""))
    with pytest.raises(SnapshotSourceError, match="which is not awaited here"):
        transport.send_snapshot(snapshot_message(), source, size=5).result(LONG_TIMEOUT)


def test_a_source_that_cannot_be_closed_fails_the_handle_but_not_the_snapshot(
    transport: Transport, raft: FakeRaft
) -> None:
    source = Closing(b"hello")
    source.close_error = OSError("no")
    with pytest.raises(SnapshotSourceError, match="closed"):
        transport.send_snapshot(snapshot_message(), source, size=5).result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FINISH)]


@pytest.mark.usefixtures("phases_only")
def test_callbacks_that_raise_are_counted_and_end_nothing(
    server: ScriptedServer, make: Make
) -> None:
    raft = FakeRaft(report_error=RuntimeError("report"))
    with make(raft) as transport:
        transport.add_peer(PEER, [server.url])
        called = threading.Event()

        def fail(_: object) -> None:
            called.set()
            raise SystemExit

        server.script = server.hold  # else it may end before: who comes late is called, and raises
        transfer = transport.send_snapshot(snapshot_message(), b"x", on_progress=fail)
        transfer.add_done_callback(fail)
        server.release.set()
        transfer.result(LONG_TIMEOUT)
        assert called.is_set()
        # Four phases that were begun, and the report; the last callback may still be running.
        eventually(lambda: transport._peers[PEER].pipeline.callback_errors == 6)


@pytest.mark.parametrize("text", ["start to send", "was sent to"])
def test_a_log_handler_that_raises_costs_a_snapshot_nothing(
    server: ScriptedServer, make: Make, text: str
) -> None:
    raft = FakeRaft()
    with handler_that_raises(text) as handler, make(raft) as transport:
        transport.add_peer(PEER, [server.url])
        for transfer in [transport.send_snapshot(snapshot_message(), b"x") for _ in range(2)]:
            transfer.result(LONG_TIMEOUT)
        assert handler.raised == 2
        assert transport._peers[PEER].snapshots.counts().in_flight == 0


# -- progress


@pytest.mark.usefixtures("phases_only")
def test_progress_goes_through_the_phases(server: ScriptedServer, transport: Transport) -> None:
    seen: list[SnapshotProgress] = []
    transfer = transport.send_snapshot(
        snapshot_message(), [b"hello"] * 2, size=10, on_progress=seen.append
    )
    done: list[SnapshotTransfer] = []
    transfer.add_done_callback(done.append)
    transfer.result(LONG_TIMEOUT)
    eventually(lambda: done == [transfer])
    assert [p.phase for p in seen] == ["dialing", "sending", "answering", "done"]
    assert [p.sent_bytes for p in seen] == [0, 0, 10, 10]
    assert {p.total_bytes for p in seen} == {10}
    assert seen[-1].rate_bytes_per_s > 0
    assert repr(transfer) == "<SnapshotTransfer to 2: done, 10 of 10 bytes>"
    transfer.cancel()  # too late
    transfer.result(0)


def test_progress_is_told_while_bytes_move_and_not_too_often(
    server: ScriptedServer, raft: FakeRaft, make: Make
) -> None:
    config = TransportConfig(probe_interval_s=0, snapshot_rate_limit=200_000)
    seen: list[tuple[float, SnapshotProgress]] = []
    with make(raft, config=config) as transport:
        transport.add_peer(PEER, [server.url])
        began = time.monotonic()
        transfer = transport.send_snapshot(
            snapshot_message(),
            bytes(200_000),
            on_progress=lambda p: seen.append((time.monotonic(), p)),
        )
        transfer.result(LONG_TIMEOUT)
    moving = [(at, p) for at, p in seen if p.phase == "sending"][1:]
    assert len(moving) >= 3
    # The n-th came n intervals later, or more: on a busy machine some are told late.
    assert all(at - began > 0.1 * n for n, (at, _) in enumerate(moving, 1))
    sent = [p.sent_bytes for _, p in moving]
    assert sent == sorted(sent)
    assert 0 < moving[-1][1].rate_bytes_per_s < 1_000_000


# -- ending


def begin(
    transport: Transport, server: ScriptedServer, phase: str, source: Closing
) -> SnapshotTransfer:
    """Bring a transfer into a phase, and leave it there."""
    if phase in ("sending", "waiting"):
        server.on_head = stuck
    server.script = server.hold
    reached = threading.Event()
    first: SnapshotTransfer | None = None
    if phase == "waiting":
        first = transport.send_snapshot(snapshot_message(), [bytes(64 * MIB)], size=64 * MIB)
        eventually(lambda: first is not None and first.progress.phase == "sending")
        reached.set()
    transfer = transport.send_snapshot(
        snapshot_message(),
        source,
        size=64 * MIB,
        on_progress=lambda p: reached.set() if p.phase == phase else None,
    )
    assert reached.wait(LONG_TIMEOUT)
    if phase == "sending":
        eventually(lambda: transfer.progress.sent_bytes > 0)
    return transfer


PHASES = ["waiting", "dialing", "sending", "answering"]


@pytest.mark.parametrize("end", ["cancel", "remove_peer", "stop"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_transfer_is_ended_in_every_phase(
    server: ScriptedServer, raft: FakeRaft, phase: str, end: str, make: Make
) -> None:
    source = Closing(*[bytes(MIB)] * 64)
    config = replace(config_of(dial_timeout_s=LONG_TIMEOUT), stop_timeout_s=LONG_TIMEOUT)
    with black_hole() as hole, make(raft, config=config) as transport:
        url = f"http://127.0.0.1:{hole}" if phase == "dialing" else server.url
        transport.add_peer(PEER, [url])
        transfer = begin(transport, server, phase, source)
        snapshots = transport._peers[PEER].snapshots
        began = time.monotonic()
        if end == "cancel":
            transfer.cancel()
        elif end == "stop":
            transport.stop()
        else:
            transport.remove_peer(PEER)
        reason = "cancelled" if end == "cancel" else "stopped"
        with pytest.raises(SnapshotCancelledError, match=reason):
            transfer.result(LONG_TIMEOUT)
        if end != "cancel":
            # stop and remove_peer wait for that, and for nothing that the peer would have to do.
            assert time.monotonic() - began < LONG_TIMEOUT / 2
            assert snapshots._thread is None or not snapshots._thread.is_alive()
        assert source.closed.is_set()
        is_blamed = end != "cancel"
        reports = 2 if phase == "waiting" and is_blamed else 1
        assert raft.wait_snapshots(reports) == [(PEER, SnapshotStatus.FAILURE)] * reports
        # What ran before the one that waited is cut off by stop, too.
        assert raft.unreachable == [PEER] * is_blamed
        assert snapshots.counts().failures == reports
        server.release.set()


def test_a_newer_snapshot_takes_the_place_of_the_one_that_waits(
    server: ScriptedServer, transport: Transport, raft: FakeRaft
) -> None:
    server.script = server.hold
    first = transport.send_snapshot(snapshot_message(index=1), b"1")
    server.wait_requests(1)
    replaced = Closing(b"2")
    second = transport.send_snapshot(snapshot_message(index=2), replaced, size=1)
    assert second.progress.phase == "waiting"
    third = transport.send_snapshot(snapshot_message(index=3), b"3")
    with pytest.raises(SnapshotCancelledError, match="superseded by a newer snapshot"):
        second.result(LONG_TIMEOUT)
    assert replaced.closed.is_set()
    server.release.set()
    first.result(LONG_TIMEOUT)
    third.result(LONG_TIMEOUT)
    assert [r.body for r in server.requests] == [
        body_of(snapshot_message(index=1), b"1"),
        body_of(snapshot_message(index=3), b"3"),
    ]
    # Of the one that was replaced Raft hears nothing: it waits for the newer one.
    assert raft.snapshots == [(PEER, SnapshotStatus.FINISH)] * 2
    assert counts(transport)[:3] == (2, 0, 0)


def test_the_one_that_waits_is_sent_when_the_one_before_it_failed_or_was_cancelled(
    server: ScriptedServer, transport: Transport, raft: FakeRaft
) -> None:
    server.script = server.hold
    first = transport.send_snapshot(snapshot_message(), b"1")
    server.wait_requests(1)
    second = transport.send_snapshot(snapshot_message(), b"2")
    first.cancel()
    server.release.set()
    second.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE), (PEER, SnapshotStatus.FINISH)]


@pytest.mark.parametrize(
    "end",
    [lambda connection, request: OK, close, reset, then_close(b"not HTTP\r\n\r\n")],
    ids=["answer", "close", "reset", "nonsense"],
)
def test_a_cancel_before_the_answer_was_read_wins(
    server: ScriptedServer,
    transport: Transport,
    raft: FakeRaft,
    monkeypatch: pytest.MonkeyPatch,
    end: Script,
) -> None:
    """Whatever the transfer's thread was doing when both came."""

    def late_end(connection: Connection, request: Request) -> bytes | None:
        server.hold(connection, request)
        return end(connection, request)

    server.script = late_end
    read_answer, is_sent = SnapshotLink.read_answer, threading.Event()

    def late(link: SnapshotLink, timeout_s: float) -> PeerAnswer:
        assert is_sent.wait(LONG_TIMEOUT)
        transfer.cancel()
        server.release.set()
        assert link._sock is not None
        assert select.select([link._sock], [], [], LONG_TIMEOUT)[0]
        return read_answer(link, timeout_s)

    monkeypatch.setattr(SnapshotLink, "read_answer", late)
    transfer = transport.send_snapshot(snapshot_message(), b"x")
    is_sent.set()
    with pytest.raises(SnapshotCancelledError, match="cancelled"):
        transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
    assert raft.unreachable == []


def test_the_one_that_waits_ends_though_its_peer_is_removed_after_a_stop(
    server: ScriptedServer, raft: FakeRaft, make: Make
) -> None:
    server.script = server.hold
    with make(raft) as transport:
        transport.add_peer(PEER, [server.url])
        transfers = [transport.send_snapshot(snapshot_message(), b"x") for _ in range(2)]
        server.wait_requests(1)
        peer = transport._peers[PEER]
        transport._peers = {}  # as far as remove_peer has come in another thread
    peer.stop_begin()
    for transfer in transfers:
        with pytest.raises(SnapshotCancelledError, match="stopped"):
            transfer.result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)] * 2


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12: threads
def test_a_file_that_cannot_be_closed_ends_no_fork(
    server: ScriptedServer, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("no")

    path = tmp_path / "db"
    path.write_bytes(b"x")
    server.script = server.hold
    transport.send_snapshot(snapshot_message(), b"x")
    waiting = transport.send_snapshot(snapshot_message(), path)
    with monkeypatch.context() as patch:
        patch.setattr(waiting.source, "close", fail)
        pid = os.fork()
        if pid == 0:  # letting go of the transfers comes last
            os._exit(0 if transport._peers[PEER].snapshots._waiting == [] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    server.release.set()
    waiting.result(LONG_TIMEOUT)


def test_transfers_to_different_peers_run_side_by_side(
    server: ScriptedServer, transport: Transport, raft: FakeRaft
) -> None:
    server.script = server.hold
    transport.add_peer(3, [server.url])
    transfers = [transport.send_snapshot(snapshot_message(to=to), b"x") for to in (PEER, 3)]
    server.wait_requests(2)
    server.release.set()
    for transfer in transfers:
        transfer.result(LONG_TIMEOUT)
    assert sorted(raft.snapshots) == [(PEER, SnapshotStatus.FINISH), (3, SnapshotStatus.FINISH)]


def test_pause_and_cut_peer_do_not_concern_snapshots(
    server: ScriptedServer, transport: Transport, raft: FakeRaft
) -> None:
    transport.pause()
    transport.cut_peer(PEER)
    transport.send([Message(type=MessageType.HEARTBEAT, to=PEER)])
    transport.send_snapshot(snapshot_message(), b"x").result(LONG_TIMEOUT)
    (request,) = server.requests
    assert request.line == "POST /raft/snapshot HTTP/1.1"
    assert request.body == body_of(snapshot_message(), b"x")
    assert raft.snapshots == [(PEER, SnapshotStatus.FINISH)]
    assert transport.stats()[PEER].offered == 0


def test_the_transport_can_be_stopped_from_every_callback(
    server: ScriptedServer, make: Make
) -> None:
    for where in ("report", "progress", "done"):
        raft = FakeRaft()
        transport = make(raft)
        transport.start()
        transport.add_peer(PEER, [server.url])
        stopped = threading.Event()

        def stop(*_: object, transport: Transport = transport, stopped: Any = stopped) -> None:
            transport.stop()
            stopped.set()

        if where == "report":
            raft.report_snapshot = stop  # type: ignore[method-assign]
        transfer = transport.send_snapshot(
            snapshot_message(), b"x", on_progress=stop if where == "progress" else None
        )
        if where == "done":
            transfer.add_done_callback(stop)
        assert stopped.wait(LONG_TIMEOUT), where
        eventually(transfer.done)
        transport.stop()


def test_a_result_that_is_not_there_in_time(server: ScriptedServer, transport: Transport) -> None:
    server.script = server.hold
    transfer = transport.send_snapshot(snapshot_message(), b"x")
    with pytest.raises(TimeoutError):
        transfer.result(0.01)
    server.release.set()
    transfer.result(LONG_TIMEOUT)


def test_nothing_is_left_behind(
    server: ScriptedServer, transport: Transport, tmp_path: Path
) -> None:
    path = tmp_path / "db"
    path.write_bytes(b"x" * 1000)

    def go() -> None:
        transport.send_snapshot(snapshot_message(), path).result(LONG_TIMEOUT)
        with pytest.raises(SnapshotSourceError):
            transport.send_snapshot(snapshot_message(), [b"x"], size=2).result(LONG_TIMEOUT)
        cancelled = transport.send_snapshot(snapshot_message(), path)
        cancelled.cancel()
        eventually(cancelled.done)
        # The thread ends after the last one; the server's end of it, too.
        eventually(lambda: not transport._peers[PEER].snapshots._turn.is_taken())
        server.wait_for(lambda: server.ended == len(server.connections))

    go()
    before = open_descriptors()
    threads = threading.active_count()
    for _ in range(10):
        go()
    assert_all_closed(before)  # the server may accept the last one only now
    eventually(lambda: threading.active_count() <= threads)


def test_a_large_file_goes_out_without_being_read_into_memory(
    server: ScriptedServer, transport: Transport, tmp_path: Path
) -> None:
    path = tmp_path / "db"
    with path.open("wb") as file:
        file.truncate(256 * MIB)  # sparse: no disk is needed
    server.on_head = reading
    transport.send_snapshot(snapshot_message(), b"warm").result(LONG_TIMEOUT)
    before = rss()
    peak = 0

    def look(_: SnapshotProgress) -> None:
        nonlocal peak
        peak = max(peak, rss())

    transport.send_snapshot(snapshot_message(), path, on_progress=look).result(LONG_TIMEOUT)
    assert peak - before < 8 * MIB


# -- the rate limit


def test_the_limit_is_shared_and_can_be_changed(
    server: ScriptedServer, raft: FakeRaft, make: Make
) -> None:
    config = TransportConfig(probe_interval_s=0, snapshot_rate_limit=100_000)
    with make(raft, config=config) as transport:
        for peer in (PEER, 3):
            transport.add_peer(peer, [server.url])
        began = time.monotonic()
        transfers = [
            transport.send_snapshot(snapshot_message(to=to), bytes(10_000_000)) for to in (PEER, 3)
        ]
        eventually(lambda: all(t.progress.sent_bytes > 20_000 for t in transfers))
        sent = sum(t.progress.sent_bytes for t in transfers)
        # More than the limit cannot have gone, however late we look.
        assert sent <= 100_000 * (time.monotonic() - began + 0.3)
        with pytest.raises(UsageError, match=r"^rate: "):
            transport.set_snapshot_rate_limit(0)
        transport.set_snapshot_rate_limit(None)
        for transfer in transfers:
            transfer.result(LONG_TIMEOUT)  # would take 200 s


def test_a_tiny_limit_still_moves_a_byte_a_second(
    server: ScriptedServer, transport: Transport
) -> None:
    def chunks() -> Iterator[bytes]:
        transport.set_snapshot_rate_limit(1)  # the head has gone without
        yield bytes(100)

    transfer = transport.send_snapshot(snapshot_message(), chunks(), size=100)
    eventually(lambda: transfer.progress.sent_bytes >= 2)
    assert transfer.progress.sent_bytes < 50
    transport.set_snapshot_rate_limit(None)
    transfer.result(LONG_TIMEOUT)


@pytest.mark.parametrize("rate", [1.0, 1000.0, 1e6, 1e9])
def test_a_bucket_gives_no_more_than_its_rate(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """On a clock of our own: over a long time, and for several that share it."""
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    bucket = RateLimiter(rate)
    ready = [now] * 3
    taken = 0
    while now < 1030.0:
        who = min(range(3), key=ready.__getitem__)
        now = max(now, ready[who])
        count, wait_s = bucket.take(4 * MIB)
        assert 1 <= count <= 4 * MIB
        assert 0 <= wait_s <= 1.0
        taken += count
        ready[who] = now + wait_s
    assert taken <= max(rate * 30 * 1.02 + 4 * MIB * (rate > 1e6), 100)
    assert taken >= rate * 30 * 0.9 or rate * 0.125 > 4 * MIB


@pytest.mark.parametrize("rate", [0, 0.5, -1, True, "1"])
def test_what_is_no_rate_is_refused(rate: Any) -> None:
    with pytest.raises(UsageError, match=r"^(rate|snapshot_rate_limit): "):
        TransportConfig(snapshot_rate_limit=rate)


def test_a_descriptor_that_cannot_be_had_is_a_failure(
    transport: Transport, raft: FakeRaft, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(os, "eventfd", refuse)
    source = Closing(b"x")
    with pytest.raises(PeerUnreachableError, match="too many"):
        transport.send_snapshot(snapshot_message(), source, size=1).result(LONG_TIMEOUT)
    assert raft.snapshots == [(PEER, SnapshotStatus.FAILURE)]
    assert source.closed.is_set()


# -- TLS, and our own receiver


def test_a_handshake_that_is_not_answered_is_ended_by_cancel_and_by_its_time(
    raft: FakeRaft, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    with (
        ScriptedServer(on_connect=lambda _: bool(release.wait(LONG_TIMEOUT))) as silent,
        make(raft) as transport,
    ):
        transport.add_peer(PEER, [silent.url.replace("http:", "https:")])
        transfer = transport.send_snapshot(snapshot_message(), b"x")
        silent.wait_connections(1)
        transfer.cancel()
        with pytest.raises(SnapshotCancelledError):
            transfer.result(LONG_TIMEOUT)
        monkeypatch.setattr("pipeline.net.dialling.HANDSHAKE_TIMEOUT_S", 0.1)
        with pytest.raises(
            PeerUnreachableError, match="TLS handshake: not done within its timeout"
        ):
            transport.send_snapshot(snapshot_message(), b"x").result(LONG_TIMEOUT)
        release.set()


def test_a_server_that_is_not_to_be_trusted_gets_nothing(
    raft: FakeRaft, tmp_path: Path, authority: Authority
) -> None:
    other = Authority(tmp_path)
    refusing = authority.info("refusing", allowed_hostnames=("elsewhere",))
    for info, text in ((other.info(), "certificate verify failed"), (refusing, "refused")):
        with (
            ScriptedServer(tls=authority.server()) as server,
            Transport(MEMBER, CLUSTER, raft, tls=info, config=NO_PROBES) as transport,
        ):
            transport.add_peer(PEER, [server.url])
            with pytest.raises(PeerUnreachableError, match=text):
                transport.send_snapshot(snapshot_message(), b"x").result(LONG_TIMEOUT)
            assert server.requests == []


class Dribble:
    """A socket with TLS that takes 10 KB at a time, and nothing each other time."""

    tls = SimpleNamespace(has_moved=False, wants_to_write=True)

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: memoryview, flags: int) -> int:
        self._is_full = not self._is_full
        if self._is_full:
            raise BlockingIOError
        return self._sock.send(data[:10_000], flags)


def test_over_tls_the_stall_timeout_counts_from_write_to_write(
    raft: FakeRaft, authority: Authority, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What moves is not stalled, however many writes an encrypted piece takes."""
    deadlines: list[float] = []
    dial, wait = SnapshotLink.dial, SnapshotLink._wait

    def watched_dial(link: SnapshotLink, timeout_s: float) -> None:
        dial(link, timeout_s)
        link._sock = Dribble(link._sock)  # type: ignore[assignment, arg-type]

    def watched_wait(link: SnapshotLink, events: int, deadline: float, *args: Any) -> int:
        if events & select.POLLOUT:
            deadlines.append(deadline)
        return wait(link, events, deadline, *args)

    monkeypatch.setattr(SnapshotLink, "dial", watched_dial)
    monkeypatch.setattr(SnapshotLink, "_wait", watched_wait)
    with ScriptedServer(tls=authority.server()) as server, make(raft) as transport:
        transport.add_peer(PEER, [server.url])
        transport.send_snapshot(snapshot_message(), bytes(MIB)).result(LONG_TIMEOUT)
    assert len(set(deadlines)) > MIB / 10_000


class Stuck(Dribble):
    """One that takes nothing although there is room: TLS has to read before it writes."""

    tls = SimpleNamespace(has_moved=False, wants_to_write=False)

    def send(self, data: memoryview, flags: int) -> int:
        raise BlockingIOError


def test_over_tls_what_waits_for_the_peer_to_say_more_is_stalled(
    raft: FakeRaft, authority: Authority, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dial = SnapshotLink.dial

    def watched_dial(link: SnapshotLink, timeout_s: float) -> None:
        dial(link, timeout_s)
        link._sock = Stuck(link._sock)  # type: ignore[assignment, arg-type]

    monkeypatch.setattr(SnapshotLink, "dial", watched_dial)
    config = config_of(stall_timeout_s=0.2)
    with ScriptedServer(tls=authority.server()) as server, make(raft, config) as transport:
        transport.add_peer(PEER, [server.url])
        with pytest.raises(PeerUnreachableError, match="stalled"):
            transport.send_snapshot(snapshot_message(), bytes(MIB)).result(LONG_TIMEOUT)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_our_own_receiver_stores_what_was_sent(
    tmp_path: Path, info: TLSInfo, make: Make, scheme: str
) -> None:
    database = tmp_path / "db"
    database.write_bytes(DATA)
    stored = tmp_path / "stored"
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=stored))
    node = FakeRaft()
    with (
        Transport(PEER, CLUSTER, node, tls=info, config=config) as receiver,
        make(FakeRaft()) as transport,
    ):
        transport.add_peer(PEER, [receiver.listen(f"{scheme}://127.0.0.1:0").url])
        for sent, source in enumerate((database, iter([DATA[:100], DATA[100:]])), 1):
            message = snapshot_message(index=sent)
            transfer = transport.send_snapshot(message, source, size=len(DATA))
            transfer.result(LONG_TIMEOUT)
            assert node.processed[-1] == message
            assert receiver.snapshot_path(sent).read_bytes() == DATA
        for source in ([DATA[:-1]], [DATA, b"!"], [DATA, OSError("broken")]):
            with pytest.raises(SnapshotSourceError):
                transport.send_snapshot(
                    snapshot_message(index=9), Closing(*source), size=len(DATA)
                ).result(LONG_TIMEOUT)
        eventually(
            lambda: receiver.handlers.snapshots.counts()["1"].failures == 3, "all three broke off"
        )
        assert len(list(stored.iterdir())) == 2
        assert len(node.processed) == 2


def test_each_result_raises_an_error_of_its_own_that_tells_where_the_source_raised(
    server: ScriptedServer, transport: Transport
) -> None:
    """One that was kept would hold the caller's frame, and with it the transfer that keeps it."""

    def raising() -> Iterator[bytes]:
        raise RuntimeError("the source's")
        yield b""

    transfer = transport.send_snapshot(snapshot_message(), raising(), size=9)
    errors = []
    for _ in range(2):
        with pytest.raises(SnapshotSourceError, match="the source's") as raised:
            transfer.result(LONG_TIMEOUT)
        errors.append(raised.value)
    assert errors[0] is not errors[1]
    for error in errors:
        assert isinstance(error.__cause__, RuntimeError)
        assert "in raising" in error.__notes__[0]
