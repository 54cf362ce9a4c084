"""Whether the run in a folder is the run that the recipe describes."""

from __future__ import annotations

from typing import Any

from qlora_cli.errors import OutputError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.run_folder import RunFolder

# A resumed run may report, evaluate and save at other steps, keep another number of checkpoints, and go on for longer.
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
}


def check_same_run(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse to go on with a run under a recipe that would have made another one.

    Raises:
        OutputError: naming every setting that differs.
    """
    if not folder.recipe.exists():
        return
    before, now = _leaves(load_recipe(folder.recipe).model_dump()), _leaves(recipe.model_dump())
    changed = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    if changed:
        lines = [f"  {name}: was {before.get(name)!r}, is {now[name]!r}" for name in changed]
        raise OutputError(
            f"--resume: the run in {folder.path} was made with other settings:\n"
            + "\n".join(lines)
            + "\nResume with the same recipe, or train into another folder with --output-dir"
        )


def _leaves(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if isinstance(value, dict) and name != "dataset.columns":
            result |= _leaves(value, name + ".")
        else:
            result[name] = value
    return result
