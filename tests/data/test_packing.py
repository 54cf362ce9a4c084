"""Packs: every row in one of them, none too full, and no more of them than best fit decreasing needs."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.packing import Packs, best_fit
from qlora_cli.data.units import packed_units
from tests.support.rows import fake_rows, fake_units

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120)


def pack(lengths: list[int], seed: int = 0, capacity: int = CAPACITY) -> Packs:
    return best_fit(np.array(lengths), capacity, np.random.default_rng(seed))


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing as it is written in books: each row where it leaves the least space."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [held for held in bins if sum(held) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@given(lengths=LENGTHS, capacity=st.integers(CAPACITY, 3 * CAPACITY), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_packs_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int, seed: int) -> None:
    """Whole runs of equal lengths are placed at once, and the packs hold what placing them one by one gives: as many
    packs, filled alike. Every row is in exactly one, and none holds more than the capacity."""
    rows, offsets = pack(lengths, seed, capacity)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    held = [[lengths[i] for i in rows[a:b]] for a, b in itertools.pairwise(offsets)]
    assert all(0 < sum(pack) <= capacity for pack in held)
    wanted = one_by_one(lengths, capacity)
    assert sorted(map(sum, held)) == sorted(map(sum, wanted))


@given(few=st.lists(st.integers(1, 9), min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_long_runs_of_equal_lengths_are_packed_as_one_by_one(few: list[int]) -> None:
    """Where many rows are equally long, runs fill bins in part and are split: still the same packs."""
    rows, offsets = pack(few, capacity=20)
    sums = np.add.reduceat(np.array(few)[rows], offsets[:-1])
    assert sorted(sums.tolist()) == sorted(map(sum, one_by_one(few, 20)))


def test_the_seed_draws_who_goes_with_whom() -> None:
    """The same seed gives the same packs; another gives packs of the same lengths with other rows of them."""
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 500).tolist()
    first, again, other = pack(lengths, 1), pack(lengths, 1), pack(lengths, 2)
    assert first.rows.tolist() == again.rows.tolist()
    assert first.rows.tolist() != other.rows.tolist()
    assert np.array_equal(first.offsets, other.offsets)
    assert np.array_equal(np.array(lengths)[first.rows], np.array(lengths)[other.rows])
    drawn = [packed_units(fake_rows(lengths), CAPACITY, seed).rows.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_packs_of_real_lengths_are_nearly_full() -> None:
    """On log-normal lengths, packs of 1,024 are filled to more than 98%: that is what packing is for."""
    lengths = np.minimum(np.exp(np.random.default_rng(0).normal(5, 0.7, 5000)).astype(int) + 1, 1024)
    rows, offsets = best_fit(lengths, 1024, np.random.default_rng(0))
    assert lengths.sum() / ((len(offsets) - 1) * 1024) > 0.98
    assert len(rows) == 5000


def test_what_training_would_refuse_does_not_break_a_check() -> None:
    """A row longer than the capacity has a pack of its own, and an empty one takes a place: a check counts steps of
    such rows, too, beside telling of them. No rows at all are no packs."""
    rows, offsets = pack([CAPACITY + 9, 3, 0, CAPACITY - 3])
    packs = [sorted(rows[a:b].tolist()) for a, b in itertools.pairwise(offsets)]
    assert [0] in packs
    assert sorted(map(len, packs)) == [1, 1, 2]
    assert len(packed_units(fake_rows([]), CAPACITY, seed=0)) == 0


def test_a_pack_holds_rows_of_one_source() -> None:
    """Of three sources, each is packed by itself: a weight is a source's, so a pack cannot be of two."""
    rows = fake_rows([5] * 7, [3] * 30, [20, 1], weights=[1, 2, 0.5])
    units = packed_units(rows, 20, seed=3)
    assert units.packed
    assert units.weights == (1, 2, 0.5)
    assert sorted(units.rows.tolist()) == list(range(39))
    for index in range(len(units)):
        members = units.rows_of(index)
        assert set(rows.part_of[members].tolist()) == {units.part_of[index]}
        assert rows.lengths[members].sum() == units.lengths[index] <= 20
    assert np.bincount(units.part_of).tolist() == [2, 5, 2]


def test_rows_by_themselves_are_units_as_they_are() -> None:
    """Without packing, unit i is row i of its source, with its length."""
    units = fake_units([4, 2], [9])
    assert not units.packed
    assert [units.rows_of(i).tolist() for i in range(len(units))] == [[0], [1], [2]]
    assert (units.lengths.tolist(), units.part_of.tolist()) == ([4, 2, 9], [0, 0, 1])
