"""What a step is, as functions of the recipe and the step's number: how many, which rows, which rate, which draws.

Nothing here remembers anything. That is why a run that goes on from a checkpoint is the run that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from typing import Any

import numpy as np
import torch

from qlora_cli.data.batches import StepPlan
from qlora_cli.data.units import Units
from qlora_cli.recipe.schema import TrainingSection


def step_plan(section: TrainingSection, units: Units, num_processes: int) -> StepPlan:
    """Which rows, or packs of rows, each optimizer step sees on each process."""
    return StepPlan(
        units=units,
        batch_size=section.per_device_train_batch_size,
        accumulation=section.gradient_accumulation_steps,
        num_processes=num_processes,
        seed=section.seed,
    )


def sequences_per_step(section: TrainingSection, num_processes: int) -> int:
    """Rows, or packs of rows, that a whole optimizer step sees, over all its micro-batches and processes."""
    return section.per_device_train_batch_size * section.gradient_accumulation_steps * num_processes


def total_steps(section: TrainingSection, plan: StepPlan) -> int:
    """`max_steps`, or the optimizer steps in `num_train_epochs`, at least one."""
    if section.max_steps is not None:
        return section.max_steps
    # Rounded first: 1.1 epochs of 50 steps are 55, not the 56 that 55.00000000000001 would give.
    return max(1, math.ceil(round(section.num_train_epochs * plan.steps_per_epoch, 6)))


def data_position(plan: StepPlan, step: int) -> dict[str, Any]:
    """Where a run stands in its data after `step` steps: the epoch, the steps taken in it, and the SHA-256 of which
    units the next step takes, over all processes."""
    epoch, taken = divmod(step, plan.steps_per_epoch)
    coming = [micro.indices for process in range(plan.num_processes) for micro in plan.step(step, process)]
    return {"epoch": epoch, "steps": taken, "next": hashlib.sha256(json.dumps(coming).encode()).hexdigest()}


def endless_warmup(section: TrainingSection, total_steps: int) -> str | None:
    """What to say of a warmup that the run does not live to see the end of."""
    if section.warmup_steps < total_steps:
        return None
    return f"warmup_steps is {section.warmup_steps} and the run ends after {total_steps}"


def seed_step(seed: int, step: int, process: int) -> None:
    """Set every random state as a function of seed, step and process: dropout is the same however a run got here."""
    words = np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)
    value = int(words[0])
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)


def learning_rate(section: TrainingSection, step: int, total_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of `total_steps`.

    Linear warmup from 0 over `warmup_steps`, then constant, or linear or half a cosine down to 0 at `total_steps`:
    the definitions of transformers' schedules, so that loss curves can be laid over each other.
    """
    if step < section.warmup_steps:
        return section.learning_rate * step / section.warmup_steps
    remaining = max(1, total_steps - section.warmup_steps)
    progress = min(1.0, (step - section.warmup_steps) / remaining)
    match section.lr_scheduler_type:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.learning_rate * factor
