"""Random rows of every format, most of them right, and the files that hold them.

Users, systems and tools speak in capitals, assistants in small letters.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from qlora_cli.recipe.schema import FORMAT_COLUMNS

END = "<|im_end|>"

Json = Any


class Draw(random.Random):
    """Random values of every kind that JSON has, most of them wrong where they stand."""

    def words(self, letters: str) -> str:
        """Text in these letters, with what has a meaning elsewhere."""
        between = (" ", "\n", "\r\n", "\t", "", '"', "'", ",", "\\", "\x00", "\x1b[31m", "\x85", "\u2028", "\u202e",
                   "😀", "{{ 1 }}", "{% if", END, "<|IM_END|>", "<|im_start|>", "### ", "0")  # fmt: skip
        drawn = [self.choice(letters) + self.choice(between) for _ in range(self.choice((0, 1, 1, 2, 3, 5)))]
        return "".join(drawn) * (1 if self.random() < 0.98 else 2000)

    def theirs(self) -> str:
        return self.words("ABCXYZ")

    def ours(self) -> str:
        return self.words("abcxyz")

    def number(self) -> Json:
        return self.choice((0, 1, -1, 2, 7.0, 0.5, 10**30, 1e308, float("nan"), float("-inf"), True, False))

    def wrong(self, depth: int = 0) -> Json:
        """Anything but what is expected."""
        kind = self.randrange(6 if depth < 3 else 4)
        match kind:
            case 0:
                return None
            case 1:
                return self.number()
            case 2:
                return self.choice(("", " ", "\ud83d", "null", "[]", "{}", "\x00", self.words("klm")))
            case 3:
                return self.choice(([], {}))
            case 4:
                return [self.wrong(depth + 1) for _ in range(self.randrange(4))]
            case _:
                names = ("role", "content", "from", "value", "text", "type", "weight", "tool_calls", "", "K\x1b[0m")
                return {self.choice(names): self.wrong(depth + 1) for _ in range(self.randrange(4))}

    def maybe(self, value: Json, chance: float = 0.04) -> Json:
        """The value, but now and then another."""
        return self.wrong() if self.random() < chance else value

    def content(self, text: str) -> Json:
        if self.random() < 0.1:
            return [{"type": self.maybe("text"), "text": self.maybe(part)} for part in (text, text[:1])]
        return self.maybe(text)

    def calls(self) -> Json:
        arguments = self.choice(({"q": "a"}, '{"q": "a"}', "a", "{", [], None))
        return self.maybe([{"type": "function", "function": self.maybe({"name": "look", "arguments": arguments})}], 0.2)

    def turn(self, role: str, names: tuple[str, str]) -> Json:
        said = self.ours() if role in ("assistant", "gpt") else self.theirs()
        turn = {names[0]: self.maybe(role, 0.02), names[1]: self.content(said)}
        if self.random() < 0.08:
            turn["tool_calls"] = self.calls()
        if self.random() < 0.08:
            turn["weight"] = self.maybe(self.choice((0, 1)), 0.2)
        if self.random() < 0.05:
            turn[self.choice(("role", "content", "from", "value", "name", "K\x1b[0m"))] = self.maybe(role, 0.5)
        if self.random() < 0.03:
            del turn[self.choice(list(turn))]
        return self.maybe(turn, 0.02)

    def turns(self, roles: tuple[str, str, str, str], names: tuple[str, str]) -> Json:
        system, user, assistant, tool = roles
        orders = (
            [user, assistant], [user, assistant, user, assistant], [system, user, assistant], [assistant],
            [user, assistant, user], [user, user, assistant, assistant], [user, assistant, tool, assistant],
            self.choices(roles, k=self.randrange(6)),
        )  # fmt: skip
        return self.maybe([self.turn(role, names) for role in self.choice(orders)])

    def cell(self, format: str, field: str) -> Json:
        match field:
            case "messages":
                return self.turns(("system", "user", "assistant", "tool"), ("role", "content"))
            case "conversations":
                return self.turns(("system", "human", "gpt", "tool"), ("from", "value"))
            case "tools":
                return self.maybe(self.choice((None, [], "[]", [{"type": "function"}])), 0.2)
            case "completion" | "output" | "label":
                return self.maybe(self.ours())
            case _:
                return self.maybe(self.ours() if format == "text" else self.theirs())

    def row(self, format: str, strict: bool) -> dict[str, Json]:
        """A row; with all required columns if `strict`."""
        columns = FORMAT_COLUMNS[format]
        row = {field: self.cell(format, field) for field in columns.required}
        row |= {field: self.cell(format, field) for field in columns.optional if self.random() < 0.2}
        if not strict:
            if self.random() < 0.05:
                row.pop(self.choice(list(row)), None)
            if self.random() < 0.05:
                row[self.choice(("", "id", "K\x1b[0m", "Prompt", "É\n"))] = self.wrong()
        return row


def write(path: Path, rows: list[dict[str, Json]]) -> None:
    """The rows as the name of the file has it; a table has only text, and as many columns as all rows together."""
    kind = path.name.removeprefix("rows").removesuffix(".gz").removesuffix(".zst")
    if kind == ".parquet":
        try:
            pyarrow.parquet.write_table(_table(rows), path)
        except pa.ArrowException:  # an object without keys
            pyarrow.parquet.write_table(_table([{name: _text(row[name]) for name in row} for row in rows]), path)
        return
    if kind == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == ".json":
        text = json.dumps(rows, indent=1)
    else:
        text = _separated(rows, "\t" if kind == ".tsv" else ",")
    data = text.encode("utf-8", "surrogatepass")
    match path.suffix:
        case ".gz":
            data = gzip.compress(data, 1)
        case ".zst":
            data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)


def _table(rows: list[dict[str, Json]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns.append(pa.array(values))
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # of several types
            columns.append(pa.array([_text(value).encode("utf-8", "replace").decode() for value in values]))
    return pa.Table.from_arrays(columns, names=names)


def _text(value: Json) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _separated(rows: list[dict[str, Json]], delimiter: str) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names)
    cells = [[_text(row.get(name)) for name in names] for row in rows]
    if delimiter == "\t":  # in which a line is a row, if it can be one
        cells = [[" ".join(cell.splitlines()).replace('"', "'") for cell in line] for line in cells]
    writer.writerows(cells)
    return text.getvalue()
