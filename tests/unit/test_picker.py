"""URLPicker and the rules for peer URLs. Upstream: ``urlpick_test.go``, ``urls_test.go``."""

from __future__ import annotations

import pytest

from pipeline.errors import UsageError
from pipeline.send.picker import URLPicker
from pipeline.wire.urls import parse_peer_urls, parse_urls

A, B, C = "http://127.0.0.1:2380", "http://127.0.0.1:7001", "http://127.0.0.1:9001"


def test_url_picker_pick_twice() -> None:
    picker = URLPicker([A, B])
    picked = picker.pick()
    assert picked in (A, B)
    assert picker.pick() == picked


def test_url_picker_update() -> None:
    picker = URLPicker([A, B])
    picker.unreachable(A)
    picker.update(["http://localhost:2380", "http://localhost:7001"])
    assert picker.pick() == "http://localhost:2380"


def test_url_picker_unreachable() -> None:
    picker = URLPicker([A, B])
    picked = picker.pick()
    picker.unreachable(picked)
    assert picker.pick() != picked


def test_starts_with_the_smallest_url() -> None:
    assert URLPicker([C, A, B]).pick() == A


def test_several_workers_failing_on_one_url_advance_once() -> None:
    picker = URLPicker([A, B, C])
    for _ in range(4):
        picker.unreachable(A)
    assert picker.pick() == B


def test_goes_round_all_urls_and_back_to_the_first() -> None:
    picker = URLPicker([A, B, C])
    seen = []
    for _ in range(4):
        seen.append(picker.pick())
        picker.unreachable(picker.pick())
    assert seen == [A, B, C, A]


def test_stays_when_there_is_one_url_only() -> None:
    picker = URLPicker([A])
    picker.unreachable(A)
    assert picker.pick() == A


def test_stays_when_the_failing_url_was_removed_by_an_update() -> None:
    picker = URLPicker([A])
    picker.update([B, C])
    picker.unreachable(A)
    assert picker.pick() == B


def test_a_bad_update_changes_nothing() -> None:
    picker = URLPicker([A, B])
    picker.unreachable(A)
    with pytest.raises(UsageError):
        picker.update([C, "nonsense"])
    assert picker.pick() == B


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        pytest.param([" http://a:1\t"], ("http://a:1",), id="trimmed"),
        pytest.param(["http://b:1", "http://a:2", "http://a:10"],
                     ("http://a:10", "http://a:2", "http://b:1"), id="sorted as text"),
        pytest.param(["HTTP://Node-1.Example:1"], ("http://Node-1.Example:1",), id="scheme case"),
        pytest.param(["https://10.0.0.1:2380"], ("https://10.0.0.1:2380",), id="https"),
        pytest.param(["http://[::1]:2380"], ("http://[::1]:2380",), id="ipv6"),
        pytest.param(["http://[fe80::1%25eth0]:1"], ("http://[fe80::1%25eth0]:1",), id="zone"),
        pytest.param(["unix://localhost:8888"], ("unix://localhost:8888",), id="unix"),
        pytest.param(["unixs:///run/peer.sock"], ("unixs:///run/peer.sock",), id="unixs path"),
        pytest.param((url for url in (B, A)), (A, B), id="any iterable"),
        pytest.param([A, A], (A, A), id="the same twice"),
    ],
)  # fmt: skip
def test_accepts(urls: list[str], expected: tuple[str, ...]) -> None:
    assert parse_urls(urls) == expected


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("", "scheme"),
        ("a:1", "scheme"),
        ("//a:1", "scheme"),
        ("ftp://a:1", "scheme"),
        ("http:a:1", "scheme"),
        ("http://", "address"),
        ("unix://", "address"),
        ("http://a", "host:port"),
        ("http://a:", "host:port"),
        ("http://:1", "host:port"),
        ("http://::1:1", "host:port"),
        ("http://[::g]:1", "host:port"),
        ("http://a:65536", "host:port"),
        ("http://a:-1", "host:port"),
        ("http://a:+1", "host:port"),
        ("http://a:x", "host:port"),
        ("http://a,b:1", "host:port"),
        ("http://a:1/", "after the port"),
        ("https://a:1/raft", "after the port"),
        ("http://a:1\\raft", "after the port"),
        ("http://a:1?", "after the port"),
        ("http://a:1?x=y", "after the port"),
        ("http://a:1#f", "after the port"),
        ("http://user:pw@a:1", "user name"),
        ("http://a b:1", "printable"),
        ("http://a:1\r\nX-Evil: 1", "printable"),
        ("http://a\x00:1", "printable"),
        ("http://a:1\n:2", "printable"),
        ("http://ä:1", "printable"),
        ("unix://a\r\nb", "printable"),
    ],
)
def test_refuses_naming_value_and_rule(url: str, rule: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_urls([A, url])
    assert repr(url) in str(caught.value)
    assert rule in str(caught.value)


@pytest.mark.parametrize("urls", [[], "http://a:1", b"http://a:1", [b"http://a:1"], [None]])
def test_refuses_what_is_not_a_list_of_urls(urls: list[str]) -> None:
    with pytest.raises(UsageError, match="urls: "):
        parse_urls(urls)


@pytest.mark.parametrize(
    "url", ["http://0.0.0.0:1", "https://[::]:1", "http://0:1", "http://[::ffff:0.0.0.0]:1"]
)
def test_a_wildcard_can_be_listened_at_but_is_no_address_of_a_peer(url: str) -> None:
    assert parse_urls([url]) == (url,)
    picker = URLPicker([A])
    for use in (parse_peer_urls, URLPicker, picker.update):
        with pytest.raises(UsageError, match="wildcard address can be listened at but not reached"):
            use([B, url])
    assert picker.urls == (A,)
