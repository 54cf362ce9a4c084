"""Text out of a row, or what was got in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_cli.data.files import describe
from qlora_cli.errors import DataError


def got(row: Mapping[Any, Any], key: str) -> str:
    """What a message says of `row[key]`; a key that is not there is told from a null."""
    return describe(row[key]) if key in row else "nothing"


def field_name(field: str, columns: Mapping[str, str]) -> str:
    """What a message calls a field: with its column, if that has another name."""
    column = columns.get(field, field)
    return field if column == field else f"{field} (column {column!r})"


def read_text(row: Mapping[str, Any], field: str, columns: Mapping[str, str], where: str) -> str:
    """The text in a field's column; raises DataError if there is none."""
    column = columns.get(field, field)
    value = row.get(column)
    name = field_name(field, columns)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name}: expected text, got {got(row, column)}.")
    check_unicode(value, f"{where}: {name}")
    return value


def read_optional_text(row: Mapping[str, Any], field: str, columns: Mapping[str, str], where: str) -> str | None:
    """The text in a field's column; None if there is no column, a null or an empty text."""
    if row.get(columns.get(field, field)) in (None, ""):
        return None
    return read_text(row, field, columns, where)


def check_unicode(text: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where}: expected text, got {half}, half of a surrogate pair.") from error
