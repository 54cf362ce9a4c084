"""Going on with a run: from where, whether it is the same one, and putting model and optimizer where it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from qlora_cli.data.batches import StepPlan
from qlora_cli.errors import CheckpointError, OutputError
from qlora_cli.model.adapter import copy_adapter_tensors, read_adapter_tensors
from qlora_cli.model.lora import lora_layers
from qlora_cli.recipe.schema import Recipe, TrainingSection
from qlora_cli.training.checkpoint import (
    ADAPTER,
    Progress,
    SavedState,
    checkpoint_step,
    list_checkpoints,
    newest_valid,
    read_state,
    restore_optimizer,
    restore_random,
)
from qlora_cli.training.optim import page_again
from qlora_cli.training.schedule import data_position, total_steps

# A resumed run may report, evaluate, score and save at other steps, keep other checkpoints, go on for longer, wait
# longer for a lower loss, and take another way at a step that is not finite.
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
    "training.early_stopping_patience",
    "training.load_best",
    "training.on_nonfinite",
    "training.max_skipped_steps",
    "training.device",
    "evaluation.every_steps",
    "evaluation.at_start",
    "evaluation.per_device_batch_size",
    "evaluation.data_root",
    "evaluation.task_path",
    "evaluation.keep_best",
}


_INSTEAD = "or train into another folder with --output-dir"


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from."""

    folder: Path
    checkpoint: Path
    state: SavedState

    @property
    def step(self) -> int:
        """The steps that are done."""
        return self.state.progress.step


def find_checkpoint(run: Path, checkpoints: Path) -> tuple[Resumed | None, Mapping[Path, str]]:
    """The newest whole checkpoint of the run, None if there is none; and what is wrong with each newer one.

    Raises:
        CheckpointError: if it is whole, and not what this version writes.
    """
    checkpoint, passed_over = newest_valid(checkpoints)
    if checkpoint is None:
        return None, passed_over
    return Resumed(run, checkpoint, read_state(checkpoint)), passed_over


def check_same_recipe(resumed: Resumed, recipe: Recipe) -> None:
    """Refuse to go on with a run under a recipe that would have made another one.

    Raises:
        OutputError: naming every setting that differs.
    """
    stored = _recipe(resumed)
    before, now = _leaves(stored.model_dump()), _leaves(recipe.model_dump())
    # Where rows and model lie is no matter: what they are is compared by `check_same_material`.
    places = ("base_model", "dataset.train", "dataset.validation")
    free = _FREE | {name for name in places if isinstance(before.get(name), str) and isinstance(now[name], str)}
    if not (stored.evaluation.names and recipe.evaluation.names):  # what is not scored cannot be scored otherwise
        free = free | {name for name in now if name.startswith("evaluation.")}
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if changed:
        lines = [f"  {name}: was {before.get(name)!r}, is {now[name]!r}" for name in changed]
        raise OutputError(
            f"--resume: the run in {resumed.folder} was made with other settings:\n"
            + "\n".join(lines)
            + f"\nResume with the same recipe, {_INSTEAD}"
        )


def check_same_material(resumed: Resumed, run: Mapping[str, Any]) -> None:
    """Refuse to go on with other rows under the same names, another base model, or steps of other numbers of rows.

    Args:
        run: what the run is made of now: see `identity.run_identity`.

    Raises:
        OutputError: naming what differs from what the checkpoint says.
    """
    before, where = resumed.state.run, resumed.folder
    changed = [split for split, print_ in run["data"].items() if before["data"].get(split, print_) != print_]
    if changed:
        raise OutputError(
            f"--resume: the {' and '.join(changed)} rows are not those that the run in {where} began with. "
            f"Put them back, {_INSTEAD}"
        )
    if before["base_model"] != run["base_model"]:
        raise OutputError(
            f"--resume: the base model has the name of the one that the run in {where} began with, and other weights "
            f"or another configuration. Put it back, {_INSTEAD}"
        )
    if before["num_processes"] != run["num_processes"]:
        raise OutputError(
            f"--resume: the run in {where} was made by {before['num_processes']} processes, this is "
            f"{run['num_processes']}: a step would mean other rows. Start as many, {_INSTEAD}"
        )


