"""Files and hub names to rows, and what is said when that fails."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora_cli.data.files import BadRow
from qlora_cli.data.sources import Source, open_source
from qlora_cli.errors import DataError, HubUnreachableError
from qlora_cli.recipe.schema import DatasetSection

ROWS = [{"prompt": "a, b", "completion": 'say "hi"'}, {"prompt": "é\nü", "completion": "007"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def load(train: Path | str, **section: Any) -> Source:
    fields = DatasetSection(train=str(train), **section)
    return open_source("dataset.train", fields.train_sources[0], streaming=fields.streaming)


def everything(source: Source) -> list[Any]:
    """The rows; what is wrong with one is raised."""
    rows = [row.row for row in source.read()]
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(row.problem)
    return rows


def numbers(source: Source) -> list[int]:
    return [row.number for row in source.read()]


def names(source: Source) -> list[str]:
    return [source.where(row) for row in source.read()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        case suffix:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
    return path


def refusal(train: Path | str, **section: Any) -> str:
    with pytest.raises(DataError) as caught:
        everything(load(train, **section))
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    """The five kinds of file hold the same rows, commas, quotes, newlines and leading zeros included."""
    rows = load(write(tmp_path / f"rows{suffix}", ROWS))
    assert everything(rows) == ROWS
    assert [list(row) for row in everything(rows)] == [["prompt", "completion"]] * 2
    assert numbers(rows) == [1, 2]
    assert names(rows)[1] == f"rows{suffix}, {'line' if suffix == '.jsonl' else 'row'} 2"


def test_text_is_never_taken_for_something_else(tmp_path: Path) -> None:
    """Dates, numbers and NA in a text file stay the text they are."""
    rows = [{"a": "2020-01-01", "b": "NA"}, {"a": "2021-12-31 10:00:00", "b": "1e3"}]
    for suffix in (".jsonl", ".json", ".csv", ".tsv"):
        assert everything(load(write(tmp_path / f"r{suffix}", rows))) == rows


def test_values_of_any_shape_come_back_as_they_were(tmp_path: Path) -> None:
    """JSON rows may differ in keys and types from each other, and a missing key stays missing."""
    rows: list[dict[str, Any]] = [
        {"id": 1, "m": [{"role": "user", "content": "x"}], "late": None},
        {"id": "two", "m": [{"role": "tool", "name": "f", "args": {"n": [1, 2.5]}}], "late": "x"},
        {"id": None, "m": "text", "late": True},
    ]
    assert everything(load(write(tmp_path / "r.jsonl", rows))) == rows
    assert everything(load(write(tmp_path / "s.jsonl", [{"a": "x"}, {"b": "y"}]))) == [{"a": "x"}, {"b": "y"}]


def test_rows_of_jsonl_are_numbered_by_line(tmp_path: Path) -> None:
    """Blank lines are skipped but counted, and a byte-order mark is ignored."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "x"}\n\n \n{"a": "y"}\r\n{"a": "\xe2\x80\xa8"}')
    rows = load(path)
    assert numbers(rows) == [1, 4, 5]
    assert [row["a"] for row in everything(rows)] == ["x", "y", "\u2028"]


def test_json_lines_named_json(tmp_path: Path) -> None:
    """A .json file of one object per line is read as JSON Lines."""
    path = tmp_path / "r.json"
    path.write_text('{"a": "x"}\n{"a": "y"}\n')
    assert everything(load(path)) == [{"a": "x"}, {"a": "y"}]


