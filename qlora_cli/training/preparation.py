"""From the sources of a recipe to rows that a loop can read: the first part of a run, and most of a check."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.data.encode import Report, encode_source, find_format
from qlora_cli.data.encoded import EncodedRows, Indices, concatenate
from qlora_cli.data.end_of_turn import EndOfTurn, find_end_of_turn, missing_end
from qlora_cli.data.fitting import Fitted, cut_rows, refusals
from qlora_cli.data.formats import Format
from qlora_cli.data.sources import Source, open_source
from qlora_cli.data.templates import adopt_template
from qlora_cli.errors import DataError
from qlora_cli.model.source import context_length, embedding_rows
from qlora_cli.recipe.schema import DatasetSection, SourceSection
from qlora_cli.training.events import DataReady, SourceReady

_SPLIT_STREAM = 0x5EED  # keeps the held-out rows independent of anything else that is drawn from the seed
_SHOWN_ANSWER = 40  # characters


class LaidOut(NamedTuple):
    """A source, and how its rows are laid out."""

    source: Source
    format: Format


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split, as long as they are and as training sees them; `end` is how their answers end."""

    name: str
    rows: Fitted
    end: EndOfTurn

    @property
    def whole(self) -> EncodedRows:
        """The rows before anything is cut."""
        return self.rows.whole

    @property
    def kept(self) -> EncodedRows:
        """The rows that training sees."""
        return self.rows.kept

    @property
    def called(self) -> str:
        """What a sentence calls these rows."""
        return "training" if self.name == "train" else self.name

    @property
    def silent_rows(self) -> Indices:
        """The rows of `kept` whose answer is empty as it stands: only its end is learned.

        Those that are cut are not looked at: a cut may leave one token of any answer.
        """
        kept = self.kept
        return np.flatnonzero((kept.learned == 1) & (kept.index["turns"] == 1) & ~kept.is_text)

    def _sources(self) -> Iterator[SourceReady]:
        kept = self.kept
        for number, part in enumerate(kept.parts):
            rows = kept.count(np.flatnonzero(kept.part_of == number))
            yield SourceReady(part.source, part.format, rows, part.weight)

    def ready(self) -> DataReady:
        """What is told of these rows once they are encoded."""
        kept = self.kept
        return DataReady(
            split=self.name,
            sources=tuple(self._sources()),
            fingerprint=kept.fingerprint,
            rows=kept.rows,
            sequences=len(kept),
            tokens=kept.tokens,
            supervised_tokens=kept.supervised_tokens,
            dropped=kept.dropped,
            truncated=kept.truncated,
            skipped=kept.skipped,
        )


def lay_out(field: str, sources: Sequence[SourceSection], section: DatasetSection) -> list[LaidOut]:
    """Open the sources that a field of the recipe names, and find out how their rows are laid out.

    Raises DataError, or HubUnreachableError if one is on the hub and that gives no answer.
    """
    opened = [open_source(field, source, streaming=section.streaming) for source in sources]
    return [LaidOut(source, find_format(source, section)) for source in opened]


def choose_template(tokenizer: PreTrainedTokenizerBase, section: DatasetSection, laid_out: Sequence[LaidOut]) -> None:
    """Give the tokenizer the chat template that these rows are rendered with; it is saved with the adapter."""
    conversations = any(format in ("messages", "conversations") for _, format in laid_out)
    adopt_template(tokenizer, section.chat_template, conversations=conversations)


def encode_all(
    laid_out: Sequence[LaidOut],
    section: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    today: datetime.date,
    report: Report = lambda _: None,
) -> EncodedRows:
    """The rows of all sources, one source after another; raises what `encode_source` raises."""
    return concatenate(
        [encode_source(source, format, section, tokenizer, today=today, report=report) for source, format in laid_out]
    )


