"""Ids, versions, request heads and answers. Upstream: ``util_test.go``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline._version import __version__
from pipeline.errors import (
    ClusterIDMismatchError,
    IncompatibleVersionError,
    MemberRemovedError,
    PostError,
    UnexpectedStatusError,
    UsageError,
)
from pipeline.identity import Identity, Version, compare_major_minor
from pipeline.wire import protocol
from pipeline.wire.protocol import (
    check_answer,
    check_version_compatibility,
    format_id,
    min_cluster_version,
    parse_id,
    post_url,
    probe_head,
    server_version,
)

V = Version.parse
MAX_ID = 2**64 - 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param("2.1.0", "2.1.0", 0, id="equal"),
        pytest.param("2.0.0", "2.1.0", -1, id="older"),
        pytest.param("2.2.0", "2.1.0", 1, id="newer"),
        pytest.param("2.1.1", "2.1.0", 0, id="patch ignored"),
        pytest.param("2.1.0-alpha.0", "2.1.0", 0, id="pre-release ignored"),
        pytest.param("10.0.0", "9.9.0", 1, id="numbers, not text"),
    ],
)
def test_compare_major_minor_version(a: str, b: str, expected: int) -> None:
    assert compare_major_minor(V(a), V(b)) == expected


VERSION_HEADERS = [
    pytest.param(None, "2.0.0", (2, 0), id="missing"),
    pytest.param("", "2.0.0", (2, 0), id="empty"),
    pytest.param("2.1.0", "2.1.0", (2, 1), id="strict"),
    pytest.param("2.1.0-alpha.0+git", "2.1.0-alpha.0+git", (2, 1), id="pre-release and metadata"),
    pytest.param("3.5", "3.5", (3, 5), id="no patch"),
    pytest.param("v3.5.0", "v3.5.0", (3, 5), id="leading v"),
    pytest.param("3", "3", (3, 0), id="major only"),
]


def headers(name: str, value: str | None) -> dict[str, str]:
    return {} if value is None else {name: value}


@pytest.mark.parametrize(("value", "text", "major_minor"), VERSION_HEADERS)
def test_server_version(value: str | None, text: str, major_minor: tuple[int, int]) -> None:
    version = server_version(headers("x-server-version", value))
    assert version is not None
    assert str(version) == text
    assert version[:2] == major_minor


@pytest.mark.parametrize(("value", "text", "major_minor"), VERSION_HEADERS)
def test_min_cluster_version(value: str | None, text: str, major_minor: tuple[int, int]) -> None:
    version = min_cluster_version(headers("x-min-cluster-version", value))
    assert version is not None
    assert str(version) == text
    assert version[:2] == major_minor


MALFORMED_VERSIONS = [
    "x", "3.", ".5", "3.5.", "3.5.0.0", "-3.5.0", "3.-5.0", "3.5.0-", "3.5.0+", "3.5.0 ", " 3.5.0",
    "3.5.0\n", "3,5", "0x3.5", "vv3.5", "\u0663.\u0665.\u0660", "3.5.0-ä", "9" * 19 + ".0.0",
    "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED_VERSIONS)
def test_a_malformed_version_is_none_and_incompatible(text: str) -> None:
    assert server_version({"x-server-version": text}) is None
    assert min_cluster_version({"x-min-cluster-version": text}) is None
    local = V("3.5.1")
    for server, min_cluster in ((None, local), (local, None), (None, None)):
        reason = check_version_compatibility(server, min_cluster, local=local, local_min=local)
        assert reason == "remote version is malformed"
    with pytest.raises(UsageError, match="version: "):
        V(text)


@pytest.mark.parametrize(
    ("server", "min_cluster", "reason"),
    [
        pytest.param("3.5.1", "3.0.0", None, id="the same as ours"),
        pytest.param("3.0.0", "0.0.0", None, id="our minimum"),
        pytest.param("4.0.0", "3.5.1", None, id="next major, takes ours"),
        pytest.param("3.6.0", "3.5.9", None, id="patch ignored"),
        pytest.param("2.0.0", "0.0.0", "remote version is too low", id="older than our minimum"),
        pytest.param("2.9.9", "2.0.0", "remote version is too low", id="just below our minimum"),
        pytest.param("4.1.0", "4.0.0", "local version is too low", id="does not take ours"),
        pytest.param("3.6.0", "3.6.0", "local version is too low", id="minor decides"),
        pytest.param("2.0.0", "9.0.0", "remote version is too low", id="server first"),
    ],
)
def test_check_version_compatibility(server: str, min_cluster: str, reason: str | None) -> None:
    local, local_min = V("3.5.1"), V("3.0.0")
    assert (
        check_version_compatibility(V(server), V(min_cluster), local=local, local_min=local_min)
        == reason
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1, "1"), (0xCDF818194E3A8C32, "cdf818194e3a8c32"),
                        (MAX_ID, "f" * 16)]
)  # fmt: skip
def test_ids_are_written_in_hex_and_read_back(value: int, text: str) -> None:
    assert format_id(value) == text
    assert parse_id(text) == value


@pytest.mark.parametrize("value", [-1, MAX_ID + 1, True, 1.0, "1", None])
def test_refuses_to_write_what_is_not_an_id(value: int) -> None:
    with pytest.raises(UsageError, match=re.escape(f"id: {value!r}")):
        format_id(value)


@pytest.mark.parametrize(
    ("text", "value"), [("CDF8", 0xCDF8), ("00cdf8", 0xCDF8), ("0" * 100 + "1", 1), ("000", 0)]
)
def test_reads_ids_of_any_case_with_leading_zeros(text: str, value: int) -> None:
    assert parse_id(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "0x1", "1_0", " 1", "1\n", "+1", "-1", "g", "1" + "0" * 16, "f" * 5000, "\u0661"),
        *(b"1", 1, None, bytearray(b"1")),
    ],
)
def test_refuses_to_read_what_is_not_an_id(text: str) -> None:
    with pytest.raises(UsageError, match="id: ") as caught:
        parse_id(text)
    assert len(str(caught.value)) < 500


HEAD = {
    "member_id": 0x8E9E05C52164694D,
    "cluster_id": 0xCDF818194E3A8C32,
    "peer_urls": ["http://10.0.0.1:2380"],
    "server_version": "3.4.23",
    "min_cluster_version": "3.0.0",
}


def request_head(url: str, *, peer_urls: Sequence[str], **given: Any) -> bytes:
    """Build the head of a member that is described by ``HEAD``, or nearly so."""
    how = {name: given.pop(name) for name in ("path", "content_type") if name in given}
    return protocol.request_head(Identity(peer_urls=tuple(peer_urls), **given), url, **how)


def test_request_head_has_etcds_lines_in_gos_order() -> None:
    assert request_head("http://10.0.0.2:2380", **HEAD) == (
        b"POST /raft HTTP/1.1\r\n"
        b"Host: 10.0.0.2:2380\r\n"
        b"User-Agent: raft-pipeline/" + __version__.encode() + b"\r\n"
        b"Content-Type: application/protobuf\r\n"
        b"X-Etcd-Cluster-Id: cdf818194e3a8c32\r\n"
        b"X-Min-Cluster-Version: 3.0.0\r\n"
        b"X-Peerurls: http://10.0.0.1:2380\r\n"
        b"X-Server-From: 8e9e05c52164694d\r\n"
        b"X-Server-Version: 3.4.23\r\n"
        b"Accept-Encoding: identity\r\n"
        b"Content-Length: "
    )


def test_request_head_sorts_and_joins_peer_urls() -> None:
    head = request_head("http://a:1", **HEAD | {"peer_urls": ["http://b:2", " http://b:1"]})
    assert b"\r\nX-Peerurls: http://b:1,http://b:2\r\n" in head


def test_request_head_leaves_out_peer_urls_if_there_are_none() -> None:
    assert b"X-Peerurls" not in request_head("http://a:1", **HEAD | {"peer_urls": ()})


@pytest.mark.parametrize("url", ["http://[::1]:2380", "https://[::1]:2380"])
def test_request_head_keeps_the_brackets_of_ipv6(url: str) -> None:
    assert b"\r\nHost: [::1]:2380\r\n" in request_head(url, **HEAD)


@pytest.mark.parametrize("url", ["http://[fe80::1%25eth0]:2380", "http://[fe80::1%eth0]:2380"])
def test_heads_have_no_zone(url: str) -> None:
    """It is the sender's own name for one of its interfaces (RFC 6874 section 4)."""
    head = request_head(url, **HEAD | {"peer_urls": [url, "http://a:1"]})
    assert b"\r\nHost: [fe80::1]:2380\r\n" in head
    assert b"\r\nX-Peerurls: http://[fe80::1]:2380,http://a:1\r\n" in head
    assert b"\r\nHost: [fe80::1]:2380\r\n" in probe_head(url)


