"""A first recipe on disk: written, read back as every command reads it, and its schema beside it for editors."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.errors import OutputError, RecipeError, RequestError
from qlora_cli.recipe.json_schema import recipe_schema_text
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.paths import expand_home
from qlora_cli.recipe.schema import Section
from qlora_cli.recipe.starter import Answers, starter_text
from qlora_cli.recipe.yaml_source import Value

SCHEMA_FILE = "recipe.schema.json"


def write_starter(path: Path, answers: Answers, *, force: bool) -> list[Path]:
    """Write the recipe, and its schema beside it; returns what was written.

    Raises RequestError, with nothing left there, if the recipe does not say what the answers do or cannot be written.
    """
    text = starter_text(answers)
    try:
        with _draft(path, text) as draft:
            _check_meaning(draft, path, answers)
            if force and path.exists():
                draft.chmod(stat.S_IMODE(path.stat().st_mode))
                draft.replace(path)
            else:
                with path.open("x", encoding="utf-8", newline="\n") as file:
                    file.write(text)
        return [path, *write_schema(path.parent)]
    except FileExistsError:
        raise OutputError(f"{path} is already there; --force writes over it") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _draft(path: Path, text: str) -> Iterator[Path]:
    """The recipe under another name, in the folder that its paths are relative to."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=".recipe-", suffix=".yaml", delete=False
    ) as file:
        draft = Path(file.name)
        try:
            file.write(text)
            file.close()
            yield draft
        finally:
            draft.unlink(missing_ok=True)


def _check_meaning(draft: Path, path: Path, answers: Answers) -> None:
    """Read what was written as every command reads it, and compare."""
    try:
        recipe = load_recipe(draft)
    except RecipeError as error:
        problem = str(error).replace(str(draft), str(path))
        raise RequestError(f"nothing was written, because the recipe would be wrong:\n{problem}") from error
    for name, value, got in _differences(answers.settings(), recipe, path.parent):
        raise RequestError(f"nothing was written: {name}: {value!r} would be read as {got!r}")


def _differences(data: Mapping[str, Value], section: Section, folder: Path) -> Iterator[tuple[str, Value, Any]]:
    """What does not come back as it was written, `data` being in a recipe in `folder`: name, value, what came back."""
    for name, value in data.items():
        got = getattr(section, name)
        if isinstance(got, Section) and isinstance(value, dict):
            yield from ((f"{name}.{inner}", *both) for inner, *both in _differences(value, got, folder))
        # Paths come back as the absolute ones that they are.
        elif got != value and not (isinstance(value, str) and _same_place(got, folder / expand_home(value))):
            yield name, value, got


def _same_place(loaded: Any, meant: Path) -> bool:
    if not isinstance(loaded, str) or not os.path.isabs(loaded):  # noqa: PTH117
        return False
    return os.path.realpath(loaded) == os.path.realpath(meant)


def write_schema(folder: Path) -> list[Path]:
    """Write the JSON Schema that the recipe's first line names, unless a file of that name is somebody else's.

    Returns the file if it was written or brought up to date.
    """
    target, text = folder / SCHEMA_FILE, recipe_schema_text()
    if target.exists():
        try:
            present = target.read_text(encoding="utf-8")
            ours = json.loads(present)["title"] == json.loads(text)["title"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        if present == text or not ours:
            return []
    target.write_text(text, encoding="utf-8", newline="\n")
    return [target]
