"""The fields of a recipe that name files: relative to the recipe, or, in an override, to the current folder."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_cli.errors import DataError
from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.data_files import DATA_SUFFIXES, find_data_files, near_name, shown_path
from qlora_cli.recipe.yaml_source import Value, shorten, value_at

# Fields that name a local file or folder, or else something on the hub.
_MODEL: yaml_source.Path = ("base_model",)
_PATH_FIELDS: tuple[yaml_source.Path, ...] = (_MODEL, ("dataset", "train"), ("dataset", "validation"))

LONGEST_PATH = 4096  # characters of a path that a file system takes
HUB_NAME = re.compile(r"(?=.{1,96}$)[\w.-]+(/[\w.-]+)?", re.ASCII)


def resolve_paths(data: dict[str, Value], base: Path) -> None:
    """Make the path-valued fields absolute where they name something local; `~` is a home folder everywhere."""
    if isinstance(output := data.get("output_dir"), str):
        data["output_dir"] = expand_home(output)
    for keys, section, value in _path_values(data):
        section[str(keys[-1])] = _resolve(value, base)


def misplaced_paths(data: dict[str, Value], recipe_folder: Path) -> dict[yaml_source.Path, str]:
    """Values that are still names, for the hub, but that the current folder has: what is wrong with each.

    The libraries that fetch from the hub look there first, so that one recipe would mean different things in
    different folders.
    """
    return {
        keys: f"{value} is not beside the recipe but in the current folder; a path is relative to the recipe: "
        f"write {os.path.relpath(value, recipe_folder)}"
        for keys, _, value in _path_values(data)
        if value and not os.path.isabs(value) and os.path.exists(value)  # noqa: PTH110, PTH117
    }


def absent_paths(data: dict[str, Value]) -> dict[yaml_source.Path, str]:
    """Resolved values that name nothing that is there and can be used, nor anything a hub could have."""
    problems = {}
    for keys, _, value in _path_values(data):
        if value and (problem := _absent(keys, value)):
            problems[keys] = problem
    return problems


def _absent(keys: yaml_source.Path, value: str) -> str | None:
    if "://" in value:
        return f"{shorten(value)} is a URL; expected a path, or a hub name such as org/name."
    if not os.path.isabs(value):  # noqa: PTH117
        return None if HUB_NAME.fullmatch(value) else _NO_NAME.format(shorten(repr(value)))
    try:
        if keys == _MODEL:
            return model_problem(Path(value), shown_path(Path(value)))
        find_data_files(value)
    except DataError as error:
        return str(error)
    except (OSError, ValueError) as error:  # not ours to read, or a name that no file can have
        return f"{shorten(repr(value))}: cannot be looked up: {error}"
    return None


_NO_NAME = "{} is no path that is there, and no hub name such as org/name."


def looks_local(value: str) -> bool:
    """Whether this can only be a path or a glob, not the name of something on the hub."""
    return (
        value.startswith((".", "/", "~"))
        or value.count("/") > 1
        or value.lower().endswith(DATA_SUFFIXES)
        or glob.has_magic(value)
    )


def is_local(name: str) -> bool:
    """Whether this names a file, a folder or a glob, rather than something on the hub."""
    # Of a recipe, what is beside it has become an absolute path on loading it.
    return looks_local(name) or (bool(name) and os.path.exists(name))  # noqa: PTH110 (too long a name is no path)


def expand_home(value: str) -> str:
    """`~` and `~user` at the start as the home folder; as it is if there is no such user."""
    with contextlib.suppress(RuntimeError):
        return str(Path(value).expanduser()) if value.startswith("~") else value
    return value


def model_problem(path: Path, shown: str) -> str | None:
    """Why this folder, called `shown`, is no base model; None if it may be one."""
    if path.is_file():
        return f"{shown} is a file; expected a model folder, or a hub name such as org/name."
    if not path.is_dir():
        return f"{shown}: there is no such folder{near_name(path)}"
    if not (path / "config.json").is_file():
        return f"{shown} holds no config.json, so it is not a model folder."
    return None


def _path_values(data: dict[str, Value]) -> Iterator[tuple[yaml_source.Path, dict[str, Value], str]]:
    """Every path-valued field that holds text: its keys, the section it is in, and the text."""
    for keys in _PATH_FIELDS:
        section = value_at(data, keys[:-1])
        value = section.get(str(keys[-1])) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(value, str):
            yield keys, section, value


def _resolve(value: str, base: Path) -> str:
    """An absolute path for what is a path by its look or because it exists; a hub name stays as it is."""
    if "://" in value or len(value) > LONGEST_PATH:
        return value
    # Where it stands is no pattern.
    path = (Path(glob.escape(str(base))) if glob.has_magic(value) else base) / expand_home(value)
    # Nothing at all is not the folder itself; and what cannot be looked at (too long, say) is no path.
    if looks_local(value) or (value and os.path.exists(path)):  # noqa: PTH110
        full = Path.cwd() / path
        tidy = os.path.normpath(full)
        with contextlib.suppress(OSError, ValueError):  # not ours to read, or a name that no file can have
            # Behind a symbolic link, `..` is not the folder that the name says.
            return tidy if os.path.realpath(tidy) == os.path.realpath(full) else str(full)
        return tidy
    return value
