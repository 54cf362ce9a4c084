"""The rehearsal: before the first step, once through all that would else fail after hours, leaving no trace.

The longest batch to come goes forward, backward, through clipping and the optimizer; so does the one with the most
supervised tokens, if that is another, as the logits of those are often the largest tensor of a step. Then the longest
held-out batch, and a checkpoint that is written and read again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object

from qlora_cli.data.batches import Batch, MicroBatch, collate, eval_batches
from qlora_cli.data.largest import SizedBatch, extremes
from qlora_cli.data.units import Units
from qlora_cli.errors import NonFiniteError, OutOfMemoryElsewhereError, OutOfMemoryError
from qlora_cli.evaluation.answering.memory import ran_out, within_memory
from qlora_cli.training.devices import on_any_process
from qlora_cli.training.environment import peak_memory_bytes
from qlora_cli.training.events import Notice, Rehearsed, Stage
from qlora_cli.training.gradients import accumulate, check_all_took_part
from qlora_cli.training.loop import Loop
from qlora_cli.training.loss import supervised_loss
from qlora_cli.training.no_trace import no_trace
from qlora_cli.training.out_of_memory import eval_batch_size, how_to_evaluate_in_less, how_to_need_less
from qlora_cli.training.rehearsal_checkpoint import rehearse_checkpoint
from qlora_cli.training.schedule import seed_step


def rehearse(loop: Loop) -> None:
    """Go through the longest of what `loop` is about to run, and tell what it took; afterwards nothing has happened.

    Every process takes part, each with the longest training batch of them all: which process gets it is chance.

    Raises:
        OutOfMemoryError: if a batch does not fit.
        RunError: if the checkpoint could not be written.
        NonFiniteError: if a loss or a gradient is NaN or infinite, naming the rows, and steps are not skipped for it.
        CheckpointError: if the checkpoint is not read again as it was written.
        ModelError: if a LoRA layer takes no part.
    """
    loop.output.emit(Stage("rehearsing the longest batch"))
    device = loop.accelerator.device
    with no_trace(loop.model, loop.optimizer, device):
        longest, step_seconds = _rehearse_steps(loop)
        evaluation_seconds = _rehearse_evaluation(loop)
        checkpoint_bytes, checkpoint_seconds = rehearse_checkpoint(loop)
    loop.accelerator.wait_for_everyone()
    loop.output.emit(
        Rehearsed(
            rows=len(longest.indices),
            tokens=longest.longest,
            step_seconds=step_seconds,
            evaluation_seconds=evaluation_seconds,
            checkpoint_bytes=checkpoint_bytes,
            checkpoint_seconds=checkpoint_seconds,
            peak_memory_bytes=peak_memory_bytes(device),
            packed=loop.data.train.packed,
        )
    )


def _rehearse_steps(loop: Loop) -> tuple[SizedBatch, float]:
    """A step of every batch at the edge; returns the longest and the seconds that its step took."""
    coming = extremes(loop.plan, loop.progress.step, loop.total_steps)
    loop.model.train()
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0  # each batch meets the weights as they are, and no update is too large for them
    seed_step(loop.section.seed, loop.progress.step, loop.accelerator.process_index)
    # First a small one: when the longest comes in training, there is the optimizer's state already,
    taken = _rehearse_step(loop, [coming.smallest], "the shortest batch")
    # and, of other micro-batches, the gradients.
    before = [coming.smallest] if loop.section.gradient_accumulation_steps > 1 else []
    if coming.most_supervised.supervised > coming.largest.supervised:
        taken |= _rehearse_step(loop, [*before, coming.most_supervised], "the batch with the most to learn")
    started = time.monotonic()
    last = "the longest batch"
    _rehearse_step(loop, [*before, coming.largest], last, may_skip=taken or loop.progress.step > 0)
    return coming.largest, time.monotonic() - started


def _rehearse_step(loop: Loop, batches: Sequence[SizedBatch], name: str, *, may_skip: bool = True) -> bool:
    """An optimizer step as the loop does it; `name` is what messages call the last of its micro-batches.

    Returns whether it was taken; if not, training will skip it. Without `may_skip` nothing is skipped: where no batch
    is finite, it is the base.
    """
    units, last = loop.data.train, batches[-1]
    with _fitting(loop, name, units, last.indices, how_to_need_less(loop.section)):
        step = accumulate(
            loop.accelerator,
            loop.model,
            loop.parallel,
            [MicroBatch(batch.indices) for batch in batches],
            units,
            pad_token_id=loop.data.pad_token_id,
            max_grad_norm=loop.section.max_grad_norm,
        )
        if step.fault is None:
            check_all_took_part(loop.model)
            loop.optimizer.step()
        elif may_skip and loop.section.on_nonfinite == "skip_step":
            skipped = "training will skip it, as long as max_skipped_steps allows"
            loop.output.emit(Notice(f"rehearsal: the {step.fault} in {name}: {skipped}. {step.suspects}"))
        else:
            _tell_non_finite(loop, step.fault, name, step.suspects)
        loop.optimizer.zero_grad(set_to_none=True)
        if loop.accelerator.device.type == "cuda":
            torch.cuda.synchronize(loop.accelerator.device)  # what fails on the GPU fails here, and the clock is right
    return step.fault is None


def _rehearse_evaluation(loop: Loop) -> float | None:
    """The longest held-out batch of each process; returns the seconds that it took, None where nothing is held out."""
    units, section, accelerator = loop.data.validation, loop.section, loop.accelerator
    if units is None:
        return None
    size = eval_batch_size(section)
    micro = next(iter(eval_batches(units, size, accelerator.num_processes, accelerator.process_index)))
    name, started = "the longest held-out batch", time.monotonic()
    loop.model.eval()
    batch = collate(units, micro.indices, loop.data.pad_token_id, blank=micro.blank)
    with _fitting(loop, name, units, micro.indices, how_to_evaluate_in_less(section)):
        loss = within_memory(_loss, loop, batch)
        short = on_any_process(accelerator, loss is None)
        if loss is None:
            raise OutOfMemoryError(f"out of memory on {accelerator.device}")
        if short:
            raise OutOfMemoryElsewhereError("out of memory on another process")
    seconds = time.monotonic() - started
    losses = gather_object([loss])
    broken = gather_object([] if torch.isfinite(torch.tensor(loss)) else batch.rows)
    if broken:
        _tell_non_finite(loop, f"loss is {sum(losses)}", name, units.naming(broken))
    return seconds


@torch.no_grad()
def _loss(loop: Loop, batch: Batch) -> float:
    return float(supervised_loss(loop.model, batch.to(loop.accelerator.device)))


@contextmanager
def _fitting(loop: Loop, name: str, units: Units, indices: Sequence[int], advice: str) -> Iterator[None]:
    """Turn too little memory for a batch, given by its units, into a message."""
    try:
        yield
    except (RuntimeError, MemoryError, OutOfMemoryError) as error:
        if not (ran_out(error) or isinstance(error, OutOfMemoryError)):
            raise
        kept = "what was saved before is whole" if loop.progress.step else "nothing was trained yet"
        if isinstance(error, OutOfMemoryElsewhereError):
            raise OutOfMemoryError(
                f"rehearsal: {name} does not fit in the memory of another process; {kept}. {advice}"
            ) from None
        rows = [row for index in indices for row in units.rows_of(index).tolist()]
        raise OutOfMemoryError(
            f"rehearsal: {name}, {_size(units, indices)}, does not fit in the memory of {loop.accelerator.device}; "
            f"{kept}. {advice}. {units.naming(rows)}"
        ) from None


def _tell_non_finite(loop: Loop, fault: str, name: str, suspects: str) -> None:
    """Say which rows would break a step, or an evaluation."""
    step = loop.progress.step
    if step:
        ways_out = f"Look at them, or at compute_dtype; the state after step {step} is as it was"
    else:
        ways_out = (
            "Nothing was trained yet, so it is the base model that gives this: look at its weights, or at compute_dtype"
        )
    raise NonFiniteError(f"rehearsal: the {fault} in {name}, before step {step + 1}. {suspects}. {ways_out}")


def _size(units: Units, indices: Sequence[int]) -> str:
    """How many units, and of how many tokens: `8 rows of 2,048 tokens`."""
    kind, longest = "pack" if units.packed else "row", int(units.lengths[list(indices)].max())
    return f"{len(indices):,} {kind}{'s' * (len(indices) != 1)} of {longest:,} token{'s' * (longest != 1)}"
