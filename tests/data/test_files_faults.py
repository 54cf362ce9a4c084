"""What is said of rows and of files that cannot be read, and that a bad row costs no other."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora_cli.data.files import BadRow, read_file
from qlora_cli.data.raw_rows import LONGEST_ROW
from qlora_cli.errors import DataError
from tests.data.test_files import MIB, read, refusal, rows_of, zstandard


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
        ("r.jsonl", gzip.compress(b"x", mtime=0), "r.jsonl: expected text, got gzip data. Name it r.jsonl.gz."),
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
