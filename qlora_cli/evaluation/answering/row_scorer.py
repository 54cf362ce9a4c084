"""Likelihoods row by row, for models that a prefix tree is not for."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.likelihoods import Answers, Tally, token_answers
from qlora_cli.evaluation.answering.memory import Budget, exhausted, within_memory
from qlora_cli.evaluation.answering.prefix_tree import Ints
from qlora_cli.evaluation.answering.questions import Continuation, Likelihood, Progress


@dataclass(frozen=True, eq=False)
class _Row:
    """What continuations that read the same read, and which these are.

    Attributes:
        tokens: all but the last one of each.
        owners: their numbers.
        scored: the most tokens that one of them scores.
    """

    tokens: tuple[int, ...]
    owners: list[int]
    scored: int

    @property
    def first(self) -> int:
        """The first position after which a token is asked for."""
        return len(self.tokens) - self.scored


class RowScorer:
    """Computes every different row once, padded on the right to others of about its length.

    Args:
        model: any causal language model, in eval mode.
        tokens: how many tokens a forward pass computes at most, padding counted; but one row in any case.
        rows: how many rows of logits it gives at most, but one row's own in any case; and is held in float32.
        sequences: how many rows it computes at most; None is no limit.
        alike: beyond how many tokens only rows of one length share a forward pass: 0 for models that padding confuses;
            None is nowhere.
        why: the reason that this model's rows do not share what they begin with alike.
    """

    name = "row by row"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokens: int,
        rows: int,
        sequences: int | None = None,
        alike: int | None = None,
        why: str | None = None,
    ) -> None:
        self._model = model
        self._budget = Budget(tokens)
        self._rows = rows
        self._sequences = sequences
        self._alike = alike
        self._slices = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.why = why

    @staticmethod
    def tokens(continuations: Sequence[Continuation]) -> int:
        """How many tokens are computed for these, padding left out."""
        return sum(len(row.tokens) for row in _different(continuations))

    def score(self, continuations: Sequence[Continuation], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        """Each continuation's number and likelihood, as soon as it is known; the longest come first.

        Raises:
            EvaluationError: if memory runs out with a single row, or logits are NaN.
        """
        rows = _different(continuations)
        tally = Tally(len(continuations))
        total = sum(len(row.tokens) for row in rows)
        begin = done = 0
        progress(0, total)
        while begin < len(rows):
            batch = self._batch(rows, begin)
            found = within_memory(self._answers, batch, continuations)
            if found is None:
                tokens = len(batch) * len(batch[0].tokens)
                if len(batch) == 1:
                    raise exhausted(tokens)
                self._budget.halve(tokens)
                continue
            owner, final, answers = found
            begin += len(batch)
            done += sum(len(row.tokens) for row in batch)
            progress(done, total)
            yield from tally.add(owner, final, answers)

    def _batch(self, rows: Sequence[_Row], begin: int) -> Sequence[_Row]:
        """The rows from `begin` on that go together; they come by length."""
        longest = len(rows[begin].tokens)
        end, first = begin, longest
        while end < len(rows) and (self._sequences is None or end - begin < self._sequences):
            count = end + 1 - begin
            first = min(first, rows[end].first)
            if count > 1 and (count * longest > self._budget.tokens or count * (longest - first) > self._rows):
                break
            if self._alike is not None and longest > self._alike and len(rows[end].tokens) < longest:
                break
            end += 1
        return rows[begin:end]

    @torch.no_grad()
    def _answers(
        self, batch: Sequence[_Row], continuations: Sequence[Continuation]
    ) -> tuple[Ints, np.ndarray[Any, np.dtype[np.bool_]], Answers]:
        """Whose tokens, whether the last of theirs, and the answers."""
        longest = len(batch[0].tokens)
        first = min(row.first for row in batch)
        owner: list[int] = []
        target: list[int] = []
        place: list[int] = []
        final: list[bool] = []
        for number, row in enumerate(batch):
            start = number * (longest - first) + len(row.tokens) - first
            for index in row.owners:
                scored = continuations[index].scored
                owner += [index] * scored
                target += continuations[index].tokens[-scored:]
                place += range(start - scored, start)
                final += [False] * (scored - 1) + [True]
        logits = self._logits(batch, first).flatten(0, 1)
        answers = token_answers(logits, np.array(place, np.int64), np.array(target, np.int64), self._rows)
        return np.array(owner, np.int64), np.array(final), answers

    def _logits(self, batch: Sequence[_Row], first: int) -> Tensor:
        """[batch, longest - first, vocabulary]: after positions from `first` on."""
        longest = len(batch[0].tokens)
        device = self._model.get_input_embeddings().weight.device
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(batch):
            ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
            mask[number, : len(row.tokens)] = 1
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        if self._slices:
            inputs["logits_to_keep"] = torch.arange(first, longest, device=device)
        logits: Tensor = self._model(**inputs).logits
        return logits if logits.shape[1] == longest - first else logits[:, first:]


def _different(continuations: Sequence[Continuation]) -> list[_Row]:
    """The different rows, the longest first."""
    owners: dict[bytes, list[int]] = {}
    for index, continuation in enumerate(continuations):
        owners.setdefault(array("i", continuation.tokens[:-1]).tobytes(), []).append(index)
    rows = [
        _Row(continuations[same[0]].tokens[:-1], same, max(continuations[index].scored for index in same))
        for same in owners.values()
    ]
    return sorted(rows, key=lambda row: -len(row.tokens))
