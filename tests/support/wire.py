"""Protobuf by hand."""

from __future__ import annotations


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def span(tag: int, body: bytes) -> bytes:
    return varint(tag) + varint(len(body)) + body
