"""MMLU's own CSV files as the hub's cais/mmlu."""

from __future__ import annotations

import gzip
from pathlib import Path

import datasets
import pytest

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.data_root import DataRoot
from qlora_cli.evaluation.tasks.layouts.found import DatasetName
from tests.support.benchmarks import mmlu_row, write_csv

_ANATOMY = DatasetName("cais/mmlu", "anatomy")


def _read(folder: Path, name: DatasetName, split: str) -> datasets.Dataset:
    root = DataRoot(folder)
    found = root.find(name, split)
    assert found is not None
    return root.read(found, frozenset())


def test_columns_and_types_are_those_of_the_hub(tmp_path: Path) -> None:
    """Question, subject, four choices and the answer as the number of a class; commas, quotes and line ends stay."""
    cells = ['A "quoted", long\nquestion?', " 1", "007", "NA", "", "B"]
    write_csv(tmp_path / "mmlu" / "test" / "anatomy_test.csv", [cells])
    dataset = _read(tmp_path, _ANATOMY, "test")
    assert dataset[0] == {"question": cells[0], "subject": "anatomy", "choices": cells[1:5], "answer": 1}
    assert dataset.features["answer"] == datasets.ClassLabel(names=["A", "B", "C", "D"])
    assert dataset.column_names == ["question", "subject", "choices", "answer"]


def test_splits_have_their_folders(tmp_path: Path) -> None:
    """`dev`, `validation` and `test` are dev, val and test; the case of names does not matter."""
    for number, folder in enumerate(("dev", "val", "test")):
        write_csv(tmp_path / "MMLU" / folder / f"Anatomy_{folder}.csv", [mmlu_row(number)])
    for number, split in enumerate(("dev", "validation", "test")):
        assert _read(tmp_path, _ANATOMY, split)[0]["question"] == mmlu_row(number)[0]
    assert DataRoot(tmp_path).splits(_ANATOMY) == ["validation", "test", "dev"]
    assert DataRoot(tmp_path).find(_ANATOMY, "train") is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "anatomy_test.csv: there is no row in it. Expected rows of question, A, B, C, D, answer."),
        ("q,a,b,c,A\n", "anatomy_test.csv, line 1: expected 6 cells (question, A, B, C, D, answer), got 5."),
        (
            "q,a,b,c,d,A\nq,a,b,c,d,E\n",
            "anatomy_test.csv, row 2: expected the answer to be A, B, C or D, got 'E'. "
            "The columns are question, A, B, C, D, answer, and there is no header.",
        ),
        ('q,a,b,c,d,A\n"q,a,b,c,d,A\n', "anatomy_test.csv, line 2: unexpected end of data"),
        (b"q,a,b,c,d,A\nq,\xff,b,c,d,A\n", "anatomy_test.csv, line 2: expected UTF-8, got the byte 0xff"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
            "anatomy_test.csv: expected text, got a Git LFS pointer in place of the file. Fetch the file with git lfs",
        ),
    ],
)
def test_broken_files_are_told_with_their_row(tmp_path: Path, content: str | bytes, problem: str) -> None:
    """File and row, and what was expected."""
    file = tmp_path / "mmlu" / "test" / "anatomy_test.csv"
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaskError) as caught:
        _read(tmp_path, _ANATOMY, "test")
    assert problem in str(caught.value)


def test_packed_files(tmp_path: Path) -> None:
    """As gzip leaves them."""
    file = tmp_path / "mmlu" / "test" / "anatomy_test.csv.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(b"q,a,b,c,d,A\n"))
    assert _read(tmp_path, _ANATOMY, "test")["question"][:] == ["q"]


def test_other_datasets_are_not_looked_for_there(tmp_path: Path) -> None:
    """A dataset of another name with a configuration `anatomy` is none of MMLU's."""
    write_csv(tmp_path / "mmlu" / "test" / "anatomy_test.csv", [mmlu_row(1)])
    assert DataRoot(tmp_path).find(DatasetName("other/set", "anatomy"), "test") is None
