"""What ``make soak`` makes of its samples: what grows is seen, what only varies is not."""

from __future__ import annotations

import mmap
import os
import random
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.soak.verdict import KIB, MIB, MIN_SAMPLES, Sample, growths
from tests.support.memory import IS_SANITIZED

STEADY = Sample(resident=100 * MIB, allocated=12 * MIB, blocks=220_000, threads=60, descriptors=70)


def grows(step: Callable[[int], dict[str, int]], count: int = 200) -> list[str]:
    """Name what grows in a run whose samples are changed by ``step``."""
    samples = [replace(STEADY, **step(n)) for n in range(count)]
    return [growth.name for growth in growths(samples) if not growth.is_flat]


def test_what_varies_is_flat() -> None:
    dice = random.Random(1)

    def vary(n: int) -> dict[str, int]:
        return {
            "resident": STEADY.resident + dice.randrange(-3, 4) * MIB,
            "allocated": STEADY.allocated + dice.randrange(-400, 400) * KIB,
            "blocks": STEADY.blocks + dice.randrange(-1500, 1500),
            "threads": STEADY.threads + dice.randrange(-4, 5),
            "descriptors": STEADY.descriptors + dice.randrange(-10, 10),
        }

    assert grows(vary) == []


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("resident", 64 * KIB),
        ("allocated", 10 * KIB),
        ("blocks", 10),
        ("threads", 0.1),
        ("descriptors", 0.1),
    ],
)
def test_what_leaks_in_each_round_is_seen(name: str, leak: float) -> None:
    assert grows(lambda n: {name: getattr(STEADY, name) + int(n * leak)}) == [name]


def test_what_fills_at_the_beginning_is_no_leak() -> None:
    assert grows(lambda n: {"resident": STEADY.resident - max(0, 30 - n) * MIB}) == []


def test_few_samples_say_nothing() -> None:
    with pytest.raises(ValueError, match="at least"):
        growths([STEADY] * (MIN_SAMPLES - 1))


def test_a_sample_sees_what_the_process_holds() -> None:
    before = Sample.take()
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    descriptors = [os.dup(0) for _ in range(5)]
    held = [bytearray(b"x" * (3 * MIB)), [object() for _ in range(20_000)]]
    # What malloc gives out may have been resident before; fresh pages were not. They are more than
    # the collection in between can give back.
    pages = mmap.mmap(-1, 64 * MIB)
    pages.write(b"x" * (64 * MIB))
    try:
        after = Sample.take()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        for descriptor in descriptors:
            os.close(descriptor)
    assert after.threads == before.threads + 3
    assert after.descriptors == before.descriptors + 5
    # A sanitizer gives freed memory back whenever it likes, and has an allocator of its own: the
    # other two are 0 beside it.
    assert IS_SANITIZED or after.resident > before.resident + 32 * MIB
    assert before.blocks == 0 or after.blocks > before.blocks + 15_000
    # Without a GIL no memory of Python's is malloc's.
    is_mallocs = before.allocated and not sysconfig.get_config_var("Py_GIL_DISABLED")
    assert not is_mallocs or after.allocated > before.allocated + 2 * MIB
    del held
