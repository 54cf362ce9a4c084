"""Files row by row: what is read of good ones, packed or not, and how far reading has come."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.files import BadRow, Row, describe, read_file
from qlora_cli.errors import DataError

MIB = 2**20


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(name: str, content: bytes | str) -> list[tuple[int, Row | str]]:
    """Numbers with rows, or with what is wrong with them."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [(n, row.problem if isinstance(row, BadRow) else row) for n, row in read_file(Path(name), name)]


def rows_of(name: str, content: bytes | str) -> list[Row | str]:
    return [row for _, row in read(name, content)]


def refusal(name: str, content: bytes | str) -> str:
    with pytest.raises(DataError) as caught:
        read(name, content)
    return str(caught.value)


def separated(rows: list[list[str]], delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows(rows)  # type: ignore[arg-type]
    return text.getvalue().encode()


def zstandard(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


# ------------------------------------------------------------------------------------------- Good rows

TEXT = st.text(max_size=20) | st.text("\"'\n\r\t,\\ aé\u2028\x00", max_size=12)
NAME = st.text(st.characters(codec="utf-8", exclude_characters='"\r\n\t,\x00\ufeff'), min_size=1, max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TABLE = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(NAME, min_size=n, max_size=n, unique=True),
        st.lists(st.lists(TEXT, min_size=n, max_size=n), max_size=6),
    )
)


@given(st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=6), st.booleans(), st.sampled_from((None, 1)))
@settings(deadline=None)
def test_json_comes_back_as_it_was_written(rows: list[Row], ascii_only: bool, indent: int | None) -> None:
    """Any object, with or without escapes; NaN and the infinities are numbers too."""
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    assert rows_of("r.jsonl", lines) == rows
    assert rows_of("r.json", json.dumps(rows, ensure_ascii=ascii_only, indent=indent)) == rows
    if len(rows) > 1:
        assert rows_of("lines.json", lines) == rows


@given(TABLE, st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
@settings(deadline=None)
def test_csv_comes_back_as_it_was_written(table: tuple[list[str], list[list[str]]], quoting: int) -> None:
    """Any cells: quotes, commas, line ends of any kind and NULs included."""
    header, cells = table
    found = rows_of("r.csv", separated([header, *cells], ",", quoting))
    assert found == [dict(zip(header, row, strict=True)) for row in cells]


@given(TABLE, st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
@settings(deadline=None)
def test_quoted_tsv_comes_back_as_it_was_written(table: tuple[list[str], list[list[str]]], quoting: int) -> None:
    """Any cells, but that those over several lines have no tabs."""
    header, cells = table
    cells = [[c.replace("\t", " ") if "\n" in c or "\r" in c else c for c in row] for row in cells]
    found = rows_of("r.tsv", separated([header, *cells], "\t", quoting))
    assert found == [dict(zip(header, row, strict=True)) for row in cells]


@given(st.lists(st.fixed_dictionaries({"a": TEXT | st.none(), "b": st.lists(st.integers(0, 9))}), min_size=1))
@settings(max_examples=20, deadline=None)
def test_parquet_comes_back_as_it_was_written(rows: list[Row]) -> None:
    """Text, nulls and lists, over several batches and row groups."""
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows * 700), "r.parquet", row_group_size=1500)
    assert [row for _, row in read_file(Path("r.parquet"), "r")] == rows * 700


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": NaN, "b": -Infinity, "c": 1e999}', [{"b": -float("inf"), "c": float("inf")}]),
        ('\ufeff{"a": 1}\r\n \r\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        (' {"a": "\u2028\u0085"} \n', [{"a": "\u2028\u0085"}]),
        ('{"a": "\\ud83d"}\n', [{"a": "\ud83d"}]),
        ('{"a": {"\\ud83d": 1}}\n', [{"a": {"\ud83d": 1}}]),
    ],
)
def test_what_json_allows(content: str, expected: list[Row]) -> None:
    """Infinite numbers, a byte-order mark, blank lines, separators of lines in text, halves of pairs in values."""
    found = rows_of("r.jsonl", content)
    for row in found:
        assert isinstance(row, dict)
        if row.get("c"):
            assert row.pop("a") != row.get("a")  # NaN is nothing, itself included
    assert found == expected


def test_line_ends_of_any_kind() -> None:
    """CSV of Windows and of old Macs; a quoted cell keeps its own."""
    for end in ("\n", "\r\n", "\r"):
        assert rows_of("r.csv", f'a,b{end}{end}1,"x{end}y"{end}3,4') == [
            {"a": "1", "b": f"x{end}y"},
            {"a": "3", "b": "4"},
        ]
    assert read("r.jsonl", '\n{"a": 1}\r\n\r\n{"a": 2}') == [(2, {"a": 1}), (4, {"a": 2})]


def test_long_json_in_short_pieces() -> None:
    """A list longer than a piece of it in memory: no row is cut, no number, no letter of several bytes."""
    rows = [{"i": i, "n": int("7" * (i % 50 + 1)), "t": "é\U0001f600" * (i % 97)} for i in range(20_000)]
    text = json.dumps(rows, ensure_ascii=False)
    assert len(text.encode()) > 5 * MIB
    assert rows_of("r.json", text) == rows
    assert len(rows_of("n.json", "[" + "123456789, " * 200_000 + "1]")) == 200_001
    broken = json.dumps(rows, ensure_ascii=False, indent=0).replace('"i": 19999,', '"i" 19999,')
    line = broken[: broken.index('"i" 19999')].count("\n") + 1
    assert refusal("b.json", broken) == (
        f"b.json, line {line}: expected a JSON list of objects (expecting ':' delimiter at column 5)."
    )


