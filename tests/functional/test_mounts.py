"""asgi_app and wsgi_app as a part of somebody else's application, under a prefix or not."""

from __future__ import annotations

import asyncio
import http.client
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit
from wsgiref.util import setup_testing_defaults, shift_path_info

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from pipeline import Message, ReceiverConfig, Transport, TransportConfig
from pipeline.receive.handlers import behind_prefix
from pipeline.receive.wsgi import wsgi_app
from tests.support import LONG_TIMEOUT
from tests.support.fronts import AsgiFront, WsgiFront, running
from tests.support.http import CLUSTER_ID, HEARTBEAT, handlers_of, peer_headers
from tests.support.raft import FakeRaft
from tests.support.waiting import eventually

MESSAGE = HEARTBEAT.marshal()


@pytest.fixture(scope="module")
def asgi() -> Iterator[AsgiFront]:
    with running(AsgiFront) as front:
        assert isinstance(front, AsgiFront)
        yield front


@pytest.fixture(scope="module")
def wsgi() -> Iterator[WsgiFront]:
    with running(WsgiFront) as front:
        assert isinstance(front, WsgiFront)
        yield front


@pytest.fixture
def raft() -> FakeRaft:
    return FakeRaft()


@pytest.fixture
def transport(raft: FakeRaft) -> Iterator[Transport]:
    config = TransportConfig(receiver=ReceiverConfig(handlers=2))
    with Transport(2, CLUSTER_ID, raft, config=config) as transport:
        yield transport


def status_of(url: str, path: str, body: bytes | None = None) -> int:
    """The status of a POST with a body, or of a GET."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LONG_TIMEOUT)
    try:
        connection.request("GET" if body is None else "POST", path, body, peer_headers())
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def handler_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("pipeline-handler")]


@pytest.mark.parametrize("prefix", ["", "/peer", "/a b/ä"])
def test_it_is_mounted_in_starlette(
    asgi: AsgiFront, raft: FakeRaft, transport: Transport, prefix: str
) -> None:
    asgi.app = Starlette(routes=[Mount(prefix or "/", app=transport.asgi_app)])
    sent = prefix.replace(" ", "%20").replace("ä", "%C3%A4")
    assert status_of(asgi.url, f"{sent}/raft/probing") == 200
    assert status_of(asgi.url, f"{sent}/raft", MESSAGE) == 204
    assert status_of(asgi.url, f"{sent}/raft/raft", MESSAGE) == 404
    assert status_of(asgi.url, f"{sent}/%72aft", MESSAGE) == 404
    if prefix:
        assert status_of(asgi.url, "/raft", MESSAGE) == 404
    assert raft.processed == [HEARTBEAT]


def test_it_is_mounted_in_a_mount(asgi: AsgiFront, raft: FakeRaft, transport: Transport) -> None:
    inner = Starlette(routes=[Mount("/raft", app=transport.asgi_app)])
    asgi.app = Starlette(routes=[Mount("/raft", app=inner)])
    assert status_of(asgi.url, "/raft/raft/raft", MESSAGE) == 204
    assert raft.processed == [HEARTBEAT]


def test_stop_ends_the_threads_of_a_mount_which_hears_of_no_shutdown(
    asgi: AsgiFront, raft: FakeRaft
) -> None:
    with Transport(2, CLUSTER_ID, raft) as transport:
        asgi.app = Starlette(routes=[Mount("/peer", app=transport.asgi_app)])
        assert status_of(asgi.url, "/peer/raft", MESSAGE) == 204
        assert handler_threads() != []
    assert handler_threads() == []
    # The server goes on; the node is not there any more.
    assert status_of(asgi.url, "/peer/raft", MESSAGE) == 503
    assert status_of(asgi.url, "/peer/raft/probing") == 503
    assert raft.processed == [HEARTBEAT]
    assert handler_threads() == []


def test_stop_does_not_wait_for_process_and_what_waits_for_its_turn_is_refused(
    asgi: AsgiFront, raft: FakeRaft
) -> None:
    raft.gate = threading.Event()
    config = TransportConfig(stop_timeout_s=0.2, receiver=ReceiverConfig(handlers=1))
    statuses: list[int] = []

    def post() -> None:
        statuses.append(status_of(asgi.url, "/raft", MESSAGE))

    with Transport(2, CLUSTER_ID, raft, config=config) as transport:
        asgi.app = app = transport.asgi_app
        posts = [threading.Thread(target=post) for _ in range(3)]
        for thread in posts:
            thread.start()
        raft.wait_processed(1)
        eventually(lambda: app._threads._pending == 3)
    assert len(handler_threads()) == 1
    raft.gate.set()
    for thread in posts:
        thread.join(LONG_TIMEOUT)
    assert sorted(statuses) == [204, 503, 503]
    assert raft.processed == [HEARTBEAT]
    eventually(lambda: handler_threads() == [])


def test_process_may_stop_its_transport(asgi: AsgiFront) -> None:
    stopped = threading.Event()

    class Stopping(FakeRaft):
        def process(self, message: Message) -> None:
            transport.stop()
            stopped.set()

    transport = Transport(2, CLUSTER_ID, Stopping())
    transport.start()
    asgi.app = transport.asgi_app
    before = time.monotonic()
    assert status_of(asgi.url, "/raft", MESSAGE) == 204
    assert stopped.is_set()
    assert time.monotonic() - before < LONG_TIMEOUT / 2
    eventually(lambda: handler_threads() == [])


def test_every_call_gives_the_same_application(transport: Transport) -> None:
    assert transport.asgi_app is transport.asgi_app


def probe(app: Any, **scope: Any) -> int:
    """Ask an ASGI application for /raft/probing, as a server would."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    asyncio.run(app({"type": "http", "method": "GET", "headers": [], **scope}, receive, send))
    status: int = sent[0]["status"]
    return status


