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
from qlora_cli.model.fingerprint import HUB_COMMIT, UNKNOWN_COMMIT
from qlora_cli.model.lora import lora_layers
from qlora_cli.recipe.schema import Recipe, TrainingSection
from qlora_cli.training.checkpoint import (
    ADAPTER,
    Progress,
    SavedState,
    check_readable,
    checkpoint_step,
    list_checkpoints,
    newest_valid,
    read_state,
    restore_optimizer,
    restore_random,
)
from qlora_cli.training.identity import but_for_places, settings
from qlora_cli.training.manifest import Fault, FaultKind
from qlora_cli.training.optim import page_again
from qlora_cli.training.record import last_checkpoint
from qlora_cli.training.run_folder import RunFolder
from qlora_cli.training.schedule import data_position, total_steps

_BASE = ("base_model", "revision")

# A resumed run may report, evaluate, score and save at other steps, keep other checkpoints, go on for longer, wait
# longer for a lower loss, and take another way at a step that is not finite. Where the model and the template of its
# rows lie is no matter: what they are, and what they give, is compared by `check_same_material`.
_FREE = {
    *_BASE,
    "dataset.chat_template",
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
_OLD_VERSION = f"Go on with the version of qlora-cli that the run began with (run.json has it), {_INSTEAD}"


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


def find_checkpoint(folder: RunFolder) -> tuple[Resumed | None, Mapping[Path, Fault]]:
    """The newest whole checkpoint of the run, and what is wrong with each newer one.

    None if there is none, and it may begin again: what it trained is lost.

    Raises:
        CheckpointError: if one may be whole, and this version cannot read it, or not now.
        OutputError: if the run has a result and nothing to go on from: beginning again, it would replace that. Or if it
            has saved something, and nothing is there: that may be somewhere else.
    """
    checkpoint, passed_over = newest_valid(folder.checkpoints)
    for path, fault in passed_over.items():
        check_readable(path, fault)
    if checkpoint is not None:
        return Resumed(folder.path, checkpoint, read_state(checkpoint)), passed_over
    for path, fault in passed_over.items():
        if fault.kind is FaultKind.OTHER_VERSION:
            raise CheckpointError(f"{path} {fault}. {_OLD_VERSION}")
    if folder.may_hold_a_result():
        faults = "".join(f"\n  {path.name}: {fault}" for path, fault in passed_over.items())
        raise OutputError(
            f"--resume: the run in {folder.path} has a trained adapter, and no checkpoint to go on from: it would "
            f"begin again and replace that. Move {folder.adapter} somewhere else, {_INSTEAD}{faults}"
        )
    if not passed_over and (name := last_checkpoint(folder.record)) is not None:
        raise OutputError(
            f"--resume: {folder.record} tells of {name}, and there is no checkpoint in {folder.checkpoints}: is it on "
            f"a disk that is not mounted, or was it moved? Put it back, or delete {folder.record} to begin again"
        )
    return None, passed_over


def check_same_recipe(resumed: Resumed, recipe: Recipe) -> None:
    """Refuse to go on with a run under a recipe that would have made another one.

    Raises:
        OutputError: naming every setting that differs.
    """
    stored = _recipe(resumed)
    before, now = settings(stored.model_dump()), settings(recipe.model_dump())
    free = _FREE
    if resumed.state.run["base_model"] == UNKNOWN_COMMIT:  # what cannot be compared has to have its old name
        free = free - set(_BASE)
    for name, one, other in (
        ("dataset.train", stored.dataset.train_sources, recipe.dataset.train_sources),
        ("dataset.validation", stored.dataset.validation_sources, recipe.dataset.validation_sources),
    ):
        if but_for_places(one) == but_for_places(other):
            free = free | {name}
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
        was, is_ = (print_.startswith(HUB_COMMIT) for print_ in (before["base_model"], run["base_model"]))
        why = "its weights or its configuration are others"
        if was != is_:
            why = "one is on the hub and the other in a folder, so that they cannot be compared"
        raise OutputError(
            f"--resume: base_model is not the one that the run in {where} began with: {why}. Put that back, {_INSTEAD}"
        )
    if before.get("chat_template", run["chat_template"]) != run["chat_template"]:
        raise OutputError(
            f"--resume: the chat template is not the one that the run in {where} began with: it is saved with the "
            f"adapter, and may ask otherwise what the training rows do not. Put it back, {_INSTEAD}"
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
    found = [
        _changed_name(resumed, run),
        _changed_schedule(resumed, section, plan),
        _changed_policy(resumed, section),
        _changed_surroundings(resumed, run),
    ]
    return [doubt for doubt in found if doubt is not None]


def _changed_name(resumed: Resumed, run: Mapping[str, Any]) -> str | None:
    """Another name of the base model, which was not read from end to end to see that it is the same; None if none."""
    before, now = (each["recipe"] for each in (resumed.state.run, run))
    changed = [f"{name} was {before[name]}, is {now[name]}" for name in _BASE if before[name] != now[name]]
    if not changed:
        return None
    compared = "commits" if run["base_model"].startswith(HUB_COMMIT) else "configurations and samples of the weights"
    return f"{'; '.join(changed)}: taken for the same model, as {compared} are the same"


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


def _changed_policy(resumed: Resumed, section: TrainingSection) -> str | None:
    """Another way at a step that is not finite; None if there is none."""
    before = _recipe(resumed).training
    names = ("on_nonfinite", "max_skipped_steps")
    changed = [
        f"training.{name} was {getattr(before, name)}, is {getattr(section, name)}"
        for name in names
        if getattr(before, name) != getattr(section, name)
    ]
    if not changed:
        return None
    return f"{'; '.join(changed)}: a step whose loss or gradient is not finite is met otherwise from here on"


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
            f"{resumed.checkpoint}: was made with settings that this version does not read so: {names}. {_OLD_VERSION}"
        ) from None
