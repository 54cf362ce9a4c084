"""The loss on held-out rows."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import nn

from qlora_cli.data.batches import collate, eval_batches
from qlora_cli.data.encode import EncodedRows
from qlora_cli.training.events import Emitter, EvalRecord, EvaluationProgress
from qlora_cli.training.loss import perplexity, supervised_loss


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    rows: EncodedRows,
    *,
    batch_size: int,
    pad_token_id: int,
    step: int,
    emit: Emitter,
) -> EvalRecord:
    """Mean loss over all supervised tokens of `rows`, each weighing the same; leaves the model in training mode."""
    started = time.monotonic()
    batches = eval_batches(rows.lengths, batch_size, accelerator.num_processes, accelerator.process_index)
    model.eval()
    # Sums in double precision on the CPU: the result must not depend on how rows fell into batches.
    totals = torch.zeros(2, dtype=torch.float64)
    for done, micro in enumerate(batches, start=1):
        batch = collate(rows, micro.indices, pad_token_id, blank=micro.blank).to(accelerator.device)
        totals[0] += supervised_loss(model, batch).double().cpu()
        totals[1] += batch.supervised_tokens
        emit(EvaluationProgress(done, len(batches)))
    model.train()
    loss_sum, tokens = accelerator.reduce(totals.to(accelerator.device), reduction="sum").tolist()
    loss = loss_sum / max(tokens, 1.0)
    return EvalRecord(
        step=step,
        eval_loss=loss,
        perplexity=perplexity(loss),
        supervised_tokens=int(tokens),
        seconds=time.monotonic() - started,
    )