@pytest.mark.parametrize(
    ("root", "path", "raw", "status"),
    [
        pytest.param("", "/raft/probing", b"/raft/probing", 200, id="no prefix"),
        pytest.param("/p", "/p/raft/probing", b"/p/raft/probing", 200, id="of newer servers"),
        pytest.param("/p", "/raft/probing", b"/p/raft/probing", 200, id="of older mounts"),
        pytest.param("/p", "/raft/probing", b"/raft/probing", 200, id="behind a proxy"),
        pytest.param("/p/", "/p/raft/probing", None, 200, id="without the raw path"),
        pytest.param("/a b", "/a b/raft/probing", b"/a%20b/raft/probing", 200, id="encoded"),
        pytest.param("/ä", "/ä/raft/probing", None, 200, id="not ASCII"),
        pytest.param("/raft", "/raft/raft/probing", b"/raft/raft/probing", 200, id="the same word"),
        pytest.param("/p", "/pr/raft/probing", b"/pr/raft/probing", 404, id="another word"),
        pytest.param("/p", "/p/p/raft/probing", b"/p/p/raft/probing", 404, id="twice"),
        pytest.param("", "/p/raft/probing", b"/p/raft/probing", 404, id="not told"),
        pytest.param("/p", "/p", b"/p", 404, id="the mount itself"),
    ],
)
def test_root_path_is_taken_off(
    transport: Transport, root: str, path: str, raw: bytes | None, status: int
) -> None:
    scope: dict[str, Any] = {"root_path": root, "path": path}
    if raw is not None:
        scope["raw_path"] = raw
    assert probe(transport.asgi_app, **scope) == status


