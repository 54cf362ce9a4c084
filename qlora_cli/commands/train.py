"""`qlora train`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.commands.invocation import invocation
from qlora_cli.commands.stopping import exit_code
from qlora_cli.errors import Interrupted, QloraError, RunError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.substitution import escape

if TYPE_CHECKING:
    from qlora_cli.training.events import Finished


def train(recipe: Path, *, overrides: list[str], output_dir: str | None, resume: bool, rehearse: bool) -> int:
    """Train the recipe's adapter, showing the run; returns the exit code."""
    # In quotes, so that YAML reads any name as the text it is.
    folder = [] if output_dir is None else [f"output_dir={json.dumps(escape(output_dir), ensure_ascii=False)}"]
    again = _resume_command(recipe, overrides, output_dir, rehearse=rehearse)
    loaded: list[Recipe] = []

    def work() -> None:
        loaded.append(load_recipe(recipe, [*overrides, *folder]))  # before torch: a wrong recipe is told at once
        _run(loaded[0], again, resume=resume, rehearse=rehearse)

    def begun() -> bool:
        from qlora_cli.training.run_folder import RunFolder

        return bool(loaded) and RunFolder(Path(loaded[0].output_dir)).holds_a_run()

    def stopped() -> str:
        if not begun():
            return "stopped; nothing was written"
        if _newest_checkpoint(loaded[0]) is None:
            return "stopped at once; nothing was saved yet, and --resume begins again"
        return "stopped at once; what was saved before is whole"

    def told(error: QloraError) -> None:
        from qlora_cli.console import make_console

        if isinstance(error, Interrupted) and begun():
            make_console().print(f"Go on with: {again}", markup=False)
        elif isinstance(error, RunError) and loaded and (newest := _newest_checkpoint(loaded[0])) is not None:
            where = f"The newest checkpoint is {newest}. Once it can, the run goes on with"
            make_console().print(f"{where}: {again}", markup=False)

    return exit_code(work, stopped, told)


def _run(recipe: Recipe, again: str, *, resume: bool, rehearse: bool) -> None:
    """Train, and say what to do with the adapter; `again` is the command that goes on."""
    from qlora_cli.commands.libraries import names_in, set_up_libraries
    from qlora_cli.console import make_console

    console = make_console()
    set_up_libraries(names_in(recipe), progress=console.is_terminal)
    from qlora_cli.train_view import TrainView
    from qlora_cli.training.run import train as run

    with TrainView(console) as view:
        finished = run(recipe, resume=resume, rehearse=rehearse, listeners=[view])
    console.print(
        f"Load it over the same base with PEFT, transformers or vLLM, or fold it into the base's weights:\n"
        f"  {_merge_command(finished.adapter.parent)}\n"
        f"To train on, for longer:\n"
        f"  {again} --set {_longer(recipe, finished)}",
        markup=False,
    )


def _newest_checkpoint(recipe: Recipe) -> str | None:
    """The name of what a run goes on from, by its looks; None if it begins."""
    from qlora_cli.training.checkpoint import list_checkpoints
    from qlora_cli.training.manifest import find_fault
    from qlora_cli.training.run_folder import RunFolder

    found = list_checkpoints(RunFolder(Path(recipe.output_dir)).checkpoints)
    return next((path.name for path in found if find_fault(path, hashes=False) is None), None)


def _merge_command(run: Path) -> str:
    # One process does it, however many trained.
    return shlex.join([*invocation(alone=True), "merge", str(run), "--output", f"{run.resolve().name}-merged"])


def _longer(recipe: Recipe, finished: Finished) -> str:
    """The setting under which a finished run would go on."""
    patience = recipe.training.early_stopping_patience
    if finished.stopped_early is not None and patience is not None:
        return f"training.early_stopping_patience={2 * patience}"
    return f"training.max_steps={2 * finished.steps}"


def _resume_command(recipe: Path, overrides: list[str], output_dir: str | None, *, rehearse: bool) -> str:
    words = [*invocation(), "train", str(recipe), *(word for item in overrides for word in ("--set", item))]
    words += [] if output_dir is None else ["--output-dir", output_dir]
    return shlex.join([*words, *([] if rehearse else ["--no-rehearsal"]), "--resume"])
