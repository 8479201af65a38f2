"""Who is given a stream, and what everybody else is answered: order, statuses, bytes (spec 8.2).

Upstream: ``http_test.go`` ``TestServeRaftStreamPrefix`` and ``TestServeRaftStreamPrefixBad``, which
have their names in ``tests/functional/test_streams.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from pipeline.identity import Identity
from pipeline.receive.handlers import Handlers
from pipeline.wire.answers import Answer, Request, render, stream_answer
from tests.support.raft import FakeRaft

MEMBER = 0xA1
PEER = 0xB2
REMOVED = 0xC3
STRANGER = 0xD4
URL = "http://10.0.0.4:2380"


class FakePeers:
    """The node's streams: there is one peer, and one who was removed."""

    def __init__(self) -> None:
        self.is_stopping = False

    def has_peer(self, peer_id: int) -> bool:
        return peer_id in (PEER, REMOVED)


class Watch:
    """Keeps who was shown to it."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, tuple[str, ...]]] = []

    def note(
        self, sender: int, urls: tuple[str, ...], remote: object, *, is_authenticated: bool
    ) -> None:
        self.noted.append((sender, urls))

    def is_watched(self, sender: int, *, is_authenticated: bool) -> bool:
        return False


class Raft(FakeRaft):
    """Asks are kept; the answer may be an error."""

    def __init__(self) -> None:
        super().__init__()
        self.removed = {REMOVED}
        self.asked: list[int] = []
        self.error: BaseException | None = None

    def is_id_removed(self, member_id: int) -> bool:
        self.asked.append(member_id)
        if self.error is not None:
            raise self.error
        return super().is_id_removed(member_id)


@pytest.fixture
def raft() -> Raft:
    return Raft()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def handlers(raft: Raft, watch: Watch) -> Handlers:
    handlers = Handlers(raft, Identity(MEMBER, 0x7, (), "3.6.0"), senders=watch)
    handlers.streams = FakePeers()
    return handlers


def dial(
    path: str = f"/raft/stream/message/{PEER:x}", method: str = "GET", **changes: str | None
) -> Request:
    """Return a peer's dial; ``x_raft_to=None`` leaves a header out."""
    headers: dict[str, str | None] = {
        "x-etcd-cluster-id": "7",
        "x-min-cluster-version": "3.0.0",
        "x-peerurls": URL,
        "x-raft-to": f"{MEMBER:x}",
        "x-server-from": f"{PEER:x}",
        "x-server-version": "3.5.1",
    }
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    given = {name: value for name, value in headers.items() if value is not None}
    return Request(method, path, given, "10.0.0.2:1234")


def refusal(handlers: Handlers, request: Request) -> tuple[int, str]:
    answer = handlers.check(request, can_detach=True)
    assert answer is not None
    assert not answer.close
    assert not answer.is_endless
    return answer.status, answer.body.decode()


def is_given(handlers: Handlers, request: Request) -> bool:
    return handlers.check(request, can_detach=True) is None


@pytest.mark.parametrize("kind", ["message", "msgapp"])
@pytest.mark.parametrize("spelling", ["b2", "B2", "000b2"])
def test_a_peer_is_given_its_stream_however_it_spells_its_id(
    handlers: Handlers, kind: str, spelling: str
) -> None:
    assert is_given(handlers, dial(f"/raft/stream/{kind}/{spelling}"))


def test_what_x_server_from_says_does_not_matter(handlers: Handlers) -> None:
    assert is_given(handlers, dial(x_server_from="99"))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD"])
def test_the_method_is_looked_at_first_and_costs_no_version(
    handlers: Handlers, method: str
) -> None:
    answer = handlers.check(
        dial("/raft/stream/strange", method, x_etcd_cluster_id="8"), can_detach=True
    )
    assert answer is not None
    assert answer.status == 405
    assert answer.body == b"Method Not Allowed\n"
    names = [name for name, _ in answer.headers]
    assert ("Allow", "GET") in answer.headers
    assert "X-Server-Version" not in names


