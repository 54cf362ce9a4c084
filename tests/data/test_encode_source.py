"""The rows of a source, encoded once: the format found, bad rows told or skipped, and found again the next time."""

from __future__ import annotations

import datetime
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora_cli.data import encode as encode_module
from qlora_cli.data.encode import Progress, check_shape, encode_source, find_format
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.files import BadRow
from qlora_cli.data.row_encoder import RowEncoder
from qlora_cli.data.sources import Source, open_source
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DatasetSection
from tests.support.encoded import DAY, encode_whole, source_of
from tests.support.tokenizers import CHATML, tiny_tokenizer

GOOD = {"prompt": "Q", "completion": "A"}


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, **fields: Any) -> tuple[Source, DatasetSection]:
    section = DatasetSection(train=str(path), **fields)
    return open_source("dataset.train", section.train_sources[0]), section


def encode_file(path: Path, tokenizer: Any = None, *, today: datetime.date = DAY, **fields: Any) -> EncodedRows:
    source, section = opened(path, **fields)
    format = find_format(source, section)
    return encode_source(source, format, section, tokenizer or tiny_tokenizer(), today=today)


def told(*rows: Any, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        encode_whole(tiny_tokenizer(), *rows, **fields)
    return str(caught.value)


def test_the_format_is_that_of_the_first_rows() -> None:
    """Of all columns that occur in them; a bad row says nothing of it, nor does one far down."""
    section = DatasetSection(train="rows.jsonl", on_bad_row="skip")
    rows = [BadRow("rows.jsonl, line 1: bad"), {"completion": "A"}, {"prompt": "Q", "id": 5}]
    assert find_format(source_of(*rows), section) == "prompt_completion"
    late = [{"text": "a"}] * 1000 + [GOOD]
    assert find_format(source_of(*late), section) == "text"
    named = source_of({"q": "Q", "a": "A"}, columns={"prompt": "q", "completion": "a"})
    assert find_format(named, section) == "prompt_completion"


@pytest.mark.parametrize(
    ("name", "content"),
    [("r.jsonl", b"\n \n"), ("r.json", b"[]"), ("r.csv", b"prompt,completion\n"), ("r.parquet", b"")],
)
def test_files_without_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Files that hold something, but no row."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    if name == "r.parquet":
        pyarrow.parquet.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / name)
    source, section = opened(tmp_path / name)
    with pytest.raises(DataError) as caught:
        find_format(source, section)
    assert str(caught.value) == f"{name}: there are no rows."


def test_bad_rows_are_told_together() -> None:
    """The first five of those that were read together, that there are more, and the way on if there is one."""
    bad = [BadRow(f"rows.jsonl, line {n}: bad") for n in range(2, 9)]
    assert told(GOOD, bad[0]) == (
        "rows.jsonl, line 2: bad\nMend the data, or set dataset.on_bad_row: skip to leave such rows out."
    )
    assert told(GOOD, *bad) == "\n".join(
        [
            *[f"rows.jsonl, line {n}: bad" for n in range(2, 7)],
            "… and at least 2 more.",
            "Mend the data, or set dataset.on_bad_row: skip to leave such rows out.",
        ]
    )
    assert told(bad[0], GOOD).endswith("skip to leave such rows out.")
    # Where no row is good, leaving out the bad ones is no way.
    assert told(bad[0]) == "rows.jsonl, line 2: bad"
    assert told({"prompt": None, "completion": 5}) == "rows.jsonl, line 1: prompt: expected text, got null."


def test_reading_stops_at_the_first_bad_rows() -> None:
    """A mistake in row 3 of a million is not told after the million."""
    taken = 0

    def rows() -> Iterable[Any]:
        nonlocal taken
        for number in range(100_000):
            taken += 1
            yield {"prompt": "Q"} if number == 2 else GOOD

    source = source_of()
    section = DatasetSection(train="rows.jsonl", format="prompt_completion")
    from qlora_cli.data.sources import SourceRow

    object.__setattr__(source, "opened", lambda _: (SourceRow(0, n, row) for n, row in enumerate(rows(), 1)))
    with pytest.raises(DataError, match=r"^rows.jsonl, line 3: completion: expected text, got nothing"):
        encode_source(source, "prompt_completion", section, tiny_tokenizer(), today=DAY)
    assert taken < 3000


