"""From a recipe file and `--set` overrides to a checked `Recipe`.

Precedence: the schema's defaults < the recipe that is extended < the recipe < `--set`, the last of which wins.
Relative paths in a recipe are relative to that recipe; those in an override, to the folder the command is run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_cli.errors import Mistake, Position, RecipeError
from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.layers import Stack, lay_file, lay_override
from qlora_cli.recipe.paths import absent_paths, misplaced_paths
from qlora_cli.recipe.rules import contradictions
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.values import describe_errors, position_of


def load_recipe(path: Path, overrides: Sequence[str] = (), *, must_exist: bool = True) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings, as given to `--set`; the value is read as YAML.
        must_exist: whether the local model and data that the recipe names have to be there.

    Raises:
        RecipeError: with every mistake found, each with its position.
    """
    stack = Stack()
    lay_file(stack, path)
    stack.begin_overrides()
    for override in overrides:
        lay_override(stack, override)
    stack.settle()
    top = Position(str(path))
    stack.places.setdefault((), yaml_source.Place(top, top))
    recipe, mistakes = _validate(stack)
    mistakes = _in_reading_order(stack.mistakes + mistakes, path)
    if must_exist:
        # Last, since they may be wrong only on this machine.
        told = {mistake.key for mistake in mistakes}
        mistakes += _in_reading_order(_path_mistakes(stack, path.parent, told), path)
    if mistakes or recipe is None:
        raise RecipeError(mistakes)
    return recipe


def _validate(stack: Stack) -> tuple[Recipe | None, list[Mistake]]:
    recipe, mistakes = None, []
    try:
        recipe = Recipe.model_validate(stack.data)
    except ValidationError as error:
        details = [detail for detail in error.errors(include_url=False) if not _is_hidden(detail, stack)]
        mistakes = describe_errors(details, stack.places)
    known = stack.mistakes + mistakes
    told = frozenset(name for mistake in known for name in (mistake.key, mistake.suggestion) if name)
    return recipe, mistakes + contradictions(stack.data, stack.places, stack.hinted, told, whole=stack.whole)


def _is_hidden(detail: ErrorDetails, stack: Stack) -> bool:
    """Whether a field is missing only because what gives it could not be read, or is told of already."""
    hinted = any(detail["loc"][: len(path)] == path for path in stack.hinted)
    return detail["type"] == "missing" and (hinted or not stack.whole)


def _path_mistakes(stack: Stack, recipe_folder: Path, told: set[str]) -> list[Mistake]:
    """What is not there, where nothing worse is said of the field already."""
    problems = absent_paths(stack.data) | misplaced_paths(stack.data, recipe_folder)
    return [
        Mistake(position_of(keys, stack.places), yaml_source.dotted(keys), problem)
        for keys, problem in problems.items()
        if yaml_source.dotted(keys) not in told
    ]


def _in_reading_order(mistakes: Sequence[Mistake], path: Path) -> list[Mistake]:
    """The recipe's own, then those of files it extends, then those of arguments; in each from top to bottom."""
    files = list(dict.fromkeys([str(path), *(m.position.file for m in mistakes if m.position.line)]))
    rank = {file: number for number, file in enumerate(files)}
    unique = dict.fromkeys(mistakes)
    return sorted(unique, key=lambda m: (rank.get(m.position.file, len(files)), m.position.line, m.position.column))