def check_position(resumed: Resumed, section: TrainingSection, plan: StepPlan) -> None:
    """Refuse to call a run complete that went on for longer than is asked for now, or to go on with rows in another
    order.

    Raises:
        OutputError: naming both numbers of steps.
    """
    asked = total_steps(section, plan)
    done = max(checkpoint_step(path) for path in list_checkpoints(resumed.checkpoint.parent))
    if done > asked:
        raise OutputError(
            f"--resume: the run in {resumed.folder} has done {done} steps, and the recipe asks for {asked}. "
            f"Ask for more, {_INSTEAD}"
        )
    if resumed.state.position != data_position(plan, resumed.step):
        raise OutputError(
            f"--resume: step {resumed.step + 1} would see other rows than the run in {resumed.folder} had before it: "
            "they are drawn by NumPy, whose version is another, or this version of the tool orders them otherwise. "
            f"Resume with the versions that it began with (run.json has them), {_INSTEAD}"
        )


def doubts_about_the_rest(
    resumed: Resumed, section: TrainingSection, plan: StepPlan, run: Mapping[str, Any]
) -> list[str]:
    """What makes the rest of the run another one than it would have been, and is yet no reason to refuse."""
    found = [_changed_schedule(resumed, section, plan), _changed_surroundings(resumed, run)]
    return [doubt for doubt in found if doubt is not None]


def _changed_schedule(resumed: Resumed, section: TrainingSection, plan: StepPlan) -> str | None:
    """What another number of steps does to a learning rate that falls over all of them; None if nothing."""
    if section.lr_scheduler_type == "constant":
        return None
    before, now = total_steps(_recipe(resumed).training, plan), total_steps(section, plan)
    if before == now:
        return None
    return (
        f"the {section.lr_scheduler_type} learning rate now falls over {now} steps, not {before}: from here on this is "
        "not the run that it would have been"
    )


def _changed_surroundings(resumed: Resumed, run: Mapping[str, Any]) -> str | None:
    """What decides the last bits of a product, and is another than it was; None if nothing is."""
    before, now = resumed.state.run["surroundings"], run["surroundings"]
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if not changed:
        return None
    return f"{'; '.join(changed)}: from here on the last bits may not be those that they would have been"


def restore(resumed: Resumed, model: nn.Module, optimizer: Optimizer, process: int, device: torch.device) -> Progress:
    """Put model, optimizer and random generators where the checkpoint left them; returns where that is.

    Raises:
        ModelError, CheckpointError: if it does not fit the model or the optimizer.
    """
    adapter = resumed.checkpoint / ADAPTER
    copy_adapter_tensors(lora_layers(model), read_adapter_tensors(adapter), adapter)
    restore_optimizer(resumed.checkpoint, resumed.state, optimizer)
    page_again(optimizer)
    restore_random(resumed.checkpoint, resumed.state, process, device)
    return resumed.state.progress


def _recipe(resumed: Resumed) -> Recipe:
    """The recipe that the checkpoint was made with."""
    try:
        return Recipe.model_validate(resumed.state.run["recipe"])
    except ValidationError as error:
        names = ", ".join(".".join(str(part) for part in problem["loc"]) for problem in error.errors())
        raise CheckpointError(
            f"{resumed.checkpoint}: was made with settings that this version does not read so: {names}. Go on with the "
            f"version of qlora-cli that the run began with (run.json has it), {_INSTEAD}"
        ) from None


def _leaves(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if isinstance(value, dict) and name != "dataset.columns":
            result |= _leaves(value, name + ".")
        else:
            result[name] = value
    return result
