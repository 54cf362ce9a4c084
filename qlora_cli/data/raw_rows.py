"""A row as it stands in a file, a row that cannot be read, and how messages name what was got."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

# Several times the longest context there is, at four bytes a token. A longer row is a file without its line ends, or
# a cell whose quote is never closed; to hold it in memory would cost a multiple of it.
LONGEST_ROW = 16 * 2**20  # bytes in JSON Lines, characters in the others
TOO_LONG = f"expected a row of at most {LONGEST_ROW // 2**20} MiB, got more."

_NAMES = 12  # of columns that a message names


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, though those after it can: `problem` is a whole message, with file and line or row."""

    problem: str


def describe(value: object) -> str:
    """A short, human name for a JSON value: what was got in place of what was expected."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {_cut(str(value), 40)}"
    if isinstance(value, str):
        return f"the text {shorten(value)}"
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def shorten(text: str, limit: int = 40) -> str:
    """`text` in quotes, cut to about `limit` characters, with halves of surrogate pairs as escapes."""
    quoted = json.dumps(_cut(text, limit), ensure_ascii=False)
    return quoted.encode("utf-8", "backslashreplace").decode("utf-8")


def name_columns(names: Sequence[str]) -> str:
    """The names, as many as a message has room for."""
    some = ", ".join(_cut(name, 40) for name in names[:_NAMES])
    some = some.encode("utf-8", "backslashreplace").decode("utf-8")
    return some if len(names) <= _NAMES else f"{some} and {len(names) - _NAMES} more"


def utf8_fault(raw: bytes) -> str | None:
    """What is wrong with a line that is no UTF-8, for the end of a message; None if it is."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return wrong_byte(raw[error.start], error.start + 1)
    return None


def wrong_byte(byte: int, position: int) -> str:
    """The end of a message on a byte that is no UTF-8, at `position` of its line, from 1."""
    return f"expected UTF-8, got the byte 0x{byte:02x} at byte {position} of the line. Save the file as UTF-8."


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
