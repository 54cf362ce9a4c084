"""The rows on which a merged model is set against the trained one: the run's own held-out rows, or shipped prompts."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.data.encoded import EncodedRows
from qlora_cli.errors import DataError, RequestError
from qlora_cli.merging.adapters.source import AdapterSource
from qlora_cli.merging.fidelity.prompts import encode_prompts
from qlora_cli.model.source import context_length, embedding_rows
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.preparation import (
    Split,
    choose_template,
    encode_all,
    hold_out,
    lay_out,
    make_split,
    split_refusals,
)
from qlora_cli.training.record import RunRecord
from qlora_cli.training.run_folder import RunFolder

_SAMPLE_STREAM = 0xC4EC  # keeps this draw apart from the others of a seed


class CheckRow(NamedTuple):
    """Token ids, int64 [length], and which of them count, bool [length]; the first never does."""

    ids: Tensor
    learned: Tensor


@dataclass(frozen=True, eq=False)
class CheckRows:
    """Rows to compare models on, in no order: the first few are as good a sample as any.

    Attributes:
        rows: the rows.
        origin: what they are, for the user.
        held_out: whether they are the run's own, so that the loss on them says how good a model is.
    """

    rows: tuple[CheckRow, ...]
    origin: str
    held_out: bool

    @property
    def tokens(self) -> int:
        """Tokens that count, in all rows."""
        return sum(int(row.learned.sum()) for row in self.rows)


def check_rows(
    adapter: AdapterSource, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, limit: int
) -> CheckRows:
    """At most `limit` rows: the validation rows of the adapter's run as training saw them, spread evenly over them all.

    Shipped prompts take their place where the adapter is of no run, the run has no validation rows, or they cannot be
    had any more; `origin` says which.

    Args:
        tokenizer: the adapter's if it has one, else the base's; it stays as it is.
        config: of the model that was trained.
        limit: at least 1.
    """
    if adapter.run is None or adapter.recipe is None:
        return _shipped(tokenizer, config, limit, "the adapter is of no run with held-out rows")
    try:
        validation = _validation(adapter.run, adapter.recipe, copy.deepcopy(tokenizer), config)
    except RequestError as error:
        return _shipped(tokenizer, config, limit, f"the run's validation rows cannot be had: {_first_line(error)}")
    if validation is None:
        return _shipped(tokenizer, config, limit, "the run has no validation rows")
    kept = validation.kept
    usable = np.flatnonzero(kept.learned > 0)
    if not len(usable):
        return _shipped(tokenizer, config, limit, "the run's validation rows have nothing to learn")
    chosen = usable[_spread(len(usable), limit, adapter.recipe.training.seed)]
    number = f"{len(chosen):,}" if len(chosen) == len(kept) else f"{len(chosen):,} of {len(kept):,}"
    changed = "" if _are_the_same(adapter.run, kept) else ", which have changed since it trained"
    return CheckRows(tuple(_read(kept, chosen.tolist())), f"{number} validation rows of the run{changed}", True)


def _validation(
    run: RunFolder, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> Split | None:
    """The rows that the run evaluated on, encoded as they were on its day; None if it had none."""
    section, seed = recipe.dataset, recipe.training.seed
    if section.validation is None and section.validation_fraction is None:
        return None
    today = RunRecord(run.record, {}).started_on
    sources = lay_out("dataset.validation", section.validation_sources, section)
    if section.validation_fraction is not None:
        sources = lay_out("dataset.train", section.train_sources, section)
    choose_template(tokenizer, section, sources)
    rows = encode_all(sources, section, tokenizer, today=today)
    if section.validation_fraction is not None:
        _, rows = hold_out(rows, section.validation_fraction, seed)
    split = make_split("validation", rows, section, tokenizer)
    for refusal in split_refusals(split, section, config, tokenizer):
        raise DataError(refusal)
    return split


def _are_the_same(run: RunFolder, rows: EncodedRows) -> bool:
    """Whether these rows have the fingerprint that the run wrote down, as far as can be told."""
    try:
        record = json.loads(run.record.read_text(encoding="utf-8"))
        return bool(record["data"]["validation"]["fingerprint"] == rows.fingerprint)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True


def _spread(number: int, limit: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """One index out of each of `limit` equal stretches of `number`, in random order; all of them if there are fewer."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, _SAMPLE_STREAM]))
    size = min(number, limit)
    edges = np.arange(size + 1) * number // size
    return generator.permutation(generator.integers(edges[:-1], edges[1:]))


def _read(rows: EncodedRows, chosen: Sequence[int]) -> list[CheckRow]:
    read = (rows.read(row) for row in chosen)
    return [CheckRow(torch.from_numpy(ids), torch.from_numpy(learned)) for ids, learned in read]


def _shipped(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, limit: int, because: str) -> CheckRows:
    """The prompts that come with this package: all of their tokens count."""
    longest, vocabulary = context_length(config), embedding_rows(config)
    rows = []
    for ids in encode_prompts(tokenizer, datetime.datetime.now(datetime.UTC).date()):
        # A token that the model has no row for is one it was never shown.
        known = torch.tensor([i for i in ids if i < vocabulary][:longest], dtype=torch.int64)
        learned = torch.ones(len(known), dtype=torch.bool)
        learned[:1] = False
        rows.append(CheckRow(known, learned))
    rows = [rows[i] for i in _spread(len(rows), limit, 0).tolist()]
    return CheckRows(tuple(rows), f"{len(rows)} shipped prompts, as {because}", False)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
