"""The supervised loss, as a sum over tokens: whoever adds up micro-batches divides once, by the tokens of them all."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_cli.data.batches import Batch
from qlora_cli.data.encoded import IGNORED
from qlora_cli.model.packing import packed_inputs
from qlora_cli.model.rotary import rewind_rotary


def supervised_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy summed over the supervised tokens of a batch, float32, a scalar.

    The logits of position t are scored against the label of position t + 1. Only positions with a label reach the
    output head where the architecture allows it: the head's product and its logits, vocabulary wide, are the largest
    in the step. Packed rows see each other unless `prepare_packing` was done on the model.

    Args:
        model: a causal language model, wrapped by Accelerate or not.
        batch: ids and labels, each [batch, seq], with an attention mask or, packed, with positions.
    """
    logits, targets = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def supervised_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the model says at every position before a supervised token, and which token that is.

    It depends on the batch alone, and not on what went through the model before: see `rewind_rotary`.

    Returns:
        Logits [supervised tokens, vocabulary] in the model's dtype, and targets [supervised tokens], int64, in the
        order of the batch.
    """
    rewind_rotary(model)
    # The last position has nothing to predict.
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    supervised = targets != IGNORED
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs |= packed_inputs(model, batch.position_ids)
    if _slices_by_mask(model):
        logits = model(**inputs, logits_to_keep=supervised).logits  # [supervised tokens, vocabulary]
    else:
        logits = model(**inputs).logits[supervised]
    return logits, targets[supervised]


def _slices_by_mask(model: nn.Module) -> bool:
    """Whether the model's forward takes a boolean `logits_to_keep` [batch, seq], flattening what it keeps.

    transformers gives nearly every architecture this through one helper; older releases, remote code and a few
    stragglers slice columns instead, and get the plain path.
    """
    inner = getattr(model, "module", model)  # DistributedDataParallel's
    if not isinstance(inner, PreTrainedModel):
        return False
    return hasattr(inspect.getmodule(type(inner)), "slice_logits_to_keep")


def perplexity(loss: float) -> float | None:
    """exp(loss), None where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None
