"""From a recipe file and `--set` overrides to a checked `Recipe`, and back to YAML.

Precedence: the schema's defaults < the recipe < `--set`, the last of which wins. Relative paths in a recipe are
relative to the recipe; those in an override, to the folder the command is run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from qlora_cli.errors import RecipeError
from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.messages import describe_errors, position_of
from qlora_cli.recipe.paths import misplaced_paths, resolve_paths
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.yaml_source import Position, Value, YamlSource

# Of two fields that exclude each other, the one in an override takes the place of the other, as with one field.
_EXCLUSIVE: dict[yaml_source.Path, str] = {
    ("training", "max_steps"): "num_train_epochs",
    ("training", "num_train_epochs"): "max_steps",
    ("dataset", "validation"): "validation_fraction",
    ("dataset", "validation_fraction"): "validation",
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings, as given to `--set`; the value is read as YAML.

    Raises:
        RecipeError: naming every mistake found, each with its position.
    """
    source = yaml_source.parse_yaml(_read_text(path), str(path))
    resolve_paths(source.data, path.parent)
    for override in overrides:
        _apply_override(source, override)
    problems = [
        f"{position_of(keys, source)}: {'.'.join(map(str, keys))}: {problem}"
        for keys, problem in misplaced_paths(source.data, path.parent).items()
    ]
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        problems = describe_errors(error.errors(), source) + problems
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with every default spelled out, so that `load_recipe` gives back an equal one."""
    data = recipe.model_dump()
    if recipe.training.max_steps is not None:
        # Of two ways to say how long, only the one in force; the schema refuses both at once.
        del data["training"]["num_train_epochs"]
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML leaves bare but we read as a number, such as the commit `12345e6`, and escapes what is no
    letter: PyYAML loses some of the rarer line breaks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if yaml_source.parse_scalar(text) == text and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise RecipeError(f"{path}: is a folder; expected a recipe, a YAML file")
        with path.open("rb") as file:
            data = file.read(yaml_source.MAX_BYTES + 1)
        if len(data) > yaml_source.MAX_BYTES:
            raise RecipeError(f"{path}: larger than {yaml_source.MAX_BYTES:,} bytes, which no recipe is")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; expected a recipe, a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def _apply_override(source: YamlSource, override: str) -> None:
    """Set one value in place; its position becomes the argument itself."""
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    argument = f"--set {override}"
    if not equals or not all(keys):
        raise RecipeError(f"{argument}: expected KEY=VALUE, as in --set training.max_steps=20")
    if not text.strip():
        raise RecipeError(f'{argument}: there is no value; write null to unset one, or "" for an empty text')
    value = yaml_source.parse_value(text, argument)
    section: dict[str, Value] = source.data
    for depth, key in enumerate(keys[:-1], start=1):
        inner = section.setdefault(key, {})
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{argument}: `{'.'.join(keys[:depth])}` is a value, not a section")
        section = inner
    section[keys[-1]] = value
    if value is not None and keys in _EXCLUSIVE:
        section.pop(_EXCLUSIVE[keys], None)
    for known in [path for path in source.positions if path[: len(keys)] == keys]:
        del source.positions[known]
    for depth in range(1, len(keys)):
        # A section that only overrides name has no place in the file to point at.
        source.positions.setdefault(keys[:depth], Position(argument, 0, 0))
    source.positions[keys] = Position(argument, 0, 0)
    resolve_paths(source.data, Path.cwd(), only=keys)
