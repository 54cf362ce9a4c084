"""Whether two ways of computing logits are one model: made-up rows, and what rounding alone makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.memory import ran_out

# What each made-up row begins with of the one before it, and its length.
BRANCHES = ((0, 13), (6, 11), (9, 10), (6, 8), (2, 9), (0, 5))
# Tokens that a row is read on by, to see what other shapes round otherwise.
_FURTHER = 4
# Mean over nodes of |found - alone| / |alone|, logits centred: so little is rounding, and so is what is no more than a
# few times the difference that rows show to themselves in other shapes, up to the last figure. SmolLM2-135M on a CPU
# shows 1e-5 in float32 and 0.02 in bfloat16 and in 4 bits; with a mask that is not heeded 0.11, with positions that
# are not 0.15.
_ROUNDING = {torch.float32: (1e-4, 1e-3)}
_HALF_ROUNDING = (0.03, 0.1)
_TIMES = 3


def made_up_rows(model: PreTrainedModel) -> list[list[int]]:
    """Rows that begin alike, of several lengths; no draw touches the global random state."""
    # From the second quarter: special tokens stand at the ends.
    quarter = max(model.get_input_embeddings().weight.shape[0] // 4, 1)
    generator = np.random.default_rng(0)
    rows: list[list[int]] = [[]]
    for shared, length in BRANCHES:
        rows.append(rows[-1][:shared] + generator.integers(quarter, 2 * quarter, length - shared).tolist())
    return rows[1:]


@torch.no_grad()
def logits_alone(model: PreTrainedModel, row: list[int]) -> Tensor:
    """[length, vocabulary], in the model's dtype."""
    return logits_padded(model, [row])[0]


@torch.no_grad()
def logits_padded(model: PreTrainedModel, rows: list[list[int]]) -> list[Tensor]:
    """The logits of each row, [length, vocabulary], from one batch in which shorter ones are padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return [logits[number, : len(row)] for number, row in enumerate(rows)]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The mean over all positions of relative errors of logits, [length, vocabulary] for each row."""
    one, other = torch.cat(found).float(), torch.cat(wanted).float()
    centred = other - other.mean(-1, keepdim=True)
    return float(((one - other).norm(dim=-1) / centred.norm(dim=-1)).mean())


def rounding(model: PreTrainedModel, rows: list[list[int]], alone: list[Tensor]) -> float:
    """The largest difference that is none: what rounding may come to on this model, by what it is for rows that are
    read on a little further, where only the shapes are others."""
    further = [logits_alone(model, row + rows[0][:_FURTHER])[: len(row)] for row in rows]
    least, most = _ROUNDING.get(model.get_input_embeddings().weight.dtype, _HALF_ROUNDING)
    return min(max(least, _TIMES * difference(further, alone)), most)


def fault_in(trial: Callable[[], tuple[float, float]]) -> str | None:
    """Why another way of computing is not this model's, to follow upon a colon; None if it is.

    Args:
        trial: gives the difference of its logits from those of the rows alone, and what rounding may come to.

    Raises:
        MemoryError, RuntimeError: memory does not suffice for it.
    """
    try:
        found, most = trial()
    except Exception as error:  # there is another way, and code that we do not know may do anything with mask and cache
        if ran_out(error):
            raise
        return f"a trial fails with {type(error).__name__} ({next(iter(str(error).splitlines()), '')})"
    if not found <= most:  # nor NaN
        return f"in a trial its logits differed by {found:.1%} from those of the rows alone"
    return None
