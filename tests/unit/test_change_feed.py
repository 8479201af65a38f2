"""``examples/change_feed.py`` without an etcd: which lines it prints, whatever comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import (
    Entry,
    EntryType,
    Message,
    MessageType,
    ReceiverConfig,
    Snapshot,
    SnapshotMetadata,
    TransportConfig,
)
from pipeline.examples import change_feed
from pipeline.examples.change_feed import FeedError, Learner
from pipeline.examples.etcd import put_request
from pipeline.examples.etcd_log import keys_of, line_of
from pipeline.examples.etcd_log_pb2 import InternalRaftRequest
from pipeline.raftpb.raft_pb2 import ConfChange
from tests.support.wire import span, varint

US, LEADER, OTHER = 3, 1, 2


class Feed:
    """A learner, and the lines that it has told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: int = 0, **arguments: Any) -> None:
        self.lines: list[dict[str, Any]] = []
        monkeypatch.setattr(change_feed, "tell", self.lines.append)
        self.learner = Learner(US, 7, index, **arguments)

    def step(self, kind: MessageType, *, term: int = 1, **fields: Any) -> Message | None:
        return self.learner.step(Message(type=kind, to=US, from_=LEADER, term=term, **fields))

    def append(self, after: int, log: list[Entry], commit: int, **fields: Any) -> Message:
        fields.setdefault("log_term", 1)
        answer = self.step(
            MessageType.APP, index=after, entries=log[after:], commit=commit, **fields
        )
        assert answer is not None
        return answer

    @property
    def keys(self) -> list[str]:
        return [line["key"] for line in self.lines]


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    return Feed(monkeypatch)


def put(index: int, key: str, term: int = 1) -> Entry:
    return Entry(term=term, index=index, data=put_request(key.encode(), b"value"))


def log_of(count: int) -> list[Entry]:
    return [put(n, f"key {n}") for n in range(1, count + 1)]


# -- the learner


def test_an_entry_is_told_and_acknowledged_when_it_is_committed(feed: Feed) -> None:
    assert feed.append(0, log_of(3), commit=0).index == 0
    assert feed.lines == []
    answer = feed.append(3, log_of(3), commit=2)
    assert (answer.type, answer.index, answer.to, answer.reject) == (
        MessageType.APP_RESP,
        2,
        LEADER,
        False,
    )
    assert feed.lines == [
        {"index": n, "term": 1, "kind": "put", "key": f"key {n}", "value": "value"} for n in (1, 2)
    ]
    assert feed.append(3, log_of(3), commit=3).index == 3
    assert feed.keys == ["key 1", "key 2", "key 3"]


def test_what_another_leader_has_put_in_its_place_is_told_instead(feed: Feed) -> None:
    feed.append(0, log_of(3), commit=1)
    theirs = [*log_of(1), put(2, "theirs", term=2)]
    assert feed.append(1, theirs, commit=2, term=2).index == 2
    assert feed.keys == ["key 1", "theirs"]
    # The third was of the old leader, and is not there any more.
    refusal = feed.append(3, log_of(3), commit=3, term=2)
    assert (refusal.reject, refusal.index, refusal.reject_hint) == (True, 3, 2)


def test_what_does_not_fit_is_refused_with_where_to_go_on(feed: Feed) -> None:
    feed.append(0, log_of(2), commit=1)
    for after, log_term in ((3, 1), (2, 9)):
        refusal = feed.append(after, log_of(5), commit=5, log_term=log_term)
        assert (refusal.reject, refusal.index, refusal.reject_hint) == (True, after, 1)
    assert feed.keys == ["key 1"]


