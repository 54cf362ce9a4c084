"""Which units go into which step, and tensors of them.

Order is a pure function of (seed, epoch), and a step of its index, so a run that goes on after a crash sees
exactly the batches it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from qlora_cli.data.encoded import IGNORED
from qlora_cli.data.order import EpochBatches, epoch_batches, epoch_sizes
from qlora_cli.data.units import Units


@dataclass(frozen=True, eq=False)
class Batch:
    """Units, padded on the right to the longest of them.

    Tensors are int64 [batch, seq]; labels are -100 where there is no loss, and unshifted. Rows by themselves have an
    `attention_mask`. Packed ones have `position_ids` in its place: they begin at 0 with each row, and so does the
    padding, a stretch of its own; what comes before a 0 must not be seen from there on.

    `rows` are the indices of all rows in the batch. `tokens` counts what is not padding, `supervised_tokens` the labels
    in [:, 1:], since the first position predicts nothing; both are 0 for a blank batch and known without asking the
    device.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    rows: list[int]
    tokens: int
    supervised_tokens: int
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        mask, positions = self.attention_mask, self.position_ids
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            labels=self.labels.to(device),
            position_ids=None if positions is None else positions.to(device),
        )


class MicroBatch(NamedTuple):
    """Indices of the units of one forward pass. A blank one is run for company, and counts for nothing."""

    indices: list[int]
    blank: bool = False


def collate(units: Units, indices: Sequence[int], pad_token_id: int, *, blank: bool = False) -> Batch:
    """Lay units `indices` out as a Batch; `blank` masks every label."""
    shape = (len(indices), max(int(units.lengths[i]) for i in indices))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    filled = np.zeros(shape, dtype=np.int64)
    positions = np.empty(shape, dtype=np.int64)
    rows: list[int] = []
    for line, index in enumerate(indices):
        start = 0
        for row in units.rows_of(index).tolist():
            ids, learned = units.encoded.read(row)
            stretch = slice(start, start + len(ids))
            input_ids[line, stretch] = ids
            positions[line, stretch] = np.arange(len(ids))
            if not blank:
                labels[line, stretch] = np.where(learned, ids, IGNORED)
            start = stretch.stop
            rows.append(row)
        filled[line, :start] = 1
        positions[line, start:] = np.arange(shape[1] - start)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if units.packed else torch.from_numpy(filled),
        labels=torch.from_numpy(labels),
        rows=rows,
        tokens=0 if blank else int(filled.sum()),
        supervised_tokens=int((labels[:, 1:] != IGNORED).sum()),
        position_ids=torch.from_numpy(positions) if units.packed else None,
    )


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The micro-batches of every optimizer step, for every process.

    A step takes accumulation × num_processes consecutive batches of its epoch, dealt to the processes in turn;
    the last step of an epoch takes what is left.
    """

    units: Units
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    seed: int = 0
    _epoch: dict[int, EpochBatches] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def units_per_epoch(self) -> int:
        """Rows, or packs of rows, that an epoch sees: of each source as often as its weight says."""
        return int(epoch_sizes(self.units).sum())

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch, over all processes."""
        return math.ceil(self.units_per_epoch / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.batches_per_epoch / (self.accumulation * self.num_processes))

    @cached_property
    def padding(self) -> float:
        """The share of padding among all tokens of the first epoch's batches, from 0 to 1."""
        batches = self._batches(0)
        lengths = self.units.lengths[batches.units]
        firsts = np.arange(0, len(lengths), self.batch_size)
        widths = np.maximum.reduceat(lengths, firsts)
        area = int((widths * np.diff([*firsts, len(lengths)])).sum())
        return 1 - int(lengths.sum()) / area

    def step(self, index: int, process_index: int = 0) -> list[MicroBatch]:
        """The forward passes of one process in optimizer step `index`, counted from 0 over all epochs.

        All processes get equally many; those that would have one less run a blank one, so that none waits for
        the others' gradients forever.
        """
        epoch, position = divmod(index, self.steps_per_epoch)
        size = self.accumulation * self.num_processes
        batches = self._batches(epoch)
        stretch = range(position * size, min((position + 1) * size, len(batches)))
        return list(_deal(batches, stretch, self.num_processes, process_index))

    def _batches(self, epoch: int) -> EpochBatches:
        if epoch not in self._epoch:
            self._epoch.clear()  # only the current epoch is worth keeping
            self._epoch[epoch] = epoch_batches(self.units, self.batch_size, seed=self.seed, epoch=epoch)
        return self._epoch[epoch]


@dataclass(frozen=True, eq=False)
class EvalBatches:
    """The forward passes of one process over all units, made as they are asked for: a list of them would be large."""

    batches: EpochBatches
    num_processes: int
    process_index: int

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.num_processes)

    def __iter__(self) -> Iterator[MicroBatch]:
        return _deal(self.batches, range(len(self.batches)), self.num_processes, self.process_index)


def eval_batches(units: Units, batch_size: int, num_processes: int = 1, process_index: int = 0) -> EvalBatches:
    """The forward passes of one process over all units, once each, whatever their weight.

    The longest come first, so that too little memory shows at once. Every process gets equally many passes, the last
    of which may be blank.
    """
    order = np.argsort(-units.lengths, kind="stable")
    batches = EpochBatches(order, np.arange(math.ceil(len(order) / batch_size)), batch_size)
    return EvalBatches(batches, num_processes, process_index)


def _deal(batches: EpochBatches, stretch: range, num_processes: int, process_index: int) -> Iterator[MicroBatch]:
    """The share of one process in a stretch of batches, and a blank one at the end if others have one more."""
    for first in stretch[::num_processes]:
        own = first + process_index
        yield MicroBatch(batches.batch(min(own, stretch[-1])), blank=own > stretch[-1])