def test_bad_rows_are_skipped_and_counted() -> None:
    """The others keep their numbers; with no other there is nothing to train on."""
    rows = [BadRow("rows.jsonl, line 1: bad"), GOOD, {"prompt": "Q", "completion": None}, GOOD]
    encoded = encode_whole(tiny_tokenizer(), *rows, on_bad_row="skip")
    assert encoded.row_numbers.tolist() == [2, 4]
    assert encoded.skipped == 2
    assert encoded.problems == (
        "rows.jsonl, line 1: bad",
        "rows.jsonl, line 3: completion: expected text, got null.",
    )
    assert told(*[{"prompt": None, "completion": ""}] * 7, on_bad_row="skip").splitlines()[-2:] == [
        "rows.jsonl, line 5: prompt: expected text, got null.",
        "… and 2 more.",
    ]
    assert told(BadRow("rows.jsonl, line 1: bad"), on_bad_row="skip") == "rows.jsonl, line 1: bad"


def test_shape_is_checked_without_a_tokenizer() -> None:
    """What a malformed row would be refused for, unless such rows are to be skipped."""
    source = source_of(GOOD, {"prompt": "Q", "completion": {"a": 1}})
    with pytest.raises(DataError) as caught:
        check_shape(source, DatasetSection(train="rows.jsonl"))
    assert str(caught.value) == "rows.jsonl, line 2: completion: expected text, got an object."
    check_shape(source, DatasetSection(train="rows.jsonl", on_bad_row="skip"))


def test_rows_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is encoded; neither is it for other limits, which are applied afterwards."""
    path = write(tmp_path / "r.jsonl", [GOOD, {"prompt": "Why?", "completion": "So."}])
    first = encode_file(path)

    def again(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(encode_module, "_write", again)
    second = encode_file(path, max_length=5, overlong="drop")
    assert second.fingerprint == first.fingerprint
    assert [second.labels(i).tolist() for i in range(2)] == [first.labels(i).tolist() for i in range(2)]
    assert second.parts == first.parts


@pytest.mark.parametrize(
    "changed",
    [
        "a byte of the data",
        "the tokenizer",
        "the template",
        "the special tokens",
        "the names of special tokens",
        "supervise",
        "on_bad_row",
        "the columns",
        "the date that the template writes",
    ],
)
def test_whatever_matters_encodes_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    """Each of the things that what is learned depends on makes another entry."""
    dated = "{{ strftime_now('%d %b') }}" + CHATML
    rows = [{"prompt": "Q", "completion": "A", "other": "B"}]
    path = write(tmp_path / "r.jsonl", rows)
    tokenizer = tiny_tokenizer(dated)
    encode_file(path, tokenizer)
    counted = 0
    write_rows = encode_module._write

    def count(*arguments: Any) -> Any:
        nonlocal counted
        counted += 1
        return write_rows(*arguments)

    monkeypatch.setattr(encode_module, "_write", count)
    encode_file(path, tiny_tokenizer(dated))
    assert counted == 0
    fields: dict[str, Any] = {}
    today = DAY
    match changed:
        case "a byte of the data":
            write(path, [{**rows[0], "completion": "B"}])
        case "the tokenizer":
            tokenizer.add_tokens(["<new>"])
        case "the template":
            tokenizer = tiny_tokenizer(" " + dated)
        case "the special tokens":
            tokenizer.eos_token = "<|pad|>"
        case "the names of special tokens":
            tokenizer.pad_token = "<|im_start|>"
        case "supervise":
            fields["supervise"] = "everything"
        case "on_bad_row":
            fields["on_bad_row"] = "skip"
        case "the columns":
            fields["columns"] = {"completion": "other"}
        case _:
            today = DAY + datetime.timedelta(days=1)
    encode_file(path, tokenizer, today=today, **fields)
    assert counted == 1


def test_a_date_that_is_not_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every day would encode all rows again."""
    path = write(tmp_path / "r.jsonl", [GOOD])
    first = encode_file(path)
    monkeypatch.setattr(encode_module, "_write", None)
    assert encode_file(path, today=DAY + datetime.timedelta(days=1)).fingerprint == first.fingerprint


