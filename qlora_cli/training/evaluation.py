"""The loss on held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from qlora_cli.data.batches import Batch, collate, eval_batches
from qlora_cli.data.units import Units
from qlora_cli.errors import Interrupted, NonFiniteError, OutOfMemoryError
from qlora_cli.evaluation.answering.memory import within_memory
from qlora_cli.training.devices import on_any_process
from qlora_cli.training.events import Emitter, EvalRecord, EvaluationProgress
from qlora_cli.training.loss import perplexity, supervised_loss

_WAYS_OUT = "Look at them; else try a lower learning_rate, or compute_dtype: float32"
_BASE_IS_BROKEN = (
    "Nothing was trained yet, so it is the base model that gives this: look at its weights, or at compute_dtype"
)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    units: Units,
    *,
    batch_size: int,
    pad_token_id: int,
    step: int,
    emit: Emitter,
    stopping: Callable[[], bool] = lambda: False,
) -> EvalRecord:
    """Mean loss over all supervised tokens of `units`, each weighing the same; leaves the model in training mode.

    Args:
        stopping: asked before every batch whether to leave off, on all processes if one says so.

    Raises:
        NonFiniteError: if it is NaN or infinite, naming the rows that make it so.
        OutOfMemoryError: if a batch does not fit, on any process.
        Interrupted: if it was left off.
    """
    started = time.monotonic()
    batches = eval_batches(units, batch_size, accelerator.num_processes, accelerator.process_index)
    # Sums in double precision on the CPU: the result must not depend on how rows fell into batches.
    totals = torch.zeros(2, dtype=torch.float64)
    broken: list[int] = []
    model.eval()
    try:
        for done, micro in enumerate(batches, start=1):
            if on_any_process(accelerator, stopping()):
                raise Interrupted(f"left off the evaluation after step {step}")
            batch = collate(units, micro.indices, pad_token_id, blank=micro.blank)
            loss_sum = within_memory(_loss_sum, model, batch, accelerator.device)
            # The processes meet in every batch, so that none is left waiting for one that ran out of memory.
            if on_any_process(accelerator, loss_sum is None) or loss_sum is None:
                when = f"after step {step}" if step else "before the first step"
                raise OutOfMemoryError(f"evaluation {when} ran out of memory on {accelerator.device}")
            if not torch.isfinite(loss_sum):
                broken += batch.rows
            totals[0] += loss_sum
            totals[1] += batch.supervised_tokens
            emit(EvaluationProgress(done, len(batches)))
    finally:
        model.train()
    total, tokens = accelerator.reduce(totals.to(accelerator.device), reduction="sum").tolist()
    loss = total / max(tokens, 1.0)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"evaluation after step {step}: the held-out loss is {loss}. "
            f"{units.naming(gather_object(broken))}. {_WAYS_OUT if step else _BASE_IS_BROKEN}"
        )
    return EvalRecord(
        step=step,
        eval_loss=loss,
        perplexity=perplexity(loss),
        supervised_tokens=int(tokens),
        seconds=time.monotonic() - started,
    )


def _loss_sum(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The loss summed over a batch's supervised tokens, float64, on the CPU."""
    return supervised_loss(model, batch.to(device)).double().cpu()
