"""Steps and tensors: what each process runs, and that a batch is its rows and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.batches import MicroBatch, StepPlan, collate, eval_batches
from qlora_cli.data.units import Units, make_units, packed_units, row_units
from tests.support.encoded import rows_of_tokens
from tests.support.rows import fake_rows, fake_units

PACK_TO = st.sampled_from([None, 130, 400])


def rows_of(units: Units, micro_batches: list[MicroBatch]) -> list[int]:
    """The rows in some forward passes, except for blank ones."""
    return [row for m in micro_batches if not m.blank for i in m.indices for row in units.rows_of(i).tolist()]


@given(
    n=st.integers(1, 120),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
    pack_to=PACK_TO,
)
@settings(max_examples=80, deadline=None)
def test_processes_share_an_epoch_without_overlap(
    n: int, batch_size: int, accumulation: int, processes: int, epoch: int, pack_to: int | None
) -> None:
    """Over its processes and steps, an epoch covers each row once, and all run equally many forwards."""
    units = fake_units(np.arange(n) + 1, pack_to=pack_to)
    plan = StepPlan(units, batch_size, accumulation, processes, seed=9)
    assert plan.batches_per_epoch == math.ceil(len(units) / batch_size)
    seen: list[int] = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        parts = [plan.step(step, process) for process in range(processes)]
        assert len({len(part) for part in parts}) == 1
        assert 1 <= len(parts[0]) <= accumulation
        assert all(micro.indices for part in parts for micro in part)
        seen += [row for part in parts for row in rows_of(units, part)]
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("pack_to", [None, 200])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.4, 2.5]])
def test_a_step_does_not_depend_on_the_steps_before_it(pack_to: int | None, weights: list[float]) -> None:
    """Step 17 asked first, asked again after all others, and asked of a fresh plan is the same step: a run that is
    resumed replays nothing."""
    lengths = np.random.default_rng(0).integers(1, 99, 50)

    def fresh() -> StepPlan:
        units = fake_units(lengths, lengths[::-1], weights=weights, pack_to=pack_to, seed=3)
        return StepPlan(units, 4, accumulation=3, seed=3)

    plan = fresh()
    late = plan.step(17)
    walked = [plan.step(step) for step in range(40)]
    assert plan.steps_per_epoch < 17, "another epoch than the first"
    assert walked[17] == late == fresh().step(17)
    assert all(fresh().step(step) == walked[step] for step in (0, 23, 39))


def test_one_process_with_accumulation_takes_the_same_rows_as_several() -> None:
    """A step of 2 processes holds the rows of a step of 1 process that accumulates twice as often."""
    units = fake_units(np.random.default_rng(0).integers(1, 99, 61))
    alone = StepPlan(units, 3, accumulation=4, seed=3)
    shared = StepPlan(units, 3, accumulation=2, num_processes=2, seed=3)
    assert alone.steps_per_epoch == shared.steps_per_epoch
    for step in range(2 * alone.steps_per_epoch):
        both = rows_of(units, shared.step(step, 0) + shared.step(step, 1))
        assert sorted(rows_of(units, alone.step(step))) == sorted(both)


def test_weights_lengthen_and_shorten_an_epoch() -> None:
    """30 rows twice and 41 half are 60 + 20 of them: 10 batches of 8, in every epoch."""
    plan = StepPlan(fake_units([3] * 30, [4] * 41, weights=[2, 0.5]), 8, accumulation=2)
    assert (plan.batches_per_epoch, plan.steps_per_epoch) == (10, 5)
    for epoch in range(3):
        steps = [plan.step(epoch * 5 + step) for step in range(5)]
        assert sum(len(rows_of(plan.units, step)) for step in steps) == 80


@given(n=st.integers(1, 60), batch_size=st.integers(1, 7), processes=st.integers(1, 4), pack_to=PACK_TO)
@settings(max_examples=50, deadline=None)
def test_evaluation_covers_every_row_once(n: int, batch_size: int, processes: int, pack_to: int | None) -> None:
    """Evaluation sees each row once whatever its weight, longest first, with equally many forwards per process."""
    lengths = np.random.default_rng(n).integers(1, 99, n)
    units = fake_units(lengths, pack_to=pack_to, weights=[2.5])
    parts = [eval_batches(units, batch_size, processes, p) for p in range(processes)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for row in rows_of(units, part)) == list(range(n))
    for part in parts:
        own = [units.lengths[i] for m in part if not m.blank for i in m.indices]
        assert own == sorted(own, reverse=True)


def test_collate_pads_on_the_right_and_counts() -> None:
    """A batch is padded on the right, its padding has neither attention nor loss, and its counts are exact."""
    rows = fake_rows([2, 5, 4])
    batch = collate(row_units(rows), [1, 0], pad_token_id=77)
    assert batch.input_ids.tolist() == [[1001, 1002, 1003, 1004, 1005], [1, 2, 77, 77, 77]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 1003, 1004, 1005], [-100, 2, -100, -100, -100]]
    assert batch.position_ids is None
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert batch.rows == [1, 0]
    assert (batch.tokens, batch.supervised_tokens) == (7, 4)
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels)
    assert moved.supervised_tokens == 4
    assert moved.position_ids is None


def test_a_packed_batch_tells_its_rows_apart_by_position() -> None:
    """Rows of a pack lie end to end; positions begin at 0 with each, and with the padding; there is no mask."""
    rows = fake_rows([4, 2, 3])
    batch = collate(packed_units(rows, 6, seed=0), [0, 1], pad_token_id=77)
    assert batch.attention_mask is None
    assert batch.position_ids is not None
    assert batch.position_ids.dtype == torch.int64
    lines = sorted(zip(batch.position_ids.tolist(), batch.input_ids.tolist(), batch.labels.tolist(), strict=True))
    assert lines == [
        ([0, 1, 2, 0, 1, 2], [2001, 2002, 2003, 77, 77, 77], [-100, 2002, 2003, -100, -100, -100]),
        ([0, 1, 2, 3, 0, 1], [1, 2, 3, 4, 1001, 1002], [-100, -100, 3, 4, -100, 1002]),
    ]
    assert sorted(batch.rows) == [0, 1, 2]
    assert (batch.tokens, batch.supervised_tokens) == (9, 5)
    moved = batch.to("cpu")
    assert moved.attention_mask is None
    assert torch.equal(moved.position_ids, batch.position_ids)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), blank=st.booleans(), pack_to=st.integers(40, 99))
@settings(max_examples=60, deadline=None)
def test_packs_hold_the_rows_that_padded_batches_hold(lengths: list[int], blank: bool, pack_to: int) -> None:
    """Cut where positions begin anew, packs are the rows as they are, with the same labels after the shift; the count
    of tokens and of supervised ones is that of the rows by themselves."""
    rows = fake_rows(lengths)
    packs = packed_units(rows, pack_to, seed=1)
    batch = collate(packs, range(len(packs)), pad_token_id=0, blank=blank)
    plain = collate(row_units(rows), range(len(rows)), pad_token_id=0, blank=blank)
    found = {}
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        starts = [i for i, position in enumerate(positions.tolist()) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            if ids[start]:
                found[int(ids[start]) // 1000] = (ids[start:end].tolist(), labels[start:end].tolist())
            else:
                assert end == len(ids), "padding comes last, and once"
                assert (labels[start:] == -100).all()
    wanted = {}
    for i in range(len(lengths)):
        ids, learned = rows.read(i)
        wanted[i] = (ids.tolist(), np.where(learned & (not blank), ids, -100).tolist())
    assert found == wanted
    assert (batch.tokens, batch.supervised_tokens) == (plain.tokens, plain.supervised_tokens)


@pytest.mark.parametrize("pack_to", [None, 8])
def test_a_blank_batch_counts_for_nothing(pack_to: int | None) -> None:
    """A blank batch has the shape of a real one, no label, and adds nothing to any count."""
    rows = fake_rows([2, 5])
    units = make_units(rows, pack_to, seed=0)
    indices = range(len(units))
    batch = collate(units, indices, pad_token_id=0, blank=True)
    assert torch.equal(batch.input_ids, collate(units, indices, pad_token_id=0).input_ids)
    assert (batch.labels == -100).all()
    assert (batch.tokens, batch.supervised_tokens) == (0, 0)


@pytest.mark.parametrize("pack_to", [None, 12])
def test_each_row_is_read_once(pack_to: int | None) -> None:
    """Reading a row is reading a file: a batch reads the rows in it once, and no other."""
    rows = fake_rows([2, 5, 4, 1, 6])
    units = make_units(rows, pack_to, seed=0)
    collate(units, [1, 0], pad_token_id=0)
    assert sorted(rows.reads) == sorted([*units.rows_of(0).tolist(), *units.rows_of(1).tolist()])


def test_rows_are_named_as_a_message_has_them() -> None:
    """Each once and in order; where none can be named, such as for a sum that overflowed, there is no other error."""
    units = row_units(rows_of_tokens(*[([1, 2], [False, True])] * 3))
    assert units.naming([2, 0, 2]) == "Rows of rows.jsonl in it: line 1, 3"
    assert units.naming([]) == "Rows of rows.jsonl in it: "
