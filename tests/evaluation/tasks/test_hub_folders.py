"""Data filed under its name on the hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.data_root import DataRoot
from qlora_cli.evaluation.tasks.layouts.found import DatasetName
from tests.support.benchmarks import write_jsonl

_ROWS: list[dict[str, Any]] = [
    {"question": "2024-01-01", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "label": 1, "score": 0.5},
    {"question": "NA", "choices": {"text": ["c"], "label": ["A"]}, "label": 0, "score": 2.0},
]
_NAME = DatasetName("org/Set", "easy")


def _read(folder: Path, name: DatasetName, split: str, needed: frozenset[str] = frozenset()) -> datasets.Dataset:
    root = DataRoot(folder)
    found = root.find(name, split)
    assert found is not None
    return root.read(found, needed)


def _csv(path: Path, delimiter: str = ",") -> None:
    lines = [["question", "choices", "label", "score"]]
    for row in _ROWS:
        cells = [row["question"], json.dumps(row["choices"]), str(row["label"]), str(row["score"])]
        lines.append([f'"{cell}"'.replace('"', '""')[1:-1] if '"' in cell else cell for cell in cells])
    path.write_text("".join(delimiter.join(line) + "\n" for line in lines))


_WRITERS: dict[str, Callable[[Path], object]] = {
    "test.jsonl": lambda path: write_jsonl(path, _ROWS),
    "test.json": lambda path: path.write_text(json.dumps(_ROWS)),
    "test.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in _ROWS).encode())
    ),
    "test.csv": _csv,
    "test.tsv": lambda path: _csv(path, "\t"),
    "test.parquet": lambda path: datasets.Dataset.from_list(_ROWS).to_parquet(str(path)),
    "Test-00000-of-00001.parquet": lambda path: datasets.Dataset.from_list(_ROWS).to_parquet(str(path)),
    "test": lambda path: datasets.Dataset.from_list(_ROWS).save_to_disk(str(path)),
    "test/any.jsonl": lambda path: write_jsonl(path, _ROWS),
}


@pytest.mark.parametrize("file", list(_WRITERS))
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, file: str) -> None:
    """Text stays text (a date, NA), numbers and lists are such, in every kind of file."""
    path = tmp_path / "org" / "Set" / "easy" / file
    path.parent.mkdir(parents=True)
    _WRITERS[file](path)
    dataset = _read(tmp_path, _NAME, "test")
    assert dataset.to_list() == _ROWS
    assert dataset.features["label"].dtype == "int64"


@pytest.mark.parametrize(
    ("folder", "config"),
    [
        ("org/Set/easy", "easy"),
        ("ORG/set/Easy", "easy"),
        ("org/Set/default", None),
        ("org/Set/default", "default"),
        ("org/Set", None),
        ("org/Set/data", None),
        ("org/Set/data/easy", "easy"),
        ("hub/org/Set/easy", "easy"),
    ],
)
def test_where_a_configuration_may_lie(tmp_path: Path, folder: str, config: str | None) -> None:
    """Its own folder, in any case; `default` or the dataset's own folder where there is none."""
    write_jsonl(tmp_path / folder / "test.jsonl", _ROWS)
    assert len(_read(tmp_path, DatasetName("org/Set", config), "test")) == 2


def test_a_configuration_is_not_taken_for_another(tmp_path: Path) -> None:
    """Rows of `default`, or of none, are not those of a configuration that was named."""
    write_jsonl(tmp_path / "org" / "Set" / "default" / "test.jsonl", _ROWS)
    write_jsonl(tmp_path / "org" / "Set" / "test.jsonl", _ROWS)
    assert DataRoot(tmp_path).find(_NAME, "test") is None


