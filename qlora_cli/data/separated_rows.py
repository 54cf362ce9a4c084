"""Rows out of CSV and TSV, whose first line names the columns, or which have columns that are known.

CSV is read by RFC 4180: a cell that begins with a double quote ends with one, has those inside it doubled, and may
hold commas and line ends. A row that breaks this rule is bad by itself if its quotes pair up all the same. Where they
do not, nobody can tell where the next row begins, and the file is refused, so that no quote ever swallows rows.

TSV has two traditions: cells quoted as in CSV, and cells that are what stands between the tabs, in which a quote is a
quote (GLUE's files, for one). Each line is taken by the first of these that gives as many cells as there are columns:

1. quoted as in CSV, on this line alone;
2. quoted as in CSV, with the lines up to the closing quote, unless most of these make a row by themselves: then the
   quote is a stray one, and each line is a row (lines that begin with a tab do not count: they are indented code);
3. literally, between the tabs.

With one column there are no tabs to tell by, so that a quote that stays open on its line is what it is in CSV.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora_cli.data.raw_rows import LONGEST_ROW, TOO_LONG, BadRow, Row, name_columns, utf8_fault
from qlora_cli.errors import DataError

_RULE = "A cell that begins with a double quote must end with one, and have those inside it doubled."
_NO_RESUMING = "Where the next row begins cannot be told."
_MOST_LINES = 100_000  # of a row; the shorter they are, the more memory each takes for what it holds
_NOT_SOON = f"more than {LONGEST_ROW // 2**20} MiB or {_MOST_LINES:,} lines in one row"
_LINE = LONGEST_ROW + 2  # characters with its end
_PIECE = 2**20  # characters of a line that is too long, to skip it by


def read_separated(
    stream: io.BufferedReader, shown: str, delimiter: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (row, row), from row 1, of the cells between commas or tabs; all of them are text.

    The first line names the columns, unless `columns` does, for a file that has no header.
    Raises DataError with the line for a header that is wrong, and for a quote that may have swallowed rows.
    """
    lines = _Lines(stream)
    if columns is not None:
        yield from _rows(lines, _Table(shown, delimiter, list(columns)))
        return
    table = _Table(shown, delimiter, [])
    header = next(_records(lines, table), None)
    if header is None:
        return
    if isinstance(header, BadRow):
        raise DataError(header.problem)
    if len(set(header)) < len(header):
        raise DataError(f"{shown}, line {lines.number}: two columns have the same name: {name_columns(header)}.")
    yield from _rows(lines, _Table(shown, delimiter, header))


def _rows(lines: _Lines, table: _Table) -> Iterator[tuple[int, Row | BadRow]]:
    for number, cells in enumerate(_records(lines, table), 1):
        yield number, cells if isinstance(cells, BadRow) else dict(zip(table.columns, cells, strict=True))


@dataclass(frozen=True)
class _Table:
    """What all rows of a file have in common; `columns` is empty until the header is read."""

    shown: str
    delimiter: str
    columns: list[str]

    def has_all(self, cells: list[str]) -> bool:
        """Whether there is a cell for every column."""
        return len(cells) == len(self.columns) or not self.columns

    def where(self, first: int, last: int) -> str:
        """The beginning of a message."""
        return f"{self.shown}, line {first}" if first == last else f"{self.shown}, lines {first}-{last}"

    def wrong_number(self, cells: list[str], first: int, last: int) -> str:
        """The message for too few or too many cells."""
        return (
            f"{self.where(first, last)}: expected {len(self.columns)} cells ({name_columns(self.columns)}), "
            f"got {len(cells)}."
        )

    def mostly_rows(self, lines: list[str]) -> bool:
        """Whether these are several lines, more than half of which make a row by themselves."""
        if len(self.columns) < 2 or len(lines) < 2:
            return False
        rows = sum(self.has_all(line.split(self.delimiter)) and not line.startswith("\t") for line in lines)
        return 2 * rows > len(lines)


class _LongLineError(Exception):
    """A line that is too long, and has been passed over, with so many double quotes in it."""

    def __init__(self, quotes: int) -> None:
        super().__init__(quotes)
        self.quotes = quotes


class _UnclosedError(Exception):
    """A quote that is open when the file, or what a row may have, comes to an end."""


class _Lines:
    """The lines of a text, each with its end, which may be any of \\n, \\r\\n and \\r; lines can be put back."""

    def __init__(self, stream: io.BufferedReader) -> None:
        # What is no UTF-8 becomes halves of surrogate pairs, which no UTF-8 gives: one byte spoils one row only.
        self._text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        self._readline = self._text.readline
        self._back: deque[str | _LongLineError] = deque()
        self.number = 0  # of the line taken last, from 1

    def take(self) -> str:
        """The next line; "" at the end. Raises _LongLineError in place of one that is too long."""
        line = self._back.popleft() if self._back else self._readline(_LINE)
        if not line:
            return ""
        self.number += 1
        if isinstance(line, _LongLineError):
            raise line
        if len(line) > LONGEST_ROW and len(line.rstrip("\r\n")) > LONGEST_ROW:
            raise self._pass_over(line)
        return line

    def put_back(self, lines: list[str]) -> None:
        """Make these the next ones, though they were taken."""
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)

    def put_back_long(self, line: _LongLineError) -> None:
        """As `put_back`, for what was raised in place of a line."""
        self._back.appendleft(line)
        self.number -= 1

    def _pass_over(self, piece: str) -> _LongLineError:
        quotes = piece.count('"')
        while piece and not piece.endswith(("\r", "\n")):
            piece = self._text.readline(_PIECE)
            quotes += piece.count('"')
        if piece.endswith("\r") and (after := self._text.read(1)) not in ("", "\n"):
            # Not the rest of \r\n, cut in two, but the next line.
            self._back.append(after if after == "\r" else after + self._text.readline(LONGEST_ROW + 1))
        return _LongLineError(quotes)


