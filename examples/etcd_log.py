"""What etcd's log and its databases say: requests and keys as lines of JSON, and the members.

The schema is ``etcd_log.proto``; ``make raftpb`` makes ``etcd_log_pb2.py`` of it.
"""

from __future__ import annotations

import base64
import json
import mmap
from collections.abc import Iterator, MutableSequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from pipeline.examples.bolt import pairs
from pipeline.examples.etcd_log_pb2 import InternalRaftRequest, KeyValue

__all__ = ["Line", "keys_of", "line_of", "members_of"]

#: What ``json.dumps`` makes one of.
Line = dict[str, Any]


def line_of(data: bytes) -> Line:
    """Show the request in a normal entry: ``kind`` says which, the rest is its fields."""
    if not data:
        return {"kind": "empty"}  # which a leader begins its term with
    try:
        request = InternalRaftRequest.FromString(data)
    except DecodeError:
        request = InternalRaftRequest()
    if not request.HasField("header"):
        return {"kind": "v2"}  # of API v2: up to 3.5 a member tells its name with one
    kind = request.WhichOneof("request")
    if kind is None:
        return {"kind": "unknown"}  # of a later etcd
    user = {"user": request.header.username} if request.header.username else {}
    return {"kind": kind, **user, **_shown(getattr(request, kind))}


def keys_of(database: Path) -> Iterator[Line]:
    """Show the keys that a database has, each as it is now, from the oldest write to the newest.

    Held in memory are the keys, not the values.
    """
    with _opened(database) as pages:
        newest: dict[bytes, bytes] = {}  # key to revision
        for revision, value in pairs(pages, b"key"):
            key = KeyValue.FromString(value).key
            if revision.endswith(b"t"):  # a tombstone, the key deleted
                newest.pop(key, None)
            else:
                newest[key] = revision
        for revision, value in pairs(pages, b"key"):
            found = KeyValue.FromString(value)
            if newest.get(found.key) == revision:
                yield {"kind": "key", **_shown(found)}


def members_of(database: Path) -> dict[int, list[str]]:
    """Return the peer URLs of the members that a database knows, by their IDs."""
    with _opened(database) as pages:
        members = [json.loads(member) for _, member in pairs(pages, b"members")]
    return {member["id"]: member["peerURLs"] for member in members}


def _opened(database: Path) -> mmap.mmap:
    with database.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def _shown(message: Message) -> Line:
    """Show the fields that are there, and those that the schema shows always."""
    line: Line = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, MutableSequence):
            line[field.name] = [_value(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            line[field.name] = _value(field, value)
    return line


def _value(field: Any, value: Any) -> object:
    if isinstance(value, Message):
        return _shown(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:  # what no text can be taken for
            return {"base64": base64.b64encode(value).decode()}
    if field.name == "lease" or field.name.endswith("ID"):
        return f"{value:x}"  # as etcdctl has it: 64 bits are too many for some readers' numbers
    if field.enum_type is not None and value in field.enum_type.values_by_number:
        return field.enum_type.values_by_number[value].name
    return value