@pytest.mark.parametrize(
    ("script", "info", "extra", "status"),
    [
        pytest.param("", "/raft/probing", {}, 200, id="no prefix"),
        pytest.param("/p", "/raft/probing", {}, 200, id="a prefix"),
        pytest.param("/p", "/raft/probing", {"REQUEST_URI": "/p/raft/probing?a"}, 200, id="uri"),
        pytest.param("/p", "/raft/probing", {"RAW_URI": "/p/raft/probing"}, 200, id="raw uri"),
        pytest.param("/p", "/raft/probing", {"RAW_URI": "/raft/probing"}, 200, id="behind a proxy"),
        pytest.param("/a b", "/raft/probing", {"RAW_URI": "/a%20b/raft/probing"}, 200, id="space"),
        pytest.param("/p", "/raft/probing", {"RAW_URI": "/p/%72aft/probing"}, 404, id="encoded"),
        pytest.param("/p", "/p/raft/probing", {}, 404, id="twice"),
    ],
)
def test_script_name_is_taken_off(
    transport: Transport, script: str, info: str, extra: dict[str, str], status: int
) -> None:
    environ: dict[str, Any] = {"SCRIPT_NAME": script, "PATH_INFO": info, **extra}
    setup_testing_defaults(environ)
    statuses: list[str] = []

    def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], object]:
        statuses.append(status)
        return lambda _: None

    body = b"".join(transport.wsgi_app(environ, start))
    assert (b'"OK":true' in body) == (status == 200)
    assert [int(text.split()[0]) for text in statuses] == [status]


def test_it_is_mounted_in_a_wsgi_application(wsgi: WsgiFront, raft: FakeRaft) -> None:
    with Transport(2, CLUSTER_ID, raft) as transport:
        app = transport.wsgi_app

        def mount(environ: Any, start_response: Any) -> Any:
            assert shift_path_info(environ) == "peer"
            return app(environ, start_response)

        wsgi.app = mount
        assert status_of(wsgi.url, "/peer/raft/probing") == 200
        assert status_of(wsgi.url, "/peer/raft", MESSAGE) == 204
    assert status_of(wsgi.url, "/peer/raft", MESSAGE) == 503
    assert raft.processed == [HEARTBEAT]


def test_what_is_behind_no_prefix_stays_as_it_is() -> None:
    assert behind_prefix("/raft", "") == "/raft"
    assert behind_prefix("*", "/p") == "*"


def test_a_body_in_tiny_pieces_lets_others_on_the_loop_have_their_turn(
    raft: FakeRaft, transport: Transport
) -> None:
    message = Message(type=8, context=bytes(5000))
    pieces = [bytes([byte]) for byte in message.marshal()]
    turns = 0
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:  # never suspends, as a server with a queue of them
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    async def others() -> None:
        nonlocal turns
        while pieces:
            turns += 1
            await asyncio.sleep(0)

    async def serve() -> None:
        headers = [(name.encode(), value.encode()) for name, value in peer_headers().items()]
        scope = {"type": "http", "method": "POST", "path": "/raft", "headers": headers}
        task = asyncio.create_task(others())
        async with asyncio.timeout(LONG_TIMEOUT):
            await transport.asgi_app(scope, receive, send)
            await task

    asyncio.run(serve())
    assert sent[0]["status"] == 204
    assert raft.processed == [message]
    assert turns >= 5000 // 64


class Dripping(io.BytesIO):
    """A body of which each byte takes its time."""

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(0.01)
        return super().read(1)


def test_wsgi_answers_a_body_that_drips_400(raft: FakeRaft) -> None:
    config = ReceiverConfig(stall_timeout_s=0.2, min_body_rate=10_000)
    handlers = handlers_of(raft, config)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/raft",
        "CONTENT_LENGTH": "100000",
        "wsgi.input": Dripping(bytes(100_000)),
    }
    setup_testing_defaults(environ)
    for name, value in peer_headers().items():
        environ["HTTP_" + name.replace("-", "_").upper()] = value
    statuses: list[str] = []
    wsgi_app(handlers, config)(environ, lambda status, *_: statuses.append(status))  # type: ignore[arg-type,func-returns-value]
    assert statuses == ["400 Bad Request"]
    assert (raft.processed, handlers.received.failures) == ([], 1)
