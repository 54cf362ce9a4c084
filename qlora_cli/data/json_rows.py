"""Rows out of JSON Lines: one object a line."""

from __future__ import annotations

import functools
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qlora_cli.data.raw_rows import LONGEST_ROW, TOO_LONG, BadRow, Row, describe, shorten, utf8_fault

# Levels of lists and objects. What works its way down through a value later (copies, templates, JSON again) has to
# get to its end from however deep a call.
_DEEPEST = 100
_LINE_ENDS = ("\n", "\r\n", "")
_PIECE = 2**20  # bytes of a line that is too long, to skip it by


class JsonDecoder:
    """Parses JSON, and notes in `repeated` every key that one object has twice: the last would silently win."""

    def __init__(self) -> None:
        repeated: list[str] = []

        def pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            value = dict(pairs)
            if len(value) != len(pairs):
                repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            return value

        self.repeated = repeated
        self._decoder = json.JSONDecoder(object_pairs_hook=pairs_hook)

    def raw_decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; raises what `json.JSONDecoder.raw_decode` does."""
        self.repeated.clear()
        return self._decoder.raw_decode(text, start)

    def decode(self, text: str) -> Any:
        """The value that is the whole text; raises what `json.JSONDecoder.decode` does."""
        self.repeated.clear()
        return self._decoder.decode(text)

    def fault(self, row: Row, brackets: int) -> str | None:
        """What is wrong with the object just parsed, of so many opening brackets: the end of a message, or None."""
        if self.repeated:
            return f"expected every key of an object once, got {shorten(self.repeated[0])} twice."
        if brackets > _DEEPEST and _is_too_deep(row):
            return f"expected at most {_DEEPEST} levels of lists and objects, got more."
        names = "".join(row)
        if not names.isascii() and re.search("[\ud800-\udfff]", names):
            return "the name of a column holds half of a surrogate pair, which is no text."
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
        line = raw.decode("utf-8")
    except UnicodeDecodeError:
        return utf8_fault(raw) or ""
    try:
        row, end = decoder.raw_decode(line)
        if line[end:] not in _LINE_ENDS:
            return _parse_slowly(line.strip("\r\n"), decoder)
    except (ValueError, RecursionError):  # blanks before it, or truly not JSON
        return _parse_slowly(line.strip("\r\n"), decoder)
    return _checked(row, raw, decoder)


def _parse_slowly(line: str, decoder: JsonDecoder) -> Row | str:
    if not line.strip():
        return ""
    try:
        row = decoder.decode(line)
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return f"expected one JSON object, got {shorten(line.strip())} ({reason(error)}{column})."
    return _checked(row, line.encode("utf-8"), decoder)


def _checked(row: object, raw: bytes, decoder: JsonDecoder) -> Row | str:
    if not isinstance(row, dict):
        return f"expected one JSON object, got {describe(row)}."
    return decoder.fault(row, raw.count(b"{") + raw.count(b"[")) or row


def _is_too_deep(row: Row) -> bool:
    level: list[Any] = [row]
    for _ in range(_DEEPEST):
        values = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return True