@given(st.data())
def test_in_whatever_order_appends_come_the_lines_are_the_log(data: st.DataObject) -> None:
    log = log_of(data.draw(st.integers(1, 12)))
    positions = st.integers(0, len(log))
    spans = st.tuples(positions, positions, positions)
    with pytest.MonkeyPatch.context() as monkeypatch:
        feed = Feed(monkeypatch)
        for start, end, commit in data.draw(st.lists(spans, max_size=20)):
            told = feed.learner.index
            answer = feed.append(start, log[:end], commit)
            assert answer.index == (start if answer.reject else feed.learner.index)
            assert told <= feed.learner.index <= max(told, commit)
            assert [line["index"] for line in feed.lines] == [*range(1, feed.learner.index + 1)]
        # Whatever has come, the leader goes on where the feed is.
        feed.append(feed.learner.index, log, len(log))
        assert feed.keys == [f"key {n}" for n in range(1, len(log) + 1)]


def test_it_goes_on_behind_the_line_it_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed(monkeypatch, index=2)
    refusal = feed.append(4, log_of(4), commit=4)
    assert (refusal.reject, refusal.reject_hint) == (True, 2)
    assert feed.append(0, log_of(4), commit=4).index == 4
    assert feed.keys == ["key 3", "key 4"]


def test_a_leader_that_is_none_any_more_hears_of_the_term(feed: Feed) -> None:
    feed.append(0, log_of(1), commit=1, term=5)
    answer = feed.append(1, log_of(2), commit=2, term=4)
    assert (answer.type, answer.term, answer.reject) == (MessageType.APP_RESP, 5, False)
    assert feed.keys == ["key 1"]


def test_a_heartbeat_is_answered_with_its_context(feed: Feed) -> None:
    answer = feed.step(MessageType.HEARTBEAT, context=b"read 1")
    assert answer is not None
    assert (answer.type, bytes(answer.context or b"")) == (MessageType.HEARTBEAT_RESP, b"read 1")


def test_a_leader_that_counts_on_more_than_the_reader_has_ends_the_feed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed = Feed(monkeypatch, index=10)
    feed.step(MessageType.HEARTBEAT, commit=10)
    with pytest.raises(FeedError, match=r"up to 12 .* after 10"):
        feed.step(MessageType.HEARTBEAT, commit=12)


@pytest.mark.parametrize(
    "kind", [MessageType.VOTE, MessageType.PRE_VOTE, MessageType.PROP, MessageType.TIMEOUT_NOW]
)
def test_what_is_not_for_a_learner_is_not_answered(feed: Feed, kind: MessageType) -> None:
    assert feed.step(kind, term=9, index=9) is None
    assert feed.learner.term == 0


class Peers:
    """What the learner has its transport do."""

    def __init__(self, database: Path | None = None) -> None:
        self.database = database
        self.peers: dict[int, object] = {}
        self.done: list[tuple[Any, ...]] = []

    def snapshot_path(self, index: int) -> Path | None:
        return self.database

    def stats(self) -> dict[int, object]:
        return self.peers

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.done.append((name, *arguments))


def change(index: int, kind: str, member_id: int, context: bytes = b"") -> Entry:
    made = ConfChange(id=1, type=kind, node_id=member_id, context=context)
    return Entry(term=1, index=index, type=EntryType.CONF_CHANGE, data=made.SerializeToString())


