"""The order of an epoch: how often each unit is seen, next to whom, and that nothing but seed and epoch decides."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.order import EpochBatches, epoch_batches, epoch_sizes
from qlora_cli.data.units import Units
from tests.support.rows import fake_units

SEED = st.integers(0, 2**32 - 1)
SOURCES = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=60), min_size=1, max_size=3)
WEIGHTS = st.lists(st.sampled_from([0.01, 0.3, 0.5, 1.0, 1.5, 2.0, 3.7]), min_size=3, max_size=3)


def listed(batches: EpochBatches) -> list[list[int]]:
    return [batches.batch(i) for i in range(len(batches))]


def seen(units: Units, epoch: int, seed: int = 0) -> Counter[int]:
    """How often an epoch has each unit."""
    return Counter(i for batch in listed(epoch_batches(units, 8, seed=seed, epoch=epoch)) for i in batch)


@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=300),
    batch_size=st.integers(1, 17),
    seed=SEED,
    pack_to=st.sampled_from([None, 900, 2000]),
)
@settings(max_examples=80, deadline=None)
def test_an_epoch_has_every_row_once_in_the_fewest_batches(
    lengths: list[int], batch_size: int, seed: int, pack_to: int | None
) -> None:
    """An epoch visits each row exactly once, packed or not, in as few batches as hold its units; one at most is
    short."""
    units = fake_units(lengths, pack_to=pack_to, seed=seed)
    batches = listed(epoch_batches(units, batch_size, seed=seed, epoch=3))
    assert sorted(row for batch in batches for i in batch for row in units.rows_of(i)) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(units) / batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert max(map(len, batches)) <= batch_size


@given(sources=SOURCES, weights=WEIGHTS, seed=SEED, packing=st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_weight_is_how_often_units_are_seen(
    sources: list[list[int]], weights: list[float], seed: int, packing: bool
) -> None:
    """Every epoch has weight × units of a source, rounded and at least one, and after any epoch the units of a source
    have been seen equally often, give or take one."""
    units = fake_units(*sources, weights=weights[: len(sources)], pack_to=50 if packing else None)
    sizes = np.bincount(units.part_of).tolist()
    total: Counter[int] = Counter()
    for epoch in range(5):
        counts = seen(units, epoch, seed)
        total += counts
        for part, weight in enumerate(units.weights):
            members = np.flatnonzero(units.part_of == part).tolist()
            assert sum(counts[i] for i in members) == max(1, round(weight * sizes[part])) == epoch_sizes(units)[part]
            assert max(total[i] for i in members) - min(total[i] for i in members) <= 1


def test_weights_one_two_and_a_half() -> None:
    """Once, twice, and half of the rows now, the other half in the next epoch."""
    units = fake_units([7] * 40, [8] * 40, [9] * 40, weights=[1, 2, 0.5])
    first, second = seen(units, 0), seen(units, 1)
    for counts in (first, second):
        assert [counts[i] for i in range(80)] == [1] * 40 + [2] * 40
        assert sum(counts[i] for i in range(80, 120)) == 20
    assert [first[i] + second[i] for i in range(80, 120)] == [1] * 40


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    """The same seed and epoch give the same batches; another epoch, or another seed, gives others."""
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    for weights in ([1.0, 1.0], [2.0, 0.5]):
        units = fake_units(lengths[:600], lengths[600:], weights=weights)
        once = listed(epoch_batches(units, 8, seed=42, epoch=1))
        np.random.seed(7)  # the global state must not matter
        assert listed(epoch_batches(units, 8, seed=42, epoch=1)) == once
        assert listed(epoch_batches(units, 8, seed=42, epoch=2)) != once
        assert listed(epoch_batches(units, 8, seed=43, epoch=1)) != once


@pytest.mark.parametrize("count", [1, 7, 999, 5000])
def test_one_source_is_ordered_as_runs_were_recorded(count: int) -> None:
    """One source seen once an epoch has the order of the plain method, written out here. Recorded losses, and runs
    that are resumed, rest on it."""
    lengths = np.random.default_rng(count).integers(1, 500, count)
    for epoch in range(2):
        generator = np.random.default_rng(np.random.SeedSequence([42, epoch]))
        order = generator.permutation(count)
        window = 8 * min(128, max(1, math.ceil(count / 16)))
        batches: list[list[int]] = []
        for start in range(0, count, window):
            rows = sorted(order[start : start + window].tolist(), key=lambda row: lengths[row])
            batches += [rows[i : i + 8] for i in range(0, len(rows), 8)]
        wanted = [batches[i] for i in generator.permutation(len(batches))]
        assert listed(epoch_batches(fake_units(lengths), 8, seed=42, epoch=epoch)) == wanted


def test_sources_are_mixed_over_the_epoch() -> None:
    """Each tenth of an epoch has its share of both sources."""
    generator = np.random.default_rng(0)
    units = fake_units(generator.integers(1, 500, 12_000), generator.integers(1, 500, 3000), weights=[1, 2])
    batches = listed(epoch_batches(units, 8, seed=1, epoch=0))
    tenths = np.array_split(np.array([np.mean(units.part_of[batch]) for batch in batches]), 10)
    assert all(abs(tenth.mean() - 1 / 3) < 0.05 for tenth in tenths)


@pytest.mark.parametrize("sizes", [(12_000, 3000), (1000, 100), (200,)])
def test_a_row_seen_five_times_is_not_seen_twice_in_a_batch(sizes: tuple[int, ...]) -> None:
    """Its copies are equally long, and yet hardly ever batched together, in small datasets as in large ones."""
    generator = np.random.default_rng(0)
    units = fake_units(*(generator.integers(1, 500, size) for size in sizes), weights=[1, 5][-len(sizes) :])
    batches = listed(epoch_batches(units, 8, seed=1, epoch=0))
    repeated = sum(len(batch) - len(set(batch)) for batch in batches)
    assert repeated < 0.05 * sum(map(len, batches))


def test_a_small_dataset_is_batched_anew_every_epoch() -> None:
    """Grouping by length does not put the same rows together in every epoch."""
    units = fake_units(np.random.default_rng(0).permutation(200) + 10)
    groups = [{frozenset(b) for b in listed(epoch_batches(units, 8, seed=1, epoch=epoch))} for epoch in range(2)]
    assert len(groups[0] & groups[1]) < 3


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_padding_is_under_five_percent(sigma: float, weight: float) -> None:
    """On log-normal lengths, batches of 8 hold less than 5% padding, whatever the weight."""
    lengths = np.minimum(np.exp(np.random.default_rng(0).normal(5, sigma, 5000)).astype(int) + 1, 2048)
    assert padding(fake_units(lengths, weights=[weight])) < 0.05


def test_padding_of_packs() -> None:
    """The packs that could not be filled are batched with their like: padding stays where it is without packing."""
    lengths = np.minimum(np.exp(np.random.default_rng(0).normal(5, 0.8, 5000)).astype(int) + 1, 2048)
    assert padding(fake_units(lengths, pack_to=2048)) < 0.01


def padding(units: Units) -> float:
    """The share of an epoch's tokens that is padding, at batch size 8."""
    batches = listed(epoch_batches(units, 8, seed=1, epoch=0))
    laid_out = sum(int(units.lengths[batch].max()) * len(batch) for batch in batches)
    return 1 - sum(int(units.lengths[batch].sum()) for batch in batches) / laid_out


def test_batches_are_not_ordered_by_length() -> None:
    """Short and long batches are mixed over the epoch, so the loss of a step does not follow its length."""
    units = fake_units(np.arange(4000) + 1)
    means = [units.lengths[b].mean() for b in listed(epoch_batches(units, 8, seed=5, epoch=0))]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_sources_are_not_drawn_in_step() -> None:
    """Of two equal sources, half of each is seen, and not the same half: the n-th row of one may say what that of the
    other does."""
    units = fake_units([7] * 100, [7] * 100, weights=[0.5, 0.5])
    counts = seen(units, 0)
    halves = {i for i in counts if i < 100}, {i - 100 for i in counts if i >= 100}
    assert len(halves[0]) == len(halves[1]) == 50
    assert 10 < len(halves[0] & halves[1]) < 40
