"""Answers written by transformers' own `generate`: for sampling and beams, and for models whose cache is their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.greedy_rules import not_a_number, sampled
from qlora_cli.evaluation.answering.rows import Row
from qlora_cli.evaluation.answering.together import padded_left

# What belongs to drawing tokens alone; many models' generation configurations have it.
_SAMPLING_KNOBS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def write_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    stop_ids: Collection[int],
    seed: int,
    each_token: Callable[[int], None],
) -> Literal[True]:
    """Write the whole answers of these rows, which have the same sampling arguments, with transformers' `generate`.

    The random state of the process is as before afterwards. `each_token` is called after every token, with how many
    there are.

    Raises:
        EvaluationError: `generate` refuses an argument, or the model's logits are NaN.
    """
    sampling = rows[0].prompt.sampling
    ids, mask = padded_left([row.prompt.tokens for row in rows], model.device)
    arguments: dict[str, Any] = {
        **_choices(sampling),
        "max_length": None,
        "max_new_tokens": max(row.prompt.max_new_tokens for row in rows),
        "eos_token_id": sorted(stop_ids) or None,
        "pad_token_id": _padding_id(tokenizer, stop_ids),
        "use_cache": True,
        "logits_processor": LogitsProcessorList([_NumbersOnly()]),
        "stopping_criteria": StoppingCriteriaList([_RowsEnd(rows, ids.shape[1], each_token)]),
    }
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            output = model.generate(input_ids=ids, attention_mask=mask, **arguments)
        except (ValueError, TypeError) as fault:
            raise _refused(sampling, fault) from fault
    if len(output) != len(rows):
        raise _refused(sampling, f"{len(output)} answers came to {len(rows)} prompts")
    for row, tokens in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
        row.written = tokens[: row.stops.first_end(tokens, row.prompt.max_new_tokens)]
    return True


def _choices(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are chosen, said in full: what is left open would be filled in by the model's own configuration."""
    if sampled(sampling):
        return {**sampling, "do_sample": True}
    return {**dict.fromkeys(_SAMPLING_KNOBS), **sampling, "do_sample": False, "temperature": None}


def _padding_id(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> int:
    """What stands behind an answer that is complete; it is cut off, so that any token will do."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(stop_ids, default=0)


def _refused(sampling: Mapping[str, Any], fault: object) -> EvaluationError:
    given = ", ".join(f"{name}={value!r}" for name, value in sampling.items()) or "no arguments but the prompts"
    return EvaluationError(
        f"transformers' generate could not be used with {given}: {fault}\n"
        "    These are the task's `generation_kwargs`: correct them there, or leave the task out."
    )


class _NumbersOnly(LogitsProcessor):  # type: ignore[misc]
    """Lets no NaN pass: the likeliest token would be any, and nothing could be drawn."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise not_a_number()
        return scores


class _RowsEnd(StoppingCriteria):  # type: ignore[misc]
    """Tells `generate` which rows are complete: each by its own stop texts and its own longest answer."""

    def __init__(self, rows: Sequence[Row], read: int, each_token: Callable[[int], None]) -> None:
        self._rows = rows
        self._read = read
        self._window = max(row.stops.window for row in rows)  # the whole of long answers, at each token, takes long
        self._each_token = each_token

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        """Which rows of [rows × beams, tokens] are complete, [rows × beams], bool."""
        columns = input_ids.shape[1]
        count = columns - self._read
        self._each_token(count)
        beams = len(input_ids) // len(self._rows)
        ends = input_ids[:, max(self._read, columns - self._window) :].tolist()
        complete = []
        for place, end in enumerate(ends):
            row = self._rows[place // beams]
            complete.append(count >= row.prompt.max_new_tokens or row.stops.reached(end))
        return torch.tensor(complete, dtype=torch.bool, device=input_ids.device)