def test_a_split_is_not_taken_for_another(tmp_path: Path) -> None:
    """`test_matched` is not `test`, nor is `dev` validation."""
    for name in ("test_matched", "testing", "dev", "test.old"):
        write_jsonl(tmp_path / "org" / "Set" / "easy" / f"{name}.jsonl", _ROWS)
    root = DataRoot(tmp_path)
    assert root.find(_NAME, "test") is None
    assert root.find(_NAME, "validation") is None
    assert root.splits(_NAME) == ["dev", "test.old", "test_matched", "testing"]


def test_what_datasets_leaves_beside_rows_is_no_split(tmp_path: Path) -> None:
    """Of a DatasetDict, of a Dataset that lies where its split's folder should, and of a repository."""
    folder = tmp_path / "org" / "Set" / "easy"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(_ROWS)}).save_to_disk(str(folder))
    (folder / "dataset_infos.json").write_text("{}")
    assert DataRoot(tmp_path).splits(_NAME) == ["train"]
    datasets.Dataset.from_list(_ROWS).save_to_disk(str(tmp_path / "org" / "Set" / "hard"))
    assert DataRoot(tmp_path).splits(DatasetName("org/Set", "hard")) == []


def test_parts_follow_one_another(tmp_path: Path) -> None:
    """Several files of a split are read in the order of their names."""
    folder = tmp_path / "org" / "Set" / "easy"
    for number in (1, 0):
        write_jsonl(folder / f"test-0000{number}-of-00002.jsonl", [_ROWS[number]])
    assert _read(tmp_path, _NAME, "test").to_list() == _ROWS


@pytest.mark.parametrize("second", ["test.csv", "test.jsonl.gz", "test-00000-of-00001.jsonl"])
def test_the_same_rows_twice_are_refused(tmp_path: Path, second: str) -> None:
    """Two files that each look like the whole split."""
    folder = tmp_path / "org" / "Set" / "easy"
    write_jsonl(folder / "test.jsonl", _ROWS)
    (folder / second).write_bytes(b"")
    with pytest.raises(TaskError, match=r"expected the rows of the split 'test' once, got test.*\. Leave one of them"):
        DataRoot(tmp_path).find(_NAME, "test")


def test_labels_of_parquet_and_of_save_to_disk_keep_their_names(tmp_path: Path) -> None:
    """What `datasets` wrote keeps its types."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    folder = tmp_path / "org" / "Set" / "easy"
    folder.mkdir(parents=True)
    dataset.to_parquet(str(folder / "test.parquet"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder))
    assert _read(tmp_path, _NAME, "test").features == features
    assert _read(tmp_path, _NAME, "train").features == features


_CARD = """---
configs:
- config_name: easy
  default: true
  data_files:
  - split: test
    path: parts/easy-*.jsonl
dataset_info:
- config_name: easy
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': 'no'
          '1': 'yes'
