"""The batches at the edges of what a run will see: whoever has room for them has room for all."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qlora_cli.data.batches import StepPlan
from qlora_cli.data.order import epoch_batches
from qlora_cli.data.units import Ints, Units


class SizedBatch(NamedTuple):
    """A micro-batch: its units, the tokens of the longest, and the supervised tokens of them all."""

    indices: list[int]
    longest: int
    supervised: int

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding among them."""
        return len(self.indices) * self.longest


class Extremes(NamedTuple):
    """The micro-batches of the fewest tokens, of the most supervised ones, and of the most; padding counts."""

    smallest: SizedBatch
    most_supervised: SizedBatch
    largest: SizedBatch


def extremes(plan: StepPlan, first: int, end: int) -> Extremes:
    """Those of all processes in the steps from `first` up to `end`, or in an epoch's worth of them if they are more.

    Of equally large ones `largest` has the most supervised tokens, and the reverse.
    """
    end = min(end, first + plan.steps_per_epoch)
    epochs = range(first // plan.steps_per_epoch, (end - 1) // plan.steps_per_epoch + 1)
    found = [_of_epoch(plan, epoch, first, end) for epoch in epochs]
    return Extremes(
        min((each.smallest for each in found), key=lambda batch: batch.tokens),
        max((each.most_supervised for each in found), key=lambda batch: (batch.supervised, batch.tokens)),
        max((each.largest for each in found), key=lambda batch: (batch.tokens, batch.supervised)),
    )


def _of_epoch(plan: StepPlan, epoch: int, first: int, end: int) -> Extremes:
    """Those of the steps [first, end) that are in this epoch."""
    batches = epoch_batches(plan.units, plan.batch_size, seed=plan.seed, epoch=epoch)
    done, size = epoch * plan.steps_per_epoch, plan.accumulation * plan.num_processes
    coming = batches.sequence[max(first - done, 0) * size : (end - done) * size]
    starts = np.arange(0, len(batches.units), plan.batch_size)
    counts = np.diff([*starts, len(batches.units)])
    longest = np.maximum.reduceat(plan.units.lengths[batches.units], starts)
    supervised = np.add.reduceat(_supervised(plan.units)[batches.units], starts)[coming]
    tokens = (longest * counts)[coming]

    def sized(place: int) -> SizedBatch:
        batch = int(coming[place])
        stretch = batches.units[starts[batch] : starts[batch] + counts[batch]]
        return SizedBatch(stretch.tolist(), int(longest[batch]), int(supervised[place]))

    return Extremes(
        sized(int(tokens.argmin())),
        sized(int(np.lexsort((tokens, supervised))[-1])),
        sized(int(np.lexsort((supervised, tokens))[-1])),
    )


def _supervised(units: Units) -> Ints:
    """Supervised tokens of every unit, int64."""
    learned: Ints = np.add.reduceat(units.encoded.learned[units.rows], units.offsets[:-1])
    return learned
