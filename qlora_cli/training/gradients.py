"""The gradients of one optimizer step, over all its micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from qlora_cli.data.batches import Batch, MicroBatch, collate
from qlora_cli.data.units import Units
from qlora_cli.errors import ModelError, OutOfMemoryElsewhereError, OutOfMemoryError
from qlora_cli.evaluation.answering.memory import within_memory
from qlora_cli.model.lora import bypassed_layers
from qlora_cli.training.data_parallel import DataParallel
from qlora_cli.training.devices import on_any_process
from qlora_cli.training.loss import supervised_loss


@dataclass(frozen=True)
class StepSums:
    """Sums over one optimizer step, of all processes; `norm` is the gradient's before clipping.

    `suspects` names the rows that made the loss or the gradient NaN or infinite, if it is.
    """

    loss: float
    supervised: int
    tokens: int
    norm: float
    suspects: str = ""

    @property
    def fault(self) -> str | None:
        """Which of the two is NaN or infinite; None if neither is."""
        if not math.isfinite(self.loss):
            return f"loss is {self.loss}"
        return None if math.isfinite(self.norm) else f"gradient norm is {self.norm}"


def accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    parallel: DataParallel,
    micro_batches: Sequence[MicroBatch],
    units: Units,
    *,
    pad_token_id: int,
    max_grad_norm: float | None,
) -> StepSums:
    """Add a step's gradients to the trained parameters: every token of all micro-batches and processes weighs the same,
    divided once by the supervised ones among them; then clip.

    Raises:
        OutOfMemoryError: if memory does not suffice, on any process; no weight has changed.
    """
    batches = [collate(units, micro.indices, pad_token_id, blank=micro.blank) for micro in micro_batches]
    counts = torch.tensor([[b.supervised_tokens, b.tokens] for b in batches]).sum(0).to(accelerator.device)
    supervised, tokens = (int(n) for n in accelerator.reduce(counts, reduction="sum").tolist())
    supervised = max(supervised, 1)
    losses = within_memory(_backward, accelerator, model, batches, supervised)
    # The processes meet here first, so that none is left waiting for one that ran out of memory.
    short = on_any_process(accelerator, losses is None)
    if losses is None:
        raise OutOfMemoryError(f"out of memory on {accelerator.device}")
    if short:
        raise OutOfMemoryElsewhereError("out of memory on another process")
    parallel.sum_gradients()
    total = accelerator.reduce(torch.stack(losses).sum(), reduction="sum")
    norm = accelerator.clip_grad_norm_(parallel.parameters, max_grad_norm or math.inf)
    sums = StepSums(float(total), supervised, tokens, float(norm))
    if sums.fault is None:
        return sums
    suspects = units.naming(gather_object(_suspects(batches, losses, loss_is_finite=math.isfinite(sums.loss))))
    return StepSums(sums.loss, supervised, tokens, sums.norm, suspects)


def _backward(accelerator: Accelerator, model: nn.Module, batches: Sequence[Batch], supervised: int) -> list[Tensor]:
    """The summed loss of every micro-batch, each gone backward."""
    losses = []
    for batch in batches:
        loss = supervised_loss(model, batch.to(accelerator.device))
        accelerator.backward(loss / supervised)
        losses.append(loss.detach())
    return losses


def check_all_took_part(model: nn.Module) -> None:
    """Refuse a model in which a LoRA layer has no gradient after the first backward pass.

    Raises:
        ModelError: naming such layers.
    """
    bypassed = bypassed_layers(model)
    if bypassed:
        raise ModelError(
            f"lora.target_modules: {len(bypassed)} of the chosen layers took no part in the first step, because "
            f"the model does not call them on text: {', '.join(bypassed[:5])}. Name others"
        )


def _suspects(batches: Sequence[Batch], losses: Sequence[Tensor], *, loss_is_finite: bool) -> list[int]:
    """The rows of the micro-batches whose loss is not finite; of all, if only the gradient is not."""
    real = [(batch, loss) for batch, loss in zip(batches, losses, strict=True) if batch.supervised_tokens]
    bad = [batch for batch, loss in real if loss_is_finite or not torch.isfinite(loss)]
    return [row for batch in bad for row in batch.rows]