---
# A set
"""


@pytest.mark.parametrize("config", ["easy", None])
def test_a_copy_of_the_repository_is_read_by_its_card(tmp_path: Path, config: str | None) -> None:
    """The card says which files a split has, which configuration is the default, and what labels mean."""
    folder = tmp_path / "org" / "Set"
    write_jsonl(folder / "parts" / "easy-1.jsonl", [{"text": "a", "label": 1}])
    write_jsonl(folder / "parts" / "hard-1.jsonl", [{"text": "b", "label": 0}])
    (folder / "README.md").write_text(_CARD)
    dataset = _read(tmp_path, DatasetName("org/Set", config), "test")
    assert dataset.to_list() == [{"text": "a", "label": 1}]
    if config:
        assert dataset.features["label"] == datasets.ClassLabel(names=["no", "yes"])


def test_cells_are_what_the_card_says(tmp_path: Path) -> None:
    """Texts that look like numbers stay texts."""
    folder = tmp_path / "org" / "Set"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "easy-1.csv").write_text("text,label\n12,1\n,0\n")
    (folder / "README.md").write_text(_CARD.replace(".jsonl", ".csv"))
    dataset = _read(tmp_path, DatasetName("org/Set", "easy"), "test")
    assert dataset["text"][:] == ["12", None]
    assert dataset.features["label"] == datasets.ClassLabel(names=["no", "yes"])


def test_cells_may_be_asked_for_as_texts(tmp_path: Path) -> None:
    """All of them, or all but those of some columns; lists are lists and empty cells none all the same."""
    file = tmp_path / "org" / "Set" / "easy" / "test.csv"
    file.parent.mkdir(parents=True)
    file.write_text('x,y,z\n1,2.5,"[3]"\n4,,"[5]"\n')
    root = DataRoot(tmp_path)
    found = root.find(_NAME, "test")
    assert found is not None
    assert root.read(found, frozenset())[:] == {"x": [1, 4], "y": [2.5, None], "z": [[3], [5]]}
    assert root.read(found, frozenset(), frozenset("x"))[:] == {"x": [1, 4], "y": ["2.5", None], "z": [[3], [5]]}
    assert root.read(found, frozenset(), frozenset())["x"][:] == ["1", "4"]


def test_files_that_a_task_names_are_found_where_the_hub_has_them(tmp_path: Path) -> None:
    """`data_files` of the hub, or of the dataset's repository, are looked for below the root."""
    write_jsonl(tmp_path / "org" / "Set" / "data" / "two.jsonl", _ROWS)
    of_hub = DatasetName("json", None, {"data_files": {"test": "hf://datasets/org/Set/data/two.jsonl"}})
    of_set = DatasetName("org/Set", None, {"data_files": {"test": "data/two.jsonl"}})
    outside = DatasetName("org/Set", None, {"data_files": {"test": "../../secret.jsonl"}})
    write_jsonl(tmp_path.parent / "secret.jsonl", _ROWS)
    assert len(_read(tmp_path, of_hub, "test")) == 2
    assert len(_read(tmp_path, of_set, "test")) == 2
    assert DataRoot(tmp_path).find(outside, "test") is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "test.jsonl: there is no row in it."),
        ('{"a": 1}\n{"a": \n', 'test.jsonl, line 2: expected one JSON object, got "{\\"a\\":"'),
        ('{"a": 1, "b": 2}\n{"b": 2}\n', "test.jsonl, line 2: expected the column 'a', which other rows have, got 'b'"),
        ('{"a": 1}\n{"a": 2}\n{"a": "x"}\n', "line 3: a: expected a value of the kind that the rows before it have"),
    ],
)
def test_broken_files_are_told_with_their_line(tmp_path: Path, content: str, problem: str) -> None:
    """File and line, and what was expected."""
    file = tmp_path / "org" / "Set" / "easy" / "test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(TaskError) as caught:
        _read(tmp_path, _NAME, "test", frozenset("a"))
    assert problem in str(caught.value)


def test_columns_that_no_template_uses_may_be_left_out(tmp_path: Path) -> None:
    """A row without them has null there."""
    write_jsonl(tmp_path / "org" / "Set" / "easy" / "test.jsonl", [{"a": 1}, {"a": 2, "note": "x"}])
    assert _read(tmp_path, _NAME, "test", frozenset("a"))["note"][:] == [None, "x"]


def test_damaged_save_to_disk_folder(tmp_path: Path) -> None:
    """The folder is named, without a traceback of Arrow's."""
    folder = tmp_path / "org" / "Set" / "easy" / "test"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{")
    with pytest.raises(TaskError, match="easy/test: not readable as what `save_to_disk` wrote"):
        _read(tmp_path, _NAME, "test")


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "-2"], [1, -2]),
        (["1", "2.5"], [1.0, 2.5]),
        (["007", "1"], ["007", "1"]),
        (["1", ""], [1, None]),
        (["true", "false"], [True, False]),
        (["['a', 'b']", '["c"]'], [["a", "b"], ["c"]]),
        (["[see note]", "[b]"], ["[see note]", "[b]"]),
        (["1", "A"], ["1", "A"]),
    ],
)
def test_cells_are_what_the_whole_column_says(tmp_path: Path, cells: list[str], values: list[Any]) -> None:
    """Numbers only if all are, and as they would be written again; lists in JSON's and in Python's writing."""
    file = tmp_path / "org" / "Set" / "easy" / "test.tsv"
    file.parent.mkdir(parents=True)
    file.write_text("x\ty\n" + "".join(f"{cell}\t-\n" for cell in cells))
    assert _read(tmp_path, _NAME, "test")["x"][:] == values


