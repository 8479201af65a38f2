"""A head on the general path that comes byte by byte."""

from __future__ import annotations

import re

import pytest

from pipeline import general
from pipeline.config import ReceiverConfig
from pipeline.general import BodyBudget, General, Then
from pipeline.handlers import Handlers
from tests.support.http import CLUSTER_ID, raw_head
from tests.support.raft import FakeRaft

HEAD = raw_head(line="GET /raft/probing HTTP/1.1")


class Counting:
    """A pattern that counts the bytes it looks at."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern
        self.seen = 0

    def search(self, data: bytes, at: int = 0) -> re.Match[bytes] | None:
        self.seen += len(data) - at
        return self._pattern.search(data, at)


def make() -> General:
    config = ReceiverConfig()
    handlers = Handlers(FakeRaft(), cluster_id=CLUSTER_ID, server_version="3.5.1", config=config)
    return General(handlers, config, "127.0.0.1:1", BodyBudget(1), lambda _head: False)


def feed(data: bytes) -> bytes:
    """Feed bytes one by one until there is an answer."""
    connection = make()
    for at in range(len(data)):
        out, then = connection.feed(data[at : at + 1])
        if out:
            return out
        assert then is Then.READ_HEAD
    return b""


def test_no_byte_is_looked_at_again_for_each_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Counting(general._BARE)
    monkeypatch.setattr(general, "_BARE", bare)
    assert feed(HEAD).startswith(b"HTTP/1.1 200 ")
    assert bare.seen <= 2 * len(HEAD)


@pytest.mark.parametrize("bad", [b"\n", b"\r", b"\x00", b"\r\r\n"])
def test_what_is_refused_is_refused_wherever_it_comes(bad: bytes) -> None:
    for at in range(len(HEAD) - 4):
        assert feed(HEAD[:at] + bad + HEAD[at:]).startswith(b"HTTP/1.1 400 ")