@pytest.mark.parametrize(
    "path",
    [
        "/raft/stream/message",
        "/raft/stream/message/x/b2",
        "/raft/stream/message/b2/",
        "/raft/stream/strange/b2",
        "/raft/stream/",
    ],
)
def test_a_path_that_is_none_of_a_stream(handlers: Handlers, path: str) -> None:
    assert refusal(handlers, dial(path)) == (404, "invalid path\n")


@pytest.mark.parametrize("member", ["", "0xb2", "g", "1" * 17])
def test_a_path_with_no_member_in_it(handlers: Handlers, member: str) -> None:
    assert refusal(handlers, dial(f"/raft/stream/message/{member}")) == (404, "invalid from\n")


@pytest.mark.parametrize("to", [None, "", "A1", "00a1", "b2"])
def test_whom_it_is_for_is_compared_as_text(handlers: Handlers, to: str | None) -> None:
    assert refusal(handlers, dial(x_raft_to=to)) == (412, "to field mismatch\n")


def test_each_check_comes_before_those_behind_it(handlers: Handlers, raft: Raft) -> None:
    """From the last to the first: what is wrong last is told only when all before is right."""
    wrong: dict[str, str | None] = {"x_raft_to": "99"}
    path = "/raft/stream/message/"
    assert refusal(handlers, dial(f"{path}{PEER:x}", **wrong))[0] == 412
    assert refusal(handlers, dial(f"{path}{STRANGER:x}", **wrong)) == (
        404,
        "error sender not found\n",
    )
    raft.removed.add(STRANGER)
    assert refusal(handlers, dial(f"{path}{STRANGER:x}", **wrong)) == (410, "removed member\n")
    asked = len(raft.asked)
    assert refusal(handlers, dial(f"{path}zz", **wrong)) == (404, "invalid from\n")
    assert refusal(handlers, dial("/raft/stream/x/zz", **wrong)) == (404, "invalid path\n")
    wrong["x_etcd_cluster_id"] = "07"
    assert refusal(handlers, dial("/raft/stream/x/zz", **wrong)) == (412, "cluster ID mismatch\n")
    wrong["x_server_version"] = "2.3.0"
    assert refusal(handlers, dial("/raft/stream/x/zz", **wrong)) == (412, "incompatible version\n")
    assert len(raft.asked) == asked  # a caller of another cluster is no reason to ask


def test_a_peer_that_was_removed_is_told_so(handlers: Handlers) -> None:
    assert refusal(handlers, dial(f"/raft/stream/msgapp/{REMOVED:x}")) == (
        410,
        "removed member\n",
    )


@pytest.mark.parametrize("error", [RuntimeError("no"), MemoryError()])
def test_a_raft_that_cannot_say_has_removed_nobody(
    handlers: Handlers, raft: Raft, error: BaseException
) -> None:
    """An etcd that is answered 410 ends itself."""
    raft.error = error
    raft.removed = {PEER, STRANGER}
    assert is_given(handlers, dial())
    assert refusal(handlers, dial(f"/raft/stream/message/{STRANGER:x}"))[0] == 404


def test_what_an_async_raft_returns_is_not_taken_for_yes(handlers: Handlers, raft: Raft) -> None:
    async def later() -> bool:
        return True

    raft.is_id_removed = lambda _: later()  # type: ignore[method-assign, assignment, return-value]
    assert is_given(handlers, dial())


def test_a_stranger_is_shown_with_its_urls_by_the_id_of_its_path(
    handlers: Handlers, watch: Watch
) -> None:
    path = f"/raft/stream/message/{STRANGER:x}"
    assert refusal(handlers, dial(path, x_server_from="99"))[0] == 404
    assert refusal(handlers, dial(path, x_peerurls=None))[0] == 404
    assert watch.noted == [(STRANGER, (URL,))]


def test_nobody_else_is_shown(handlers: Handlers, watch: Watch) -> None:
    is_given(handlers, dial())
    refusal(handlers, dial(f"/raft/stream/message/{REMOVED:x}"))
    refusal(handlers, dial("/raft/stream/message/zz"))
    refusal(handlers, dial(f"/raft/stream/message/{STRANGER:x}", x_etcd_cluster_id="8"))
    assert watch.noted == []


def without_date(rendered: bytes) -> str:
    return re.sub(r"Date: [^\r]*\r\n", "", rendered.decode())