def test_many_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, masks, numbers, counts and the first problems, in order, over thousands of rows."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"What is {n}?", "completion": None if n % 700 == 699 else f"It is {n * 7}. " * (n % 5)}
        for n in range(12_000)
    ]
    path = write(tmp_path / "r.jsonl", rows)
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(encode_module, "cores", lambda *, shared, cores=cores: cores)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{cores}"))
        found.append(encode_file(path, on_bad_row="skip"))
    one, many = found
    assert one.fingerprint == many.fingerprint
    assert (one.index == many.index).all()
    assert one.skipped == many.skipped == 17
    assert one.problems == many.problems
    assert [many.where(i) for i in (0, 698, 699)] == [f"{path}, line {n}" for n in (1, 699, 701)]


def test_a_group_of_rows_is_not_seen_in_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a resumed run would be refused for a column that is never read."""
    plain = write(tmp_path / "plain.jsonl", [GOOD] * 40)
    noted = write(tmp_path / "noted.jsonl", [{**GOOD, "note": "x" * 500}] * 40)
    monkeypatch.setattr(encode_module, "_CHUNK_CHARACTERS", 1000)
    assert encode_file(plain).fingerprint == encode_file(noted).fingerprint


def test_problems_name_the_files_as_they_are_called_now(tmp_path: Path) -> None:
    """The folder was given another name since they were found."""
    (tmp_path / "old").mkdir()
    write(tmp_path / "old" / "r.jsonl", [GOOD, {"prompt": None}])
    before = encode_file(tmp_path / "old" / "r.jsonl", on_bad_row="skip")
    (tmp_path / "old").rename(tmp_path / "new")
    after = encode_file(tmp_path / "new" / "r.jsonl", on_bad_row="skip")
    assert before.problems == (f"{tmp_path}/old/r.jsonl, line 2: prompt: expected text, got null.",)
    assert after.problems == (f"{tmp_path}/new/r.jsonl, line 2: prompt: expected text, got null.",)


def test_an_encoder_can_be_sent_to_a_process_that_begins_anew(tmp_path: Path) -> None:
    """As where processes are not forked; it encodes the same there, also when it has encoded before."""
    dated = tiny_tokenizer("{{ strftime_now('%d %b') }}" + CHATML)
    source, section = opened(write(tmp_path / "r.jsonl", [GOOD, {"prompt": "é😀", "completion": None}]))
    encoder = RowEncoder(source, "prompt_completion", section, dated, today=DAY)
    rows = list(source.read())
    for _ in range(2):
        here, there = encoder.encode(rows), pickle.loads(pickle.dumps(encoder)).encode(rows)  # noqa: S301
        assert here.words.tolist() == there.words.tolist()
        assert here.records.tolist() == there.records.tolist()
        assert here.problems == there.problems
        assert (here.rows, len(here.problems)) == (1, 1)


def test_what_one_process_makes_for_all_takes_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight processes on a machine seven wait for what is kept; what is kept nowhere, each makes for itself."""
    seen = []
    monkeypatch.setattr(encode_module, "cores", lambda *, shared: seen.append(shared) or 1)
    encode_file(write(tmp_path / "r.jsonl", [GOOD]))
    encode_whole(tiny_tokenizer(), GOOD)
    assert seen == [False, True]


def test_progress_is_told(tmp_path: Path) -> None:
    """Rows so far and the share of the file, up to all of it."""
    path = write(tmp_path / "r.jsonl", [GOOD] * 2000)
    source, section = opened(path)
    seen: list[Progress] = []
    encode_source(source, "prompt_completion", section, tiny_tokenizer(), today=DAY, report=seen.append)
    assert [p.rows for p in seen] == [512, 1024, 1536, 2000]
    shares = [p.share for p in seen if p.share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert {p.source for p in seen} == {source.name}
