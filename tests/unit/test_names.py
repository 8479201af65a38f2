"""Hosts of URLs: addresses among them, what is proven and sent of them, and how they are shown."""

from __future__ import annotations

import pytest

from pipeline.names import is_wildcard, literal_address, proven_name, show_address, zoneless


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("[fe80::1%lo]", "fe80::1"),
        ("[::ffff:127.0.0.1]", "127.0.0.1"),
        ("[::ffff:7f00:1]", "127.0.0.1"),
        ("localhost", None),
        ("127.0.0.1.", None),
        ("node-1.example.", None),
        ("[::g]", None),
        ("ä", None),
        ("", None),
    ],
)
def test_an_address_is_told_from_a_name(host: str, address: str | None) -> None:
    found = literal_address(host)
    assert (None if found is None else str(found)) == address


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "0x0", "[::]", "[0::0]", "[::%lo]",
                                  "[::ffff:0.0.0.0]"])  # fmt: skip
def test_a_wildcard_is_one_however_it_is_written(host: str) -> None:
    assert is_wildcard(host)


@pytest.mark.parametrize("host", ["0.0.0.1", "[::1]", "any.example", "0.0.0.0.example"])
def test_other_hosts_are_no_wildcards(host: str) -> None:
    assert not is_wildcard(host)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("node-1.example", "node-1.example"),
        ("node-1.example.", "node-1.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("[2001:DB8::1]", "2001:db8::1"),
        ("[fe80::1%eth0]", "fe80::1"),
        ("[::ffff:10.0.0.1]", "10.0.0.1"),
    ],
)
def test_what_a_server_must_prove_has_no_dot_no_zone_and_no_brackets(host: str, name: str) -> None:
    assert proven_name(host) == name


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://[fe80::1%25eth0]:2380", "http://[fe80::1]:2380"),
        ("http://[fe80::1%eth0]:2380", "http://[fe80::1]:2380"),
        ("http://[::1]:2380", "http://[::1]:2380"),
        ("http://node-1.example:2380", "http://node-1.example:2380"),
        ("unix:///run/100%25]", "unix:///run/100%25]"),
    ],
)
def test_a_zone_is_left_out_of_what_is_sent(url: str, sent: str) -> None:
    assert zoneless(url) == sent


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("10.0.0.1", "10.0.0.1:7"),
        ("::1", "[::1]:7"),
        ("::ffff:10.0.0.1", "10.0.0.1:7"),
        ("::ffff:7f00:1", "127.0.0.1:7"),
        ("fe80::1%eth0", "[fe80::1%eth0]:7"),
        ("testclient", "testclient:7"),
        ("a:b", "[a:b]:7"),
    ],
)
def test_ipv4_is_shown_as_ipv4(host: str, shown: str) -> None:
    assert show_address(host, 7) == shown
