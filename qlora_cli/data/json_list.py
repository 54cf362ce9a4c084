"""Rows out of one JSON document, a list of objects, of which only a piece is in memory at a time."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
from collections.abc import Iterator
from typing import cast

from qlora_cli.data.json_rows import JsonDecoder, reason
from qlora_cli.data.raw_rows import LONGEST_ROW, TOO_LONG, BadRow, Row, describe, name_columns, shorten, wrong_byte
from qlora_cli.errors import DataError

_PIECE = 2**20  # bytes
_LONGEST_WORD = 16  # characters; `-Infinity` has nine, and an escaped surrogate pair twelve

# Of one class each: groups that are repeated possessively are matched wrongly by Python before 3.11.5.
_BLANKS = re.compile(r"[ \t\n\r]*")
_FLAT = re.compile(r'[^"\[\]{}]*')  # up to what begins a string, or begins or ends a list or an object
_STRING = re.compile(r'[^"\\]*')
_WORD = re.compile(r"[^,\[\]{}]*")
_NO_UTF8 = re.compile("[\ud800-\udfff]")


def holds_json_lines(stream: io.BufferedReader, shown: str) -> bool:
    """Whether this is one object and then more: JSON Lines under the name .json, which is common.

    Raises DataError for one object alone, which is not a list, and for an object with a mistake.
    """
    window = _Window(stream, shown)
    if window.peek() != "{":
        return False
    try:
        keys = list(cast(Row, window.value()))
    except json.JSONDecodeError as error:
        raise window.refusal(reason(error), error.pos) from error
    except _TooLongError:  # for a row, so that no more rows follow
        keys = _first_keys(window)
    except (ValueError, RecursionError) as error:
        refusal = window.refusal(reason(error), window.at)
        window.pass_over()
        if not window.peek():
            raise refusal from error
        return True
    else:
        if window.peek():
            return True
    raise DataError(
        f"{shown}: expected a JSON list of objects, got one object with the keys {name_columns(keys)}. "
        f"Save the list of rows by itself, or name the file .jsonl if each line is a row."
    )


def read_json_list(stream: io.BufferedReader, shown: str) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (row, row), from row 1. Raises DataError for what is no list, and with the line for a syntax error."""
    window = _Window(stream, shown)
    if not window.skip("["):
        raise _no_list(window, shown)
    number = 0
    more = window.peek() != "]"
    while more:
        number += 1
        yield number, _element(window, f"{shown}, row {number}")
        more = window.skip(",")
    if not window.skip("]"):
        raise window.refusal("expecting ',' delimiter", window.at)
    if window.peek():
        raise window.refusal("extra data", window.at)


def _no_list(window: _Window, shown: str) -> DataError:
    try:
        value = window.value()
    except json.JSONDecodeError as error:
        return window.refusal(reason(error), error.pos)
    except _TooLongError:
        return window.refusal("more than a row in one value", window.at)
    except (ValueError, RecursionError) as error:
        return window.refusal(reason(error), window.at)
    if window.peek():
        return window.refusal("extra data", window.at)
    return DataError(f"{shown}: expected a JSON list of objects, got {describe(value)}.")


def _element(window: _Window, where: str) -> Row | BadRow:
    """The next element, which is taken whatever is wrong with it."""
    try:
        value = window.value()
    except json.JSONDecodeError as error:
        raise window.refusal(reason(error), error.pos) from error
    except _TooLongError:
        window.pass_over()
        return BadRow(f"{where}: {TOO_LONG}")
    except (ValueError, RecursionError) as error:
        got = shorten(window.text[window.at : window.at + 41])
        window.pass_over()
        return BadRow(f"{where}: expected an object, got {got} ({reason(error)}).")
    if problem := window.utf8_problem():
        return BadRow(problem)
    if not isinstance(value, dict):
        return BadRow(f"{where}: expected an object, got {describe(value)}.")
    fault = window.fault(value)
    return BadRow(f"{where}: {fault}") if fault else value


def _first_keys(window: _Window) -> list[str]:
    """The keys of an object that is too long to be read, up to the one whose value is."""
    keys: list[str] = []
    with contextlib.suppress(ValueError, RecursionError, _TooLongError):
        while window.skip(",{") and window.peek() == '"':
            keys.append(str(window.value()))
            window.skip(":")
            window.value()
    return [*keys, "…"]


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _TooLongError(Exception):
    """A value of more than LONGEST_ROW characters."""


