"""From the rows of a recipe to rows that a loop can read: the first part of a run, and most of a check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.data.encode import encode_whole
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.end_of_turn import EndOfTurn, doubts_about_the_end, find_end_of_turn, missing_end
from qlora_cli.data.fitting import cut_rows, listed, refusals
from qlora_cli.data.sources import Rows
from qlora_cli.errors import DataError
from qlora_cli.model.source import context_length, embedding_rows
from qlora_cli.recipe.schema import DatasetSection
from qlora_cli.training.events import DataReady


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split: where they come from, as long as they are, and as training sees them.

    `end` is how their answers end.
    """

    name: str
    rows: Rows
    whole: EncodedRows
    kept: EncodedRows
    end: EndOfTurn

    @property
    def silent_rows(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows whose answer is empty as it stands: a cut may leave one token of any answer."""
        if self.whole.format == "text":
            return self.whole.row_numbers[:0]
        return np.intersect1d(self.whole.silent_rows, self.kept.row_numbers)

    @property
    def rows_losing_labels(self) -> int:
        """How many rows are cut in their answer."""
        return int((self.kept.learned < self.whole.learned).sum()) if self.kept.truncated else 0

    def ready(self) -> DataReady:
        """What is told of these rows once they are encoded."""
        return DataReady(
            split=self.name,
            source=self.kept.source,
            fingerprint=self.kept.fingerprint,
            format=self.kept.format,
            rows=len(self.kept),
            tokens=self.kept.tokens,
            supervised_tokens=self.kept.supervised_tokens,
            dropped=self.kept.dropped,
            truncated=self.kept.truncated,
        )


def encode_split(name: str, rows: Rows, section: DatasetSection, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Tokenise `rows` and bring them to `max_length`; refuses only what `encode_whole` does."""
    whole = encode_whole(rows, section, tokenizer)
    kept = cut_rows(whole, section)
    return Split(name, rows, whole, kept, find_end_of_turn(whole, kept, tokenizer))


def split_refusals(split: Split, section: DatasetSection, config: PreTrainedConfig) -> Iterator[str]:
    """Everything for which a model with this configuration cannot be trained on these rows, the first first."""
    vocab_size = embedding_rows(config)
    yield from refusals(split.whole, split.kept, split.rows, section, vocab_size=vocab_size)
    yield from _beyond_the_model(split.kept, config)
    if split.name == "train":
        yield from missing_end(split.end, split.kept, section.max_length)
        yield from _nothing_said(split)


def prepare_split(
    name: str, rows: Rows, section: DatasetSection, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> Split:
    """The rows of one split, ready for training.

    Raises:
        DataError: if a row is malformed, or for the first of `split_refusals`.
        ModelError: if the tokenizer cannot do this.
    """
    split = encode_split(name, rows, section, tokenizer)
    for refusal in split_refusals(split, section, config):
        raise DataError(refusal)
    return split


def doubts(train: Split, validation: Split | None, section: DatasetSection) -> Iterator[str]:
    """What may be meant so, but is more often a mistake."""
    kept = train.kept
    silent = train.silent_rows
    if len(silent):
        rows, verb = ("row has", "teaches") if len(silent) == 1 else ("rows have", "teach")
        yield f"{len(silent)} training {rows} an empty answer and {verb} only to stop ({kept.unit} {listed(silent)})"
    if kept.dropped > len(kept):
        yield f"dataset.overlong: drop leaves {len(kept):,} of {len(train.whole):,} training rows"
    if cut := train.rows_losing_labels:
        yield f"{cut:,} of {len(kept):,} training rows lose part of their answer at dataset.max_length"
    yield from doubts_about_the_end(train.end, kept, section.max_length)
    if validation is not None and _same_rows(kept, validation.kept):
        yield "validation has the rows of train: its loss says nothing about rows the model has not seen"


def _nothing_said(split: Split) -> Iterator[str]:
    if len(split.kept) and len(split.silent_rows) == len(split.kept):
        yield f"{split.kept.source}: every answer is empty: there is nothing to learn but to stop."


def _same_rows(train: EncodedRows, validation: EncodedRows) -> bool:
    # By what is in them: a copy of a file has another name.
    return np.array_equal(validation.offsets, train.offsets) and np.array_equal(validation.ids, train.ids)


def _beyond_the_model(rows: EncodedRows, config: PreTrainedConfig) -> Iterator[str]:
    positions = context_length(config)
    longest = int(rows.lengths.max(initial=0))
    if positions is not None and longest > positions:
        row = int(rows.row_numbers[int(rows.lengths.argmax())])
        yield (
            f"{rows.source}: {rows.unit} {row} has {longest} tokens, the model has positions for {positions}. "
            f"Set dataset.max_length to {positions} or less, and dataset.overlong to drop or truncate"
        )
