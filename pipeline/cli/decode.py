"""``raft-pipeline decode``: what is in bytes that a node sent or received.

The library's own decoder and reader of frames, and nothing that it would not take: what fails here
fails in a node.
"""

from __future__ import annotations

import http.client
import io
import json
import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import click

from pipeline import Message, MessageType, UnmarshalError, UsageError, parse_id
from pipeline.cli.messages import describe, summary
from pipeline.cli.options import json_option, member_id
from pipeline.wire._chunks import Chunks
from pipeline.wire._frames import FrameReader
from pipeline.wire._messages import decode as decode_message
from pipeline.wire.answers import BODILESS
from pipeline.wire.protocol import (
    RAFT_PATH,
    RAFT_TO,
    SNAPSHOT_PATH,
    STREAM_KINDS,
    parse_stream_path,
)

__all__ = ["Item", "decode", "items"]

#: A reader of frames keeps what it is given until a frame is whole: it is given pieces.
PIECE_BYTES = 64 * 1024
#: The least byte that a message begins with; streams and snapshots begin with a type or a length.
FIRST_TAG = 8
#: The most that a head has; a listener of ours takes half of it at most.
HEAD_MAX = 64 * 1024

_FIRST_LINE = re.compile(rb"(?:[A-Z]+ (\S+) HTTP/1\.[01]|HTTP/1\.[01] ([0-9]{3})[^\r\n]*)\r?\n")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}\r\n")
_HEX = re.compile(rb"[0-9A-Fa-f:\s]+")
# A line of xxd, and one of hexdump -C.
_DUMP = re.compile(
    rb"[0-9A-Fa-f]{8,}: ((?:[0-9A-Fa-f]{2,} ?)+)(?: .*)?|"
    rb"[0-9A-Fa-f]{8,}  ((?:[0-9A-Fa-f]{2} {1,2})+)\s*\|.*"
)


class DecodeError(Exception):
    """The bytes are not what they should be; the text says where."""


@dataclass(frozen=True)
class Item:
    """One thing that was found."""

    #: From the start of the input; of what came in chunks, within what they carried.
    offset: int
    bytes: int
    #: request, answer, message, snapshot, frame, heartbeat, error.
    kind: str
    #: More about it, in one line.
    text: str
    #: The message, the head.
    about: dict[str, Any]


@dataclass(frozen=True)
class _Stream:
    """Which stream it is, and whose; None and 0 while it is not known."""

    kind: str | None
    from_: int
    to: int


def items(
    data: memoryview, stream: str | None, from_: int, to: int, data_bytes: int
) -> Iterator[Item]:
    """Find out what ``data`` is, and yield what is in it, an error last."""
    try:
        yield from _items(_plain(data), _Stream(stream, from_, to), data_bytes)
    except DecodeError as error:
        yield Item(0, 0, "error", str(error), {"error": str(error)})


def _plain(data: memoryview) -> memoryview:
    """Return the bytes that hexadecimal text stands for; what is no such text as it is."""
    if not len(data) or not (data[0] in b" \r\n\t" or chr(data[0]).isalnum()):
        return data
    first = bytes(data[:4096])
    if _DUMP.fullmatch(first.partition(b"\n")[0].rstrip()):
        lines = map(_DUMP.fullmatch, map(bytes.rstrip, bytes(data).splitlines()))
        text = b"".join(line[1] or line[2] for line in lines if line is not None)
    elif _HEX.fullmatch(first):
        text = bytes(data).replace(b":", b"")
    else:
        return data
    try:
        return memoryview(bytes.fromhex(text.decode("ascii")))
    except ValueError:
        return data


def _items(data: memoryview, stream: _Stream, data_bytes: int) -> Iterator[Item]:
    if not len(data):
        return
    if _FIRST_LINE.match(data):
        yield from _exchanges(data, stream, data_bytes)
    elif _CHUNK_SIZE.match(data):
        body, _ = _dechunked(data)
        yield from _frames(memoryview(body), stream, data_bytes)
    elif stream.kind is not None:
        yield from _frames(data, stream, data_bytes)
    elif len(data) and data[0] < FIRST_TAG:
        if _is_framed(data, MessageType.SNAP):
            yield from _snapshot(data, 0, data_bytes)
        else:
            yield from _frames(data, stream, data_bytes)
    else:
        yield from _message(data, 0, data_bytes)