def hold_out(rows: EncodedRows, fraction: float, seed: int) -> tuple[EncodedRows, EncodedRows]:
    """The rows to train on and those to hold out: always the same ones for a seed. Raises DataError for one row."""
    number = rows.rows
    if number < 2:
        raise DataError(f"{rows.source}: dataset.validation_fraction needs at least 2 rows, got {number}.")
    held_out = min(max(1, round(number * fraction)), number - 1)
    order = np.random.default_rng(np.random.SeedSequence([seed, _SPLIT_STREAM])).permutation(number)
    # By row and not by sequence: those of one row say much the same.
    chosen = np.zeros(number, dtype=np.bool_)
    chosen[order[:held_out]] = True
    held = chosen[rows.ordinals]
    # What is told of the source as a whole is told once, with the rows to train on.
    return rows.select(~held), replace(rows.select(held), skipped=0, problems=(), unwritten_tools=0)


def make_split(name: str, whole: EncodedRows, section: DatasetSection, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Bring encoded rows to `max_length`; refuses nothing."""
    rows = cut_rows(whole, section)
    return Split(name, rows, find_end_of_turn(rows, tokenizer))


def prepare(
    section: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    seed: int,
    today: datetime.date,
    report: Report = lambda _: None,
) -> tuple[Split, Split | None]:
    """The training rows and the held-out rows, ready for training.

    Raises:
        DataError: if a row is malformed, or for the first of `split_refusals`.
        ModelError: if the tokenizer cannot do this.
        OutputError: if there is no room to keep what is made.
    """
    train = lay_out("dataset.train", section.train_sources, section)
    validation = lay_out("dataset.validation", section.validation_sources, section)
    choose_template(tokenizer, section, [*train, *validation])
    rows = encode_all(train, section, tokenizer, today=today, report=report)
    held_out = encode_all(validation, section, tokenizer, today=today, report=report) if validation else None
    if section.validation_fraction is not None:
        rows, held_out = hold_out(rows, section.validation_fraction, seed)
    splits = [make_split("train", rows, section, tokenizer)]
    if held_out is not None:
        splits.append(make_split("validation", held_out, section, tokenizer))
    for split in splits:
        for refusal in split_refusals(split, section, config, tokenizer):
            raise DataError(refusal)
    return splits[0], splits[1] if len(splits) > 1 else None


def split_refusals(
    split: Split, section: DatasetSection, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Everything for which a model with this configuration cannot be trained on these rows, the first first."""
    yield from refusals(split.rows, section, vocab_size=embedding_rows(config))
    yield from _beyond_the_model(split.kept, config)
    if split.name == "train":
        yield from missing_end(split.end, split.kept, section.max_length)
        yield from _nothing_said(split, tokenizer)


def _nothing_said(split: Split, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if len(split.kept) and len(split.silent_rows) == len(split.kept):
        yield f"{split.kept.source}: every answer is empty: there is nothing to learn but to stop."
    elif split.whole.format == "classification" and (label := only_answer(split.whole, tokenizer)) is not None:
        yield (
            f"{split.whole.source}: all {split.whole.rows:,} labels are the same ({label!r}): there is nothing to tell "
            f"apart. Look at the column of labels, and at whether these are all rows."
        )


def only_answer(rows: EncodedRows, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The beginning of the answer that all rows have, though they differ; None if there are several."""
    answers = rows.index["answer"]
    # The same row several times is a way of trying things out.
    if rows.rows < 2 or (answers != answers[0]).any() or rows.is_text.any() or not _differ(rows):
        return None
    ids, learned = rows.read(0)
    said: str = tokenizer.decode(ids[learned], skip_special_tokens=True).strip()
    return said if len(said) <= _SHOWN_ANSWER else said[:_SHOWN_ANSWER] + "…"


def _differ(rows: EncodedRows) -> bool:
    if (rows.lengths != rows.lengths[0]).any():
        return True
    first = rows.words(0)
    return any(not np.array_equal(first, rows.words(row)) for row in range(1, len(rows)))


def _beyond_the_model(rows: EncodedRows, config: PreTrainedConfig) -> Iterator[str]:
    positions = context_length(config)
    longest = int(rows.lengths.max(initial=0))
    if positions is not None and longest > positions:
        where = rows.where(int(rows.lengths.argmax()))
        yield (
            f"{where} has {longest} tokens, the model has positions for {positions}. "
            f"Set dataset.max_length to {positions} or less, and dataset.overlong to drop or truncate"
        )
