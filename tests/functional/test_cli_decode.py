"""``raft-pipeline decode``: bytes of every kind that a node has sent or received."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline import (
    ConfState,
    Entry,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
)
from pipeline.cli.commands import commands
from pipeline.cli.decode import items as items_of
from pipeline.identity import Identity
from pipeline.wire._frames import FrameWriter
from pipeline.wire.protocol import request_head, stream_head
from tests.support.processes import run_python
from tests.support.recordings import Recording, recordings

URL = "http://127.0.0.1:2380"
IDENTITY = Identity(0xA1, 7, (), "3.5.0")
APPEND = Message(
    type=MessageType.APP,
    from_=0xA1,
    to=0xB2,
    term=3,
    log_term=2,
    index=10,
    commit=9,
    entries=[Entry(term=3, index=11, data=b"key"), Entry(term=3, index=12, data=b"value")],
)
SNAP = Message(
    type=MessageType.SNAP,
    from_=0xA1,
    to=0xB2,
    snapshot=Snapshot(
        metadata=SnapshotMetadata(index=5, term=2, conf_state=ConfState(voters=[0xA1, 0xB2]))
    ),
)


def run(data: bytes, *arguments: str, exit_code: int = 0) -> list[str]:
    result = CliRunner().invoke(commands, ["decode", *arguments], input=data)
    assert result.exit_code == exit_code, result.output
    return result.output.splitlines()


def found(data: bytes, *arguments: str, exit_code: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(data, "--json", *arguments, exit_code=exit_code)]


def post(body: bytes) -> bytes:
    return request_head(IDENTITY, URL) + b"%d\r\n\r\n" % len(body) + body


def framed(message: Message) -> bytes:
    body = message.marshal()
    return len(body).to_bytes(8, "big") + body


def test_a_message_is_shown_with_every_field_that_is_not_zero() -> None:
    (item,) = found(APPEND.marshal(), "--data", "2")
    assert (item["kind"], item["bytes"]) == ("message", len(APPEND.marshal()))
    assert item["message"] == {
        "type": "MsgApp",
        "from": "a1",
        "to": "b2",
        "term": 3,
        "log_term": 2,
        "index": 10,
        "commit": 9,
        "entries": [
            {"index": 11, "term": 3, "type": "NORMAL", "bytes": 3, "data": b"ke".hex()},
            {"index": 12, "term": 3, "type": "NORMAL", "bytes": 5, "data": b"va".hex()},
        ],
    }


def test_a_message_is_one_line_for_people() -> None:
    (line,) = run(APPEND.marshal())
    assert line.endswith(
        "message   MsgApp a1 -> b2 term 3 log_term 2 index 10 commit 9 entries 2 (11..12, 8 bytes)"
    )


def as_xxd(data: bytes) -> bytes:
    """Write lines as xxd does, which is not everywhere."""
    lines = []
    for at in range(0, len(data), 16):
        part = data[at : at + 16]
        pairs = " ".join(part[i : i + 2].hex() for i in range(0, len(part), 2))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:08x}: {pairs:<39}  {text}\n")
    return "".join(lines).encode()


def as_hexdump(data: bytes) -> bytes:
    """Write lines as hexdump -C does."""
    lines = []
    for at in range(0, len(data), 16):
        part = data[at : at + 16]
        halves = "  ".join(" ".join(f"{b:02x}" for b in part[i : i + 8]) for i in (0, 8))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:08x}  {halves:<49} |{text}|\n")
    return "".join([*lines, f"{len(data):08x}\n"]).encode()


@pytest.mark.parametrize(
    "write",
    [
        lambda data: data.hex().encode(),
        lambda data: data.hex(":").upper().encode() + b"\n",
        lambda data: b"\n".join(data.hex()[i : i + 60].encode() for i in range(0, 4000, 60)),
        as_xxd,
        as_hexdump,
    ],
    ids=["hex", "colons", "lines", "xxd", "hexdump -C"],
)
@pytest.mark.parametrize("data", [APPEND.marshal(), post(APPEND.marshal())], ids=["raw", "post"])
def test_hexadecimal_text_is_as_good_as_the_bytes(write: Any, data: bytes) -> None:
    assert found(write(data)) == found(data)


def test_posts_and_their_answers_may_follow_each_other() -> None:
    answer = b"HTTP/1.1 204 No Content\r\nX-Etcd-Cluster-Id: 7\r\n\r\n"
    refusal = b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 20\r\n\r\ncluster ID mismatch\n"
    data = post(APPEND.marshal()) + answer + post(APPEND.marshal()) + refusal
    items = found(data)
    kinds = ["request", "message", "answer", "request", "message", "answer", "text"]
    assert [item["kind"] for item in items] == kinds
    assert items[0]["headers"]["X-Server-From"] == "a1"
    assert items[1]["message"]["type"] == "MsgApp"
    assert items[2]["line"] == "HTTP/1.1 204 No Content"
    assert items[6]["text"] == "cluster ID mismatch"
    assert data[items[4]["offset"] :].startswith(APPEND.marshal())


@pytest.mark.parametrize("is_request", [True, False])
def test_of_a_snapshot_the_head_is_shown_and_the_database_is_counted(is_request: bool) -> None:
    data = framed(SNAP) + bytes(1000)
    if is_request:
        head = request_head(IDENTITY, URL, path="/raft/snapshot")
        data = head + b"%d\r\n\r\n" % len(data) + data
    *_, item = found(data)
    assert (item["kind"], item["database_bytes"]) == ("snapshot", 1000)
    assert item["message"]["snapshot"]["index"] == 5
    assert item["message"]["snapshot"]["voters"] == ["a1", "b2"]


@pytest.mark.parametrize("recording", recordings(), ids=str)
def test_the_streams_that_etcds_wrote_are_read_to_their_end(recording: Recording) -> None:
    members = recording.members
    ids = ("--from", f"{members['from_']:x}", "--to", f"{members['to']:x}")
    items = found(recording.chunked, "--stream", recording.stream, *ids)
    assert {item["kind"] for item in items} <= {"frame", "heartbeat"}
    assert items[0]["offset"] == 0
    for item, after in itertools.pairwise(items):
        assert item["offset"] + item["bytes"] == after["offset"]
    frames = [item for item in items if item["kind"] == "frame"]
    if recording.stream == "msgapp":
        assert {item["message"]["type"] for item in frames} <= {"MsgApp"}
    # And without being told what it is.
    assert [item["kind"] for item in found(recording.chunked)] == [item["kind"] for item in items]


@pytest.mark.parametrize("kind", ["msgapp", "message"])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_the_request_for_a_stream_says_which_and_whose_it_is(kind: str, is_chunked: bool) -> None:
    writer = FrameWriter(kind, from_=0xB2, to=0xA1)
    append = Message.unmarshal(APPEND.marshal())
    append.from_, append.to = 0xB2, 0xA1
    frames = writer.heartbeat() + writer.write(append)
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    if is_chunked:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        frames = b"%x\r\n%s\r\n" % (len(frames), frames)
    items = found(stream_head(IDENTITY, URL, kind, 0xB2) + head + frames)
    assert [item["kind"] for item in items] == ["request", "answer", "heartbeat", "frame"]
    assert items[3]["stream"] == kind
    assert (items[3]["message"]["from"], items[3]["message"]["to"]) == ("b2", "a1")


def test_a_frame_that_is_not_whole_is_told_after_those_that_are() -> None:
    data = framed(APPEND) + framed(APPEND)[:-3]
    items = found(data, "--stream", "message", exit_code=1)
    assert [item["kind"] for item in items] == ["frame", "error"]
    assert items[1]["error"] == (
        f"offset {len(framed(APPEND))}: the frame is not whole, 3 bytes are missing"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x08\x03\xff", "Message"),
        (b"POST /raft HTTP/1.1\r\nContent-Length: 9\r\n\r\n\x08\x04", "2 bytes of 9"),
        (b"POST /raft HTTP/1.1\r\nContent-Length: 2\r\n\r\n\x08\x04junk", "no head"),
        (b"POST /raft HTTP/1.1\r\nContent-Length: -2\r\n\r\n\x08\x04", "Content-Length"),
        (b"POST /raft HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", "headers"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk"),
    ],
    ids=["message", "cut", "junk", "length", "headers", "chunk"],
)
def test_what_cannot_be_decoded_is_an_error_that_says_where(data: bytes, text: str) -> None:
    *_, item = found(data, exit_code=1)
    assert item["kind"] == "error"
    assert text in item["error"]


def test_nothing_is_not_an_answer() -> None:
    assert run(b"", exit_code=1) == ["Error: there is nothing in it"]


def test_fields_of_another_schema_are_told() -> None:
    (item,) = found(APPEND.marshal() + b"\xa0\x06\x01")
    assert item["has_unknown_fields"] is True


def test_a_file_is_read_as_a_pipe_is(tmp_path: Path) -> None:
    path = tmp_path / "post.bin"
    path.write_bytes(post(APPEND.marshal()))
    result = run_python("-m", "pipeline", "decode", "--json", str(path))
    assert (result.returncode, result.stderr) == (0, "")
    items = [json.loads(line) for line in result.stdout.splitlines()]
    assert items == found(post(APPEND.marshal()))


SEEDS = [
    APPEND.marshal(),
    post(APPEND.marshal()),
    framed(SNAP) + b"database",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n\0\r\n",
    as_xxd(APPEND.marshal()),
]


@given(st.sampled_from(SEEDS), st.integers(0, 400), st.binary(max_size=12), st.booleans())
def test_whatever_comes_is_decoded_or_an_error_and_ends(
    seed: bytes, at: int, changed: bytes, is_cut: bool
) -> None:
    data = seed[:at] + changed + (b"" if is_cut else seed[at + len(changed) :])
    for stream in (None, "msgapp", "message"):
        found = list(items_of(memoryview(data), stream, 0, 0, 16))
        assert all(item.kind != "error" for item in found[:-1])


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_decoded_or_an_error(data: bytes) -> None:
    found = list(items_of(memoryview(data), None, 0, 0, 16))
    assert all(item.kind != "error" for item in found[:-1])
