"""Rows of data files as a datasets.Dataset: values of JSON and Parquet as they are, cells of CSV and TSV as what they
all say."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_cli.data.files import BadRow, Row, describe, read_file, shorten
from qlora_cli.errors import DataError, TaskError
from qlora_cli.evaluation.tasks.layouts.found import Needed, Numbers, refuse_problems, sound_rows
from qlora_cli.recipe.data_files import data_kind, shown_path

CELLS = (".csv", ".tsv")  # kinds of files that say of no cell what it is

_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_TRUTH = {"true": True, "false": False, "True": True, "False": False}


def read_files(files: Sequence[Path], needed: Needed, features: Any = None, numbers: Numbers = None) -> Any:
    """A datasets.Dataset of the rows of files, all of one kind, in their order.

    `features` are the types of the columns where they are known. What Parquet files say of themselves comes first.
    `numbers` are the columns whose cells may be read as numbers.

    Raises:
        TaskError: with file and line or row for what cannot be read, for a row that lacks a column of `needed` that
            another has, and for values of one column that are of different kinds; and if there is no row at all.
    """
    import datasets

    kind = data_kind(files[0])
    wheres: list[str] = []
    rows: list[Row] = []
    unit = "line" if kind == ".jsonl" else "row"
    for file in files:
        shown = shown_path(file)
        for number, row in sound_rows(read_file(file, shown), shown):
            wheres.append(f"{shown}, {unit} {number}")
            rows.append(row)
    if not rows:
        raise TaskError(f"{', '.join(map(shown_path, files))}: there is no row in it.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    refuse_problems(
        f"{where}: expected the column {name!r}, which other rows have, got {', '.join(map(repr, row))} only."
        for where, row in zip(wheres, rows, strict=True)
        for name in names
        if name in needed and name not in row
    )
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    if kind in CELLS:
        refuse_problems(_no_lists(columns, needed, wheres))
        texts = _texts(features, columns) if numbers is None else columns.keys() - numbers
        columns = {name: _as_said(values, no_number=name in texts) for name, values in columns.items()}
    if kind == ".parquet":
        features = _parquet_features(files[0]) or features
    if features is not None and set(features) == set(columns):
        try:
            return datasets.Dataset.from_dict(columns, features=features)
        except Exception:  # of Arrow: the card is of other files
            features = None
    try:
        return datasets.Dataset.from_dict(columns)
    except Exception as error:  # of Arrow, which names no row
        raise TaskError(_mixture(columns, wheres) or f"{shown_path(files[0])}: {error}") from error


def has_types(file: Path, features: Any) -> bool:
    """Whether `features`, which may be None, are those of the columns of a file of cells."""
    if features is None:
        return False
    try:
        rows = (row for _, row in read_file(file, shown_path(file)) if not isinstance(row, BadRow))
        return set(next(rows, ())) == set(features)
    except DataError:  # which is told when all of it is read
        return False


def _parquet_features(file: Path) -> Any:
    """The types that `datasets` has left in a file, which tell labels from numbers."""
    import datasets
    import pyarrow.parquet

    try:
        return datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
    except Exception:  # of types that `datasets` has not: those of the values do
        return None


def _texts(features: Any, columns: Collection[str]) -> set[str]:
    """The columns that are texts whatever they look like, by the types that are known."""
    if features is None or set(features) != set(columns):
        return set()
    return {name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")}


def _as_said(cells: list[str], *, no_number: bool) -> list[Any]:
    """Numbers, truth values, lists and objects of the cells of a column, if all of them say such; else the text.

    An empty cell among such values is None. A number is one as it would be written again: `007` and `+1` are text.
    With `no_number` so are all others, and truth values, which are numbers to Python.
    """
    filled = [cell for cell in cells if cell != ""]
    if not filled:
        return cells
    convert: Callable[[str], Any]
    if all(map(_WHOLE.fullmatch, filled)):
        convert = str if no_number else int
    elif all(map(_DECIMAL.fullmatch, filled)):
        convert = str if no_number else float
    elif all(cell in _TRUTH for cell in filled):
        convert = str if no_number else _TRUTH.__getitem__
    elif all(map(_is_bracketed, filled)):
        convert = _structure
    else:
        return cells
    try:
        return [convert(cell) if cell != "" else None for cell in cells]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return cells


def _no_lists(columns: Mapping[str, list[str]], needed: Needed, wheres: Sequence[str]) -> Iterator[str]:
    """What is wrong with cells that a prompt would take letters out of, in the place of members of a list."""
    for name, cells in columns.items():
        filled = [(where, cell) for where, cell in zip(wheres, cells, strict=True) if cell != ""]
        if name not in needed or not filled or not all(map(_is_bracketed, (cell for _, cell in filled))):
            continue
        for where, cell in filled:
            try:
                _structure(cell)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                yield (
                    f"{where}: {name}: expected a list or an object as JSON or Python writes it, got {shorten(cell)}. "
                    f"Other programs may write such rows as they print them: use JSON Lines or Parquet."
                )


def _is_bracketed(cell: str) -> bool:
    return (cell[0], cell[-1]) in (("[", "]"), ("{", "}"))


def _structure(cell: str) -> Any:
    """A list or an object, written as JSON or as Python writes it.

    Raises ValueError, or what Python's parser raises, for what is neither: also for texts without a comma between
    them, as numpy prints them, which Python would take for one text.
    """
    try:
        return json.loads(cell)
    except ValueError:
        value = ast.literal_eval(cell)
    tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline) if token.type != tokenize.NL]
    if any(pair == (tokenize.STRING, tokenize.STRING) for pair in itertools.pairwise(tokens)):
        raise ValueError("texts without a comma between them")
    return value


def _mixture(columns: dict[str, list[Any]], wheres: Sequence[str]) -> str | None:
    """What is wrong with the first value that does not go with those before it."""
    import pyarrow

    for name, values in columns.items():
        if _arrow_takes(pyarrow, values):
            continue
        low, high = 0, len(values)  # the first `low` values go together, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _arrow_takes(pyarrow, values[:middle]) else (low, middle)
        return (
            f"{wheres[high - 1]}: {name}: expected a value of the kind that the rows before it have, "
            f"got {describe(values[high - 1])}."
        )
    return None


def _arrow_takes(pyarrow: Any, values: list[Any]) -> bool:
    try:
        pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):
        return False
    return True
