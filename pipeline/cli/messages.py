"""Messages as people and programs read them."""

from __future__ import annotations

from typing import Any

from pipeline import Entry, EntryType, Message, MessageType, format_id
from pipeline.wire._messages import byte_view

__all__ = ["describe", "name_of", "summary"]


def name_of(kind: int) -> str:
    """Return etcd's name of a message type: ``MsgAppResp`` of ``APP_RESP``."""
    try:
        return "Msg" + MessageType(kind).name.title().replace("_", "")
    except ValueError:
        return f"Msg({kind})"


def describe(message: Message, data_bytes: int) -> dict[str, Any]:
    """Return the fields of a message that are not zero, IDs as hexadecimal text.

    Of each payload there is its length, and the first ``data_bytes`` bytes in hexadecimal.
    """
    fields: dict[str, Any] = {
        "type": name_of(message.type),
        "from": format_id(message.from_),
        "to": format_id(message.to),
    }
    for name in ("term", "log_term", "index", "commit", "reject", "reject_hint"):
        if value := getattr(message, name):
            fields[name] = value
    if message.entries:
        fields["entries"] = [_entry(entry, data_bytes) for entry in message.entries]
    if message.snapshot is not None:
        about = message.snapshot.metadata
        fields["snapshot"] = {
            "index": about.index,
            "term": about.term,
            "voters": [format_id(voter) for voter in about.conf_state.voters],
            "learners": [format_id(learner) for learner in about.conf_state.learners],
            **_payload(message.snapshot.data, data_bytes),
        }
    if message.context is not None:
        fields["context"] = _payload(message.context, data_bytes)
    return fields


def _entry(entry: Entry, data_bytes: int) -> dict[str, Any]:
    kind = entry.type.name if isinstance(entry.type, EntryType) else entry.type
    payload = _payload(entry.data, data_bytes)
    return {"index": entry.index, "term": entry.term, "type": kind, **payload}


def _payload(data: Any, data_bytes: int) -> dict[str, Any]:
    view = byte_view(b"" if data is None else data)
    return {"bytes": len(view), "data": view[:data_bytes].hex()}


def summary(fields: dict[str, Any]) -> str:
    """Write what ``describe`` returned in one line."""
    text = f"{fields['type']} {fields['from']} -> {fields['to']}"
    for name in ("term", "log_term", "index", "commit", "reject_hint"):
        if name in fields:
            text += f" {name} {fields[name]}"
    if fields.get("reject"):
        text += " rejected"
    if entries := fields.get("entries"):
        size = sum(entry["bytes"] for entry in entries)
        text += f" entries {len(entries)} ({entries[0]['index']}..{entries[-1]['index']}"
        text += f", {size} bytes)"
    if snapshot := fields.get("snapshot"):
        text += f" snapshot {snapshot['index']} of term {snapshot['term']}"
        text += f", voters {' '.join(snapshot['voters'])}"
    if context := fields.get("context"):
        text += f" context {context['data']}"
    return text
