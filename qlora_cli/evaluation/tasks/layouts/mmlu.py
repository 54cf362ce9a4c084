"""MMLU as its authors give it out: `mmlu/{dev,val,test}/SUBJECT_{dev,val,test}.csv`, without a header.

https://github.com/hendrycks/test. The rows are those of cais/mmlu on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_cli.data.files import Row
from qlora_cli.data.opening import open_bytes, uncounted
from qlora_cli.data.separated_rows import read_separated
from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.layouts.found import (
    DatasetName,
    Found,
    Needed,
    Numbers,
    packed_or_not,
    refuse_problems,
    sound_rows,
    telling_of_data,
)
from qlora_cli.recipe.data_files import shown_path

_NAMES = ("cais/mmlu", "hails/mmlu_no_train")
_LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", *_LETTERS, "answer")
_SPLITS = {"dev": "dev", "validation": "val", "test": "test"}


def find(root: Path, dataset: DatasetName, split: str) -> Found | None:
    """The file of a subject and split; None if it is not there or this is another dataset."""
    subject = dataset.config
    if dataset.path not in _NAMES or not subject or split not in _SPLITS:
        return None
    file = packed_or_not(root, _place(subject, split))
    if file is None:
        return None

    def read(_: Needed, __: Numbers) -> Any:
        return _read(file, subject)

    return Found((file,), read)


def place(dataset: DatasetName, split: str) -> str | None:
    """Where the file would be, below the root; None if this is another dataset."""
    if dataset.path not in _NAMES or not dataset.config or split not in _SPLITS:
        return None
    return _place(dataset.config, split)


def _place(subject: str, split: str) -> str:
    folder = _SPLITS[split]
    return f"mmlu/{folder}/{subject}_{folder}.csv"


def _read(file: Path, subject: str) -> Any:
    """A datasets.Dataset with the columns and types of cais/mmlu."""
    import datasets

    shown = shown_path(file)
    with telling_of_data(), open_bytes(file, shown, uncounted) as stream:
        rows = list(sound_rows(read_separated(stream, shown, ",", _COLUMNS), shown))
    if not rows:
        raise TaskError(f"{shown}: there is no row in it. Expected rows of question, A, B, C, D, answer.")
    refuse_problems(
        f"{shown}, row {number}: expected the answer to be A, B, C or D, got {row['answer']!r}. "
        f"The columns are question, A, B, C, D, answer, and there is no header."
        for number, row in rows
        if _answer(row) not in _LETTERS
    )
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "subject": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=list(_LETTERS)),
        }
    )
    columns = {
        "question": [row["question"] for _, row in rows],
        "subject": [subject] * len(rows),
        "choices": [[row[letter] for letter in _LETTERS] for _, row in rows],
        "answer": [_LETTERS.index(_answer(row)) for _, row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _answer(row: Row) -> str:
    answer: str = row["answer"]
    return answer.strip()
