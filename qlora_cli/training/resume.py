"""Going on with a run: whether it is the same one, and putting model and optimizer where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from qlora_cli.data.batches import StepPlan
from qlora_cli.errors import OutputError
from qlora_cli.model.adapter import copy_adapter_tensors, read_adapter_tensors
from qlora_cli.model.lora import lora_layers
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe, TrainingSection
from qlora_cli.training.checkpoint import (
    ADAPTER,
    Progress,
    checkpoint_step,
    list_checkpoints,
    newest_valid,
    restore_optimizer,
)
from qlora_cli.training.events import Emitter, Notice
from qlora_cli.training.optim import page_again
from qlora_cli.training.run_folder import RunFolder
from qlora_cli.training.schedule import total_steps

# A resumed run may report, evaluate, score and save at other steps, keep other checkpoints, and go on for longer.
_FREE = {
    "output_dir",
    "training.num_train_epochs",
    "training.max_steps",
    "training.per_device_eval_batch_size",
    "training.logging_steps",
    "training.eval_steps",
    "training.eval_on_start",
    "training.save_steps",
    "training.save_total_limit",
    "training.device",
    "evaluation.every_steps",
    "evaluation.at_start",
    "evaluation.per_device_batch_size",
    "evaluation.data_root",
    "evaluation.task_path",
    "evaluation.keep_best",
}


def check_same_run(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse to go on with a run under a recipe that would have made another one.

    Raises:
        OutputError: naming every setting that differs.
    """
    if not folder.recipe.exists():
        return
    stored = load_recipe(folder.recipe, must_exist=False)
    before, now = _leaves(stored.model_dump()), _leaves(recipe.model_dump())
    free = _FREE
    if not (stored.evaluation.names and recipe.evaluation.names):  # what is not scored cannot be scored otherwise
        free = free | {name for name in now if name.startswith("evaluation.")}
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if changed:
        lines = [f"  {name}: was {before.get(name)!r}, is {now[name]!r}" for name in changed]
        raise OutputError(
            f"--resume: the run in {folder.path} was made with other settings:\n"
            + "\n".join(lines)
            + "\nResume with the same recipe, or train into another folder with --output-dir"
        )


def check_same_data(folder: RunFolder, fingerprints: Mapping[str, str], num_processes: int) -> None:
    """Refuse to go on with other rows under the same names, or with steps made of other numbers of rows.

    Args:
        fingerprints: of the data now, by split.

    Raises:
        OutputError: naming what differs from the run's own record.
    """
    try:
        record = json.loads(folder.record.read_text(encoding="utf-8"))
        before = {split: str(facts["fingerprint"]) for split, facts in record["data"].items()}
        processes = int(record["hardware"]["num_processes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # killed before it was written: nothing was trained under it
    changed = [split for split, fingerprint in fingerprints.items() if before.get(split, fingerprint) != fingerprint]
    if changed:
        raise OutputError(
            f"--resume: the {' and '.join(changed)} rows are not those that the run in {folder.path} began with. "
            "Put them back, or train into another folder with --output-dir"
        )
    if processes != num_processes:
        raise OutputError(
            f"--resume: the run in {folder.path} was made by {processes} processes, this is {num_processes}: a step "
            "would mean other rows. Start as many, or train into another folder with --output-dir"
        )


def check_steps_left(folder: RunFolder, total_steps: int) -> None:
    """Refuse to call a run complete that went on for longer than is asked for now.

    Raises:
        OutputError: naming both numbers of steps.
    """
    done = max((checkpoint_step(path) for path in list_checkpoints(folder.checkpoints)), default=0)
    if done > total_steps:
        raise OutputError(
            f"--resume: the run in {folder.path} has done {done} steps, and the recipe asks for {total_steps}. "
            "Ask for more, or train into another folder with --output-dir"
        )


def changed_schedule(folder: RunFolder, section: TrainingSection, plan: StepPlan) -> str | None:
    """What another number of steps does to a learning rate that falls over all of them; None if nothing."""
    if not folder.recipe.exists() or section.lr_scheduler_type == "constant":
        return None
    before = total_steps(load_recipe(folder.recipe).training, plan)
    now = total_steps(section, plan)
    if before == now:
        return None
    return (
        f"the {section.lr_scheduler_type} learning rate now falls over {now} steps, not {before}: from here on this is "
        "not the run that it would have been"
    )


def restore(
    folder: RunFolder, model: nn.Module, optimizer: Optimizer, emit: Emitter
) -> tuple[Progress | None, list[Path]]:
    """Put model and optimizer where the newest whole checkpoint left them.

    Returns:
        Where that is, None if there is no whole checkpoint; and the newer ones that are damaged.

    Raises:
        ModelError, CheckpointError: if it does not fit the model or the optimizer.
    """
    checkpoint, damaged = newest_valid(folder.checkpoints)
    for path, fault in damaged.items():
        emit(Notice(f"passed over checkpoint {path.name}: {fault}"))
    if checkpoint is None:
        emit(Notice("no checkpoint to go on from: starting from the beginning"))
        progress = None
    else:
        copy_adapter_tensors(lora_layers(model), read_adapter_tensors(checkpoint / ADAPTER), checkpoint / ADAPTER)
        progress = restore_optimizer(checkpoint, optimizer)
        page_again(optimizer)
        emit(Notice(f"going on from {checkpoint.name}"))
    return progress, list(damaged)


def _leaves(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if isinstance(value, dict) and name != "dataset.columns":
            result |= _leaves(value, name + ".")
        else:
            result[name] = value
    return result
