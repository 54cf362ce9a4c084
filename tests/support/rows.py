"""Rows that are nothing but their lengths and their sources, for tests of packs, orders and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qlora_cli.data.encoded import IGNORED, Part
from qlora_cli.data.units import Units, make_units


@dataclass
class FakeRows:
    """What batches are made of: row i holds the ids 1000 i + 1, 1000 i + 2, …, of which the second half is learned.

    Row i has the number 10 + i. `reads` tells of every row whose ids were read.
    """

    lengths: npt.NDArray[np.int64]
    part_of: npt.NDArray[np.uint16]
    parts: tuple[Part, ...]
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def row_numbers(self) -> npt.NDArray[np.int64]:
        return np.arange(10, 10 + len(self))

    def input_ids(self, index: int) -> npt.NDArray[np.int64]:
        self.reads.append(index)
        return np.arange(1, self.lengths[index] + 1) + 1000 * index

    def labels(self, index: int) -> npt.NDArray[np.int64]:
        at = np.arange(self.lengths[index])
        return np.where(at >= max(1, len(at) // 2), at + 1 + 1000 * index, IGNORED)


def fake_rows(*sources: Sequence[int] | npt.NDArray[np.int64], weights: Sequence[float] | None = None) -> FakeRows:
    """Rows of the given lengths, source by source, the sources being called a.jsonl, b.jsonl, …"""
    weights = weights or [1.0] * len(sources)
    return FakeRows(
        lengths=np.concatenate([np.asarray(lengths, dtype=np.int64) for lengths in sources]),
        part_of=np.repeat(np.arange(len(sources)), [len(lengths) for lengths in sources]).astype(np.uint16),
        parts=tuple(Part(f"{'abcdefgh'[i]}.jsonl", "line", "text", weight) for i, weight in enumerate(weights)),
    )


def fake_units(
    *sources: Sequence[int] | npt.NDArray[np.int64],
    weights: Sequence[float] | None = None,
    pack_to: int | None = None,
    seed: int = 0,
) -> Units:
    """The units of such rows: each row, or packs of up to `pack_to` tokens."""
    return make_units(fake_rows(*sources, weights=weights), pack_to, seed)
