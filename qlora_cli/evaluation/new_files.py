"""Files of results: what they are called, and how they come to be there, whole and without writing over another."""

from __future__ import annotations

import itertools
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from qlora_cli.disk import sync, telling_disk_errors

_NOT_IN_NAMES = re.compile(r"[\"<>:/|\\?*\[\]\s]+")


def samples_file(results: Path, task: str) -> Path:
    """Where the samples of a task lie, beside its results.

    `results_X.json` gets `samples_TASK_X.jsonl`, any other `NAME.json` gets `samples_TASK_NAME.jsonl`; underscores in X
    or NAME become hyphens, since lm-eval's tools take what follows the last one for it.
    """
    return results.with_name(f"samples_{_NOT_IN_NAMES.sub('__', task)}_{samples_name(results)}.jsonl")


def samples_name(results: Path) -> str:
    """What the names of files of samples say of their results."""
    return results.stem.removeprefix("results_").replace("_", "-")


def base_of(results: Path) -> Path:
    """The name that the base's samples are called after."""
    return results.with_name(f"{results.stem}-base{results.suffix}")


def write_new(path: Path, pieces: Iterable[str]) -> Path:
    """Write a file, whole or not at all; its folder is made.

    Returns:
        Where it is: at `path`, or, where that has come to be there, beside it under the next free name: `NAME-2.json`.
        What it holds may have taken hours, and so may what is there.

    Raises:
        RunError: if it cannot be written.
    """
    # A short name, however long the file's, that no other evaluation writes to.
    staging = path.with_name(f".{secrets.token_hex(4)}.writing")
    with telling_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Half of a surrogate pair, which no UTF-8 has, is written out, as JSON has it.
            with staging.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.writelines(pieces)
            sync(staging)
            return next(name for name in _names(path) if _placed(staging, name))
        finally:
            staging.unlink(missing_ok=True)


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _placed(staging: Path, path: Path) -> bool:
    """Give what is written its name; False if that is taken, by whatever it may be."""
    try:
        os.link(staging, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without a second name for a file: take the name first, which is refused alike
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        try:
            staging.replace(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return True
