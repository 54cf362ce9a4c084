"""Rows of any shape as one Arrow table, and which of its columns hold JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from qlora_cli.data.files import Row
from qlora_cli.errors import DataError

_CHUNK_ROWS = 8192


class _Column:
    """One column of a growing table: plain text, or JSON text once a value is anything else."""

    def __init__(self, rows_before: int) -> None:
        self.is_text = True
        self.chunks: list[pa.Array] = [pa.nulls(rows_before, pa.string())] if rows_before else []

    def append(self, values: list[Any]) -> None:
        if self.is_text and all(value is None or isinstance(value, str) for value in values):
            # Half a surrogate pair is a Python string, but not text; JSON can carry it to where it is reported.
            with contextlib.suppress(UnicodeEncodeError):
                self.chunks.append(pa.array(values, pa.string()))
                return
        if self.is_text:
            self.is_text = False
            self.chunks = [_as_json(chunk.to_pylist()) for chunk in self.chunks]
        self.chunks.append(_as_json(values))


def _as_json(values: list[Any]) -> pa.Array:
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def tabulate(rows: Iterable[Row]) -> tuple[pa.Table, frozenset[str]]:
    """A table with a string column for every key that occurs, and the names of the columns that hold JSON text.

    Values that are not text are kept as JSON, so that rows may differ in shape and come back exactly as they
    were. A missing key reads as null.
    """
    columns: dict[str, _Column] = {}
    total = 0
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, _CHUNK_ROWS)):
        for name in dict.fromkeys(itertools.chain.from_iterable(chunk)):
            columns.setdefault(name, _Column(total))
        for name, column in columns.items():
            column.append([row.get(name) for row in chunk])
        total += len(chunk)
    if any("\ud800" <= letter <= "\udfff" for name in columns for letter in name):
        raise DataError("the name of a column holds half of a surrogate pair, which is no text.")
    table = pa.table({name: pa.chunked_array(column.chunks, pa.string()) for name, column in columns.items()})
    return table, frozenset(name for name, column in columns.items() if not column.is_text)
