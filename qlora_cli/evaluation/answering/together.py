"""Which rows a model answers together as it answers each alone: not every recurrent or older one heeds padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.likeness import (
    difference,
    logits_alone,
    logits_padded,
    made_up_rows,
    rounding,
)
from qlora_cli.evaluation.answering.memory import ran_out

# Which rows may share a batch.
Together: TypeAlias = Literal["any", "one length", "none"]

_STEPS = 3  # of generation: the first reads the prompts, the others what was kept of them
_LENGTH = 5  # of rows of one length


def read_together(model: PreTrainedModel) -> Together:
    """Which rows have the logits that each has alone in one forward pass, shorter ones padded on the right.

    A trial of some hundred tokens. The model is to be in eval mode.
    """

    def compared(rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
        return logits_padded(model, rows), [logits_alone(model, row) for row in rows]

    return _found_out(model, compared)


def written_together(model: PreTrainedModel) -> Together:
    """Which prompts, shorter ones padded on the left, transformers' `generate` goes on from as from each alone.

    A trial of some hundred tokens. The model is to be in eval mode.
    """

    def compared(rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
        return _while_same(_written(model, rows), [_written(model, [row]) for row in rows])

    return _found_out(model, compared)


def padded_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts, padded on the left to the longest, and which columns are tokens: [rows, columns] each, int64."""
    columns = max(map(len, prompts))
    ids = torch.zeros((len(prompts), columns), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, tokens in enumerate(prompts):
        # Padding is of the row's own tokens: some of `generate`'s rules look at every token there is.
        ids[place] = tokens[0]
        ids[place, columns - len(tokens) :] = torch.tensor(tokens)
        mask[place, columns - len(tokens) :] = 1
    return ids.to(device), mask.to(device)


def _found_out(
    model: PreTrainedModel, compared: Callable[[list[list[int]]], tuple[list[Tensor], list[Tensor]]]
) -> Together:
    """The largest of companies in which logits, which `compared` computes together and alone, differ by rounding."""
    rows = made_up_rows(model)[::2]

    def alike(some: list[list[int]]) -> bool:
        try:
            most = rounding(model, some, [logits_alone(model, row) for row in some])
            return difference(*compared(some)) <= most
        except Exception as error:  # what cannot be tried is not relied on
            if ran_out(error):
                raise
            return False

    if alike(rows):
        return "any"
    return "one length" if alike([row[:_LENGTH] for row in rows]) else "none"


_Written: TypeAlias = tuple[Tensor, Tensor]


@torch.no_grad()
def _written(model: PreTrainedModel, rows: list[list[int]]) -> _Written:
    """Tokens that follow, [rows, steps], and the logits that they were chosen by, [rows, steps, vocabulary]."""
    ids, mask = padded_left(rows, model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_length=None,
        max_new_tokens=_STEPS,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def _while_same(together: _Written, alone: list[_Written]) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of both, as long as both have read the same: between two likeliest tokens, rounding may choose."""
    tokens, logits = together
    found, wanted = [], []
    for place, (own_tokens, own_logits) in enumerate(alone):
        differ = (tokens[place] != own_tokens[0]).nonzero()
        steps = int(differ[0]) + 1 if len(differ) else len(own_tokens[0])
        found.append(logits[place, :steps])
        wanted.append(own_logits[0, :steps])
    return found, wanted
