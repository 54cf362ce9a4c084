"""Rows out of JSON Lines, JSON, CSV and TSV files, with the line of every mistake.

These are parsed here rather than by `datasets`, because its loaders guess types and so change text: a JSON
string that looks like a date becomes a timestamp, a CSV cell `NA` becomes null and `007` becomes 7.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_cli.errors import DataError

Row = dict[str, Any]


def read_file(path: Path, shown: str) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) of one text file: `number` counts lines of .jsonl and rows of anything else, from 1.

    `shown` is what messages call the file. Raises DataError with file and line for whatever cannot be read.
    """
    try:
        match path.suffix.lower():
            case ".jsonl":
                yield from _read_json_lines(path, shown)
            case ".json":
                yield from _read_json(path, shown)
            case ".csv":
                yield from _read_separated(path, shown, ",")
            case _:
                yield from _read_separated(path, shown, "\t")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, shown) from error
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror or error}.") from error


def describe(value: object) -> str:
    """A short, human name for a JSON value: what was got in place of what was expected."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {shorten(value)}"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def shorten(text: str, limit: int = 40) -> str:
    """`text` in quotes, cut to about `limit` characters."""
    return json.dumps(text if len(text) <= limit else text[:limit] + "…", ensure_ascii=False)


def _not_utf8(path: Path, shown: str) -> DataError:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return DataError(f"{shown}, line 1: expected UTF-8, got UTF-16. Save the file as UTF-8.")
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return DataError(
                    f"{shown}, line {number}: expected UTF-8, got the byte 0x{raw[error.start]:02x} "
                    f"at byte {error.start + 1} of the line. Save the file as UTF-8."
                )
    return DataError(f"{shown}: expected UTF-8. Save the file as UTF-8.")


def _read_json_lines(path: Path, shown: str) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # malformed, a number of thousands of digits, too deep
                raise DataError(
                    f"{shown}, line {number}: expected one JSON object, got {shorten(line.strip())} ({_reason(error)})."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{shown}, line {number}: expected one JSON object, got {describe(row)}.")
            yield number, row


def _read_json(path: Path, shown: str) -> Iterator[tuple[int, Row]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip().startswith("{"):
            # One whole object and then more: JSON Lines under the name .json, which is common.
            yield from _read_json_lines(path, shown)
            return
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{shown}{line}: expected a JSON list of objects ({_reason(error)}).") from error
    if isinstance(document, dict):
        raise DataError(
            f"{shown}: expected a JSON list of objects, got one object with the keys {', '.join(document)}. "
            f"Save the list of rows by itself, or name the file .jsonl if each line is a row."
        )
    if not isinstance(document, list):
        raise DataError(f"{shown}: expected a JSON list of objects, got {describe(document)}.")
    for number, row in enumerate(document, 1):
        if not isinstance(row, dict):
            raise DataError(f"{shown}, row {number}: expected an object, got {describe(row)}.")
        yield number, row


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
    return "nested too deeply"


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Lift `csv`'s limit of 131,072 characters a cell, which is process-wide, for as long as a file is read."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_separated(path: Path, shown: str, delimiter: str) -> Iterator[tuple[int, Row]]:
    with _long_cells(), path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a stray quote would otherwise swallow the lines up to the next one, silently.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{shown}, line 1: two columns have the same name: {', '.join(header)}.")
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{shown}, line {reader.line_num}: expected {len(header)} cells "
                        f"({', '.join(header)}), got {len(cells)}."
                    )
                yield number, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(
                f"{shown}, line {reader.line_num}: {error}. A cell that begins with a double quote must end "
                f"with one, and have those inside it doubled."
            ) from error
