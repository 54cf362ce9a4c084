"""`qlora train`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from qlora_cli.commands.invocation import invocation
from qlora_cli.errors import Interrupted, QloraError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.substitution import escape


def train(recipe: Path, *, overrides: list[str], output_dir: str | None, resume: bool, rehearse: bool) -> int:
    """Train the recipe's adapter, showing the run; returns the exit code."""
    from qlora_cli.console import make_console, show_error
    from qlora_cli.train_view import TrainView
    from qlora_cli.training.run_folder import RunFolder

    console = make_console()
    # In quotes, so that YAML reads any name as the text it is.
    folder = [] if output_dir is None else [f"output_dir={json.dumps(escape(output_dir), ensure_ascii=False)}"]
    again = _resume_command(recipe, overrides, output_dir)
    loaded = None
    try:
        loaded = load_recipe(recipe, [*overrides, *folder])  # before torch: a wrong recipe is told at once
        from qlora_cli.commands.libraries import names_in, set_up_libraries

        set_up_libraries(names_in(loaded), progress=console.is_terminal)
        from qlora_cli.training.run import train as run

        with TrainView(console) as view:
            finished = run(loaded, resume=resume, rehearse=rehearse, listeners=[view])
    except QloraError as error:
        show_error(error)
        if isinstance(error, Interrupted):
            console.print(f"Go on with: {again}", markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        show_error(Interrupted("stopped at once; what was saved before is whole"))
        if loaded is not None and RunFolder(Path(loaded.output_dir)).holds_a_run():
            console.print(f"Go on with: {again}", markup=False)
        return Interrupted.exit_code
    console.print(
        f"Load it over the same base with PEFT, transformers or vLLM, or fold it into the base's weights:\n"
        f"  {_merge_command(finished.adapter.parent)}\n"
        f"To train on, for longer:\n"
        f"  {again} --set training.max_steps={2 * finished.steps}",
        markup=False,
    )
    return 0


def _merge_command(run: Path) -> str:
    # One process does it, however many trained.
    return shlex.join(["qlora", "merge", str(run), "--output", f"{run.name}-merged"])


def _resume_command(recipe: Path, overrides: list[str], output_dir: str | None) -> str:
    words = [*invocation(), "train", str(recipe), *(word for item in overrides for word in ("--set", item))]
    words += [] if output_dir is None else ["--output-dir", output_dir]
    return shlex.join([*words, "--resume"])
