"""Order and padding: every row once, the same every time, and little of it padding."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.batches import MicroBatch, StepPlan, collate, epoch_batches, eval_batches
from qlora_cli.data.encoded import EncodedRows

SEED = st.integers(0, 2**32 - 1)


def encoded_rows(lengths: list[int]) -> EncodedRows:
    """Rows of ids 1, 2, 3, …, of which the second half of each row is supervised."""
    rows = [np.arange(1, n + 1) for n in lengths]
    return EncodedRows(
        ids=np.concatenate(rows).astype(np.int32),
        supervised=np.concatenate([row > max(1, len(row) // 2) for row in rows]),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        row_numbers=np.arange(10, 10 + len(rows)),
        format="text",
        source="rows.jsonl",
        fingerprint="",
    )


@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=300), batch_size=st.integers(1, 17), seed=SEED)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_row_once_in_the_fewest_batches(lengths: list[int], batch_size: int, seed: int) -> None:
    """An epoch visits each row exactly once, in ceil(n / batch_size) batches of which at most one is short."""
    batches = epoch_batches(np.array(lengths), batch_size, seed=seed, epoch=3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert max(map(len, batches)) <= batch_size


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    """The same seed and epoch give the same batches; another epoch, or another seed, gives others."""
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    once = epoch_batches(lengths, 8, seed=42, epoch=1)
    np.random.seed(7)  # the global state must not matter
    assert epoch_batches(lengths, 8, seed=42, epoch=1) == once
    assert epoch_batches(lengths, 8, seed=42, epoch=2) != once
    assert epoch_batches(lengths, 8, seed=43, epoch=1) != once


def test_a_small_dataset_is_batched_anew_every_epoch() -> None:
    """Grouping by length does not put the same rows together in every epoch."""
    lengths = np.random.default_rng(0).permutation(200) + 10
    groups = [{frozenset(b) for b in epoch_batches(lengths, 8, seed=1, epoch=epoch)} for epoch in range(2)]
    assert len(groups[0] & groups[1]) < 3


def test_padding_is_under_five_percent() -> None:
    """On log-normal lengths, batches of 8 hold less than 5% padding."""
    generator = np.random.default_rng(0)
    for sigma in (0.5, 0.8, 1.0):
        lengths = np.minimum(np.exp(generator.normal(5, sigma, 5000)).astype(int) + 1, 2048)
        batches = epoch_batches(lengths, 8, seed=1, epoch=0)
        padded = sum(int(lengths[b].max()) * len(b) for b in batches)
        assert 1 - lengths.sum() / padded < 0.05


def test_batches_are_not_ordered_by_length() -> None:
    """Short and long batches are mixed over the epoch, so the loss of a step does not follow its length."""
    lengths = np.arange(4000) + 1
    means = [lengths[b].mean() for b in epoch_batches(lengths, 8, seed=5, epoch=0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@given(
    n=st.integers(1, 120),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_processes_share_an_epoch_without_overlap(
    n: int, batch_size: int, accumulation: int, processes: int, epoch: int
) -> None:
    """Over its processes and steps, an epoch covers each row once, and all run equally many forwards."""
    plan = StepPlan(np.arange(n) + 1, batch_size, accumulation, processes, seed=9)
    assert plan.batches_per_epoch == math.ceil(n / batch_size)
    seen: list[int] = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        parts = [plan.step(step, process) for process in range(processes)]
        assert len({len(part) for part in parts}) == 1
        assert 1 <= len(parts[0]) <= accumulation
        assert all(micro.indices for part in parts for micro in part)
        seen += [i for part in parts for micro in part if not micro.blank for i in micro.indices]
    assert sorted(seen) == list(range(n))


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    """Step 17 asked first, asked again after others, and asked of a fresh plan is the same step."""
    lengths = np.random.default_rng(0).integers(1, 99, 50)
    plan = StepPlan(lengths, 4, accumulation=2, seed=3)
    late = plan.step(17)
    for step in range(12):
        plan.step(step)
    assert plan.step(17) == late == StepPlan(lengths, 4, accumulation=2, seed=3).step(17)


def test_one_process_with_accumulation_takes_the_same_rows_as_several() -> None:
    """A step of 2 processes holds the rows of a step of 1 process that accumulates twice as often."""
    lengths = np.random.default_rng(0).integers(1, 99, 61)
    alone = StepPlan(lengths, 3, accumulation=4, seed=3)
    shared = StepPlan(lengths, 3, accumulation=2, num_processes=2, seed=3)
    assert alone.steps_per_epoch == shared.steps_per_epoch

    def rows(parts: list[MicroBatch]) -> list[int]:
        return sorted(i for micro in parts if not micro.blank for i in micro.indices)

    for step in range(2 * alone.steps_per_epoch):
        assert rows(alone.step(step)) == rows(shared.step(step, 0) + shared.step(step, 1))


@given(n=st.integers(1, 60), batch_size=st.integers(1, 7), processes=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_evaluation_covers_every_row_once(n: int, batch_size: int, processes: int) -> None:
    """Evaluation sees each row once, longest first, with equally many forwards per process."""
    lengths = np.random.default_rng(n).integers(1, 99, n)
    parts = [eval_batches(lengths, batch_size, processes, p) for p in range(processes)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for m in part if not m.blank for i in m.indices) == list(range(n))
    for part in parts:
        own = [lengths[i] for m in part if not m.blank for i in m.indices]
        assert own == sorted(own, reverse=True)


def test_collate_pads_on_the_right_and_counts() -> None:
    """A batch is padded on the right, its padding has neither attention nor loss, and its counts are exact."""
    batch = collate(encoded_rows([2, 5, 4]), [1, 0], pad_token_id=77)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 77, 77, 77]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 3, 4, 5], [-100, 2, -100, -100, -100]]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert (batch.rows, batch.tokens, batch.supervised_tokens) == ([11, 10], 7, 4)
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels)
    assert moved.supervised_tokens == 4


def test_a_blank_batch_counts_for_nothing() -> None:
    """A blank batch has the shape of a real one, no label, and adds nothing to any count."""
    rows = encoded_rows([2, 5])
    batch = collate(rows, [0, 1], pad_token_id=0, blank=True)
    assert torch.equal(batch.input_ids, collate(rows, [0, 1], pad_token_id=0).input_ids)
    assert (batch.labels == -100).all()
    assert (batch.tokens, batch.supervised_tokens) == (0, 0)
