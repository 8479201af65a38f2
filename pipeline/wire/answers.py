"""Requests and answers as a node sees them, and an answer as it is written: no sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from pipeline.errors import UsageError
from pipeline.wire.protocol import SERVER_FROM, parse_id, reason_phrase

__all__ = [
    "Answer",
    "Request",
    "header_lines",
    "render",
    "sender_of",
    "stream_answer",
    "text_answer",
]

#: Statuses of answers that have no body (RFC 9110 section 6.4.1).
BODILESS = (204, 304)


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request."""

    method: str
    #: As it stood in the request line: not decoded, without the query.
    path: str
    #: Names in lower case; of a repeated header the first value, as Go's ``Header.Get``.
    headers: Mapping[str, str]
    #: Shows the caller's ``ip:port`` in logs.
    remote: object
    #: As ``ssl.SSLSocket.getpeercert()`` gives it, verified; None without TLS or without one.
    certificate: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer without its framing: the listener adds Content-Length, Connection and Date."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    #: Close the connection, without reading what may be left of the request.
    close: bool = False
    #: The body does not end: now and then another byte of it comes, until the caller goes.
    is_endless: bool = False


def text_answer(
    status: int, text: str, headers: tuple[tuple[str, str], ...] = (), *, close: bool = False
) -> Answer:
    """Answer with a line of text, as Go's ``http.Error`` does."""
    return Answer(
        status,
        (
            *headers,
            ("Content-Type", "text/plain; charset=utf-8"),
            ("X-Content-Type-Options", "nosniff"),
        ),
        f"{text}\n".encode(),
        close,
    )


def header_lines(answer: Answer, *, close: bool) -> list[tuple[str, str]]:
    """Return all headers of an answer, in the order in which they are written."""
    headers = [*answer.headers, ("Date", formatdate(usegmt=True))]
    if answer.is_endless:
        headers.append(("Transfer-Encoding", "chunked"))
    elif answer.status not in BODILESS:
        headers.append(("Content-Length", str(len(answer.body))))
    if close:
        headers.append(("Connection", "close"))
    return headers


def render(answer: Answer) -> bytes:
    """Write an answer to a request whose method has answers with bodies: all but HEAD."""
    lines = [f"HTTP/1.1 {answer.status} {reason_phrase(answer.status)}"]
    lines += [f"{name}: {value}" for name, value in header_lines(answer, close=answer.close)]
    body = b"" if answer.status in BODILESS else answer.body
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def stream_answer(headers: tuple[tuple[str, str], ...], *, is_chunked: bool) -> bytes:
    """Write the head of a stream, which the frames follow.

    Without chunks, for a caller that speaks HTTP/1.0, it ends with its connection. It names the
    server's own version, as all our answers do (RFC 9110 section 6.2), where Go names the caller's.
    """
    framing = ("Transfer-Encoding", "chunked") if is_chunked else ("Connection", "close")
    lines = ["HTTP/1.1 200 OK"]
    for name, value in (*headers, ("Date", formatdate(usegmt=True)), framing):
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def sender_of(request: Request) -> int | None:
    """Return the member that X-Server-From names, None without one."""
    try:
        return parse_id(request.headers.get(SERVER_FROM.lower(), ""))
    except UsageError:
        return None
