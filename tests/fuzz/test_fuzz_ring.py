"""Invariant: whatever is pushed and popped, the ring does what a deque with a bound does."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from pipeline._core import Channel

#: True pushes, False pops; in runs, so that the ring gets full and empty.
OPERATIONS = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60)


@given(cap=st.integers(1, 70), operations=OPERATIONS)
def test_does_what_a_bounded_deque_does(cap: int, operations: list[tuple[bool, int]]) -> None:
    channel = Channel(cap)
    model: deque[int] = deque()
    number = 0
    for is_push, times in operations:
        for _ in range(times):
            if is_push:
                number += 1
                assert channel.try_push(number) == (len(model) < cap)
                if len(model) < cap:
                    model.append(number)
            else:
                assert channel.try_pop() == (model.popleft() if model else None)
            assert len(channel) == len(model)