# ------------------------------------------------------------------------------------------- TSV


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # Bare quotes, as in GLUE.
        ('a\tb\n"it" is\tx\n', [('"it" is', "x")]),
        ('a\tb\n1\t"he said\n2\tno\n', [("1", '"he said'), ("2", "no")]),
        ('a\tb\n1\t"he said\n2\tno"\n3\t"x"\n', [("1", '"he said'), ("2", 'no"'), ("3", "x")]),
        ('a\tb\n"x\t"\t\n"y\tz\n', [("x\t", ""), ('"y', "z")]),
        ('a\tb\tc\n1\t"2\t3"\n', [("1", '"2', '3"')]),
        # Quoted cells, as csv writes them.
        ('a\tb\n"say ""hi"""\tx\n', [('say "hi"', "x")]),
        ('a\tb\n1\t"two\nlines"\n2\tx\n', [("1", "two\nlines"), ("2", "x")]),
        ('a\tb\n"two\n\nlines"\t"and\ntwo"\n2\tx\n', [("two\n\nlines", "and\ntwo"), ("2", "x")]),
        ('a\tb\n1\t"def f():\n\tx = 1\n\treturn x"\n', [("1", "def f():\n\tx = 1\n\treturn x")]),
        # A single column.
        ('a\n"it" is\n"two\nlines"\n', [('"it" is',), ("two\nlines",)]),
    ],
)
def test_quotes_in_tsv(content: str, expected: list[tuple[str, ...]]) -> None:
    """Quoted and bare ones, told by the number of cells; no line is swallowed."""
    names = "abc"[: len(expected[0])]
    assert rows_of("r.tsv", content) == [dict(zip(names, cells, strict=True)) for cells in expected]


def test_a_quote_of_tsv_that_nothing_closes() -> None:
    """Costs its own line alone, where the tabs do not make a row of it; one column has none to tell by."""
    assert rows_of("r.tsv", 'a\tb\n"1\n2\t3\n') == [
        "r.tsv, line 2: expected 2 cells (a, b), got 1.",
        {"a": "2", "b": "3"},
    ]
    assert refusal("r.tsv", 'a\nx\n"1\n2\n').startswith("r.tsv, line 3: unexpected end of data: a double quote opens")


# ------------------------------------------------------------------------------------------- Packed, counted, at once


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_packed_files_hold_the_same_rows(suffix: str) -> None:
    """Whatever the case of the name, and in however many members or frames, empty ones among them."""
    rows = [["a", "b"], *([str(i), "é" * i] for i in range(50))]
    objects = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    content = {
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects).encode(),
        ".json": json.dumps(objects, ensure_ascii=False).encode(),
        ".csv": separated(rows, ","),
        ".tsv": separated(rows, "\t"),
    }[suffix]
    expected = list(enumerate(objects, 1))
    assert read(f"r{suffix}", content) == expected
    parts = (content[:77], b"", content[77:])
    assert read(f"r{suffix}.gz", b"".join(map(gzip.compress, parts)) + b"\0\0") == expected
    assert read(f"r{suffix.upper()}.ZST", b"".join(map(zstandard, parts))) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.zst", ".json.gz"])
def test_what_has_been_read_is_told(suffix: str) -> None:
    """In bytes of the file on disk, on the way and to the last one."""
    texts = [os.urandom(200).hex() for _ in range(4000)]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({"a": texts}), "r.parquet")
    else:
        lines = {
            ".jsonl": "".join(f'{{"a": "{text}"}}\n' for text in texts),
            ".json": json.dumps([{"a": text} for text in texts]),
        }.get(suffix.removesuffix(".gz"), "a\n" + "\n".join(texts))
        data = lines.encode()
        packs = {".gz": gzip.compress, ".zst": zstandard}
        Path(f"r{suffix}").write_bytes(packs.get(Path(suffix).suffix, bytes)(data) if "." in suffix[1:] else data)
    path, told, halfway = Path(f"r{suffix}"), [], 0
    for number, _ in read_file(path, "r", told.append):
        halfway = sum(told) if number == 2000 else halfway
    assert sum(told) == path.stat().st_size
    assert min(told) >= 0
    assert 0.2 < halfway / path.stat().st_size < 0.95


def test_two_files_at_once() -> None:
    """Files of cells longer than the csv module allows by itself are read by turns; its limit stays as it was."""
    limit = csv.field_size_limit()
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("x\n" + f'"{"y" * 200_000}"\n' * 3)
    first, second = (read_file(Path(name), name) for name in ("a.csv", "b.csv"))
    assert len(next(first)[1]["x"]) == 200_000  # type: ignore[index]
    assert csv.field_size_limit() == limit
    assert len([*second]) == 3
    assert len([*first]) == 2


def test_what_messages_call_a_value() -> None:
    """In a few words, whatever it is."""
    values = [None, True, 5, "x" * 50, [1], {}, b"abc", float("nan"), 10**100]
    assert [describe(value) for value in values] == [
        "null", "the boolean true", "the number 5", f'the text "{"x" * 40}…"', "a list of 1", "an object", "3 bytes",
        "the number nan", f"the number 1{'0' * 39}…",
    ]  # fmt: skip
