"""Rows out of JSON Lines: one object a line."""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qlora_cli.data.raw_rows import LONGEST_ROW, TOO_LONG, BadRow, Row, describe, shorten, utf8_fault

# Levels of lists and objects. What works its way down through a value later (copies, templates, JSON again) has to
# get to its end from however deep a call.
_DEEPEST = 100
_SCALARS = {str, int, float, bool, type(None)}
_LINE_ENDS = ("\n", "\r\n", "")
_PIECE = 2**20  # bytes of a line that is too long, to skip it by


class JsonDecoder:
    """Parses JSON, and tells what is wrong with an object that JSON itself allows.

    `decode` and `raw_decode` are those of json.JSONDecoder.
    """

    def __init__(self) -> None:
        repeated: list[str] = []

        def pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            value = dict(pairs)
            if len(value) != len(pairs):
                repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            return value

        decoder = json.JSONDecoder(object_pairs_hook=pairs_hook)
        self.decode, self.raw_decode = decoder.decode, decoder.raw_decode
        self._repeated = repeated
        self._sound: set[str] = set()  # names of columns

    def forget(self) -> None:
        """To call before a value is parsed, if the one before it was not taken to `fault`."""
        self._repeated.clear()

    def fault(self, row: Row, text: str, start: int, end: int) -> str | None:
        """What is wrong with the object parsed last, from text[start:end]: the end of a message, or None."""
        if self._repeated:
            key = self._repeated[0]
            self._repeated.clear()
            return f"expected every key of an object once, got {shorten(key)} twice."
        # A look at every value takes longer than to count brackets, of which there are seldom so many.
        is_flat = _SCALARS.issuperset(map(type, row.values()))
        if not is_flat and text.count("{", start, end) + text.count("[", start, end) > _DEEPEST and _is_too_deep(row):
            return f"expected at most {_DEEPEST} levels of lists and objects, got more."
        if not self._sound.issuperset(row):
            if any("\ud800" <= letter <= "\udfff" for name in row for letter in name):
                return "the name of a column holds half of a surrogate pair, which is no text."
            self._sound = set(row)
        return None


def read_json_lines(stream: io.BufferedReader, shown: str) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (line, row), from line 1; blank lines are skipped."""
    decoder = JsonDecoder()
    lines = iter(functools.partial(stream.readline, LONGEST_ROW + 1), b"")
    for number, raw in enumerate(lines, 1):
        if len(raw) > LONGEST_ROW and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(_PIECE)
            yield number, BadRow(f"{shown}, line {number}: {TOO_LONG}")
            continue
        row = _parse(raw, decoder)
        if isinstance(row, dict):
            yield number, row
        elif row:
            yield number, BadRow(f"{shown}, line {number}: {row}")


def reason(error: Exception) -> str:
    """What parsing says against a text, without where."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg[:1].lower() + error.msg[1:]
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _parse(raw: bytes, decoder: JsonDecoder) -> Row | str:
    """The row of a line, or what is wrong with it; "" for a blank one."""
    try:
        line = raw.decode()
        row, end = decoder.raw_decode(line)
    except (ValueError, RecursionError):
        return _parse_slowly(raw, decoder)
    if not isinstance(row, dict) or line[end:] not in _LINE_ENDS:
        return _parse_slowly(raw, decoder)
    return decoder.fault(row, line, 0, end) or row


def _parse_slowly(raw: bytes, decoder: JsonDecoder) -> Row | str:
    """As `_parse`, for what is not simply an object and the end of the line."""
    decoder.forget()
    if fault := utf8_fault(raw):
        return fault
    line = raw.decode().strip("\r\n")
    if not line.strip():
        return ""
    try:
        row = decoder.decode(line)
    except (ValueError, RecursionError) as error:
        decoder.forget()
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return f"expected one JSON object, got {shorten(line.strip())} ({reason(error)}{column})."
    if isinstance(row, dict):
        return decoder.fault(row, line, 0, len(line)) or row
    decoder.forget()
    return f"expected one JSON object, got {describe(row)}."


def _is_too_deep(row: Row) -> bool:
    level: list[Any] = [row]
    for _ in range(_DEEPEST):
        values = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True
