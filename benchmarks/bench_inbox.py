"""Taking: what ``take`` and the Messages it makes cost, with what arrives there beforehand."""

from __future__ import annotations

from typing import Any

import pytest
from harness import CLUSTER_ID, QuietRaft, builder
from pytest_benchmark.fixture import BenchmarkFixture

from pipeline import EncodedMessage, Inbox, Message
from pipeline.identity import Identity
from pipeline.receive.handlers import Handlers

BATCHES = (1, 16, 256)
ROUNDS = 2000


@pytest.mark.parametrize("encoded", [False, True], ids=["Message", "EncodedMessage"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_is_taken(benchmark: BenchmarkFixture, batch: int, encoded: bool) -> None:
    """MsgApps of one entry of 128 bytes and of one member, with the counting of its node."""
    inbox: Inbox[Message] | Inbox[EncodedMessage]
    inbox = Inbox(encoded=True) if encoded else Inbox()
    source = Handlers(QuietRaft(), Identity(1, CLUSTER_ID, (), "3.5.1"), inbox=inbox).source
    assert source is not None
    body: Any = builder("core", 128)(100_000).marshal()

    def arrive() -> None:
        for _ in range(batch):
            source.deliver(body)

    taken = benchmark.pedantic(inbox.take, (batch,), setup=arrive, rounds=ROUNDS)
    assert len(taken) == batch
    if benchmark.stats is not None:  # with --benchmark-disable there are none
        benchmark.extra_info["ns_per_message"] = benchmark.stats.stats.median * 1e9 / batch