class _Window:
    """The piece of a document that is in memory; `text[at:]` has not been taken yet."""

    def __init__(self, stream: io.BufferedReader, shown: str) -> None:
        self.text = ""
        self.at = 0
        self.decoder = JsonDecoder()
        self._taken_from = 0  # where the value that was taken last begins
        self._stream, self._shown = stream, shown
        self._ended = False
        # What is no UTF-8 becomes halves of surrogate pairs, which no UTF-8 gives: one byte spoils one row only.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._spoilt = False
        self._line = 1  # of text[0], with the characters and the bytes that came before it on that line
        self._columns = self._bytes = 0

    def peek(self) -> str:
        """The next character that is no blank, at which `at` then is; "" at the end."""
        return self._pass(_BLANKS)

    def skip(self, marks: str) -> bool:
        """Take one of these characters if it is the next."""
        mark = self.peek()
        if not mark or mark not in marks:
            return False
        self.at += 1
        return True

    def value(self) -> object:
        """Take a value, and the blanks before it.

        Raises json.JSONDecodeError with its position in `text`, ValueError and RecursionError as the decoder does, and
        _TooLongError; `at` is then where the value begins.
        """
        self.peek()
        while True:
            self.decoder.forget()
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    raise
            else:
                # A number may go on in the next piece.
                if end - self.at <= LONGEST_ROW and (end < len(self.text) or self._ended):
                    self._taken_from, self.at = self.at, end
                    return value
            if len(self.text) - self.at > LONGEST_ROW:
                raise _TooLongError
            self._read_on()

    def pass_over(self) -> None:
        """Take the value that begins here, without keeping it or looking closely at what is in it."""
        first = self.text[self.at : self.at + 1]
        if first == '"':
            self._pass_over_string()
        elif first not in ("[", "{"):
            self._pass(_WORD)
        else:
            depth = 0
            while mark := self._pass(_FLAT):
                if mark == '"':
                    self._pass_over_string()
                    continue
                self.at += 1
                depth += 1 if mark in "[{" else -1
                if depth == 0:
                    return

    def fault(self, row: Row) -> str | None:
        """As JsonDecoder's, for the value that was taken last."""
        return self.decoder.fault(row, self.text, self._taken_from, self.at)

    def utf8_problem(self) -> str | None:
        """What is wrong with the bytes of the value that was taken last: a whole message, with the line."""
        match = _NO_UTF8.search(self.text, self._taken_from, self.at) if self._spoilt else None
        return self._wrong_byte(match.start()) if match else None

    def refusal(self, reason: str, position: int) -> DataError:
        """What is wrong at a position of `text`: with the document, of which no more can be read."""
        if _NO_UTF8.match(self.text, position):
            return DataError(self._wrong_byte(position))
        line, column, _ = self._place(position)
        return DataError(f"{self._shown}, line {line}: expected a JSON list of objects ({reason} at column {column}).")

    def _wrong_byte(self, position: int) -> str:
        line, _, before = self._place(position)
        return f"{self._shown}, line {line}: {wrong_byte(ord(self.text[position]) - 0xDC00, before + 1)}"

    def _place(self, position: int) -> tuple[int, int, int]:
        """The line and the column of a position of `text`, from 1, and the bytes before it on that line."""
        start = self.text.rfind("\n", 0, position) + 1
        line = self._line + self.text.count("\n", 0, position)
        before = len(self.text[start:position].encode("utf-8", "surrogateescape"))
        if start:
            return line, position - start + 1, before
        return line, self._columns + position + 1, self._bytes + before

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether an error may come of the end of the piece, and not of the document."""
        return error.pos >= len(self.text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")

    def _read_on(self) -> None:
        """Drop what has been taken, and read as much again as is left: a value is tried anew a few times at most."""
        line, column, self._bytes = self._place(self.at)
        self._line, self._columns = line, column - 1
        rest = self.text[self.at :]
        raw = self._stream.read(max(_PIECE, min(len(rest), LONGEST_ROW - len(rest))))
        piece = self._decode(raw, not raw)
        self._spoilt = self._spoilt or not _is_utf8(piece)
        self._ended = not raw
        self.text, self.at = rest + piece, 0

    def _pass(self, pattern: re.Pattern[str]) -> str:
        """Take all that matches, and give the character after it; "" at the end of the document."""
        while True:
            self.at = pattern.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self._ended:
                return ""
            self._read_on()

    def _pass_over_string(self) -> None:
        self.at += 1
        while self._pass(_STRING) == "\\":
            if self.at + 1 == len(self.text) and not self._ended:  # half of an escape, at the end of the piece
                self._read_on()
            self.at = min(self.at + 2, len(self.text))
        self.at += 1
