"""Which files a path, a folder or a glob of the recipe stands for."""

from __future__ import annotations

import contextlib
import glob
import itertools
from pathlib import Path

from qlora_cli.errors import DataError
from qlora_cli.recipe.words import distance, nearest

_MANY_NAMES = 2000  # names to look for a misspelt one among

# Kinds of data files that are read.
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def find_data_files(name: str) -> list[Path]:
    """The data files, all of one kind, in order.

    Raises:
        DataError: if there are none, or if they cannot be read together.
    """
    path, shown = Path(name), shown_path(Path(name))
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in DATA_SUFFIXES)
        if not found:
            raise DataError(f"{shown}: no {_alternatives()} file in this folder.")
    elif glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())  # noqa: PTH207
        if not found:
            raise DataError(f"{shown}: no file matches.")
    else:
        raise DataError(f"{shown}: there is no such file or folder{near_name(path)}")
    by_kind = {p.suffix.lower(): p.name for p in reversed(found)}
    for kind, example in by_kind.items():
        if kind not in DATA_SUFFIXES:
            raise DataError(f"{shown}: expected a {_alternatives()} file, got {example}.")
    if len(by_kind) > 1:
        raise DataError(
            f"{shown}: expected files of one kind, got {', '.join(sorted(by_kind.values()))}. "
            f"Name the ones to use with a glob such as *{found[0].suffix}."
        )
    return found


def shown_path(path: Path) -> str:
    """A path as messages have it: relative to the current folder where it is inside."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def near_name(path: Path) -> str:
    """The end of a message: a name in the same folder that may have been meant, or the folder that is not there."""
    try:
        if not path.parent.is_dir():
            return f"; the folder {shown_path(path.parent)} is not there."
        names = sorted(p.name for p in itertools.islice(path.parent.iterdir(), _MANY_NAMES))
    except OSError:  # a folder that may not be looked into
        return "."
    # Without the suffix first, which makes all of a folder alike.
    stem = nearest(path.stem, {Path(name).stem for name in names})
    close = min((distance(name, path.name), name) for name in names if Path(name).stem == stem) if stem else None
    return f"; did you mean {close[1]}?" if close else "."


def _alternatives() -> str:
    return f"{', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]}"