def test_data_root_has_to_be_a_folder(tmp_path: Path) -> None:
    """A misspelt folder gets the one that was meant."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TaskError, match=r"--data-root: .*benchmrks: there is no such folder; did you mean benchmarks\?"
    ):
        DataRoot(tmp_path / "benchmrks")
    with pytest.raises(TaskError, match=r"--data-root: .*file is a file\. Give the folder that holds the data\."):
        DataRoot(tmp_path / "file")


@pytest.mark.parametrize("cell", ["['0' '4'\n '2']", "[a, b]", "{'text': array(['a', 'b'], dtype=object)}"])
def test_lists_as_they_are_printed_are_none(tmp_path: Path, cell: str) -> None:
    """As pandas writes the lists of a Parquet file into CSV: Python reads the first as one text, and a prompt would
    take letters out of the others."""
    path = tmp_path / "org" / "Set" / "easy" / "test.csv"
    path.parent.mkdir(parents=True)
    path.write_text(f'question,choices\na,"[""x"", \'y\']"\nb,"{cell}"\n')
    with pytest.raises(TaskError) as caught:
        _read(tmp_path, _NAME, "test", frozenset(["choices"]))
    assert str(caught.value).startswith(
        f"{path}, row 2: choices: expected a list or an object as JSON or Python writes it, got "
    )
    assert _read(tmp_path, _NAME, "test")["choices"][1] == cell


def test_a_split_with_a_file_missing_is_refused(tmp_path: Path) -> None:
    """The names say how many there are: a copy that broke off gives no score of the rows that came."""
    folder = tmp_path / "org" / "Set" / "easy"
    for number in (0, 2):
        write_jsonl(folder / f"test-{number:05d}-of-00003.jsonl", _ROWS)
    with pytest.raises(TaskError) as caught:
        _read(tmp_path, _NAME, "test")
    assert str(caught.value) == (
        f"{folder}: expected all 3 files of the split 'test', as their names say, got 2; number 00001 is the first "
        "that is not there."
    )
    write_jsonl(folder / "test-00001-of-00003.jsonl", _ROWS)
    assert len(_read(tmp_path, _NAME, "test")) == 6


def test_what_datasets_leaves_beside_rows_is_not_read(tmp_path: Path) -> None:
    """In the folder of a split."""
    folder = tmp_path / "org" / "Set" / "easy" / "validation"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(_ROWS).to_parquet(str(folder / "rows.parquet"))
    (folder / "dataset_info.json").write_text("{}")
    assert _read(tmp_path, _NAME, "validation").to_list() == _ROWS


def test_truth_may_be_asked_for_as_texts(tmp_path: Path) -> None:
    """By the columns that are to be numbers, as Python takes it for such, and by the card."""
    file = tmp_path / "org" / "Set" / "parts" / "easy-1.csv"
    file.parent.mkdir(parents=True)
    file.write_text("text,label\ntrue,1\nfalse,0\n")
    (tmp_path / "org" / "Set" / "README.md").write_text(_CARD.replace(".jsonl", ".csv"))
    assert _read(tmp_path, DatasetName("org/Set", "easy"), "test")["text"][:] == ["true", "false"]
    (tmp_path / "org" / "Set" / "test.csv").write_text("x,y\ntrue,true\n")
    root = DataRoot(tmp_path)
    found = root.find(DatasetName("org/Set"), "test")
    assert found is not None
    assert root.read(found, frozenset(), frozenset("x")).to_list() == [{"x": True, "y": "true"}]