def test_very_long_cells_are_read(tmp_path: Path) -> None:
    """A CSV cell may be longer than the csv module's limit, which stays as it was."""
    limit = csv.field_size_limit()
    rows = load(write(tmp_path / "r.csv", [{"a": "x" * 300_000, "b": "y"}]))
    assert len(everything(rows)[0]["a"]) == 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_folders_and_globs_run_on_over_files(tmp_path: Path, suffix: str) -> None:
    """Files of a folder or glob are taken in order of name, and messages name the file as well."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / f"b{suffix}", [{"a": "3"}])
    write(folder / f"a{suffix}", [{"a": "1"}, {"a": "2"}])
    (folder / "README.md").write_text("not data")
    for source in (folder, f"{folder}/*{suffix}"):
        rows = load(source)
        assert [row["a"] for row in everything(rows)] == ["1", "2", "3"]
        unit = "line" if suffix == ".jsonl" else "row"
        assert names(rows)[1:] == [f"data/a{suffix}, {unit} 2", f"data/b{suffix}, {unit} 1"]


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    """The fingerprint changes with any byte or file name, and with nothing else."""
    first = load(write(tmp_path / "r.jsonl", ROWS)).fingerprint
    assert len(first) == 64
    (tmp_path / "elsewhere").mkdir()
    assert load(write(tmp_path / "elsewhere" / "r.jsonl", ROWS)).fingerprint == first
    assert load(write(tmp_path / "s.jsonl", ROWS)).fingerprint != first
    assert load(write(tmp_path / "r.jsonl", ROWS[::-1])).fingerprint != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b"", "r.jsonl: the file is empty."),
        (
            "r.jsonl",
            b'{"a": "x"}\n{"a": "y"\n',
            """r.jsonl, line 2: expected one JSON object, got "{\\"a\\": \\"y\\"" """
            "(expecting ',' delimiter at column 10).",
        ),
        ("r.jsonl", b'{"a": "x"}\n["b"]\n', "r.jsonl, line 2: expected one JSON object, got a list of 1."),
        ("r.jsonl", b"5\n", "r.jsonl, line 1: expected one JSON object, got the number 5."),
        (
            "r.jsonl",
            b'{"a": "x"}\n{"a": "caf\xe9"}\n',
            "r.jsonl, line 2: expected UTF-8, got the byte 0xe9 at byte 11 of the line. Save the file as UTF-8.",
        ),
        (
            "r.csv",
            b"a\nx\ncaf\xe9\n",
            "r.csv, line 3: expected UTF-8, got the byte 0xe9 at byte 4 of the line. Save the file as UTF-8.",
        ),
        (
            "r.jsonl",
            '{"a": "x"}\n'.encode("utf-16"),
            "r.jsonl, line 1: expected UTF-8, got UTF-16. Save the file as UTF-8.",
        ),
        (
            "r.json",
            b'[{"a": "x"},\n {"a" "y"}]',
            "r.json, line 2: expected a JSON list of objects (expecting ':' delimiter at column 7).",
        ),
        (
            "r.json",
            b'{"data": [{"a": "x"}], "version": 1}',
            "r.json: expected a JSON list of objects, got one object with the keys data, version. "
            "Save the list of rows by itself, or name the file .jsonl if each line is a row.",
        ),
        ("r.json", b'[{"a": "x"}, "y"]', 'r.json, row 2: expected an object, got the text "y".'),
        ("r.json", b"true", "r.json: expected a JSON list of objects, got the boolean true."),
        ("r.csv", b"a,b\n1,2\n\n3\n", "r.csv, line 4: expected 2 cells (a, b), got 1."),
        ("r.csv", b"a,a\n1,2\n", "r.csv, line 1: two columns have the same name: a, a."),
        (
            "r.csv",
            b'a,b\n"it" is,x\n',
            "r.csv, line 2: ',' expected after '\"'. A cell that begins with a double quote must end "
            "with one, and have those inside it doubled.",
        ),
        ("r.txt", b"hello", "dataset.train: r.txt: expected a .jsonl, .json, .csv, .tsv or .parquet file, got r.txt."),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A broken file is refused with its name, the line where there is one, what was expected and what was got."""
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name) == message


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    """JSON nested beyond what can be parsed is a mistake in the data, not a crash."""
    (tmp_path / "r.jsonl").write_text('{"a":' * 200_000)
    assert refusal(tmp_path / "r.jsonl").endswith("(nested too deeply).")


def test_broken_parquet(tmp_path: Path) -> None:
    """A Parquet file that cannot be read is refused by name."""
    (tmp_path / "r.parquet").write_bytes(b"PAR1 but not really")
    assert refusal(tmp_path / "r.parquet").startswith("r.parquet: not readable as Parquet (")


def test_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    """Missing files, globs without a match, and folders with nothing or several kinds are told apart."""
    assert refusal(tmp_path / "no.jsonl") == "dataset.train: no.jsonl: there is no such file or folder."
    assert refusal("no.jsonl") == "dataset.train: no.jsonl: there is no such file or folder."
    assert refusal("no/x.jsonl") == (
        "dataset.train: no/x.jsonl: there is no such file or folder; the folder no is not there."
    )
    (tmp_path / "rows.jsonl").touch()
    assert refusal("row.jsonl") == (
        "dataset.train: row.jsonl: there is no such file or folder; did you mean rows.jsonl?"
    )
    assert refusal(tmp_path / "*.csv") == "dataset.train: *.csv: no file matches."
    folder = tmp_path / "mixed"
    folder.mkdir()
    kinds = ".jsonl, .json, .csv, .tsv or .parquet"
    assert refusal(folder) == f"dataset.train: mixed: no {kinds} file in this folder."
    write(folder / "a.csv", ROWS)
    write(folder / "b.jsonl", ROWS)
    assert refusal(folder) == (
        "dataset.train: mixed: expected files of one kind, got a.csv, b.jsonl. "
        "Name the ones to use with a glob such as *.csv."
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_reading_files_is_quiet_and_leaves_nothing_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str
) -> None:
    """Reading local files prints nothing and writes nothing, to the cache or elsewhere."""
    everything(load(write(tmp_path / f"r{suffix}", ROWS)))
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [f"r{suffix}"]


