"""The budget of request bodies: what counts, and that it is given back."""

from __future__ import annotations

import threading

import pytest

from pipeline.net._budget import BodyBudget

KIB = 1 << 10


def test_bodies_share_what_there_is() -> None:
    budget = BodyBudget(1000 * KIB, 0)
    one, other = budget.share(), budget.share()
    assert one.set(600 * KIB)
    assert not other.set(401 * KIB)
    assert other.set(400 * KIB)
    assert budget.used == 1000 * KIB


def test_what_there_is_no_room_for_leaves_a_share_as_it_was() -> None:
    budget = BodyBudget(200 * KIB, 64 * KIB)
    one = budget.share()
    assert one.set(10 * KIB)
    assert not one.set(201 * KIB)
    assert budget.used == 10 * KIB
    assert one.set(200 * KIB)
    assert not one.set(200 * KIB + 1)
    assert budget.used == 200 * KIB


def test_small_bodies_have_a_room_of_their_own() -> None:
    budget = BodyBudget(100 * KIB, 128 * KIB)
    assert budget.share().set(100 * KIB)
    large = budget.share()
    assert large.set(100 * KIB)
    small = [budget.share() for _ in range(3)]
    assert [share.set(64 * KIB) for share in small] == [True, True, False]
    # One that grows out of it makes room there, if there is room elsewhere.
    assert not small[0].set(65 * KIB)
    large.close()
    assert small[0].set(65 * KIB)
    assert small[2].set(64 * KIB)
    assert budget.used == (65 + 2 * 64) * KIB


@pytest.mark.parametrize("size", [KIB, 100 * KIB])
def test_a_share_is_given_back_once_however_it_ends(size: int) -> None:
    budget = BodyBudget(100 * KIB, 100 * KIB)
    for _ in range(3):
        share = budget.share()
        assert share.set(size)
        share.close()
        share.close()
        assert budget.used == 0
        dropped = budget.share()
        assert dropped.set(size)
        del dropped
        assert budget.used == 0


def test_the_books_balance_after_many_threads_have_taken_and_given() -> None:
    budget = BodyBudget(300 * KIB, 100 * KIB)
    most = []

    def work(seed: int) -> None:
        for n in range(2000):
            share = budget.share()
            for size in (seed * KIB, (n % 100) * KIB, 150 * KIB):
                share.set(size)
                most.append(budget.used)
            share.close()

    threads = [threading.Thread(target=work, args=(n + 1,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used == 0
