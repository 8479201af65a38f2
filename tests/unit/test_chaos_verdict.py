"""What ``make chaos`` makes of the logs: each kind of loss is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline import Entry
from pipeline.examples.etcd import put_request
from tests.chaos.verdict import Log, violations

ITEMS = [(b"key %d" % n, b"value %d" % n) for n in range(8)]
DATA = [put_request(*put) for put in ITEMS]
ACKNOWLEDGED = dict(ITEMS[:6])  # of the others nothing is known


def entries(*, base: int = 0) -> list[Entry]:
    """The log behind an index: an empty entry, a put for each item, and one more empty one."""
    puts = [Entry(term=1, index=n, data=data) for n, data in enumerate(DATA, 2)]
    log = [Entry(term=1, index=1), *puts, Entry(term=2, index=len(ITEMS) + 2)]
    return log[base:]


def verdict(
    damage: Callable[[list[Entry]], object] = lambda log: None,
    *,
    items: list[tuple[bytes, bytes]] = ITEMS,
    base: int = 0,
) -> list[str]:
    """Of two logs, the first damaged."""
    one, two = entries(base=base), entries()
    damage(one)
    # A database at index 4 has the first three puts.
    logs = {"one": Log(base, set(ITEMS[: max(0, base - 1)]), one), "two": Log(0, set(), two)}
    return violations(ACKNOWLEDGED, items, logs)


@pytest.mark.parametrize("base", [0, 4, len(ITEMS) + 2])
def test_equal_logs_are_well(base: int) -> None:
    assert verdict(base=base) == []


@pytest.mark.parametrize("base", [0, 4])
def test_a_lost_write_is_seen(base: int) -> None:
    found = verdict(lambda log: log.pop(-5), base=base)
    assert "one has lost 1 acknowledged writes, such as b'key 4'" in found


def test_a_changed_write_is_seen() -> None:
    def change(log: list[Entry]) -> None:
        log[3] = Entry(term=1, index=4, data=put_request(b"key 2", b"other"))

    found = verdict(change)
    assert "one has lost 1 acknowledged writes, such as b'key 2'" in found
    assert "one has 1 writes that etcd has not: b'key 2'" in found
    assert "one and two differ in entry 4" in found


def test_a_write_that_etcd_lost_is_seen() -> None:
    found = verdict(items=ITEMS[1:])
    assert "etcd has lost 1 acknowledged writes, such as b'key 0'" in found


def test_a_write_that_is_committed_twice_is_seen() -> None:
    def repeat(log: list[Entry]) -> None:
        log.append(Entry(term=2, index=11, data=log[2].data))

    assert "one has 1 writes twice, such as b'key 1'" in verdict(repeat)


def test_another_order_is_seen() -> None:
    def exchange(log: list[Entry]) -> None:
        log[2].data, log[3].data = log[3].data, log[2].data

    assert "one has writes in another order than etcd" in verdict(exchange)


def test_a_write_of_which_nothing_is_known_must_be_in_all_logs_or_none() -> None:
    found = verdict(lambda log: log.pop(-2))
    assert found == [
        "etcd has 1 writes that one has not",
        "one has no entry 9",
    ]


def test_an_entry_of_another_term_is_seen() -> None:
    def change(log: list[Entry]) -> None:
        log[-1].term = 3

    assert verdict(change) == ["one and two differ in entry 10"]