def test_parquet_files_with_different_columns(tmp_path: Path) -> None:
    """Files of one folder are read one after another, each with its own columns."""
    write(tmp_path / "a.parquet", [{"a": "x", "b": "y"}])
    write(tmp_path / "b.parquet", [{"b": 5}])
    assert everything(load(tmp_path)) == [{"a": "x", "b": "y"}, {"b": 5}]


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no path goes to the hub with its configuration and split; labels come by their names."""
    asked = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    labels = {"a": 1, "b": 0, "c": -1, "d": None}
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    dataset = datasets.Dataset.from_list(rows, features=features)

    def from_hub(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    source = load("openai/gsm8k", hub_config="main", train_split="test")
    streamed = load("openai/gsm8k", streaming=True)
    assert asked == [("openai/gsm8k", "main", "test", False), ("openai/gsm8k", None, "train", True)]
    for opened in (source, streamed):
        assert [(row["text"], row["label"]) for row in everything(opened)] == [
            ("a", "yes"),
            ("b", "no"),
            ("c", None),
            ("d", None),
        ]
    assert names(source)[0] == "openai/gsm8k (test), row 1"
    assert (source.fingerprint, source.size) == (dataset._fingerprint, 4)
    # What is streamed may be other rows tomorrow.
    assert (streamed.fingerprint, streamed.size) == (None, None)


def test_a_stream_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row after which nothing came is told."""

    class Broken:
        features = None

        def iter(self, batch_size: int) -> Any:
            yield {"a": ["x", "y"]}
            raise RuntimeError("the shard is damaged")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Broken())
    assert refusal("o/d", streaming=True) == "o/d (train), after row 2: cannot be read on: the shard is damaged."


def test_how_far_reading_has_come(tmp_path: Path) -> None:
    """The bytes of all files, or the rows of a dataset, add up to the size."""
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [{"a": "x" * 1000}] * 300)
    source = load(tmp_path)
    read: list[int] = []
    assert len(list(source.read(read.append))) == 600
    assert sum(read) == source.size == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/d' doesn't exist on the Hub"),
            "the hub has no such dataset, or it is private",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/d' is a gated dataset on the Hub."),
            "it is gated; accept its terms on the hub and log in with `hf auth login`",
        ),
        (
            ValueError('Unknown split "train". Should be one of ["test"].'),
            'it has no split \'train\' (Unknown split "train". Should be one of ["test"]); '
            "set dataset.train_split or dataset.validation_split",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
            "hub_config None does not fit (Config name is missing. Please pick one among the available configs: "
            "['a', 'b']); set dataset.hub_config",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found d.py"),
            "Dataset scripts are no longer supported, but found d.py",
        ),
    ],
)
def test_what_the_hub_says_against_a_name(monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str) -> None:
    """Whatever the hub answers, one message says what, and that a missing file looks just like this."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert refusal("o/d") == (
        f"o/d: there is no such local file or folder, so it was taken for a dataset on the hub: {problem}. "
        "For local data, give a file, a folder or a glob."
    )


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'o/d' on the Hub"),
        ValueError("Couldn't find cache for o/d for config 'a'\nAvailable configs in the cache: ['b']"),
    ],
)
def test_a_hub_that_gives_no_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Nothing is known against the dataset, which is another error than a refusal."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(HubUnreachableError) as caught:
        load("o/d")
    assert str(caught.value) == (
        "o/d: there is no such local file or folder, so it was taken for a dataset on the hub: the hub cannot be "
        "reached. For local data, give a file, a folder or a glob."
    )


@pytest.mark.parametrize("change", ["longer", "as long", "gone"])
def test_a_file_that_changes_while_it_is_read(change: str, tmp_path: Path) -> None:
    """What was read is neither the one nor the other, and must not be kept under the fingerprint of either."""
    path = write(tmp_path / "r.jsonl", ROWS)
    source = load(path)
    rows = source.read()
    next(rows)
    match change:
        case "longer":
            write(path, [*ROWS, *ROWS])
        case "as long":
            write(path, list(reversed(ROWS)))
        case _:
            path.unlink()
    with pytest.raises(DataError) as caught:
        list(rows)
    assert str(caught.value) == "r.jsonl: the file was changed while it was read. Start again."
