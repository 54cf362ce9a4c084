"""The rows of a recipe as training would see them, and all that is to be said of them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.data.encode import Report, check_shape
from qlora_cli.data.encoded import NAMED_ROWS, EncodedRows, Indices
from qlora_cli.recipe.schema import DatasetSection, SourceSection
from qlora_cli.training.facts import Lengths, Overlong, SomeRows, SplitFacts
from qlora_cli.training.findings import Findings
from qlora_cli.training.preparation import (
    LaidOut,
    Split,
    choose_template,
    encode_all,
    hold_out,
    lay_out,
    make_split,
    split_refusals,
)


class Base(NamedTuple):
    """What is known of a base model without its weights."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig


def check_rows(
    section: DatasetSection, base: Base | None, found: Findings, *, seed: int, report: Report
) -> tuple[Split | None, Split | None]:
    """The training rows and the held-out rows, encoded; None for what cannot be, or where there is no tokenizer.

    A split that fails does not keep the other from being looked at. What would be refused is among the problems.
    """
    laid_out = {
        "train": _lay_out("train", section.train_sources, section, found),
        "validation": _lay_out("validation", section.validation_sources, section, found),
    }
    there = [source for sources in laid_out.values() for source in sources]
    before = len(found.problems)
    if base is not None:
        found.attempt(choose_template, base.tokenizer, section, there)
    if base is None or len(found.problems) > before:  # nobody knows how the rows would be written
        for source, _ in there:
            found.attempt(check_shape, source, section)
        return None, None
    today = datetime.datetime.now(datetime.UTC).date()  # as a run has it, wherever it is resumed
    rows = {
        name: found.attempt(encode_all, sources, section, base.tokenizer, today=today, report=report)
        for name, sources in laid_out.items()
        if sources
    }
    train, fraction = rows.get("train"), section.validation_fraction
    if train is not None and fraction is not None:
        parts = found.attempt(hold_out, train, fraction, seed)
        rows |= dict(zip(("train", "validation"), parts or (train, None), strict=True))
    splits = {name: _split(name, part, section, base, found) for name, part in rows.items() if part is not None}
    return splits.get("train"), splits.get("validation")


def split_facts(split: Split, section: DatasetSection) -> SplitFacts:
    """What a check tells of a split."""
    kept = split.kept
    return SplitFacts(
        data=split.ready(),
        lengths=_lengths(split.whole),
        max_length=section.max_length,
        overlong=_overlong(split, section),
        without_labels=_some(kept, np.flatnonzero(kept.learned == 0)),
        silent=_some(kept, split.silent_rows),
        end_of_turn=split.end,
    )


def _lay_out(name: str, sources: Sequence[SourceSection], section: DatasetSection, found: Findings) -> list[LaidOut]:
    called = {"train": "training"}.get(name, name)
    missed = f"the {called} rows were not read"
    return found.attempt_or_miss(missed, lay_out, f"dataset.{name}", sources, section) or []


def _split(name: str, rows: EncodedRows, section: DatasetSection, base: Base, found: Findings) -> Split:
    split = make_split(name, rows, section, base.tokenizer)
    found.problems += split_refusals(split, section, base.config, base.tokenizer)
    return split


def _lengths(rows: EncodedRows) -> Lengths:
    at = np.quantile(rows.lengths, [0, 0.5, 0.9, 0.95, 0.99, 1], method="inverted_cdf")
    return Lengths(*map(int, at))


def _overlong(split: Split, section: DatasetSection) -> Overlong:
    whole, kept = split.whole, split.kept
    over = whole.count(np.flatnonzero(split.rows.over))
    lost = whole.supervised_tokens - kept.supervised_tokens
    match section.overlong:
        case "error":
            return Overlong(over, "refused", 0, 0, 0)
        case "drop":
            return Overlong(over, "dropped", over, over, lost)
        case "truncate":
            rows = split.rows
            return Overlong(over, "truncated", rows.rows_losing_labels, rows.rows_losing_answers, lost)


def _some(rows: EncodedRows, some: Indices) -> SomeRows:
    first = rows.row_numbers[rows.distinct(some)[:NAMED_ROWS]].tolist()
    return SomeRows(rows.count(some), tuple(first), rows.named(some) if len(some) else "")