def test_the_members_are_those_of_the_log(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers()
    monkeypatch.setattr(feed.learner, "transport", peers)
    url = "http://two:2380"
    context = json.dumps({"id": OTHER, "peerURLs": [url], "isLearner": True}).encode()
    log = [
        change(1, "ConfChangeAddNode", US, context),
        change(2, "ConfChangeAddLearnerNode", OTHER, context),
        change(3, "ConfChangeAddNode", OTHER, b'{"id":2,"peerURLs":null,"isPromote":true}'),
        change(4, "ConfChangeRemoveNode", OTHER),
    ]
    feed.append(0, log, commit=4)
    assert peers.done == [
        ("add_peer", OTHER, [url]),
        ("update_peer", OTHER, [url]),
        ("remove_peer", OTHER),
    ]
    assert feed.lines[1] == {
        "index": 2,
        "term": 1,
        "kind": "ConfChangeAddLearnerNode",
        "member": "2",
        "peer_urls": [url],
    }
    assert not feed.learner.is_removed
    feed.append(4, [*log, change(5, "ConfChangeRemoveNode", US)], commit=5)
    assert feed.learner.is_removed


# -- a snapshot


def leaf(*pairs: tuple[bytes, bytes]) -> bytes:
    """Write a page of bbolt with these pairs."""
    elements = data = b""
    for key, value in pairs:
        offset = 16 * (len(pairs) - len(elements) // 16) + len(data)
        elements += b"".join(n.to_bytes(4, "little") for n in (0, offset, len(key), len(value)))
        data += key + value
    return bytes(10) + len(pairs).to_bytes(2, "little") + bytes(4) + elements + data


def write_database(
    path: Path, revisions: list[tuple[bytes, bytes]], members: dict[int, str] | None = None
) -> None:
    """Write a database of etcd with revisions of keys and members, in buckets inside its root."""
    page = 4096
    meta = bytes(24) + page.to_bytes(8, "little") + (1).to_bytes(8, "little")
    known = [
        (b"%x" % id_, json.dumps({"id": id_, "peerURLs": [url]}).encode())
        for id_, url in (members or {}).items()
    ]
    buckets = ((b"key", revisions), (b"members", known))
    root = leaf(*((name, bytes(16) + leaf(*pairs)) for name, pairs in buckets))
    path.write_bytes(meta.ljust(page, b"\0") + root)


def revision(main: int, key: bytes, value: bytes | None) -> tuple[bytes, bytes]:
    name = main.to_bytes(8, "big") + b"_" + bytes(8)
    if value is None:
        return name + b"t", span(1 << 3 | 2, key)
    numbers = b"".join(varint(n << 3) + varint(main) for n in (2, 3, 4))
    return name, span(1 << 3 | 2, key) + numbers + span(5 << 3 | 2, value)


REVISIONS = [
    revision(2, b"a", b"1"),
    revision(3, b"b", b"1"),
    revision(4, b"a", b"2"),
    revision(5, b"c", b"1"),
    revision(6, b"b", None),
    revision(7, b"c", None),
    revision(8, b"c", b"\xff"),
]


def test_the_keys_of_a_database_are_those_that_are_there_now(tmp_path: Path) -> None:
    write_database(tmp_path / "db", REVISIONS)
    assert list(keys_of(tmp_path / "db")) == [
        {"kind": "key", "key": key, "create_revision": at, "mod_revision": at, "version": at}
        | {"value": value}
        for key, at, value in (("a", 4, "2"), ("c", 8, {"base64": "/w=="}))
    ]


def test_a_snapshot_becomes_the_lines_of_all_keys_and_goes_on_behind_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path))
    feed = Feed(monkeypatch, config=config)
    feed.append(0, log_of(2), commit=1)
    metadata = SnapshotMetadata(index=9, term=2)
    database = tmp_path / f"{9:016x}.snap.db"
    for _ in range(2):  # the second is of no use any more
        write_database(database, REVISIONS)
        answer = feed.step(MessageType.SNAP, term=2, snapshot=Snapshot(metadata=metadata))
        assert answer is not None
        assert (answer.type, answer.index) == (MessageType.APP_RESP, 9)
        assert not database.exists()
    assert [line["kind"] for line in feed.lines] == [
        "put",
        "snapshot",
        "key",
        "key",
        "snapshot_end",
    ]
    assert feed.lines[1] == {"kind": "snapshot", "after": 1}
    assert feed.lines[-1] == {"index": 9, "term": 2, "kind": "snapshot_end"}
    feed.append(9, [*log_of(9), put(10, "behind", term=2)], commit=10, term=2, log_term=2)
    assert feed.lines[-1]["key"] == "behind"


