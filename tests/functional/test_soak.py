"""``make soak``: one round of it, and what it would notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak import __main__ as program
from tests.soak.__main__ import Soak, SoakError


@pytest.fixture
def soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Soak]:
    monkeypatch.setattr(program, "QUIET_S", 0.0)
    monkeypatch.setattr(program, "REPEATS", 1)
    soak = Soak(tmp_path, random.Random(1))
    soak.start()
    try:
        yield soak
    finally:
        soak.stop()


def test_a_round_does_everything_over_both_and_takes_a_sample(soak: Soak) -> None:
    sample = soak.round()
    assert soak.counts == {work.__name__: 2 for work in soak.works}
    assert sample.threads > 4
    for pair in soak.pairs:
        assert pair.is_drained()
        assert all(books.sent > 0 for books in pair.books().values())
        assert all(node.snapshots > 0 for node in pair.nodes.values())


def test_a_message_that_was_answered_and_not_processed_is_noticed(soak: Soak) -> None:
    soak.large_messages(soak.pairs[0])
    soak.check()
    soak.pairs[0].nodes[2].processed.clear()
    with pytest.raises(SoakError, match=r"plain: .* sent by 1, .* processed"):
        soak.check()


def test_books_that_do_not_balance_are_noticed(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "balances", lambda books: False)
    program.wait_until(lambda: soak.failure is not None, "the background looks at the books")
    with pytest.raises(SoakError, match="PipelineStats"):
        soak.check()