def test_a_refusal_has_the_headers_of_an_etcd_s(handlers: Handlers) -> None:
    answer = handlers.check(dial(x_raft_to="1"), can_detach=True)
    assert isinstance(answer, Answer)
    assert without_date(render(answer)) == (
        "HTTP/1.1 412 Precondition Failed\r\n"
        "X-Server-Version: 3.6.0\r\n"
        "X-Etcd-Cluster-Id: 7\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Content-Length: 18\r\n"
        "\r\n"
        "to field mismatch\n"
    )


def test_the_head_of_a_stream_is_an_etcd_s_to_the_byte(handlers: Handlers) -> None:
    head = stream_answer(handlers.stream_headers, is_chunked=True).decode()
    assert re.fullmatch(
        "HTTP/1.1 200 OK\r\n"
        "X-Etcd-Cluster-Id: 7\r\n"
        "X-Server-Version: 3.6.0\r\n"
        r"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT"
        "\r\nTransfer-Encoding: chunked\r\n\r\n",
        head,
    )


def test_a_caller_that_knows_no_chunks_reads_to_the_end_of_the_connection(
    handlers: Handlers,
) -> None:
    head = stream_answer(handlers.stream_headers, is_chunked=False).decode()
    assert "Transfer-Encoding" not in head
    assert "Content-Length" not in head
    assert head.endswith("Connection: close\r\n\r\n")


@pytest.mark.parametrize("has_streams", [True, False])
def test_who_has_no_connection_to_give_refuses_without_a_version(
    handlers: Handlers, has_streams: bool
) -> None:
    """As do all with ``streams=False``: etcd then posts, and keeps the peer active."""
    if not has_streams:
        handlers.streams = None
    answer = handlers.check(dial(), can_detach=not has_streams)
    assert answer is not None
    assert answer.status == 404
    assert answer.is_endless
    assert "X-Server-Version" not in [name for name, _ in answer.headers]


def test_a_node_that_is_being_stopped_tells_nobody_that_it_is_no_peer(handlers: Handlers) -> None:
    peers = FakePeers()
    peers.is_stopping = True
    handlers.streams = peers
    answer = handlers.check(dial(f"/raft/stream/message/{STRANGER:x}"), can_detach=True)
    assert answer is not None
    assert answer.status == 503
    assert answer.close
    assert "X-Server-Version" not in [name for name, _ in answer.headers]


# -- certificates


def with_certificate(request: Request, member: int) -> Request:
    return replace(request, certificate={"serialNumber": f"{member:x}"})


@pytest.fixture
def bound(raft: Raft, watch: Watch) -> Handlers:
    """Return handlers that know whose certificate is whose."""

    def allow_member(certificate: Mapping[str, Any], member_id: int) -> bool:
        return bool(certificate["serialNumber"] == f"{member_id:x}")

    handlers = Handlers(
        raft, Identity(MEMBER, 0x7, (), "3.6.0"), senders=watch, allow_member=allow_member
    )
    handlers.streams = FakePeers()
    return handlers


def test_a_peer_is_given_its_stream_with_its_own_certificate(bound: Handlers) -> None:
    assert is_given(bound, with_certificate(dial(), PEER))


@pytest.mark.parametrize(
    ("path_member", "header_member", "certificate"),
    [
        (PEER, PEER, STRANGER),  # says throughout that it is the peer
        (PEER, STRANGER, STRANGER),  # asks for the peer's stream with its own name
        (STRANGER, PEER, STRANGER),
        (REMOVED, STRANGER, STRANGER),
    ],
)
def test_nobody_is_given_anything_with_the_certificate_of_another(
    bound: Handlers, watch: Watch, path_member: int, header_member: int, certificate: int
) -> None:
    path = f"/raft/stream/message/{path_member:x}"
    request = with_certificate(dial(path, x_server_from=f"{header_member:x}"), certificate)
    assert refusal(bound, request) == (412, "certificate not allowed for this member\n")
    assert watch.noted == []


def test_a_certificate_without_a_name_beside_it_is_nobody_s(bound: Handlers) -> None:
    assert refusal(bound, with_certificate(dial(x_server_from=None), PEER))[0] == 412
