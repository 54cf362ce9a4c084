"""From a recipe file and `--set` overrides to a checked `Recipe`, and back to YAML.

Precedence: the schema's defaults < the recipe < `--set`, the last of which wins. Relative paths in a recipe are
relative to the recipe; those in an override, to the folder the command is run in.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_cli.errors import RecipeError
from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.yaml_source import Position, Value, YamlSource, shorten

# Fields that name a local file or folder, or else something on the hub.
_PATH_FIELDS: tuple[yaml_source.Path, ...] = (
    ("base_model",),
    ("dataset", "train"),
    ("dataset", "validation"),
)

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
    _resolve_paths(source.data, path.parent)
    for override in overrides:
        _apply_override(source, override)
    try:
        return Recipe.model_validate(source.data)
    except ValidationError as error:
        raise RecipeError("\n".join(_describe(error.errors(), source))) from None


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
    _resolve_paths(source.data, Path.cwd(), only=keys)


def _resolve_paths(data: dict[str, Value], base: Path, only: yaml_source.Path | None = None) -> None:
    """Make the path-valued fields absolute where they name something local; `~` is a home folder everywhere."""
    if isinstance(output := data.get("output_dir"), str):
        data["output_dir"] = _expand_home(output)
    for keys in _PATH_FIELDS:
        section: Value = data
        for key in keys[:-1]:
            section = section.get(str(key)) if isinstance(section, dict) else None
        field = str(keys[-1])
        if not isinstance(section, dict) or not isinstance(section.get(field), str):
            continue
        if only is None or keys[: len(only)] == only:
            section[field] = _resolve_path(str(section[field]), base)


def _resolve_path(value: str, base: Path) -> str:
    """An absolute path for what is a path by its look or because it exists; a hub name stays as it is."""
    path = base / _expand_home(value)
    looks_local = value.startswith((".", "/", "~")) or value.count("/") > 1 or path.suffix.lower() in _DATA_SUFFIXES
    # Nothing at all is not the folder itself; and what cannot be looked at (too long, say) is no path.
    if looks_local or glob.has_magic(value) or (value and os.path.exists(path)):  # noqa: PTH110
        full = Path.cwd() / path
        tidy = os.path.normpath(full)
        # Behind a symbolic link, `..` is not the folder that the name says.
        return tidy if os.path.realpath(tidy) == os.path.realpath(full) else str(full)
    return value


def _expand_home(value: str) -> str:
    with contextlib.suppress(RuntimeError):  # no such user
        return str(Path(value).expanduser()) if value.startswith("~") else value
    return value


_DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}


def _describe(details: Sequence[ErrorDetails], source: YamlSource) -> list[str]:
    """Pydantic's errors in our words, one line a place: where, what was expected, what was got."""
    reasons: dict[yaml_source.Path, list[str]] = {}
    for detail in details:
        location: yaml_source.Path = ()
        for part in detail["loc"]:
            if (*location, part) in source.positions or not _is_union_tag(part):
                location = (*location, part)
        reasons.setdefault(location, []).append(_reason(detail, location))
    lines = []
    for location, texts in reasons.items():
        position = _position_of(location, source)
        name = ".".join(str(part) for part in location)
        # A field that takes either of two types fails once for each.
        lines.append(f"{position}: {name + ': ' if name else ''}{'; or '.join(texts)}")
    return lines


def _is_union_tag(part: str | int) -> bool:
    # pydantic names the member of a union that failed, as in ("lora", "target_modules", "list[str]").
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part)


def _position_of(location: yaml_source.Path, source: YamlSource) -> Position:
    """The position of the value itself, or of the nearest section around it."""
    for length in range(len(location), -1, -1):
        if position := source.positions.get(location[:length]):
            return position
    return Position(next(iter(source.positions.values())).file, 0, 0)


def _reason(detail: ErrorDetails, location: yaml_source.Path) -> str:
    got = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            known = list(_section_fields(location[:-1]))
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"expected one of: {', '.join(known)}"
            return f"unknown key; {hint}"
        case "missing":
            return "is required and was not given"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "model_type" | "model_attributes_type":
            return f"expected a section of `key: value` lines, got {_show(got)}"
        case _:
            message = detail["msg"]
            return f"{message[0].lower()}{message[1:]}, got {_show(got)}"


def _section_fields(location: yaml_source.Path) -> dict[str, Any]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return {}
        model = annotation
    return dict(model.model_fields)


def _show(value: object) -> str:
    return "nothing" if value is None else shorten(repr(value))
