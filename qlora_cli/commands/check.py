"""`qlora check`."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.errors import Interrupted, QloraError, RecipeError, RequestError
from qlora_cli.recipe.load import load_recipe

# Examples with `--json` if no number is given: a program came for them, a person for the facts.
_JSON_EXAMPLES = 3


def check(recipe: Path, *, overrides: list[str], show: int | None, as_json: bool) -> int:
    """Say what is wrong with a recipe and its data, and what training would make of them; returns the exit code."""
    from qlora_cli.check_view import facts_json, mistakes_json, show_check, show_problems
    from qlora_cli.console import make_console, show_error
    from qlora_cli.encoding_view import EncodingView
    from qlora_cli.training.events import EncodingProgress

    console = make_console()
    try:
        loaded = load_recipe(recipe, overrides)  # before torch: a wrong recipe is told at once
    except RecipeError as error:
        show_error(error)
        if as_json:
            console.out(mistakes_json(recipe, error), highlight=False)
        return error.exit_code
    try:
        from qlora_cli.commands.libraries import names_in, set_up_libraries

        set_up_libraries(names_in(loaded), progress=console.is_terminal and not as_json)
        from qlora_cli.training.checking import check_data

        examples = show if show is not None else _JSON_EXAMPLES if as_json else 0
        with EncodingView(make_console(stderr=True)) as view:
            facts = check_data(loaded, examples=examples, report=lambda done: view(EncodingProgress(*done)))
    except KeyboardInterrupt:
        show_error(Interrupted("stopped; nothing was changed"))
        return Interrupted.exit_code
    except QloraError as error:  # that is nothing about the recipe, as of a process that was killed
        show_error(error)
        return error.exit_code
    if as_json:
        show_problems(facts)
        console.out(facts_json(recipe, facts), highlight=False)
    else:
        show_check(console, recipe, facts)
    return RequestError.exit_code if facts.problems else 0