def test_the_members_are_those_of_the_snapshot(
    feed: Feed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of before may all be gone."""
    peers = Peers(tmp_path / "db")
    peers.peers = {LEADER: None, OTHER: None}
    monkeypatch.setattr(feed.learner, "transport", peers)
    urls = {id_: f"http://{id_}:2380" for id_ in (LEADER, US, 4)}
    write_database(tmp_path / "db", REVISIONS, urls)
    metadata = SnapshotMetadata(index=9, term=2)
    feed.step(MessageType.SNAP, term=2, snapshot=Snapshot(metadata=metadata))
    assert peers.done == [
        ("remove_peer", OTHER),
        ("add_peer", LEADER, [urls[LEADER]]),
        ("update_peer", LEADER, [urls[LEADER]]),
        ("add_peer", 4, [urls[4]]),
        ("update_peer", 4, [urls[4]]),
    ]
    assert not feed.learner.is_removed


def test_a_snapshot_without_its_database_is_not_acknowledged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = TransportConfig(receiver=ReceiverConfig(snapshot_dir=tmp_path))
    feed = Feed(monkeypatch, config=config)
    metadata = SnapshotMetadata(index=9, term=2)
    answer = feed.step(MessageType.SNAP, term=2, snapshot=Snapshot(metadata=metadata))
    assert answer is not None
    assert answer.index == 0
    assert feed.lines == []


# -- what a line says


def request(**fields: Any) -> bytes:
    return InternalRaftRequest(header={}, **fields).SerializeToString()


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", {"kind": "empty"}),
        (put_request(b"k", b""), {"kind": "put", "key": "k", "value": ""}),
        (put_request(b"\xff", b"\0"), {"kind": "put", "key": {"base64": "/w=="}, "value": "\0"}),
        (
            request(put={"key": b"k", "lease": 0x694D77AA9E38260F}),
            {"kind": "put", "key": "k", "value": "", "lease": "694d77aa9e38260f"},
        ),
        (
            request(delete_range={"key": b"a", "range_end": b"b"}),
            {"kind": "delete_range", "key": "a", "range_end": "b"},
        ),
        (request(compaction={"revision": 7}), {"kind": "compaction", "revision": 7}),
        (
            request(lease_grant={"TTL": 60, "ID": 255}),
            {"kind": "lease_grant", "TTL": 60, "ID": "ff"},
        ),
        (
            request(alarm={"action": 1, "memberID": 2**64 - 1, "alarm": 9}),
            {"kind": "alarm", "action": "ACTIVATE", "memberID": "f" * 16, "alarm": 9},
        ),
        (
            request(auth_user_add={}) + span(1100 << 3 | 2, span(2 << 3 | 2, b"a password")),
            {"kind": "auth_user_add"},
        ),
        (request() + span(2000 << 3 | 2, b""), {"kind": "unknown"}),
        # Request of API v2: ID, Method, Path, Val.
        (
            b"\x08\x01" + span(0x12, b"PUT") + span(0x1A, b"/0/version") + span(0x22, b"3.5.0"),
            {"kind": "v2"},
        ),
    ],
)
def test_a_request_is_shown_with_its_fields(data: bytes, line: dict[str, Any]) -> None:
    assert line_of(data) == line
    json.dumps(line)


def test_a_request_is_shown_with_who_has_made_it() -> None:
    data = InternalRaftRequest(header={"username": "alice"}, put={"key": b"k"}).SerializeToString()
    assert line_of(data) == {"kind": "put", "user": "alice", "key": "k", "value": ""}


def test_a_transaction_is_shown_with_what_it_compares_and_both_its_branches() -> None:
    data = request(
        txn={
            "compare": [{"target": "MOD", "key": b"k", "mod_revision": 0}],
            "success": [{"put": {"key": b"k", "value": b"new"}}],
            "failure": [
                {"range": {"key": b"k"}},
                {"txn": {"success": [{"delete_range": {"key": b"k"}}]}},
            ],
        }
    )
    assert line_of(data) == {
        "kind": "txn",
        "compare": [{"result": "EQUAL", "target": "MOD", "key": "k", "mod_revision": 0}],
        "success": [{"put": {"key": "k", "value": "new"}}],
        "failure": [
            {"range": {"key": "k"}},
            {"txn": {"compare": [], "success": [{"delete_range": {"key": "k"}}], "failure": []}},
        ],
    }
