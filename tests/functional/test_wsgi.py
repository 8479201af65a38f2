"""wsgi_app, driven as servers of several kinds would; under waitress it is in test_http.py."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from pipeline import Transport
from pipeline.config import ReceiverConfig
from pipeline.receive.handlers import Handlers
from pipeline.receive.wsgi import wsgi_app
from tests.support.http import CLUSTER_ID, HEARTBEAT, handlers_of, peer_headers
from tests.support.raft import FakeRaft

CONFIG = ReceiverConfig(max_body_bytes=1000, max_head_bytes=2000)
MESSAGE = HEARTBEAT.marshal()


class Stalling(io.BytesIO):
    """The body of a peer that falls silent."""

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        if not part:
            raise TimeoutError
        return part


@pytest.fixture
def raft() -> FakeRaft:
    return FakeRaft()


@pytest.fixture
def handlers(raft: FakeRaft) -> Handlers:
    return handlers_of(raft, CONFIG)


@pytest.fixture
def ask(handlers: Handlers) -> Callable[..., int]:
    """Call the application with changes of a good environment; the status."""
    app = wsgi_app(handlers, CONFIG)

    def ask(body: bytes | io.BytesIO = MESSAGE, **changes: Any) -> int:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/raft",
            "CONTENT_LENGTH": str(len(MESSAGE)),
            "REMOTE_ADDR": "::1",
            "REMOTE_PORT": "5",
            "wsgi.input": io.BytesIO(body) if isinstance(body, bytes) else body,
        }
        for name, value in peer_headers().items():
            environ["HTTP_" + name.replace("-", "_").upper()] = value
        environ.update(changes)
        environ = {name: value for name, value in environ.items() if value is not None}
        setup_testing_defaults(environ)
        statuses: list[str] = []
        parts = app(environ, lambda status, headers: statuses.append(status))  # type: ignore[arg-type,return-value]
        assert isinstance(b"".join(parts), bytes)
        return int(statuses[0].split()[0])

    return ask


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        pytest.param({}, 204, id="no raw path, as PEP 3333 has it"),
        pytest.param({"RAW_URI": "/raft?x=y"}, 204, id="gunicorn's raw path"),
        pytest.param({"REQUEST_URI": "/raft"}, 204, id="waitress's raw path"),
        pytest.param({"RAW_URI": "/%72aft"}, 404, id="an encoded path"),
        pytest.param({"PATH_INFO": "/raft "}, 404, id="a space"),
        pytest.param({"SCRIPT_NAME": "/app"}, 204, id="mounted"),
        pytest.param({"REQUEST_METHOD": "GET"}, 405, id="GET"),
        pytest.param({"HTTP_X": "y" * 2000}, 431, id="a head too large"),
        pytest.param({"QUERY_STRING": "y" * 2000}, 431, id="a query too large"),
        pytest.param({"HTTP_X_ETCD_CLUSTER_ID": f"{CLUSTER_ID:x},1"}, 412, id="a repeated header"),
        pytest.param({"HTTP_CONTENT_ENCODING": "gzip"}, 415, id="gzip"),
        pytest.param({"CONTENT_LENGTH": "1001"}, 413, id="a body too large"),
        pytest.param({"CONTENT_LENGTH": str(len(MESSAGE) + 1)}, 400, id="a body too short"),
        pytest.param({"CONTENT_LENGTH": ""}, 204, id="no body: etcd's empty message"),
        pytest.param({"REMOTE_ADDR": None}, 204, id="no address"),
    ],
)
def test_what_servers_say_is_understood(
    ask: Callable[..., int], changes: dict[str, str], status: int
) -> None:
    assert ask(**changes) == status


def test_a_chunked_body_is_read_to_its_end_if_the_server_decodes_it(
    raft: FakeRaft, ask: Callable[..., int]
) -> None:
    chunked = {"CONTENT_LENGTH": None, "HTTP_TRANSFER_ENCODING": "chunked"}
    assert ask(**chunked, **{"wsgi.input_terminated": True}) == 204
    assert raft.processed == [HEARTBEAT]
    assert ask(bytes(1001), **chunked, **{"wsgi.input_terminated": True}) == 413
    assert ask(b"1\r\n", **chunked) == 400, "chunks were taken for a message"
    assert raft.processed == [HEARTBEAT]


def test_a_body_that_stalls_is_counted_and_answered_400(
    raft: FakeRaft, handlers: Handlers, ask: Callable[..., int]
) -> None:
    assert ask(Stalling(MESSAGE[:-1])) == 400
    assert (handlers.received.failures, raft.processed) == (1, [])


def test_the_log_says_which_peer(
    raft: FakeRaft, ask: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    raft.process_error = RuntimeError("blah")
    assert ask() == 500
    assert "from [::1]:5" in caplog.text


def test_a_transport_has_one(raft: FakeRaft) -> None:
    with Transport(2, CLUSTER_ID, raft) as transport:
        environ: dict[str, Any] = {"PATH_INFO": "/raft/probing"}
        setup_testing_defaults(environ)
        statuses: list[str] = []
        transport.wsgi_app(environ, lambda status, headers: statuses.append(status))  # type: ignore[arg-type,return-value]
    assert statuses == ["200 OK"]