# -- HTTP


def _exchanges(data: memoryview, stream: _Stream, data_bytes: int) -> Iterator[Item]:
    """Yield requests and answers, one behind the other, and what is in their bodies."""
    at = 0
    while at < len(data):
        first = _FIRST_LINE.match(data[at : at + HEAD_MAX])
        end = _END_OF_HEAD.search(data[at : at + HEAD_MAX])
        if first is None or end is None:
            raise DecodeError(f"offset {at}: no head of a request or an answer")
        line = first[0].rstrip().decode("latin-1")
        try:
            headers = http.client.parse_headers(io.BytesIO(data[at + first.end() : at + end.end()]))
        except http.client.HTTPException as error:
            raise DecodeError(f"offset {at}: {error!r}") from error
        path, status = (first[1] or b"").decode("latin-1"), int(first[2] or 0)
        about = {"line": line, "headers": dict(headers.items())}
        yield Item(at, end.end(), "answer" if status else "request", line, about)
        if not status:
            stream = _asked_for(path, headers, stream)
        at += end.end()
        is_chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        if status in BODILESS or 100 <= status < 200:
            size = 0
        elif is_chunked or (status and "Content-Length" not in headers):
            size = len(data) - at
        else:
            size = _length(headers, at)
        body, used = data[at : at + size], size
        if is_chunked:
            chunked, used = _dechunked(body)
            body = memoryview(chunked)
        elif len(body) < size:
            yield from _body(path, body, at, stream, data_bytes)
            raise DecodeError(f"offset {at}: the body has {len(body)} bytes of {size}")
        yield from _body(path, body, at, stream, data_bytes)
        at += used


def _length(headers: http.client.HTTPMessage, at: int) -> int:
    text = headers.get("Content-Length", "0").strip()
    if not re.fullmatch("[0-9]{1,18}", text):
        raise DecodeError(f"offset {at}: a Content-Length of {text[:32]!r}")
    return int(text)


def _asked_for(path: str, headers: http.client.HTTPMessage, stream: _Stream) -> _Stream:
    """Return what a request says of the stream that follows its answer."""
    try:
        kind, reader = parse_stream_path(path)
        writer = parse_id(headers.get(RAFT_TO, ""))
    except UsageError:
        return stream
    return _Stream(stream.kind or kind, stream.from_ or writer, stream.to or reader)


def _body(path: str, body: memoryview, at: int, stream: _Stream, data_bytes: int) -> Iterator[Item]:
    """Yield what is in a body; ``path`` is a request's, and empty for an answer."""
    if not len(body):
        return
    if path == RAFT_PATH:
        yield from _message(body, at, data_bytes)
    elif path == SNAPSHOT_PATH:
        yield from _snapshot(body, at, data_bytes)
    elif not path and body[0] < FIRST_TAG:
        yield from _frames(body, stream, data_bytes)
    else:
        text = bytes(body[:200]).decode("latin-1").strip()
        yield Item(at, len(body), "text", text, {"text": text})


def _dechunked(data: memoryview) -> tuple[bytearray, int]:
    """Take the framing off; the body, and how many bytes there were of it."""
    chunks = Chunks()
    try:
        body = chunks.decode(data)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    if chunks.is_odd:
        raise DecodeError(f"a line of a chunk is {bytes(chunks.line)[:64]!r}")
    return body, chunks.used if chunks.is_whole else len(data)


# -- messages


def _message(data: memoryview, at: int, data_bytes: int) -> Iterator[Item]:
    yield _item(_decode(data, at), at, len(data), "message", data_bytes)


def _decode(data: memoryview, at: int) -> tuple[Message, bool]:
    """Decode a message at ``at``; whether it has fields that raftpb does not have."""
    try:
        message, has_unknown, _ = decode_message(data)
    except UnmarshalError as error:
        raise DecodeError(f"the message at {at}: {error}") from error
    assert isinstance(message, Message)
    return message, has_unknown


def _item(found: tuple[Message, bool], at: int, size: int, kind: str, data_bytes: int) -> Item:
    message, has_unknown = found
    fields = describe(message, data_bytes)
    text = summary(fields) + (" and fields that raftpb does not have" if has_unknown else "")
    return Item(at, size, kind, text, {"message": fields, "has_unknown_fields": has_unknown})


