"""What `--dataset` and its `--set` name, as far as it can be told without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qlora_cli.errors import DataError, RequestError
from qlora_cli.recipe.data_files import find_data_files
from qlora_cli.recipe.paths import HUB_NAME, expand_home, is_local

OPTION = "--dataset"
# What `--dataset` says itself, or what is for training.
_NOT_HERE = ("train", "validation", "validation_fraction", "train_split", "packing")
_INSTEAD = {"train_split": "set dataset.validation_split", "packing": "rows are scored one by one, which says the same"}


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what is not about how rows are read: all of it at once.

    Raises:
        RequestError: naming each, and why.
    """
    problems = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        section, _, name = key.partition(".")
        if section != "dataset" or not name:
            problems.append(
                f"--set {override}: an evaluation takes `dataset.KEY=VALUE` alone, which says how rows are read"
            )
        elif name.partition(".")[0] in _NOT_HERE:
            instead = _INSTEAD.get(name.partition(".")[0], f"{OPTION} names the rows")
            problems.append(f"--set {override}: `{key}` is for training; {instead}")
    if problems:
        raise RequestError("\n".join(problems))


def rows_path(file: str) -> str:
    """The rows that `--dataset` names: an absolute path, or the name on the hub. Nothing is read.

    Raises:
        DataError: if there is no such file, or it is none with rows.
    """
    if not file.strip():
        raise DataError(f"{OPTION}: expected a file, folder, glob or hub name, got nothing")
    if "://" in file:
        raise DataError(f"{OPTION}: {file[:200]} is a URL; expected a path, or a hub name such as org/name")
    if is_local(file):
        path = os.path.abspath(expand_home(file))  # noqa: PTH100 (keeps links)
        try:
            find_data_files(path)
        except DataError as error:
            raise DataError(f"{OPTION}: {error}") from None
        except (OSError, ValueError) as error:  # not ours to read, or a name that no file can have
            raise DataError(f"{OPTION}: {file[:200]!r}: cannot be looked up: {error}") from None
        return path
    if not HUB_NAME.fullmatch(file):
        raise DataError(f"{OPTION}: {file[:200]!r} is no path that is there, and no hub name such as org/name")
    return file