@pytest.mark.parametrize("change", [{"url": "http://[::]:1"}, {"peer_urls": ["http://0.0.0.0:1"]}])
def test_request_head_refuses_a_wildcard(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="wildcard"):
        request_head(**{"url": "http://a:1", **HEAD, **change})


def test_request_head_of_a_snapshot() -> None:
    head = request_head(
        "http://a:1", path="/raft/snapshot", content_type="application/octet-stream", **HEAD
    )
    assert head.startswith(b"POST /raft/snapshot HTTP/1.1\r\n")
    assert b"\r\nContent-Type: application/octet-stream\r\n" in head


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"url": "http://a:1\r\nX-Evil: 1"}, id="url"),
        pytest.param({"url": "http://a:1/raft"}, id="url with path"),
        pytest.param({"url": "unix://a"}, id="unix url"),
        pytest.param({"peer_urls": ["http://a:1\r\nX-Evil: 1"]}, id="peer url"),
        pytest.param({"peer_urls": ["http://a:1,\r\nhttp://b:1"]}, id="peer urls in one"),
        pytest.param({"server_version": "3.5.1\r\nX-Evil: 1"}, id="server version"),
        pytest.param({"min_cluster_version": "3.0.0\n"}, id="min cluster version"),
        pytest.param({"content_type": "text/plain\r\nX-Evil: 1"}, id="content type"),
        pytest.param({"path": "/raft HTTP/1.1\r\nX-Evil: 1\r\n"}, id="path"),
        pytest.param({"member_id": -1}, id="member id"),
        pytest.param({"cluster_id": 2**64}, id="cluster id"),
    ],
)
def test_request_head_refuses_what_could_smuggle_a_line(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        request_head(**{"url": "http://a:1", **HEAD, **change})


def test_post_url() -> None:
    assert post_url("http://localhost:2380") == "http://localhost:2380/raft"
    assert post_url("http://localhost:2380", "/raft/snapshot").endswith(":2380/raft/snapshot")


URL = "http://10.0.0.2:2380/raft"


def judge(status: int, body: bytes = b"", **response_headers: str) -> PostError | None:
    lower = {name.replace("_", "-"): value for name, value in response_headers.items()}
    return check_answer(status, body, lower, peer_id=2, url=URL)


@pytest.mark.parametrize("body", [b"", b"anything"])
def test_204_and_only_204_is_success(body: bytes) -> None:
    assert judge(204, body) is None


@pytest.mark.parametrize(
    ("status", "phrase"),
    [
        (100, "Continue"),
        (200, "OK"),
        (201, "Created"),
        (202, "Accepted"),
        (301, "Moved Permanently"),
        (400, "Bad Request"),
        (404, "Not Found"),
        (410, "Gone"),
        (413, "Request Entity Too Large"),
        (414, "Request URI Too Long"),
        (416, "Requested Range Not Satisfiable"),
        (418, "I'm a teapot"),
        (422, "Unprocessable Entity"),
        (299, ""),
        (599, ""),
        (999, ""),
    ],
)
def test_any_other_status_is_unexpected(status: int, phrase: str) -> None:
    error = judge(status, b"incompatible version")
    assert type(error) is UnexpectedStatusError
    assert str(error) == f'unexpected http status {phrase} while posting to "{URL}"'
    assert (error.peer_id, error.url, error.status) == (2, URL, status)


def test_500_says_whose_fault_it_is() -> None:
    error = judge(500, b"incompatible version")
    assert type(error) is UnexpectedStatusError
    assert str(error) == (
        f'unexpected http status Internal Server Error while posting to "{URL}" '
        "(500: the member could not process it)"
    )


def test_403_is_a_removed_member() -> None:
    error = judge(403, b"incompatible version")
    assert type(error) is MemberRemovedError
    assert str(error) == "the member has been permanently removed from the cluster"


@pytest.mark.parametrize("body", [b"incompatible version", b"incompatible version\n"])
def test_412_incompatible_version(body: bytes) -> None:
    error = judge(412, body)
    assert type(error) is IncompatibleVersionError
    assert str(error) == "incompatible version"


@pytest.mark.parametrize("body", [b"cluster ID mismatch", b"cluster ID mismatch\n"])
def test_412_cluster_id_mismatch_says_which_cluster_the_peer_is_of(body: bytes) -> None:
    error = judge(412, body, x_etcd_cluster_id="cdf8")
    assert type(error) is ClusterIDMismatchError
    assert str(error) == "cluster ID mismatch"
    assert error.remote_cluster_id == "cdf8"
    missing = judge(412, body)
    assert isinstance(missing, ClusterIDMismatchError)
    assert missing.remote_cluster_id == ""


# What Go 1.26 prints for %q of these bytes.
@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        (b"", r'""'),
        (b"to field mismatch\n", r'"to field mismatch\n"'),
        (b"incompatible version\n\n", r'"incompatible version\n\n"'),
        (b"incompatible version\r\n", r'"incompatible version\r\n"'),
        (b"Cluster ID mismatch", r'"Cluster ID mismatch"'),
        (b'a"b\\c', r'"a\"b\\c"'),
        (b"\a\b\f\n\r\t\v\x00\x7f", r'"\a\b\f\n\r\t\v\x00\x7f"'),
        (b"\xff\xc3\xa9\xe2\x80\x8b\xc2\xa0", '"\\xffé\\u200b\\u00a0"'),
        ("\U0001f600\U000e0001".encode(), '"\U0001f600\\U000e0001"'),
    ],
)
def test_412_with_another_body_quotes_it_as_go_does(body: bytes, quoted: str) -> None:
    error = judge(412, body)
    assert type(error) is UnexpectedStatusError
    assert str(error) == f"unhandled error {quoted} when precondition failed"
