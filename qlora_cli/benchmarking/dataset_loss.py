"""Loss and perplexity of a model on rows of a dataset, read as training reads them."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.benchmarking.target import Target
from qlora_cli.data.batches import collate
from qlora_cli.data.encode import Report as Encoding
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.units import Units, row_units
from qlora_cli.errors import DataError, EvaluationError
from qlora_cli.evaluation.answering.memory import within_memory
from qlora_cli.evaluation.answering.questions import Progress
from qlora_cli.evaluation.statistics import Comparison, compare_ratios, ratio_standard_error
from qlora_cli.model.source import embedding_rows
from qlora_cli.recipe.paths import is_local
from qlora_cli.recipe.schema import DatasetSection, SourceSection
from qlora_cli.training.loss import perplexity, supervised_logits
from qlora_cli.training.preparation import choose_template, encode_all, lay_out, make_split, split_refusals
from qlora_cli.training.record import RunRecord

_TOKENS = {"cpu": 2048, "cuda": 16_384}  # in one forward pass, padding included
_LOGITS = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes of float32 logits at once


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """Rows to score.

    Attributes:
        kept: the rows as the model sees them; one that became several sequences is there as often.
        text_bytes: UTF-8 bytes of what is supervised, special tokens left out.
        remarks: whole sentences on rows that were cut, left out, or could not be read.
    """

    kept: EncodedRows
    text_bytes: int
    pad_token_id: int
    remarks: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """What messages call the rows."""
        return self.kept.source


@dataclass(frozen=True, eq=False)
class DatasetScore:
    """How well a model says the rows' supervised tokens.

    Attributes:
        loss: mean cross entropy over all of them, in nats, each weighing the same.
        standard_error: of the loss, rows drawn whole; None for a single row.
        perplexity: exp(loss), None where that is more than a float holds.
        bits_per_byte: of the text they stand for, which tokenizers share; None without any.
        row_losses, row_tokens: float64 and int64 [rows], sums over each row of the file, for pairing.
    """

    rows: int
    tokens: int
    loss: float
    standard_error: float | None
    perplexity: float | None
    bits_per_byte: float | None
    row_losses: NDArray[np.float64]
    row_tokens: NDArray[np.int64]

    def against(self, base: DatasetScore) -> Comparison:
        """The difference of losses per token to those of another model on the same rows; lower is better."""
        if not np.array_equal(self.row_tokens, base.row_tokens):
            raise EvaluationError("two models can be compared on the same rows alone, read in the same way")
        return compare_ratios(self.row_losses, base.row_losses, self.row_tokens)


def read_dataset(
    target: Target,
    section: DatasetSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | float | None = None,
    report: Encoding = lambda _: None,
) -> DatasetRows:
    """The section's validation rows, as training would see them.

    Args:
        tokenizer: the target's; it stays as it is.
        limit: the first so many rows, or, below 1, the first share of them.

    Raises:
        DataError: if a row is malformed, or the model cannot be scored on them.
        HubUnreachableError: if they are on the hub and that gives no answer.
    """
    tokenizer, config = copy.deepcopy(tokenizer), target.config()
    laid_out = lay_out("dataset.validation", section.validation_sources, section)
    choose_template(tokenizer, section, laid_out)
    whole = encode_all(laid_out, section, tokenizer, today=_day(target), report=report)
    if limit is not None:
        first = math.ceil(whole.rows * limit) if limit < 1 else int(limit)
        whole = whole.select(whole.ordinals < first)
    if not len(whole):
        raise DataError(f"{whole.source}: has no rows to score")
    split = make_split("validation", whole, section, tokenizer)
    for refusal in split_refusals(split, section, config, tokenizer):
        raise DataError(refusal)
    remarks = (*_remarks(split.kept, split.whole.rows, section), *_seen(target, split.kept, section))
    return DatasetRows(split.kept, _text_bytes(split.kept, tokenizer), int(tokenizer.pad_token_id or 0), remarks)


def dataset_loss(
    model: PreTrainedModel,
    rows: DatasetRows,
    *,
    batch_size: int | None = None,
    progress: Progress = lambda done, of: None,
) -> DatasetScore:
    """Score a model that is in eval mode. The longest rows come first; out of memory halves what is done at once.

    Args:
        batch_size: at most so many rows in a forward pass; None: what the device takes.
        progress: is called with the tokens that are done, and all of them.

    Raises:
        EvaluationError: if the loss of a row is no number, naming the rows; if a single row needs more memory than
            there is.
    """
    kept = rows.kept
    losses = np.zeros(len(kept), dtype=np.float64)
    done = 0
    for indices, sums in _losses(model, rows, batch_size):
        losses[indices] = sums
        done += int(kept.lengths[indices].sum())
        progress(done, kept.tokens)
    if (broken := np.flatnonzero(~np.isfinite(losses))).size:
        raise EvaluationError(f"{rows.source}: the loss of {kept.counted(broken)} is no finite number")
    # A row that became several sequences is one draw.
    row_losses = np.bincount(kept.ordinals, weights=losses).astype(np.float64)
    row_tokens = np.bincount(kept.ordinals, weights=kept.learned).astype(np.int64)
    loss = float(row_losses.sum() / row_tokens.sum())
    return DatasetScore(
        rows=len(row_tokens),
        tokens=int(row_tokens.sum()),
        loss=loss,
        standard_error=ratio_standard_error(row_losses, row_tokens),
        perplexity=perplexity(loss),
        bits_per_byte=float(row_losses.sum() / math.log(2) / rows.text_bytes) if rows.text_bytes else None,
        row_losses=row_losses,
        row_tokens=row_tokens,
    )


def _losses(
    model: PreTrainedModel, rows: DatasetRows, batch_size: int | None
) -> Iterator[tuple[list[int], NDArray[np.float64]]]:
    """Indices of rows, some at a time, and the sum of each one's losses, float64."""
    kind, units = model.device.type, row_units(rows.kept)
    budget = _TOKENS.get(kind, _TOKENS["cuda"])
    at_once = max(1, _LOGITS.get(kind, _LOGITS["cuda"]) // (4 * embedding_rows(model.config)))
    left = np.argsort(-rows.kept.lengths, kind="stable").tolist()
    while left:
        number = _fitting(left, rows.kept, budget, at_once)
        number = min(number, batch_size or number)
        sums = within_memory(_row_losses, model, units, left[:number], rows.pad_token_id, at_once)
        if sums is None:
            if number == 1:
                raise EvaluationError(_too_large(rows, left[0], model))
            budget = int(rows.kept.lengths[left[0]]) * (number // 2)
            continue
        yield left[:number], sums
        left = left[number:]


def _fitting(left: Sequence[int], kept: EncodedRows, budget: int, at_once: int) -> int:
    """How many of these rows, the longest first, go into one forward pass: at least one."""
    number = max(1, min(len(left), budget // int(kept.lengths[left[0]])))
    scored = np.cumsum(kept.learned[left[:number]])
    return max(1, int((scored <= at_once).sum()))


@torch.no_grad()
def _row_losses(
    model: PreTrainedModel, units: Units, indices: list[int], pad_token_id: int, at_once: int
) -> NDArray[np.float64]:
    """The sum of the losses of each of these rows, float64 [rows]; `at_once` positions are widened to float32."""
    batch = collate(units, indices, pad_token_id).to(model.device)
    logits, targets = supervised_logits(model, batch)
    each = torch.cat(
        [
            F.cross_entropy(some.float(), wanted, reduction="none")
            for some, wanted in zip(torch.split(logits, at_once), torch.split(targets, at_once), strict=True)
        ]
    )
    # In the order of the batch: row by row. In double precision, so that how rows fell into batches does not matter.
    counts = units.encoded.learned[indices]
    starts = np.cumsum(counts) - counts
    sums: NDArray[np.float64] = np.add.reduceat(each.double().cpu().numpy(), starts)
    return sums


def _too_large(rows: DatasetRows, row: int, model: PreTrainedModel) -> str:
    return (
        f"out of memory on {model.device} with a single row of {rows.kept.lengths[row]:,} tokens "
        f"({rows.kept.where(row)}). Lower dataset.max_length (--set dataset.max_length=N), or hold the model in fewer "
        "bits (--bits 4)"
    )


def _day(target: Target) -> datetime.date:
    """The day that templates are told: the run's, so that its rows are rendered as they were."""
    if target.adapter is not None and target.adapter.run is not None:
        return RunRecord(target.adapter.run.record, {}).started_on
    return datetime.datetime.now(datetime.UTC).date()


def _text_bytes(kept: EncodedRows, tokenizer: PreTrainedTokenizerBase) -> int:
    total = 0
    for row in range(len(kept)):
        ids, learned = kept.read(row)
        text: str = tokenizer.decode(ids[learned], skip_special_tokens=True)
        total += len(text.encode("utf-8", errors="surrogatepass"))
    return total


def _seen(target: Target, rows: EncodedRows, section: DatasetSection) -> Iterator[str]:
    """Rows that the target has learned are told of."""
    recipe = None if target.adapter is None else target.adapter.recipe
    learned = () if recipe is None else recipe.dataset.train_sources

    def same(one: SourceSection, other: SourceSection) -> bool:
        split = is_local(one.path) or (one.hub_config, one.split) == (other.hub_config, other.split)
        return one.path == other.path and split

    if any(same(source, other) for source in section.validation_sources for other in learned):
        yield f"the run was trained on rows of {rows.source}: a loss on them says little about others"


def _remarks(kept: EncodedRows, rows: int, section: DatasetSection) -> tuple[str, ...]:
    remarks = []
    longest = f"longer than dataset.max_length ({section.max_length} tokens)"
    if kept.truncated:
        remarks.append(f"{kept.truncated:,} of {rows:,} rows are {longest} and are cut there")
    if kept.dropped:
        remarks.append(f"{kept.dropped:,} of {rows:,} rows are {longest} and are left out")
    if kept.skipped:
        number = f"{kept.skipped:,} row{'s' * (kept.skipped != 1)}"
        remarks.append(f"{number} could not be read: left out. The first: {kept.problems[0]}")
    return tuple(remarks)
