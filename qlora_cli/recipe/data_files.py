"""Which files a path, a folder or a glob of the recipe stands for."""

from __future__ import annotations

import contextlib
import glob
import itertools
from pathlib import Path

from qlora_cli.errors import DataError
from qlora_cli.recipe.words import distance, nearest

_MANY_NAMES = 2000  # names to look for a misspelt one among

# Kinds of data files that are read, and what those of text may be packed by.
DATA_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".zst")
# All endings of their names.
DATA_SUFFIXES = (*DATA_KINDS, *(kind + packed for packed in _PACKED for kind in DATA_KINDS if kind != ".parquet"))


def data_kind(path: Path) -> str | None:
    """What a file holds by its name, packed or not: `.jsonl` for `a.jsonl` and `a.JSONL.gz`; None if no rows."""
    suffix = data_suffix(path).lower()
    return suffix.removesuffix(".gz").removesuffix(".zst") if suffix in DATA_SUFFIXES else None


def data_suffix(path: Path) -> str:
    """The end of a name that tells the kind, as it is written: `.jsonl.gz` of `a.jsonl.gz`; else the usual suffix."""
    both = "".join(path.suffixes[-2:])
    return both if both.lower() in DATA_SUFFIXES else path.suffix


def data_stem(path: Path) -> str:
    """The name without `data_suffix`: `a` of `a.jsonl.gz`."""
    return path.name.removesuffix(data_suffix(path))


def find_data_files(name: str) -> list[Path]:
    """The data files, all of one kind, packed or not, in order of their names.

    Of a folder, hidden ones are left out, among them those that macOS adds for its own use (`._a.jsonl`).

    Raises:
        DataError: if there are none, or if they cannot be read together.
    """
    path, shown = Path(name), shown_path(Path(name))
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and data_kind(p))
        if not found:
            raise DataError(f"{shown}: no {_alternatives()} file in this folder.")
    elif glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())  # noqa: PTH207
        if not found:
            raise DataError(f"{shown}: no file matches.")
    else:
        raise DataError(f"{shown}: there is no such file or folder{near_name(path)}")
    _refuse_mixture(found, shown)
    return found


def _refuse_mixture(found: list[Path], shown: str) -> None:
    by_kind = {data_kind(p): p for p in reversed(found)}
    for kind, example in by_kind.items():
        if kind is None:
            raise DataError(f"{shown}: expected a {_alternatives()} file, got {example.name}.")
    if len(by_kind) > 1:
        raise DataError(
            f"{shown}: expected files of one kind, got {', '.join(sorted(p.name for p in by_kind.values()))}. "
            f"Name the ones to use with a glob such as *{data_suffix(found[0])}."
        )
    by_stem: dict[Path, Path] = {}
    for path in found:
        other = by_stem.setdefault(path.with_name(data_stem(path)), path)
        if other != path:
            raise DataError(
                f"{shown}: {other.name} and {path.name} look like the same rows twice, packed and not. "
                f"Name the ones to use with a glob such as *{data_suffix(other)}, or give one of them another name."
            )


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
    stem = nearest(data_stem(path), {data_stem(Path(name)) for name in names})
    close = min((distance(name, path.name), name) for name in names if data_stem(Path(name)) == stem) if stem else None
    return f"; did you mean {close[1]}?" if close else "."


def _alternatives() -> str:
    return f"{', '.join(DATA_KINDS[:-1])} or {DATA_KINDS[-1]}"
