"""GLUE as its authors give it out: `glue/RTE/dev.tsv` and the like, in eight slightly different tables.

Read as the hub's own nyu-mll/glue was made of them: cells are what stands between the tabs, quotes are letters like
others, labels are numbers of classes, -1 where the file has none, and `idx` counts the rows from 0.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.data.files import BadRow, shorten
from qlora_cli.data.opening import open_bytes, uncounted
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

_NAMES = ("nyu-mll/glue", "glue")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = (("sentence1", "sentence1"), ("sentence2", "sentence2"))
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
_MNLI_SPLITS = {
    "train": "train",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
}


@dataclass(frozen=True)
class _Table:
    """The files of one task.

    Attributes:
        folder: their folder, in GLUE's own spelling.
        texts: (name on the hub, column in the file).
        label: its column.
        classes: the names of the labels, in order; none for a score.
        columns: all columns, where a file may lack the header: CoLA's do, and so do parts cut out of others.
    """

    folder: str
    texts: tuple[tuple[str, str], ...]
    label: str
    classes: tuple[str, ...]
    columns: tuple[str, ...] = ()


_SENTENCE = (("sentence", "sentence"),)
_TABLES = {
    "cola": _Table("CoLA", _SENTENCE, "label", ("unacceptable", "acceptable"), ("source", "label", "mark", "sentence")),
    "sst2": _Table("SST-2", _SENTENCE, "label", ("negative", "positive"), ("sentence", "label")),
    "mrpc": _Table(
        "MRPC",
        (("sentence1", "#1 String"), ("sentence2", "#2 String")),
        "Quality",
        ("not_equivalent", "equivalent"),
        ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    ),
    "qqp": _Table(
        "QQP",
        (("question1", "question1"), ("question2", "question2")),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    ),
    "stsb": _Table("STS-B", _PAIR, "score", ()),
    "mnli": _Table(
        "MNLI",
        (("premise", "sentence1"), ("hypothesis", "sentence2")),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": _Table(
        "QNLI",
        (("question", "question"), ("sentence", "sentence")),
        "label",
        _ENTAILMENT,
        ("index", "question", "sentence", "label"),
    ),
    "rte": _Table("RTE", _PAIR, "label", _ENTAILMENT, ("index", "sentence1", "sentence2", "label")),
    "wnli": _Table(
        "WNLI", _PAIR, "label", ("not_entailment", "entailment"), ("index", "sentence1", "sentence2", "label")
    ),
}


def find(root: Path, dataset: DatasetName, split: str) -> Found | None:
    """The file of a task and split; None if it is not there or this is another dataset."""
    below = place(dataset, split)
    file = packed_or_not(root, below) if below else None
    if file is None:
        return None
    config = (dataset.config or "").lower()

    def read(_: Needed, __: Numbers) -> Any:
        return _read(file, config, has_label=not split.startswith("test"))

    return Found((file,), read)


def place(dataset: DatasetName, split: str) -> str | None:
    """Where the file would be, below the root; None if this is another dataset."""
    config = (dataset.config or "").lower()
    if dataset.path not in _NAMES or config not in _TABLES:
        return None
    stem = (_MNLI_SPLITS if config == "mnli" else _SPLITS).get(split)
    return f"glue/{_TABLES[config].folder}/{stem}.tsv" if stem else None


def _read(file: Path, config: str, *, has_label: bool) -> Any:
    """A datasets.Dataset with the columns and types of nyu-mll/glue."""
    import datasets

    shown, table = shown_path(file), _TABLES[config]
    expected = {column for _, column in table.texts} | ({table.label} if has_label else set())
    with telling_of_data(), open_bytes(file, shown, uncounted) as stream:
        rows = list(sound_rows(_rows(stream, shown, table, expected), shown))
    # The hub's QQP is without the few rows that are cut off, and counts them all the same.
    numbered = [(idx, line, row) for idx, (line, row) in enumerate(rows) if expected <= row.keys()]
    if config != "qqp":
        refuse_problems(
            f"{shown}, line {line}: expected the columns {', '.join(sorted(expected))}, got only {len(row)} cells."
            for line, row in rows
            if not expected <= row.keys()
        )
    if not numbered:
        raise TaskError(f"{shown}: there is no row in it. Expected the columns {', '.join(sorted(expected))}.")
    labels = [_label(row[table.label], table.classes) if has_label else -1 for _, _, row in numbered]
    refuse_problems(
        f"{shown}, line {line}: {table.label}: expected {_labels(table.classes)}, got {shorten(row[table.label])}."
        for (_, line, row), label in zip(numbered, labels, strict=True)
        if label is None
    )
    kind = datasets.ClassLabel(names=list(table.classes)) if table.classes else datasets.Value("float32")
    features = {name: datasets.Value("string") for name, _ in table.texts}
    columns: dict[str, Any] = {name: [row[column] for _, _, row in numbered] for name, column in table.texts}
    return datasets.Dataset.from_dict(
        columns | {"label": labels, "idx": [idx for idx, _, _ in numbered]},
        features=datasets.Features(features | {"label": kind, "idx": datasets.Value("int32")}),
    )


def _rows(stream: io.BufferedReader, shown: str, table: _Table, expected: set[str]) -> Iterator[tuple[int, Any]]:
    """Yield (line, row), or a BadRow; a row has the cells that are there, by column."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=None)
    header: list[str] = []
    for number, line in enumerate(text, 1):
        cells = line.rstrip("\n").split("\t")
        if cells == [""]:
            continue
        foreign = not line.isascii() and any("\udc80" <= letter <= "\udcff" for letter in line)
        if foreign:
            yield number, BadRow(f"{shown}, line {number}: expected UTF-8, got other bytes. Save the file as UTF-8.")
            if not header:  # nor is there one
                return
            continue
        if not header:
            header = _header(cells, table, expected, shown)
            if header == cells:
                continue
        yield number, dict(zip(header, cells, strict=False))


def _header(cells: list[str], table: _Table, expected: set[str], shown: str) -> list[str]:
    """The names of the columns, from the first line, or, where that is a row already, those that the task has."""
    if expected <= set(cells):
        return cells
    if len(cells) == len(table.columns) and not expected & set(cells):
        return list(table.columns)
    raise TaskError(
        f"{shown}, line 1: expected a header with the columns {', '.join(sorted(expected))}, "
        f"got {', '.join(map(shorten, cells[:8]))}."
    )


def _label(cell: str, classes: tuple[str, ...]) -> int | float | None:
    if not classes:
        try:
            score = float(cell)
        except ValueError:
            return None
        return score if 0 <= score <= 5 else None
    if cell in classes:
        return classes.index(cell)
    return int(cell) if cell.isascii() and cell.isdigit() and int(cell) < len(classes) else None


def _labels(classes: tuple[str, ...]) -> str:
    if not classes:
        return "a number from 0 to 5"
    return f"{', '.join(classes)} or a number from 0 to {len(classes) - 1}"
