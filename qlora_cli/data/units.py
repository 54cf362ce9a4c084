"""What a batch is made of: a row, or a pack of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.packing import best_fit

Ints = npt.NDArray[np.int64]

_NAMED_ROWS = 64  # that are told by number: all of most batches


@dataclass(frozen=True, eq=False)
class Units:
    """Unit i is the rows of `encoded` at rows[offsets[i]:offsets[i + 1]]: lengths[i] tokens, of source part_of[i].

    `offsets`, `rows` and `lengths` are int64, `part_of` is uint16: 26 bytes a row at most. `weights` says, for each
    source, how often its units are seen in an epoch. The rows of a `packed` unit are one sequence, end to end.
    """

    encoded: EncodedRows
    offsets: Ints
    rows: Ints
    lengths: Ints
    part_of: npt.NDArray[np.uint16]
    weights: tuple[float, ...]
    packed: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    def naming(self, rows: Sequence[int]) -> str:
        """What to say of the rows, given by their indices in `encoded`, that a step or an evaluation stopped at."""
        encoded = self.encoded
        return (
            f"Rows of {encoded.source} in it: {encoded.named(np.unique(np.asarray(rows, dtype=np.int64)), _NAMED_ROWS)}"
        )

    def rows_of(self, index: int) -> Ints:
        """Indices of the rows in a unit, int64."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]


def make_units(encoded: EncodedRows, pack_to: int | None, seed: int) -> Units:
    """Each row by itself, or packs of up to `pack_to` tokens: a function of the rows and the seed, not of the epoch."""
    return row_units(encoded) if pack_to is None else packed_units(encoded, pack_to, seed)


def row_units(encoded: EncodedRows) -> Units:
    """Each row by itself."""
    indices = np.arange(len(encoded) + 1, dtype=np.int64)
    return Units(
        encoded=encoded,
        offsets=indices,
        rows=indices[:-1],
        lengths=encoded.lengths,
        part_of=encoded.part_of,
        weights=tuple(part.weight for part in encoded.parts),
    )


def packed_units(encoded: EncodedRows, capacity: int, seed: int) -> Units:
    """Packs of rows of one source, each of at most `capacity` tokens. Every row is in exactly one."""
    if not len(encoded):
        return replace(row_units(encoded), packed=True)
    lengths, part_of = encoded.lengths, encoded.part_of
    rows, counts, parts = [], [], []
    for part in np.unique(part_of).tolist():
        members = np.flatnonzero(part_of == part)
        generator = np.random.default_rng(np.random.SeedSequence([seed, part, 0, 1]))
        packs = best_fit(lengths[members], capacity, generator)
        rows.append(members[packs.rows])
        counts.append(np.diff(packs.offsets))
        parts.append(np.full(len(counts[-1]), part, dtype=np.uint16))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    order = np.concatenate(rows)
    return Units(
        encoded=encoded,
        offsets=offsets,
        rows=order,
        lengths=np.add.reduceat(lengths[order], offsets[:-1]),
        part_of=np.concatenate(parts),
        weights=tuple(part.weight for part in encoded.parts),
        packed=True,
    )
