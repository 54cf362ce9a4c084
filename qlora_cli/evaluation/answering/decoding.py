"""Greedy decoding of several rows at once, in which rows that are complete leave the others alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.greedy_rules import not_a_number
from qlora_cli.evaluation.answering.row_cache import RowCache
from qlora_cli.evaluation.answering.rows import Row

# Rows that are complete are taken out once they are this share of the batch: taking out copies all the others.
_LEAVE_AT = 1 / 8


class GreedyRows:
    """Rows that have been read, and are written on token by token.

    Args:
        model: a causal language model that takes positions and a cache of ours.
        rows: what is being written; nothing of it yet.
        cache: keys and values of all their tokens, padded on the left to the longest row.
        logits: [rows, vocabulary], what follows each row's last token.
        repetition_penalty: the model's own, 1 for none.
    """

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[Row], cache: RowCache, logits: Tensor, repetition_penalty: float
    ) -> None:
        self._model = model
        self._cache = cache
        self._logits = logits
        self._rows: list[Row] = list(rows)
        self._open = [True] * len(self._rows)
        lengths = torch.tensor([row.length for row in self._rows], device=logits.device)
        self._columns = max(row.length for row in self._rows)
        self._padding = self._columns - lengths  # [rows]: columns on the left that are no tokens of the row
        self._padded = bool(self._padding.any())
        self._positions = lengths[:, None]  # [rows, 1]: of the token that is read next
        # A complete row may be read on beside the others: never where no position of its own is, since models have
        # tables of them, or turn what all rows read by the furthest.
        self._last_positions = torch.tensor([[row.most - 1] for row in self._rows], device=logits.device)
        self._penalty = None
        if repetition_penalty != 1:
            self._penalty = _RepetitionPenalty(repetition_penalty, self._rows, logits.shape[-1], logits.device)

    @property
    def logits(self) -> Tensor:
        """What follows the last token of every row that is still here, [rows, vocabulary]."""
        return self._logits

    @property
    def unfinished(self) -> list[Row]:
        """The rows whose answers are not complete."""
        return [row for row, is_open in zip(self._rows, self._open, strict=True) if is_open]

    @torch.no_grad()
    def advance(self) -> list[Row]:
        """Write one more token in every unfinished row; returns those that this completed.

        Raises:
            EvaluationError: the model's logits are NaN.
        """
        chosen = self._chosen()  # [rows]
        completed = []
        for place, (row, token) in enumerate(zip(self._rows, chosen.tolist(), strict=True)):
            if not self._open[place]:
                continue
            row.written.append(token)
            if row.complete:
                self._open[place] = False
                completed.append(row)
        if any(self._open):
            self._read(self._without_complete(chosen))
        return completed

    def _chosen(self) -> Tensor:
        """The likeliest next token of every row, [rows], int64; in float32, as transformers' `generate` chooses."""
        scores = self._logits.float()
        if self._penalty is not None:
            scores = self._penalty.penalised(scores)
        highest, tokens = scores.max(dim=-1)
        if bool(highest.isnan().any()):
            raise not_a_number()
        return tokens

    def _without_complete(self, chosen: Tensor) -> Tensor:
        """Take complete rows out, if they are enough; returns the chosen tokens of the rows that are still there."""
        kept = [place for place, is_open in enumerate(self._open) if is_open]
        if len(kept) > len(self._open) * (1 - _LEAVE_AT):
            return chosen
        places = torch.tensor(kept, device=chosen.device)
        padding = self._padding[places]
        first_column = int(padding.min())
        self._cache.keep(places, first_column)
        self._rows = [self._rows[place] for place in kept]
        self._open = [True] * len(kept)
        self._padding = padding - first_column
        self._padded = bool(self._padding.any())
        self._columns -= first_column
        self._positions = self._positions[places]
        self._last_positions = self._last_positions[places]
        if self._penalty is not None:
            self._penalty.keep(places)
        return chosen[places]

    def _read(self, tokens: Tensor) -> None:
        """Let the model read these tokens, [rows], one behind every row."""
        if self._penalty is not None:
            self._penalty.note(tokens)
        self._columns += 1
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=self._positions,
            attention_mask=self._attended(),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._logits = output.logits[:, -1]
        self._positions = torch.minimum(self._positions + 1, self._last_positions)

    def _attended(self) -> Tensor | None:
        """The columns that are tokens, [rows, columns], int64; None for all of them, which has the faster kernels."""
        if not self._padded:
            return None
        columns = torch.arange(self._columns, device=self._padding.device)
        return (columns[None, :] >= self._padding[:, None]).long()


class _RepetitionPenalty:
    """What a generation configuration's `repetition_penalty` does to tokens that a row holds already.

    Args:
        penalty: above 1 makes them less likely.
        rows: whose prompts' tokens count as well as what is written.
        vocabulary: the width of the logits.
    """

    def __init__(self, penalty: float, rows: Sequence[Row], vocabulary: int, device: torch.device) -> None:
        self._penalty = penalty
        self._held = torch.zeros((len(rows), vocabulary), dtype=torch.bool, device=device)
        for place, row in enumerate(rows):
            self._held[place, torch.tensor(row.prompt.tokens, device=device)] = True

    def penalised(self, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary], float32, with the penalty."""
        lower = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(self._held, lower, scores)

    def note(self, tokens: Tensor) -> None:
        """Remember one new token of every row, [rows]."""
        self._held.scatter_(1, tokens[:, None], True)

    def keep(self, rows: Tensor) -> None:
        """Forget all but these rows, [rows kept]."""
        self._held = self._held[rows]
