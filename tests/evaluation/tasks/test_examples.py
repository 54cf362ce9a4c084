"""Rows that examples are drawn from: those that may come to be some are looked at, by lm-eval's own rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import load_index
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from tests.support.benchmarks import keep_index, write_jsonl

_TASK = {
    "task": "mine",
    "dataset_path": "org/set",
    "output_type": "generate_until",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
_CHOOSING = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["no", "yes"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_ROW = {"question": "q", "answer": "a"}
_NO_ANSWER = "expected a value in the column 'answer', got none."


def _built(folder: Path, splits: dict[str, list[dict[str, Any]]], **changed: Any) -> Any:
    """A task with two examples, over these rows."""
    keep_index()
    (folder / "tasks").mkdir()
    (folder / "tasks" / "mine.yaml").write_text(yaml.safe_dump(_TASK | changed))
    for split, rows in splits.items():
        write_jsonl(folder / "data" / "org" / "set" / f"{split}.jsonl", rows)
    options = TaskOptions(data_root=folder / "data", num_fewshot=2)
    return build_tasks(["mine"], load_index([folder / "tasks"]), options).tasks["mine"]


def _problems(folder: Path, splits: dict[str, list[dict[str, Any]]], **changed: Any) -> list[str]:
    with pytest.raises(TaskError) as caught:
        _built(folder, splits, **changed)
    told = str(caught.value).replace(f"{folder}/data/org/set/", "")
    return [line.partition("): ")[2] for line in told.splitlines()]


@pytest.mark.parametrize(("drawn_from", "number"), [("train", 3), ("test", 4)])
def test_rows_that_are_never_drawn(tmp_path: Path, drawn_from: str, number: int) -> None:
    """Where the first ones are the examples, always, and one more where the question itself may be among them."""
    config = {"fewshot_config": {"sampler": "first_n", "split": drawn_from, "doc_to_target": "{{answer}}{{note}}"}}
    splits = {"train": [_ROW | {"note": "n"}] * 6, "test": [_ROW | {"note": "n"}] * 6}
    splits[drawn_from][number - 1] = _ROW | {"note": None}
    assert _built(tmp_path, splits, **config)


@pytest.mark.parametrize(("drawn_from", "number"), [("train", 2), ("test", 3)])
def test_the_first_rows_are_drawn(tmp_path: Path, drawn_from: str, number: int) -> None:
    """The last of those that may be."""
    config = {"fewshot_config": {"sampler": "first_n", "split": drawn_from, "doc_to_target": "{{answer}}{{note}}"}}
    splits = {split: [_ROW | {"note": "n"}] * 6 for split in ("train", "test")}
    splits[drawn_from][number - 1] = _ROW | {"note": None}
    assert _problems(tmp_path, splits, **config) == [
        f"example {number} of {drawn_from}.jsonl: expected a value in the column 'note', got none."
    ]


def test_an_empty_template_of_examples_is_one(tmp_path: Path) -> None:
    """Examples without a question: what the task asks is not in them."""
    rows = [_ROW, {"question": None, "answer": "a"}, _ROW]
    config = {"fewshot_config": {"doc_to_text": ""}}
    assert _built(tmp_path, {"train": rows, "test": [_ROW]}, **config)


@pytest.mark.parametrize(
    ("answer", "got"), [(42, "the number 42"), (["a"], None), ([42], "the number 42"), ([], None), ("", None)]
)
def test_answers_of_examples_are_texts(tmp_path: Path, answer: Any, got: str | None) -> None:
    """lm-eval takes the first of several; of anything else it ends the evaluation when it is drawn."""
    splits = {"train": [{"question": "q", "answer": answer}] * 3, "test": [_ROW]}
    if got is None:
        assert _built(tmp_path, splits, doc_to_target="answer")
    else:
        assert _problems(tmp_path, splits, doc_to_target="answer") == [
            f"example {number} of train.jsonl: expected a text as the answer of an example, got {got}."
            for number in (1, 2, 3)
        ]


def test_questions_of_examples_are_texts(tmp_path: Path) -> None:
    """Where examples are asked in another way than the question itself."""
    splits = {"train": [{"question": 7, "answer": "a"}] * 3, "test": [_ROW]}
    assert _problems(tmp_path, splits, fewshot_config={"doc_to_text": "question"})[0] == (
        "example 1 of train.jsonl: expected a text to ask, got the number 7."
    )


def test_numbers_of_choices_are_answers_where_there_are_choices(tmp_path: Path) -> None:
    """Examples have those of the task unless it says that they have none."""
    splits = {split: [{"question": "q", "answer": 1}] * 3 for split in ("train", "test")}
    assert _built(tmp_path, splits, doc_to_target="answer", **_CHOOSING)
    (tmp_path / "other").mkdir()
    config = {"doc_to_target": "{{answer}}", "fewshot_config": {"doc_to_choice": None}}
    assert _problems(tmp_path / "other", splits, **_CHOOSING, **config)[0] == (
        "example 1 of train.jsonl: expected a text as the answer of an example, got the number 1."
    )


def test_texts_that_look_like_numbers_are_texts(tmp_path: Path) -> None:
    """Only with choices does a template give a number."""
    assert _built(tmp_path, {"train": [{"question": "q", "answer": 42}] * 3, "test": [_ROW]})


def test_examples_of_the_validation_split(tmp_path: Path) -> None:
    """Where there is no training split; the file that is told is its."""
    splits = {"validation": [{"question": "q", "answer": None}, _ROW, _ROW], "test": [_ROW]}
    config = {"training_split": None, "validation_split": "validation"}
    assert _problems(tmp_path, splits, **config) == [f"example 1 of validation.jsonl: {_NO_ANSWER}"]


def test_examples_that_the_task_itself_has(tmp_path: Path) -> None:
    """No file of rows is to blame for them, and none but that of the questions has to be there."""
    samples = [_ROW, {"question": "q", "answer": None}]
    config = {"fewshot_config": {"samples": samples}}
    assert _problems(tmp_path, {"test": [_ROW]}, **config) == [f"example 2: {_NO_ANSWER}"]
