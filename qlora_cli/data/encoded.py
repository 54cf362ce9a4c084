"""Rows as token ids, and which of them are learned: what encoding makes, and batches are cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_cli.data.formats import Format

IGNORED = -100  # the label of a token without loss, as in torch and transformers

Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Part(NamedTuple):
    """One of the sources that rows come from; `unit` is what its row numbers count."""

    source: str
    unit: str
    format: Format
    weight: float


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Token ids of all rows, end to end, and the mask of those that are learned.

    `ids` (int32) and `supervised` (bool) hold row i at [offsets[i], offsets[i + 1]); `offsets` and `row_numbers` are
    int64. `unit` is what a row number counts: lines of a single .jsonl file, else rows. A row's first token is never
    supervised: nothing comes before it to predict it.
    """

    ids: Ints
    supervised: Mask
    offsets: npt.NDArray[np.int64]
    row_numbers: npt.NDArray[np.int64]
    format: Format
    source: str
    fingerprint: str
    unit: str = "row"
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per row, int64."""
        return np.diff(self.offsets)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources of the rows."""
        return (Part(self.source, self.unit, self.format, 1.0),)

    @property
    def part_of(self) -> npt.NDArray[np.uint16]:
        """Which of `parts` each row is of, uint16."""
        return np.zeros(len(self), dtype=np.uint16)

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return int(self.offsets[-1])

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a loss, in all rows."""
        return int(self.supervised.sum())

    @property
    def learned(self) -> npt.NDArray[np.int64]:
        """Supervised tokens per row, int64."""
        counts = np.zeros(len(self), dtype=np.int64)
        # Over rows that have tokens: an empty stretch would be given the token after it.
        filled = self.lengths > 0
        if filled.any():
            counts[filled] = np.add.reduceat(self.supervised, self.offsets[:-1][filled], dtype=np.int64)
        return counts

    @property
    def silent_rows(self) -> npt.NDArray[np.int64]:
        """Original numbers of the rows with one token to learn: the end of an empty answer."""
        silent: npt.NDArray[np.int64] = self.row_numbers[self.learned == 1]
        return silent

    def input_ids(self, index: int) -> npt.NDArray[np.int64]:
        """Token ids of a row, int64 [length]."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def labels(self, index: int) -> npt.NDArray[np.int64]:
        """Token ids of a row where they are supervised, else -100; int64 [length], unshifted."""
        mask = self.supervised[self.offsets[index] : self.offsets[index + 1]]
        return np.where(mask, self.input_ids(index), IGNORED)
