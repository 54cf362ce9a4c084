"""Rows out of Parquet, a batch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_cli.data.raw_rows import LONGEST_ROW, TOO_LONG, BadRow, Row, name_columns
from qlora_cli.errors import DataError

_ROWS = 1000  # of a batch, at most
_BYTES = 2**23  # that a batch should have, by the mean size of a row
_BUFFER = 2**20  # bytes of each column


def read_parquet(path: Path, shown: str, consumed: Callable[[int], None]) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (row, row), from row 1; values are as Arrow gives them to Python.

    Its bytes are not read in their order: `consumed` gets the share of the file's size that the rows are of all.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            _refuse_equal_names(file.schema_arrow.names, shown)
            total = file.metadata.num_rows
            number = told = 0
            for batch in file.iter_batches(batch_size=_batch_size(file.metadata)):
                for row in _rows(batch, f"{shown}, row", number):
                    number += 1
                    yield number, row
                consumed(size * number // max(total, number) - told)
                told = size * number // max(total, number)
            consumed(size - told)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, RecursionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{shown}: not readable as Parquet ({reason}).") from error


def _batch_size(metadata: Any) -> int:
    """Rows of a batch: fewer where they are long."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    longest = max((group.total_byte_size // group.num_rows for group in groups if group.num_rows > 0), default=1)
    return min(max(_BYTES // max(longest, 1), 1), _ROWS)


def _refuse_equal_names(names: list[str], shown: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{shown}: two columns have the same name: {name_columns(names)}.")


def _rows(batch: Any, place: str, before: int) -> Iterator[Row | BadRow]:
    """The rows of a batch, `before` of which are in the file before it."""
    if batch.nbytes <= LONGEST_ROW:
        # Where a value is no UTF-8, or a time that Python has none of, its row is told from the others below.
        with contextlib.suppress(ValueError, OverflowError, RecursionError):
            rows: list[Row] = batch.to_pylist()
            yield from rows
            return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        if row.nbytes > LONGEST_ROW:
            yield BadRow(f"{place} {before + index + 1}: {TOO_LONG}")
            continue
        try:
            yield row.to_pylist()[0]
        except (ValueError, OverflowError, RecursionError) as error:
            yield BadRow(f"{place} {before + index + 1}: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"expected UTF-8, got the byte 0x{error.object[error.start]:02x} in a text. Save the text as UTF-8."
    return f"cannot be read ({str(error).strip().rstrip('.')})."