def _is_framed(data: memoryview, kind: MessageType | None = None) -> bool:
    """Tell whether a length and a message of that length, and of a kind, come first."""
    size = int.from_bytes(data[:8], "big")
    if not 0 < size <= len(data) - 8:
        return False
    try:
        found = decode_message(data[8 : 8 + size]).message.type
    except UnmarshalError:
        return False
    return kind is None or found == kind


def _snapshot(data: memoryview, at: int, data_bytes: int) -> Iterator[Item]:
    """Yield the head of a snapshot: the message, and how much of the database follows."""
    size = int.from_bytes(data[:8], "big")
    if size > len(data) - 8:
        raise DecodeError(
            f"offset {at}: a message of {size} bytes, of which {len(data) - 8} are here"
        )
    found = _decode(data[8 : 8 + size], at + 8)
    database = len(data) - 8 - size
    item = _item(found, at, 8 + size, "snapshot", data_bytes)
    about = {**item.about, "database_bytes": database}
    yield Item(at, item.bytes, "snapshot", f"{item.text}, {database} bytes of database", about)


def _frames(data: memoryview, stream: _Stream, data_bytes: int) -> Iterator[Item]:
    kind = stream.kind or _kind_of(data)
    reader = FrameReader(kind, from_=stream.from_, to=stream.to)
    at = fed = 0
    while True:
        try:
            message = reader.read()
        except UnmarshalError as error:
            raise DecodeError(f"the frame at {at}: {error}") from error
        if message is None:
            if fed == len(data):
                break
            reader.feed(data[fed : fed + PIECE_BYTES])
            fed = min(fed + PIECE_BYTES, len(data))
            continue
        assert isinstance(message, Message)
        end = fed - reader.pending
        is_heartbeat = message.type == MessageType.HEARTBEAT and message.from_ == 0
        if is_heartbeat:
            yield Item(at, end - at, "heartbeat", f"of the {kind} stream", {"stream": kind})
        else:
            item = _item((message, False), at, end - at, "frame", data_bytes)
            yield Item(at, end - at, "frame", item.text, {"stream": kind, **item.about})
        at = end
    if reader.pending:
        needed = max(reader.needed - reader.pending, 1)
        raise DecodeError(f"offset {at}: the frame is not whole, {needed} bytes are missing")


def _kind_of(data: memoryview) -> str:
    """Tell the streams apart: a frame is a type of one byte and more, or a length and a message."""
    return "message" if _is_framed(data) else "msgapp"


def _read(file: BinaryIO) -> memoryview:
    """Map a file, so that a capture of any size is not read at once; read what is none."""
    try:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):  # a pipe; an empty file
        return memoryview(file.read())


@click.command()
@click.argument("file", type=click.File("rb"), default="-")
@click.option(
    "--stream",
    type=click.Choice(STREAM_KINDS),
    help="The bytes are those of a stream of this kind, its head and chunks or without.",
)
@click.option("--from", "from_", type=member_id, metavar="HEX", default="0", help="Who wrote it.")
@click.option("--to", type=member_id, metavar="HEX", default="0", help="Who read it.")
@click.option(
    "--data",
    "data_bytes",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Bytes shown of each payload.",
)
@json_option
def decode(
    *, file: BinaryIO, stream: str | None, from_: int, to: int, data_bytes: int, as_json: bool
) -> None:
    """Show what is in FILE, or standard input: messages, posts, snapshots, streams.

    It may be a message as it is posted; whole requests and answers, one behind the other; the
    body of a snapshot, of which the head is shown; the bytes of a stream. Hexadecimal text of it
    will do, plain or as xxd and hexdump -C write it. With --json there is one object on each line.
    The exit code is 1 if something cannot be decoded.
    """
    has_failed = has_found = False
    for item in items(_read(file), stream, from_, to, data_bytes):
        has_found = True
        has_failed = has_failed or item.kind == "error"
        if as_json:
            about = {"kind": item.kind, "offset": item.offset, "bytes": item.bytes, **item.about}
            click.echo(json.dumps(about))
        elif item.kind == "error":
            click.echo(f"error: {item.text}")
        else:
            click.echo(f"{item.offset:>8} {item.bytes:>8} {item.kind:<9} {item.text}")
    if not has_found:
        raise click.ClickException("there is nothing in it")
    sys.exit(1 if has_failed else 0)
