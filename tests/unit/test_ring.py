"""msgc on its own (``_ring.pxd``), through ``pipeline._core.Channel``."""

from __future__ import annotations

import sys

import pytest

from pipeline import UsageError
from pipeline._core import Channel


class Item:
    """Something whose references can be counted."""


@pytest.mark.parametrize("cap", [1, 2, 3, 63, 64, 65, 1000, 65536])
def test_holds_exactly_cap_and_gives_back_in_order(cap: int) -> None:
    channel = Channel(cap)
    items = [object() for _ in range(cap)]
    assert all(channel.try_push(item) for item in items)
    assert len(channel) == cap
    assert not channel.try_push(object())
    assert len(channel) == cap
    assert [channel.try_pop() for _ in range(cap)] == items
    assert len(channel) == 0
    assert channel.try_pop() is None


@pytest.mark.parametrize("cap", [1, 3, 4])
def test_goes_round_and_round(cap: int) -> None:
    channel = Channel(cap)
    for number in range(1000):
        assert channel.try_push(number)
        assert channel.try_pop() == number
    for number in range(cap):
        assert channel.try_push(number)
    for number in range(1000):
        assert channel.try_pop() == number
        assert channel.try_push(number + cap)


@pytest.mark.parametrize("cap", [0, 65537, 1 << 31])
def test_a_bad_cap_is_a_usage_error(cap: int) -> None:
    with pytest.raises(UsageError):
        Channel(cap)


def test_a_refused_item_is_not_held() -> None:
    channel = Channel(1)
    channel.try_push(object())
    item = Item()
    before = sys.getrefcount(item)
    assert not channel.try_push(item)
    assert sys.getrefcount(item) == before


def test_a_popped_item_is_not_held() -> None:
    channel = Channel(4)
    item = Item()
    before = sys.getrefcount(item)
    channel.try_push(item)
    assert sys.getrefcount(item) == before + 1
    assert channel.try_pop() is item
    assert sys.getrefcount(item) == before


def test_what_is_left_is_dropped_with_the_channel() -> None:
    channel = Channel(4)
    item = Item()
    before = sys.getrefcount(item)
    for _ in range(3):
        channel.try_push(item)
    del channel
    assert sys.getrefcount(item) == before
