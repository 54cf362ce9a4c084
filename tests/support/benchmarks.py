"""A folder of small benchmarks, as `--data-root` takes it: sentences made up here, in the layouts of the real ones.

No row says anything worth knowing. They differ in length and share beginnings, as the rows of real benchmarks do.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora_cli.data.cache import cache_folder
from qlora_cli.evaluation.tasks.index import load_index

# Two of mmlu_stem, one of mmlu_humanities and one of mmlu_other: 4 of the 57 subjects of `mmlu`.
SUBJECTS = ("abstract_algebra", "anatomy", "world_religions", "virology")

DEV_ROWS = 5  # of a subject of MMLU: as many as its published few-shot prompts have
TEST_ROWS = 6
TRAIN_ROWS = 12  # of every other task
EVAL_ROWS = 8

_THINGS = ("lamp", "river", "stone", "kettle", "garden", "engine", "feather", "window", "ladder", "basket", "mirror")
_PLACES = ("in the old harbour", "on a hill", "near the mill", "under the long bridge", "at school", "by night")
_DEEDS = ("shines", "turns slowly", "falls", "is mended", "grows", "makes no sound", "is carried away")


def write_data_root(path: Path, subjects: Sequence[str] = SUBJECTS) -> Path:
    """Write the folder: MMLU's `subjects`, ARC-easy, PIQA, RTE, SST-2 and CoLA, each with what its task asks for.

    MMLU: 5 rows to learn from (`dev`) and 6 to ask about (`test`) for each subject, and no `val`. The others: 12 rows
    of `train` and 8 to ask about, which is `test` for ARC-easy and `validation` (GLUE: `dev`) for the rest.
    """
    for number, subject in enumerate(subjects):
        write_mmlu_subject(path, subject, first=100 * number)
    arc = path / "allenai" / "ai2_arc" / "ARC-Easy"
    write_jsonl(arc / "train.jsonl", map(arc_row, range(TRAIN_ROWS)))
    write_jsonl(arc / "validation.jsonl", map(arc_row, range(500, 500 + EVAL_ROWS)))
    write_jsonl(arc / "test.jsonl", map(arc_row, range(1000, 1000 + EVAL_ROWS)))
    piqa = path / "baber" / "piqa" / "default"
    write_jsonl(piqa / "train.jsonl", map(piqa_row, range(TRAIN_ROWS)))
    write_jsonl(piqa / "validation.jsonl", map(piqa_row, range(1000, 1000 + EVAL_ROWS)))
    for split, first, count in (("train", 0, TRAIN_ROWS), ("dev", 1000, EVAL_ROWS)):
        numbers = range(first, first + count)
        glue = path / "glue"
        write_tsv(glue / "RTE" / f"{split}.tsv", [["index", "sentence1", "sentence2", "label"], *map(rte_row, numbers)])
        write_tsv(glue / "SST-2" / f"{split}.tsv", [["sentence", "label"], *map(sst2_row, numbers)])
        write_tsv(glue / "CoLA" / f"{split}.tsv", map(cola_row, numbers))
    return path


def keep_index() -> None:
    """Have lm-eval's index in this test's own cache folder: to make it takes seconds, and is done once for all."""
    name, content = _index_file()
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / name).write_bytes(content)


@functools.cache
def _index_file() -> tuple[str, bytes]:
    load_index()
    (kept,) = cache_folder().glob("tasks-*.json")
    return kept.name, kept.read_bytes()


def write_mmlu_subject(path: Path, subject: str, *, first: int = 0) -> None:
    """One subject in MMLU's original layout: `mmlu/dev/SUBJECT_dev.csv` and `mmlu/test/SUBJECT_test.csv`."""
    write_csv(path / "mmlu" / "dev" / f"{subject}_dev.csv", map(mmlu_row, range(first, first + DEV_ROWS)))
    write_csv(path / "mmlu" / "test" / f"{subject}_test.csv", map(mmlu_row, range(first + 50, first + 50 + TEST_ROWS)))


def sentence(number: int) -> str:
    """A sentence; different numbers give different ones, up to some thousands."""
    thing, place, deed = (words[number % len(words)] for words in (_THINGS, _PLACES, _DEEDS))
    return f"The {thing} {place} {deed}" + (f" on day {number}" if number % 2 else f", as {number % 97} people saw")


def mmlu_row(number: int) -> list[str]:
    """`question, A, B, C, D, answer`; some cells hold commas, quotes and line ends."""
    choices = [sentence(number * 7 + k) if number % 2 else _THINGS[(number + k) % len(_THINGS)] for k in range(4)]
    question = f'{sentence(number)}.\nWhich is "true", of these?' if number % 3 == 0 else f"{sentence(number)}. Why?"
    return [question, *choices, "ABCD"[number % 4]]


def arc_row(number: int) -> dict[str, Any]:
    """A row of allenai/ai2_arc: three to five choices, named by letters or by digits."""
    count = 3 + number % 3
    labels = "12345" if number % 4 == 3 else "ABCDE"
    choices = {"text": [sentence(number * 5 + k) for k in range(count)], "label": list(labels[:count])}
    question = f"{sentence(number)}. What does the {_THINGS[number % len(_THINGS)]} need?"
    return {"id": f"made_up_{number}", "question": question, "choices": choices, "answerKey": labels[number % count]}


def piqa_row(number: int) -> dict[str, Any]:
    """A row of baber/piqa: two solutions with the same beginning."""
    start = f"Take the {_THINGS[number % len(_THINGS)]} and {_DEEDS[number % len(_DEEDS)]}"
    endings = [f"{start} {_PLACES[(number + k) % len(_PLACES)]}." for k in range(2)]
    return {"goal": f"How to see that {sentence(number)}?", "sol1": endings[0], "sol2": endings[1], "label": number % 2}


def rte_row(number: int) -> list[str]:
    """`index, sentence1, sentence2, label`."""
    entailed = number % 2 == 0
    claim = sentence(number if entailed else number + 1)
    return [str(number), f"{sentence(number)}, they say.", f"{claim}.", "entailment" if entailed else "not_entailment"]


def sst2_row(number: int) -> list[str]:
    """`sentence, label`; quotes are letters like others in these files, and a blank ends the sentence."""
    return [f'"{sentence(number)}" ' if number % 3 == 0 else f"{sentence(number)} . ", str(number % 2)]


def cola_row(number: int) -> list[str]:
    """`source, label, mark, sentence`: a file without a header."""
    return ["mu24", str(number % 2), "" if number % 2 else "*", f"{sentence(number)}."]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One object a line; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: Iterable[list[str]]) -> None:
    """Comma-separated cells, quoted where they need it; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_tsv(path: Path, rows: Iterable[list[str]]) -> None:
    """Cells between tabs, as they are; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
