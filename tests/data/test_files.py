"""Files row by row: what is read of good ones, and what is said of bad rows and bad files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.files import BadRow, Row, describe, read_file
from qlora_cli.data.raw_rows import LONGEST_ROW
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
def test_json_comes_back_as_it_was_written(rows: list[Row], ascii_only: bool, indent: int | None) -> None:
    """Any object, with or without escapes; NaN and the infinities are numbers too."""
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    assert rows_of("r.jsonl", lines) == rows
    assert rows_of("r.json", json.dumps(rows, ensure_ascii=ascii_only, indent=indent)) == rows
    if len(rows) > 1:
        assert rows_of("lines.json", lines) == rows


@given(TABLE, st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
def test_csv_comes_back_as_it_was_written(table: tuple[list[str], list[list[str]]], quoting: int) -> None:
    """Any cells: quotes, commas, line ends of any kind and NULs included."""
    header, cells = table
    found = rows_of("r.csv", separated([header, *cells], ",", quoting))
    assert found == [dict(zip(header, row, strict=True)) for row in cells]


@given(TABLE, st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
def test_quoted_tsv_comes_back_as_it_was_written(table: tuple[list[str], list[list[str]]], quoting: int) -> None:
    """Any cells, but that those over several lines have no tabs."""
    header, cells = table
    cells = [[c.replace("\t", " ") if "\n" in c or "\r" in c else c for c in row] for row in cells]
    found = rows_of("r.tsv", separated([header, *cells], "\t", quoting))
    assert found == [dict(zip(header, row, strict=True)) for row in cells]


@given(st.lists(st.fixed_dictionaries({"a": TEXT | st.none(), "b": st.lists(st.integers(0, 9))}), min_size=1))
@settings(max_examples=20)
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


# ------------------------------------------------------------------------------------------- Bad rows

DEEP = "[" * 101 + "]" * 101


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("r.jsonl", b'{"a": }',
         """line 2: expected one JSON object, got "{\\"a\\": }" (expecting value at column 7)."""),
        ("r.jsonl", b'{"a": 1} x', 'line 2: expected one JSON object, got "{\\"a\\": 1} x" (extra data at column 10).'),
        ("r.jsonl", b"[1, 2]", "line 2: expected one JSON object, got a list of 2."),
        ("r.jsonl", b'"\\ud83d"', 'line 2: expected one JSON object, got the text "\\ud83d".'),
        ("r.jsonl", b'{"a": "\xe9"}', "line 2: expected UTF-8, got the byte 0xe9 at byte 8 of the line. "
                                      "Save the file as UTF-8."),
        ("r.jsonl", b'{"a": 1, "b": 2, "a": 3}', 'line 2: expected every key of an object once, got "a" twice.'),
        ("r.jsonl", b'{"m": [{"r": 1, "r": 1}]}', 'line 2: expected every key of an object once, got "r" twice.'),
        ("r.jsonl", b'{"\\ud83d": 1}',
         "line 2: the name of a column holds half of a surrogate pair, which is no text."),
        ("r.jsonl", f'{{"a": {DEEP}}}'.encode(), "line 2: expected at most 100 levels of lists and objects, got more."),
        ("r.jsonl", b'{"a": ' + b"9" * 5000 + b"}", 'line 2: expected one JSON object, got "{\\"a\\": '
                    f'{"9" * 34}…" (a number of thousands of digits).'),
        ("r.jsonl", b"\0\0", 'line 2: expected one JSON object, got "\\u0000\\u0000" (expecting value at column 1).'),
        ("r.json", b"5", "row 2: expected an object, got the number 5."),
        ("r.json", b'{"a": "\xe9"}', "line 2: expected UTF-8, got the byte 0xe9 at byte 8 of the line. "
                                     "Save the file as UTF-8."),
        ("r.json", b'{"a": 1, "a": 3}', 'row 2: expected every key of an object once, got "a" twice.'),
        ("r.json", f'{{"a": {DEEP}}}'.encode(), "row 2: expected at most 100 levels of lists and objects, got more."),
        ("r.json", b"[" * 9000 + b"]" * 9000, f'row 2: expected an object, got "{"[" * 40}…" (nested too deeply).'),
        ("r.json", b'{"a": "]\\"", "b": ' + b"9" * 5000 + b"}", 'row 2: expected an object, got '
                   '"{\\"a\\": \\"]\\\\\\"\\", \\"b\\": ' f'{"9" * 22}…" (a number of thousands of digits).'),
        ("r.csv", b"1", "line 3: expected 2 cells (a, b), got 1."),
        ("r.csv", b"1,2,3", "line 3: expected 2 cells (a, b), got 3."),
        ("r.csv", b'"1\n2"', "lines 3-4: expected 2 cells (a, b), got 1."),
        ("r.csv", b'"it" is,x', "line 3: ',' expected after '\"'. A cell that begins with a double quote must end with "
                                "one, and have those inside it doubled."),
        ("r.csv", b'1,"x\ny "z" w"', "lines 3-4: ',' expected after '\"'. A cell that begins with a double quote must "
                                     "end with one, and have those inside it doubled."),
        ("r.csv", b'"\n\xc3\xa9\xe9",2', "line 4: expected UTF-8, got the byte 0xe9 at byte 3 of the line. "
                                         "Save the file as UTF-8."),
        ("r.tsv", b"1\t2\t3", "line 3: expected 2 cells (a, b), got 3."),
    ],
)  # fmt: skip
def test_a_bad_row_costs_no_other(name: str, content: bytes, bad: str) -> None:
    """The rows around it are read, and its message has file and line."""
    match Path(name).suffix:
        case ".jsonl":
            start, end = b'{"a": "x"}\n', b'\n{"a": "y"}\n'
            expected: list[Any] = [{"a": "x"}, {"a": "y"}]
        case ".json":
            start, end = b'[{"a": "x"},\n', b',\n{"a": "y"}]'
            expected = [{"a": "x"}, {"a": "y"}]
        case suffix:
            tab = b"\t" if suffix == ".tsv" else b","
            start, end = tab.join((b"a", b"b\n1", b"2\n")), tab.join((b"\n3", b"4\n"))
            expected = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    expected.insert(1, f"{name}, {bad}")
    assert read(name, start + content + end) == list(enumerate(expected, 1))


def test_rows_of_parquet_that_are_no_text() -> None:
    """A text that is no UTF-8 spoils its own row."""
    table = pa.table({"a": pa.array([b"x", b"\xe9", b"y"], pa.binary()).view(pa.string())})
    pyarrow.parquet.write_table(table, "r.parquet")
    found = [(n, r.problem if isinstance(r, BadRow) else r) for n, r in read_file(Path("r.parquet"), "r.parquet")]
    assert found == [
        (1, {"a": "x"}),
        (2, "r.parquet, row 2: expected UTF-8, got the byte 0xe9 in a text. Save the text as UTF-8."),
        (3, {"a": "y"}),
    ]


@pytest.mark.parametrize(("name", "where"), [("r.jsonl", "line 2"), ("r.json", "row 2"), ("r.csv", "line 3")])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_one_enormous_row(name: str, where: str, packing: str) -> None:
    """Is passed over in pieces: 200 MiB of it, packed into little, never are in memory."""
    start, end = {
        "r.jsonl": ('{"a": "x"}\n{"a": "', '"}\n{"a": "y"}\n'),
        "r.json": ('[{"a": "x"}, {"a": ["\\"]', '"]}, {"a": "y"}]'),
        "r.csv": ("a\nx\n", "\ny\n"),
    }[name]
    length = (200 if packing else LONGEST_ROW // MIB + 1) * MIB
    pack = {".gz": lambda data: gzip.compress(data, 1), ".zst": zstandard, "": bytes}[packing]
    # As several members, or frames, one after the other.
    part = pack(b"a" * (length // 8))
    Path(name + packing).write_bytes(pack(start.encode()) + part * 8 + pack(end.encode()))
    tracemalloc.start()
    found = [r.problem if isinstance(r, BadRow) else r for _, r in read_file(Path(name + packing), name)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [{"a": "x"}, f"{name}, {where}: expected a row of at most 16 MiB, got more.", {"a": "y"}]
    assert peak < 100 * MIB


def test_a_row_just_short_enough() -> None:
    """Is read."""
    text = "a" * (LONGEST_ROW - len('{"a": ""}'))
    assert rows_of("r.jsonl", json.dumps({"a": text}) + "\n") == [{"a": text}]
    assert rows_of("r.json", json.dumps([{"a": text}])) == [{"a": text}]
    assert rows_of("r.csv", "a\r\n" + "b" * LONGEST_ROW + "\r\nc\r\n") == [{"a": "b" * LONGEST_ROW}, {"a": "c"}]


# ------------------------------------------------------------------------------------------- Bad files

RULE = "A cell that begins with a double quote must end with one, and have those inside it doubled."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", 'a,b\n"1,2\n3,4\n', f"r.csv, line 2: unexpected end of data: a double quote opens a cell here and is "
                                      f"not closed. {RULE}"),
        ("r.csv", 'a,b\n"1,2\n3,4\nx,"good, text"\n', f"r.csv, lines 2-4: ',' expected after '\"'. {RULE} "
                                                       "Where the next row begins cannot be told."),
        ("r.csv", 'a,b\n"1,2\n3,4\n5,6\n7,8",9,10\n', "r.csv, lines 2-5: expected 2 cells (a, b), got 3. "
                                                    "Where the next row begins cannot be told."),
        ("r.csv", 'a,"b\n1,2\n', f"r.csv, line 1: unexpected end of data: a double quote opens a cell here and is not "
                                 f"closed. {RULE}"),
        ("r.csv", b"a,\xe9\n", "r.csv, line 1: expected UTF-8, got the byte 0xe9 at byte 3 of the line. "
                               "Save the file as UTF-8."),
        ("r.csv", "\na,a\n", "r.csv, line 2: two columns have the same name: a, a."),
        ("r.csv", "a,b\n1,2\n".encode("utf-16"), "r.csv, line 1: expected UTF-8, got UTF-16. Save the file as UTF-8."),
        ("r.jsonl", '{"a": 1}\n'.encode("utf-16-be"),
         "r.jsonl, line 1: expected UTF-8, got UTF-16. Save the file as UTF-8."),
        ("r.jsonl", '{"a": 1}\n'.encode("utf-32"),
         "r.jsonl, line 1: expected UTF-8, got UTF-32. Save the file as UTF-8."),
        ("r.jsonl", gzip.compress(b"x"), "r.jsonl: expected text, got gzip data. Name it r.jsonl.gz."),
        ("r.csv", zstandard(b"x"), "r.csv: expected text, got Zstandard data. Name it r.csv.zst."),
        ("r.csv", b"PK\x03\x04...", "r.csv: expected text, got a zip archive. Unpack it."),
        ("r.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
         "r.jsonl: expected text, got a Git LFS pointer in place of the file. Fetch the file with git lfs pull."),
        ("r.json", '[{"a": 1}\n {"a": 2}]',
         "r.json, line 2: expected a JSON list of objects (expecting ',' delimiter at column 2)."),
        ("r.json", '[{"a": 1},\n', "r.json, line 2: expected a JSON list of objects (expecting value at column 1)."),
        ("r.json", '[{"a": "x', "r.json, line 1: expected a JSON list of objects "
                                "(unterminated string starting at at column 8)."),
        ("r.json", "[] []", "r.json, line 1: expected a JSON list of objects (extra data at column 4)."),
        ("r.json", "\n", "r.json, line 2: expected a JSON list of objects (expecting value at column 1)."),
        ("r.json", '{"a": {}}', "r.json: expected a JSON list of objects, got one object with the keys a. Save the "
                                "list of rows by itself, or name the file .jsonl if each line is a row."),
        ("r.json", b'[{"a": 1},\n \xff]', "r.json, line 2: expected UTF-8, got the byte 0xff at byte 2 of the line. "
                                          "Save the file as UTF-8."),
        ("r.jsonl.gz", "plain", "r.jsonl.gz: not readable as gzip (Not a gzipped file (b'pl')). "
                                "Fetch or make the file again."),
        ("r.csv.zst", "plain", "r.csv.zst: not readable as Zstandard (ZSTD decompress failed: Unknown frame "
                               "descriptor). Fetch or make the file again."),
    ],
)  # fmt: skip
def test_what_makes_a_file_unreadable(name: str, content: bytes | str, message: str) -> None:
    """Is said with the line, where there is one."""
    assert refusal(name, content) == message


def test_a_large_object_in_place_of_a_list() -> None:
    """Is refused by its first keys, and not read."""
    text = '{"version": 1, "data": [' + '"' + "x" * LONGEST_ROW + '"], "last": 1}'
    assert refusal("r.json", text).startswith(
        "r.json: expected a JSON list of objects, got one object with the keys version, data, …. Save"
    )


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_short(packing: str) -> None:
    """Is told from one that is whole, though the rows before the cut are read; half a row never is one."""
    lines = b"".join(b'{"a": "%s"}\n' % os.urandom(3000).hex().encode() for _ in range(200))
    data = gzip.compress(lines) if packing == ".gz" else zstandard(lines)
    for end in (len(data) - 1, len(data) // 2):
        Path("r.jsonl" + packing).write_bytes(data[:end])
        taken = []
        with pytest.raises(DataError, match=r"r\.jsonl: not readable as .* Fetch or make the file again"):
            taken.extend(row for _, row in read_file(Path("r.jsonl" + packing), "r.jsonl"))
        assert not any(isinstance(row, BadRow) for row in taken)


def test_a_file_that_is_gone_or_not_ours() -> None:
    """Says what the system says."""
    with pytest.raises(DataError, match=r"^r.jsonl: cannot be read: No such file or directory\.$"):
        list(read_file(Path("r.jsonl"), "r.jsonl"))
    Path("d.parquet").mkdir()
    with pytest.raises(DataError, match=r"^d.parquet: not readable as Parquet \("):
        list(read_file(Path("d.parquet"), "d.parquet"))


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
