"""Rows that are nothing but their lengths and their sources, for tests of packs, orders and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qlora_cli.data.encoded import Part
from qlora_cli.data.units import Units, make_units


@dataclass
class FakeRows:
    """What batches are made of: row i holds the ids 1000 i + 1, 1000 i + 2, …, of which the second half is learned.

    `reads` tells of every row that was read.
    """

    lengths: npt.NDArray[np.int64]
    part_of: npt.NDArray[np.uint16]
    parts: tuple[Part, ...]
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def learned(self) -> npt.NDArray[np.int64]:
        return self.lengths - np.minimum(np.maximum(1, self.lengths // 2), self.lengths)

    def read(self, row: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        self.reads.append(row)
        at = np.arange(self.lengths[row])
        return at + 1 + 1000 * row, at >= max(1, len(at) // 2)


def fake_rows(*sources: Sequence[int] | npt.NDArray[np.int64], weights: Sequence[float] | None = None) -> FakeRows:
    """Rows of the given lengths, source by source, the sources being called a.jsonl, b.jsonl, …"""
    weights = weights or [1.0] * len(sources)
    names = [f"{'abcdefgh'[i]}.jsonl" for i in range(len(sources))]
    return FakeRows(
        lengths=np.concatenate([np.asarray(lengths, dtype=np.int64) for lengths in sources]),
        part_of=np.repeat(np.arange(len(sources)), [len(lengths) for lengths in sources]).astype(np.uint16),
        parts=tuple(Part(name, (name,), "line", "text", weight) for name, weight in zip(names, weights, strict=True)),
    )


def fake_units(
    *sources: Sequence[int] | npt.NDArray[np.int64],
    weights: Sequence[float] | None = None,
    pack_to: int | None = None,
    seed: int = 0,
) -> Units:
    """The units of such rows: each row, or packs of up to `pack_to` tokens."""
    return make_units(fake_rows(*sources, weights=weights), pack_to, seed)
