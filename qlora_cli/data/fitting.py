"""What becomes of whole rows under `max_length` and `overlong`, and what there is to refuse about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.sources import Rows
from qlora_cli.recipe.schema import DatasetSection

NAMED_ROWS = 5  # that are told by number, of those that have something in common

Numbers = npt.NDArray[np.int64]


def cut_rows(whole: EncodedRows, section: DatasetSection) -> EncodedRows:
    """The rows as `overlong` leaves them: `drop` leaves out the longer ones, `truncate` keeps their first tokens.

    With `error` they stay as they are, for `refusals` to refuse.
    """
    over = whole.lengths > section.max_length
    if section.overlong == "error" or not over.any():
        return whole
    drop = section.overlong == "drop"
    kept = np.where(over, 0 if drop else section.max_length, whole.lengths)
    stays = ~over if drop else np.ones_like(over)
    # Per row: so many tokens to keep, then so many to leave out. A byte a token, and no loop over rows.
    pattern = np.tile([True, False], len(whole))
    tokens = np.repeat(pattern, np.stack([kept, whole.lengths - kept], axis=1).ravel())
    return replace(
        whole,
        ids=whole.ids[tokens],
        supervised=whole.supervised[tokens],
        offsets=np.concatenate([[0], np.cumsum(kept[stays])]).astype(np.int64),
        row_numbers=whole.row_numbers[stays],
        dropped=int(over.sum()) if drop else 0,
        truncated=0 if drop else int(over.sum()),
    )


def refusals(
    whole: EncodedRows, kept: EncodedRows, rows: Rows, section: DatasetSection, *, vocab_size: int | None = None
) -> Iterator[str]:
    """Everything for which these rows cannot be trained on, the first first.

    `whole` and `kept` are the rows before and after `cut_rows`, `rows` where they come from; `vocab_size` is the
    number of embeddings the model has, None if that is not known.
    """
    if vocab_size is not None:
        yield from _outside_the_vocabulary(whole, vocab_size, rows)
    yield from _too_long(whole, kept, rows, section)
    # What the cut alone emptied is told of above.
    unlabelled = np.setdiff1d(kept.row_numbers[kept.learned == 0], _emptied(whole, kept))
    if len(unlabelled):
        verb = "has" if len(unlabelled) == 1 else "have"
        yield f"{rows.source}: {counted(unlabelled, rows.unit)} {verb} nothing to learn: no token has a loss."


def counted(numbers: Numbers, unit: str) -> str:
    """How many rows, and the numbers of the first of them."""
    return f"{len(numbers)} row{'s' * (len(numbers) > 1)} ({unit} {listed(numbers)})"


def listed(numbers: Numbers) -> str:
    """The first few row numbers, and whether there are more."""
    return ", ".join(map(str, numbers[:NAMED_ROWS])) + (", …" if len(numbers) > NAMED_ROWS else "")


def _outside_the_vocabulary(whole: EncodedRows, vocab_size: int, rows: Rows) -> Iterator[str]:
    outside = whole.ids >= vocab_size
    if outside.any():
        row = int(np.searchsorted(whole.offsets, int(outside.argmax()), side="right")) - 1
        yield (
            f"{rows.locate(int(whole.row_numbers[row]))}: the tokenizer gives the token {whole.input_ids(row).max()}, "
            f"but the model has only {vocab_size} embeddings. The tokenizer does not belong to this model."
        )


def _too_long(whole: EncodedRows, kept: EncodedRows, rows: Rows, section: DatasetSection) -> Iterator[str]:
    limit, lengths = section.max_length, whole.lengths
    over = int((lengths > limit).sum())
    if over and section.overlong == "error":
        longest = int(whole.row_numbers[lengths.argmax()])
        yield (
            f"{rows.source}: {over} of {len(whole)} rows are longer than dataset.max_length ({limit} tokens). "
            f"The longest has {lengths.max()} tokens: {rows.locate(longest)}. "
            f"Raise dataset.max_length, or set dataset.overlong to drop or truncate."
        )
    if not len(kept):
        yield (
            f"{rows.source}: all {len(whole)} rows are longer than dataset.max_length ({limit} tokens), "
            f"so dataset.overlong: drop leaves none. Raise dataset.max_length."
        )
    emptied = _emptied(whole, kept)
    if len(emptied):
        yield (
            f"{rows.source}: cut at dataset.max_length ({limit} tokens), {counted(emptied, rows.unit)} would keep "
            f"nothing to learn. Raise dataset.max_length, or set dataset.overlong to drop."
        )


def _emptied(whole: EncodedRows, kept: EncodedRows) -> Numbers:
    """Numbers of the rows that have something to learn, and lose it all when they are cut."""
    if not kept.truncated:
        return whole.row_numbers[:0]
    emptied: Numbers = whole.row_numbers[(whole.learned > 0) & (kept.learned == 0)]
    return emptied
