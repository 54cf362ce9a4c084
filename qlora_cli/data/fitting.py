"""What becomes of whole rows under `max_length` and `overlong`, and what there is to refuse about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qlora_cli.data.encoded import EncodedRows, Indices, Mask, summarise
from qlora_cli.recipe.schema import DatasetSection

_BLOCK = 512  # rows that are read at a time


@dataclass(frozen=True, eq=False)
class Fitted:
    """Rows as long as they are (`whole`) and as training sees them (`kept`).

    `over` marks the rows of `whole` that are longer than `max_length`.
    """

    whole: EncodedRows
    kept: EncodedRows
    over: Mask

    @property
    def emptied(self) -> Indices:
        """Rows of `kept` that had something to learn, and lost it all when they were cut."""
        if not self.kept.truncated:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero((self.whole.learned > 0) & (self.kept.learned == 0))

    @property
    def rows_losing_labels(self) -> int:
        """How many rows are cut in an answer."""
        if not self.kept.truncated:
            return 0
        return self.kept.count(np.flatnonzero(self.kept.learned < self.whole.learned))

    @property
    def rows_losing_sequences(self) -> int:
        """How many rows of several sequences are dropped in part: the conversation up to some answer is too long."""
        dropped = len(self.kept) < len(self.whole)
        return self.whole.count(np.flatnonzero(self.over)) - self.kept.dropped if dropped else 0

    @property
    def rows_losing_answers(self) -> int:
        """How many rows of several answers are cut before the last of them begins."""
        if not self.kept.truncated:
            return 0
        # An answer of which a part is left has lost its end, and only that.
        begun = self.kept.index["stretches"] < self.whole.index["stretches"]
        return self.kept.count(np.flatnonzero(begun & (self.kept.learned > 0)))


def cut_rows(whole: EncodedRows, section: DatasetSection) -> Fitted:
    """The rows as `overlong` leaves them: `drop` leaves out the longer ones, `truncate` keeps their first tokens.

    With `error` they stay as they are, for `refusals` to refuse.
    """
    over: Mask = whole.lengths > section.max_length
    if section.overlong == "error" or not over.any():
        return Fitted(whole, whole, over)
    if section.overlong == "drop":
        kept = whole.select(~over)
        kept = replace(kept, dropped=whole.rows - kept.rows)
        return Fitted(whole, kept, over)
    index = whole.index.copy()
    rows = np.flatnonzero(over)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        words = np.concatenate([whole.words(row, section.max_length) for row in block.tolist()])
        records = summarise(words, np.full(len(block), section.max_length, dtype=np.int64), whole.enders)
        for name in ("length", "learned", "last", "turns", "stretches", "highest", "answer"):
            index[name][block] = records[name]
    return Fitted(whole, replace(whole, index=index, truncated=whole.count(rows)), over)


def refusals(rows: Fitted, section: DatasetSection, *, vocab_size: int | None = None) -> Iterator[str]:
    """Everything for which these rows cannot be trained on, the first first.

    `vocab_size` is the number of embeddings the model has, None if that is not known.
    """
    whole, kept = rows.whole, rows.kept
    if vocab_size is not None:
        yield from _outside_the_vocabulary(whole, vocab_size)
    yield from _too_long(rows, section)
    # What the cut alone emptied is told of above.
    unlabelled = np.setdiff1d(np.flatnonzero(kept.learned == 0), rows.emptied)
    if len(unlabelled):
        verb = "has" if kept.count(unlabelled) == 1 else "have"
        yield f"{kept.source}: {kept.counted(unlabelled)} {verb} nothing to learn: no token has a loss."


def _outside_the_vocabulary(whole: EncodedRows, vocab_size: int) -> Iterator[str]:
    highest = whole.index["highest"]
    outside = highest >= vocab_size
    if outside.any():
        row = int(outside.argmax())
        yield (
            f"{whole.where(row)}: the tokenizer gives the token {highest[row]}, "
            f"but the model has only {vocab_size} embeddings. The tokenizer does not belong to this model."
        )


def _too_long(rows: Fitted, section: DatasetSection) -> Iterator[str]:
    limit, whole = section.max_length, rows.whole
    number = whole.count(np.flatnonzero(rows.over))
    total = whole.rows
    if number and section.overlong == "error":
        longest = int(whole.lengths.argmax())
        yield (
            f"{whole.source}: {number:,} of {total:,} rows are longer than dataset.max_length ({limit} tokens). "
            f"The longest has {whole.lengths[longest]} tokens: {whole.where(longest)}. "
            f"Raise dataset.max_length, or set dataset.overlong to drop or truncate."
        )
    if not len(rows.kept):
        yield (
            f"{whole.source}: all {total:,} rows are longer than dataset.max_length ({limit} tokens), "
            f"so dataset.overlong: drop leaves none. Raise dataset.max_length."
        )
    if len(rows.emptied):
        yield (
            f"{whole.source}: cut at dataset.max_length ({limit} tokens), {whole.counted(rows.emptied)} would keep "
            f"nothing to learn. Raise dataset.max_length, or set dataset.overlong to drop."
        )
