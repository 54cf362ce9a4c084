"""Which rows go into which step, and padded tensors of them.

Order is a pure function of (seed, epoch), and a step of its index, so a run that goes on after a crash sees
exactly the batches it would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from qlora_cli.data.encoded import IGNORED, EncodedRows

# Rows are sorted by length among this many batches. On log-normal lengths (sigma 0.5 to 1, batches of 8) padding
# is 2 to 4% of all tokens with 128, 3 to 7% with 64 and 5 to 12% with 32.
_WINDOW_BATCHES = 128

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to the longest of them; or several in a sequence, none of which may see another.

    Tensors are int64 [batch, seq]; labels are -100 where there is no loss, and unshifted. Packed rows have no mask but
    `position_ids` that begin at 0 with each, padding at the end being a row of its own. `rows` are original row
    numbers. `tokens` counts what is not padding, `supervised_tokens` the labels in [:, 1:], since the first position
    predicts nothing; both are 0 for a blank batch and known without asking the device.
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
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            labels=self.labels.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
        )


class MicroBatch(NamedTuple):
    """Indices of the rows of one forward pass. A blank one is run for company, and counts for nothing."""

    indices: list[int]
    blank: bool = False


def collate(encoded: EncodedRows, indices: Sequence[int], pad_token_id: int, *, blank: bool = False) -> Batch:
    """Pad rows `indices` of `encoded` into a Batch; `blank` masks every label."""
    lengths = [int(encoded.offsets[i + 1] - encoded.offsets[i]) for i in indices]
    shape = (len(indices), max(lengths))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for position, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        input_ids[position, :length] = encoded.input_ids(index)
        attention_mask[position, :length] = 1
        if not blank:
            labels[position, :length] = encoded.labels(index)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
        rows=[int(encoded.row_numbers[i]) for i in indices],
        tokens=0 if blank else sum(lengths),
        supervised_tokens=int((labels[:, 1:] != IGNORED).sum()),
    )


def epoch_batches(lengths: Lengths, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Every row index exactly once, in ceil(n / batch_size) batches of rows of similar length.

    Rows are shuffled, cut into windows, sorted by length inside each window and cut into batches, which are
    shuffled again. Only one batch, anywhere in the epoch, can be short.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    order = generator.permutation(len(lengths))
    batches: list[list[int]] = []
    # At least two windows: sorted as a whole, a small dataset would make the same batches every epoch.
    halves = math.ceil(len(lengths) / 2 / batch_size)
    window = min(_WINDOW_BATCHES, max(halves, 1)) * batch_size
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size))
    return [batches[i] for i in generator.permutation(len(batches))]


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The micro-batches of every optimizer step, for every process.

    A step takes accumulation × num_processes consecutive batches of its epoch, dealt to the processes in turn;
    the last step of an epoch takes what is left.
    """

    lengths: Lengths
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    seed: int = 0
    _epoch: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch, over all processes."""
        return math.ceil(len(self.lengths) / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.batches_per_epoch / (self.accumulation * self.num_processes))

    def step(self, index: int, process_index: int = 0) -> list[MicroBatch]:
        """The forward passes of one process in optimizer step `index`, counted from 0 over all epochs.

        All processes get equally many; those that would have one less run a blank one, so that none waits for
        the others' gradients forever.
        """
        epoch, position = divmod(index, self.steps_per_epoch)
        size = self.accumulation * self.num_processes
        group = self._batches(epoch)[position * size : (position + 1) * size]
        return _deal(group, self.num_processes, process_index)

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epoch:
            self._epoch.clear()  # only the current epoch is worth keeping
            self._epoch[epoch] = epoch_batches(self.lengths, self.batch_size, seed=self.seed, epoch=epoch)
        return self._epoch[epoch]


def eval_batches(lengths: Lengths, batch_size: int, num_processes: int = 1, process_index: int = 0) -> list[MicroBatch]:
    """The forward passes of one process over all rows: longest rows first, so that too little memory shows at once.

    Every process gets equally many, the last of which may be blank.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return _deal(batches, num_processes, process_index)


def _deal(batches: list[list[int]], num_processes: int, process_index: int) -> list[MicroBatch]:
    mine = [MicroBatch(batch) for batch in batches[process_index::num_processes]]
    missing = math.ceil(len(batches) / num_processes) - len(mine)
    return mine + [MicroBatch(batches[-1], blank=True)] * missing
