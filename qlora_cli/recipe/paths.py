"""The fields of a recipe that name files: relative to the recipe, or, in an override, to the current folder."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from pathlib import Path

from qlora_cli.errors import DataError
from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.data_files import DATA_SUFFIXES, find_data_files, near_name, shown_path
from qlora_cli.recipe.fields import takes_environment
from qlora_cli.recipe.texts import map_texts, texts
from qlora_cli.recipe.words import nearest
from qlora_cli.recipe.yaml_source import Value, shorten

_MODEL: yaml_source.Path = ("base_model",)
# Fields whose text may name a file or a folder: itself, in the items of a list, or in one of its sections' fields.
_ROWS: tuple[yaml_source.Path, ...] = (("dataset", "train"), ("dataset", "validation"))
_TEMPLATE: yaml_source.Path = ("dataset", "chat_template")
_BENCHMARKS: tuple[yaml_source.Path, ...] = (("evaluation", "data_root"), ("evaluation", "task_path"))
_OUTPUT: yaml_source.Path = ("output_dir",)

PLAIN_TEMPLATE = "plain"
LONGEST_PATH = 4096  # characters of a path that a file system takes
HUB_NAME = re.compile(r"(?=.{1,96}$)[\w.-]+(/[\w.-]+)?", re.ASCII)


def is_inline_template(text: str) -> bool:
    """Whether a `chat_template` is the template itself, and not the name of one: only a template has Jinja's marks."""
    return "{{" in text or "{%" in text


def is_path(keys: yaml_source.Path, text: str) -> bool:
    """Whether the text at `keys` may name a file: `${NAME}` is replaced there, and nowhere else."""
    return takes_environment(keys) and not (keys == _TEMPLATE and is_inline_template(text))


def resolve_paths(data: dict[str, Value], base: Path) -> dict[str, Value]:
    """`data` with absolute paths where it names something local; `~` is a home folder everywhere."""

    def resolved(keys: yaml_source.Path, text: str) -> str:
        if keys == _OUTPUT:
            return expand_home(text)
        if keys == _TEMPLATE and is_path(keys, text) and text not in ("", PLAIN_TEMPLATE):
            return _resolve(text, base, local=True)
        if keys in _BENCHMARKS and text:
            return _resolve(text, base, local=True)
        return _resolve(text, base) if _may_be_of_the_hub(keys) else text

    return {key: map_texts(value, resolved, (key,)) for key, value in data.items()}


def misplaced_paths(data: dict[str, Value], recipe_folder: Path) -> dict[yaml_source.Path, str]:
    """Values that are still names, for the hub, but that the current folder has: what is wrong with each.

    The libraries that fetch from the hub look there first, so that one recipe would mean different things in
    different folders.
    """
    return {
        keys: f"{value} is not beside the recipe but in the current folder; a path is relative to the recipe: "
        f"write {os.path.relpath(value, recipe_folder)}"
        for keys, value in texts(data)
        if _may_be_of_the_hub(keys) and value and not os.path.isabs(value) and os.path.exists(value)  # noqa: PTH110, PTH117
    }


def absent_paths(data: dict[str, Value]) -> dict[yaml_source.Path, str]:
    """Resolved values that name nothing that is there and can be used, nor anything a hub could have."""
    problems = {keys: _absent(keys, value) for keys, value in texts(data) if value and is_path(keys, value)}
    return {keys: problem for keys, problem in problems.items() if problem}


def _may_be_of_the_hub(keys: yaml_source.Path) -> bool:
    return takes_environment(keys) and (keys == _MODEL or keys[:2] in _ROWS)


def _absent(keys: yaml_source.Path, value: str) -> str | None:
    template = keys == _TEMPLATE
    if keys == _OUTPUT or (template and value == PLAIN_TEMPLATE):
        return None
    expected = _TEMPLATES if template else "expected a path, or a hub name such as org/name."
    if keys in _BENCHMARKS:
        expected = "expected a folder."
    if "://" in value:
        return f"{shorten(value)} is a URL; {expected}"
    if not os.path.isabs(value):  # noqa: PTH117
        if template:
            return f"{shorten(repr(value))}: {_TEMPLATES}"
        return None if HUB_NAME.fullmatch(value) else _NO_NAME.format(shorten(repr(value)))
    try:
        if template:
            return _template_problem(Path(value), shown_path(Path(value)))
        if keys == _MODEL:
            return model_problem(Path(value), shown_path(Path(value)))
        if keys in _BENCHMARKS:
            return _folder_problem(Path(value), shown_path(Path(value)))
        find_data_files(value)
    except DataError as error:
        return str(error)
    except (OSError, ValueError) as error:  # not ours to read, or a name that no file can have
        return f"{shorten(repr(value))}: cannot be looked up: {error}"
    return None


_TEMPLATES = f"expected a Jinja file, the template itself, or {PLAIN_TEMPLATE}; left out, it is the tokenizer's own."
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


def _folder_problem(path: Path, shown: str) -> str | None:
    """Why this is no folder that can be looked into; None if it is one."""
    if path.is_dir():
        return None
    if path.exists():
        return f"{shown} is a file; expected a folder."
    return f"{shown}: there is no such folder{near_name(path)}"


def _template_problem(path: Path, shown: str) -> str | None:
    """Why this is no file that could hold a chat template; None if it may be one."""
    if path.is_file():
        return None
    if path.exists():
        return f"{shown} is no file; {_TEMPLATES}"
    meant = f"; did you mean {PLAIN_TEMPLATE}?" if nearest(path.name, [PLAIN_TEMPLATE]) else near_name(path)
    return f"{shown}: there is no such file{meant if len(meant) > 1 else f'; {_TEMPLATES}'}"


def _resolve(value: str, base: Path, *, local: bool = False) -> str:
    """An absolute path for what is `local`, a path by its look, or there; a hub name stays as it is."""
    if "://" in value or len(value) > LONGEST_PATH:
        return value
    # Where it stands is no pattern.
    path = (Path(glob.escape(str(base))) if glob.has_magic(value) and not local else base) / expand_home(value)
    # Nothing at all is not the folder itself; and what cannot be looked at (too long, say) is no path.
    if local or looks_local(value) or (value and os.path.exists(path)):  # noqa: PTH110
        full = Path.cwd() / path
        tidy = os.path.normpath(full)
        with contextlib.suppress(OSError, ValueError):  # not ours to read, or a name that no file can have
            # Behind a symbolic link, `..` is not the folder that the name says.
            return tidy if os.path.realpath(tidy) == os.path.realpath(full) else str(full)
        return tidy
    return value
