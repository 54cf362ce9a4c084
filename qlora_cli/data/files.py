"""Rows out of JSON Lines, JSON, CSV, TSV and Parquet files, one after the other, with the line of every mistake.

Text is parsed here rather than by `datasets`, because its loaders guess types and so change text: a JSON
string that looks like a date becomes a timestamp, a CSV cell `NA` becomes null and `007` becomes 7.
No more than some pieces of a file are in memory at a time, however long it is, or becomes when it is unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_cli.data.json_list import holds_json_lines, read_json_list
from qlora_cli.data.json_rows import read_json_lines
from qlora_cli.data.opening import open_bytes, uncounted
from qlora_cli.data.parquet_rows import read_parquet
from qlora_cli.data.raw_rows import BadRow, Row, describe, shorten
from qlora_cli.data.separated_rows import read_separated
from qlora_cli.recipe.data_files import data_kind

__all__ = ["BadRow", "Row", "describe", "read_file", "shorten"]


def read_file(
    path: Path, shown: str, consumed: Callable[[int], None] = uncounted
) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (number, row) of one file, whose kind its name tells; .gz and .zst are unpacked on the way.

    `number` counts lines of .jsonl and rows of anything else, from 1; blank lines are no rows. A row that cannot be
    read, but after which reading goes on, is a BadRow. `shown` is what messages call the file.
    `consumed` is told now and then how many bytes of the file, as it is on disk, have been read since the last time;
    all in all it is told of every byte.

    Raises:
        DataError: with file and line for what makes the rest of the file unreadable.
    """
    kind = data_kind(path)
    if kind == ".parquet":
        yield from read_parquet(path, shown, consumed)
        return
    if kind == ".json":
        with open_bytes(path, shown, uncounted) as stream:
            kind = ".jsonl" if holds_json_lines(stream, shown) else kind
    with open_bytes(path, shown, consumed) as stream:
        match kind:
            case ".jsonl":
                yield from read_json_lines(stream, shown)
            case ".json":
                yield from read_json_list(stream, shown)
            case ".csv":
                yield from read_separated(stream, shown, ",")
            case _:
                yield from read_separated(stream, shown, "\t")
