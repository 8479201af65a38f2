"""Handlers as a WSGI application (PEP 3333), for any WSGI server."""

from __future__ import annotations

import time
from collections.abc import Iterable
from urllib.parse import quote
from wsgiref.types import InputStream, StartResponse, WSGIApplication, WSGIEnvironment

from pipeline.config import ReceiverConfig
from pipeline.names import show_address
from pipeline.net._budget import BodyShare
from pipeline.receive.body_time import BodyTime
from pipeline.receive.handlers import Handlers, behind_prefix
from pipeline.wire.answers import BODILESS, Answer, Request
from pipeline.wire.protocol import reason_phrase

__all__ = ["wsgi_app"]

# One read takes no more, so that memory grows with what has arrived, not with what was announced.
_READ_BYTES = 64 * 1024


class _NoRoomError(Exception):
    """There is no memory for a body just now."""


def wsgi_app(handlers: Handlers, config: ReceiverConfig) -> WSGIApplication:
    """Return the application that serves ``handlers``.

    Parameters
    ----------
    handlers : Handlers
        What is served. Paths are matched exactly, behind the prefix it is mounted at
        (``SCRIPT_NAME``).
    config : ReceiverConfig
        For ``max_head_bytes``, ``max_body_bytes`` and, as far as the server lets us see how a body
        comes, ``min_body_rate``. How long it may stall and how many calls of ``raft.process`` run
        at once is up to the server: each call is on a thread of its.

    Notes
    -----
    Thread-safe; the server needs several threads, for ``process`` may block. WSGI has no way to
    end a connection: where other listeners close it, here the server decides.
    """

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = _serve(handlers, config, environ)
        status = f"{answer.status} {reason_phrase(answer.status) or 'Unknown'}"
        headers = list(answer.headers)
        if answer.status not in BODILESS:
            headers.append(("Content-Length", str(len(answer.body))))
        start_response(status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    return app


def _serve(handlers: Handlers, config: ReceiverConfig, environ: WSGIEnvironment) -> Answer:
    headers = _headers(environ)
    path, query = _target(environ)
    size = len(path) + len(query)
    size += sum(len(name) + len(value) + 4 for name, value in headers.items())
    if size > config.max_head_bytes:
        return handlers.head_too_large()
    request = Request(environ["REQUEST_METHOD"], path, headers, _remote(environ))
    answer = handlers.check(request)
    if answer is not None:
        return answer
    share = handlers.budget.share()
    try:
        return _serve_message(handlers, config, environ, request, share)
    finally:
        share.close()


def _serve_message(
    handlers: Handlers,
    config: ReceiverConfig,
    environ: WSGIEnvironment,
    request: Request,
    share: BodyShare,
) -> Answer:
    limit = config.max_body_bytes
    length = request.headers.get("content-length", "")
    is_chunked = not length.isdecimal() and "transfer-encoding" in request.headers
    try:
        if is_chunked and not environ.get("wsgi.input_terminated"):
            body, is_whole = bytearray(), False  # the server leaves the chunks as they are
        else:
            size = limit + 1 if is_chunked else int(length or "0")
            body = _read(environ["wsgi.input"], size, config, share)
            is_whole = is_chunked or len(body) == size
    except _NoRoomError:
        return handlers.overloaded(request.remote)
    except OSError:  # it stalled, or the peer is gone
        is_whole = False
    if not is_whole:
        return handlers.read_failed(request.remote)
    if len(body) > limit:
        return handlers.body_too_large(request.remote)
    return handlers.deliver(request, body)


def _read(stream: InputStream, size: int, config: ReceiverConfig, share: BodyShare) -> bytearray:
    """Read ``size`` bytes, or what there is; ``TimeoutError`` for a body that drips."""
    body = bytearray()
    body_time = BodyTime(config)
    while len(body) < size:
        begin = time.monotonic()
        part = stream.read(min(size - len(body), _READ_BYTES))
        if not part:
            break
        if not share.set(len(body) + len(part)):
            raise _NoRoomError
        body += part
        body_time.arrived(len(part), time.monotonic() - begin)
        if body_time.left_s < 0:
            raise TimeoutError
    return body


def _headers(environ: WSGIEnvironment) -> dict[str, str]:
    # Values of a repeated header come joined by a comma; where one is compared, none matches.
    headers = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if environ.get(name):
            headers[name.replace("_", "-").lower()] = environ[name]
    return headers


def _target(environ: WSGIEnvironment) -> tuple[str, str]:
    """Return path and query as they were sent, if the server tells."""
    # Not in PEP 3333, but many servers have one of them; PATH_INFO is decoded.
    for name in ("RAW_URI", "REQUEST_URI"):
        if name in environ:
            path, _, query = environ[name].partition("?")
            return behind_prefix(path, environ.get("SCRIPT_NAME", "")), query
    path = environ.get("PATH_INFO", "")
    # An encoded character cannot be told from a plain one; what has to be encoded, is.
    return quote(path, safe="/:@!$&'()*+,;=~-._", encoding="latin-1"), environ.get(
        "QUERY_STRING", ""
    )


def _remote(environ: WSGIEnvironment) -> str:
    host = environ.get("REMOTE_ADDR")
    if not host:
        return "unknown"
    return show_address(host, environ.get("REMOTE_PORT", ""))
