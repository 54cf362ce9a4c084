"""The batches at the edges of a run are found without a look at every batch."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.batches import StepPlan, collate
from qlora_cli.data.largest import extremes
from tests.support.rows import fake_units


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    pack_to=st.sampled_from([None, 50]),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 3),
    first=st.integers(0, 30),
    steps=st.integers(1, 30),
)
def test_they_are_those_of_a_plain_loop(
    lengths: list[int],
    weight: float,
    pack_to: int | None,
    batch_size: int,
    accumulation: int,
    processes: int,
    first: int,
    steps: int,
) -> None:
    """Rows and packs, of sources that are seen more or less than once, from any step to any other: every batch of the
    steps to come, of an epoch's worth of them, is laid out, and its tokens and its labels are counted."""
    units = fake_units(lengths, [3, 5, 8], weights=[weight, 1.0], pack_to=pack_to)
    plan = StepPlan(units, batch_size, accumulation, processes, seed=7)
    found = extremes(plan, first, first + steps)
    looked_at = range(first, min(first + steps, first + plan.steps_per_epoch))
    sizes = []
    for step in looked_at:
        for process in range(processes):
            for micro in plan.step(step, process):
                batch = collate(units, micro.indices, 0)
                sizes.append((batch.input_ids.numel(), batch.supervised_tokens))
    assert found.smallest.tokens == min(tokens for tokens, _ in sizes)
    assert (found.largest.tokens, found.largest.supervised) == max(sizes)
    most = found.most_supervised
    assert (most.supervised, most.tokens) == max((supervised, tokens) for tokens, supervised in sizes)
    for sized in found:
        batch = collate(units, sized.indices, 0)
        assert tuple(batch.input_ids.shape) == (len(sized.indices), sized.longest)
        assert batch.supervised_tokens == sized.supervised


def test_a_million_rows_take_no_time() -> None:
    """Nothing loops over rows or batches: under two seconds, most of which are the shuffle's, and no row is read."""
    lengths = np.random.default_rng(0).integers(10, 2000, 1_000_000)
    units = fake_units(lengths)
    started = time.monotonic()
    found = extremes(StepPlan(units, 8), 0, 10**9)
    assert time.monotonic() - started < 2
    assert found.largest.tokens == 8 * int(lengths.max())
    assert not units.encoded.reads
