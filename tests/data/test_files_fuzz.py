"""Files broken at random: rows, bad rows, or a refusal by name; never anything else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora_cli.data.files import BadRow, read_file
from qlora_cli.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".jsonl.zst", ".tsv.zst")
FILES = 250  # of each kind, some of them broken twice

ROWS = [
    {"prompt": f"Wie viel ist {i} + {i}, “genau”?", "completion": str(2 * i) + ("\n\tdas war's" if i % 3 else ' "so"')}
    for i in range(5)
]

SPLICES = (
    b"\x00", b'"', b'""', b"'", b",", b"\t", b"\n", b"\r", b"\r\n", b"\n\n", b"\\", b"\\ud83d", b"\xff", b"\xc3",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", "\u2028".encode(), b"{", b"}", b"[", b"]", b"[" * 3000,
    b'{"a":' * 1500, b"9" * 5000, b"1e999", b"-Infinity", b"NaN", b"null", b"]\n[", b'{"a": 1, "a": 2}', b"PAR1",
)  # fmt: skip


def packed(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(data, 1)
    return pa.compress(data, "zstd", asbytes=True) if suffix.endswith(".zst") else data


def good(suffix: str) -> bytes:
    """A file of ROWS, not yet packed."""
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), sink)
        return bytes(sink.getvalue())
    if suffix.startswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if suffix.startswith(".json"):
        return json.dumps(ROWS, indent=1).encode()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter="\t" if suffix.startswith(".tsv") else ",")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def flipped(data: bytes, draw: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 10))):
        broken[draw.randrange(len(broken))] = draw.randrange(256)
    return bytes(broken)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def without_a_part(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randrange(1, 40) :]


def with_a_part_twice(data: bytes, draw: random.Random) -> bytes:
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:]


def spliced(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 3))):
        at = draw.randrange(len(data) + 1)
        data = data[:at] + draw.choice(SPLICES) + data[at:]
    return data


def in_another_encoding(data: bytes, draw: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(
        draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-8-sig")), "replace"
    )


def of_two_files(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((data, good(draw.choice(KINDS[:4])), b"\x00" * 100))


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flipped, cut, without_a_part, with_a_part_twice, spliced, spliced, spliced, in_another_encoding, of_two_files,
)  # fmt: skip


class Outcome:
    """What reading one file gave, after checks that hold for any file."""

    def __init__(self, path: Path) -> None:
        self.rows = self.bad = self.read = 0
        self.refusal = ""
        last = 0
        try:
            for number, row in read_file(path, "the/file", self.count):
                assert number > last
                last = number
                if isinstance(row, BadRow):
                    assert row.problem.startswith(("the/file, line ", "the/file, lines ", "the/file, row "))
                    row.problem.encode()
                    self.bad += 1
                else:
                    "".join(row).encode()
                    json.dumps(row, default=str)
                    self.rows += 1
        except DataError as error:
            self.refusal = str(error)
        assert self.read == path.stat().st_size or (self.refusal and self.read < path.stat().st_size)

    def count(self, more: int) -> None:
        assert more >= 0
        self.read += more


@pytest.mark.parametrize("suffix", KINDS)
def test_no_file_is_too_broken(tmp_path: Path, suffix: str) -> None:
    """Whatever is in a file, it gives rows and bad rows with numbers that rise, or a DataError; both name the file."""
    draw = random.Random(suffix)
    path = tmp_path / f"r{suffix}"
    start = good(suffix)
    rows = bad = refusals = 0
    for _ in range(FILES):
        data = draw.choice(MUTATIONS)(start, draw)
        if data and draw.random() < 0.3:
            data = draw.choice(MUTATIONS)(data, draw)
        data = packed(data, suffix)
        if suffix.endswith((".gz", ".zst")) and draw.random() < 0.3:
            data = draw.choice(MUTATIONS[:4])(data, draw)
        path.write_bytes(data)
        outcome = Outcome(path)
        if outcome.refusal:
            assert outcome.refusal.startswith(("the/file: ", "the/file, line ", "the/file, lines "))
            outcome.refusal.encode()
        rows, bad, refusals = rows + outcome.rows, bad + outcome.bad, refusals + bool(outcome.refusal)
    # Otherwise these files would show nothing.
    assert min(rows, refusals, bad or suffix == ".parquet") > 0