def _records(lines: _Lines, table: _Table) -> Iterator[list[str] | BadRow]:
    """The cells of row after row, as many as there are columns once these are known."""
    read_quoted = _csv_record if table.delimiter == "," else _tsv_record
    while True:
        try:
            line = lines.take()
        except _LongLineError as error:
            yield _long_row(error, lines.number, table)
            continue
        if not line:
            return
        body = line.rstrip("\r\n")
        if not body:
            continue
        first = lines.number
        if '"' in body:
            cells, taken = read_quoted(line, lines, table)
        else:
            cells, taken = body.split(table.delimiter), [line]
        if not all(map(str.isascii, taken)) and (problem := _utf8_problem(taken, first, table.shown)):
            yield BadRow(problem)
        elif isinstance(cells, BadRow) or table.has_all(cells):
            yield cells
        else:
            yield BadRow(table.wrong_number(cells, first, lines.number))


def _csv_record(line: str, lines: _Lines, table: _Table) -> tuple[list[str] | BadRow, list[str]]:
    """The cells of the record that begins on this line, and its lines. Raises DataError if its end is not known."""
    first, taken = lines.number, [line]
    try:
        cells = _parse(_and_on(taken, lines), table.delimiter)
    except _UnclosedError as error:
        raise DataError(
            f"{table.shown}, line {first}: {error}: a double quote opens a cell here and is not closed. {_RULE}"
        ) from error
    except csv.Error as error:
        problem = f"{table.where(first, lines.number)}: {error}. {_RULE}"
        paired = sum(text.count('"') for text in taken) % 2 == 0
        if paired and not table.mostly_rows(taken):
            return BadRow(problem), taken
        raise DataError(f"{problem} {_NO_RESUMING}") from error
    if not table.has_all(cells) and table.mostly_rows(taken):
        raise DataError(f"{table.wrong_number(cells, first, lines.number)} {_NO_RESUMING}")
    return cells, taken


def _tsv_record(line: str, lines: _Lines, table: _Table) -> tuple[list[str] | BadRow, list[str]]:
    """As `_csv_record`, by the rule for TSV."""
    between_tabs = line.rstrip("\r\n").split(table.delimiter)
    try:
        cells = _parse([line], table.delimiter)
        return (cells if table.has_all(cells) else between_tabs), [line]
    except csv.Error:
        pass
    if len(table.columns or between_tabs) == 1:
        return (between_tabs, [line]) if line.count('"') % 2 == 0 else _csv_record(line, lines, table)
    taken = [line]
    try:
        cells = _parse(_and_on(taken, lines), table.delimiter)
        if table.columns and table.has_all(cells) and not table.mostly_rows(taken):
            return cells, taken
    except (csv.Error, _UnclosedError):
        pass
    lines.put_back(taken[1:])
    return between_tabs, [line]


def _parse(lines: Iterable[str], delimiter: str) -> list[str]:
    """The cells of one record, of as many lines as it needs; raises csv.Error for a stray quote."""
    # The limit of 131,072 characters a cell is of the whole process: it is lifted for no longer than this takes.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        # Strict: a stray quote would otherwise become a part of its cell, or swallow lines.
        return next(csv.reader(lines, delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(limit)


def _and_on(taken: list[str], lines: _Lines) -> Iterator[str]:
    """The line that is taken, and as many after it as are asked for, which are then taken too."""
    take = lines.take
    yield taken[0]
    size = len(taken[0])
    while True:
        try:
            line = take()
        except _LongLineError as error:
            lines.put_back_long(error)
            raise _UnclosedError(_NOT_SOON) from error
        if not line:
            raise _UnclosedError("unexpected end of data")
        taken.append(line)
        size += len(line)
        if size > LONGEST_ROW or len(taken) > _MOST_LINES:
            raise _UnclosedError(_NOT_SOON)
        yield line


def _long_row(error: _LongLineError, number: int, table: _Table) -> BadRow:
    problem = f"{table.where(number, number)}: {TOO_LONG}"
    if table.delimiter == "," and error.quotes % 2:
        raise DataError(f"{problem} {_NO_RESUMING}")
    return BadRow(problem)


def _utf8_problem(lines: list[str], first: int, shown: str) -> str | None:
    for number, line in enumerate(lines, first):
        if fault := utf8_fault(line.encode("utf-8", "surrogateescape")):
            return f"{shown}, line {number}: {fault}"
    return None
