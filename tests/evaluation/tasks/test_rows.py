"""Rows that a task cannot be asked about are told before anything is computed, and not scored as wrong answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import Listed, load_index
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from qlora_cli.evaluation.tasks.readiness import why_not_set_up
from qlora_cli.evaluation.tasks.supply import Supply
from tests.support.benchmarks import arc_row, keep_index, piqa_row, write_csv, write_jsonl

Row = dict[str, Any]

_NUMBER = "expected the number of one of 2 choices as the answer, from 0"


def _built(names: list[str], index: Mapping[str, Listed], root: Path, **options: Any) -> dict[str, Any]:
    return dict(build_tasks(names, index, TaskOptions(data_root=root, **options)).tasks)


def _problems(names: list[str], index: Mapping[str, Listed], root: Path, **options: Any) -> list[str]:
    """What is told, without the task and its file."""
    with pytest.raises(TaskError) as caught:
        _built(names, index, root, **options)
    return [line.partition("): ")[2] for line in str(caught.value).splitlines()]


def _piqa(root: Path, rows: list[Row]) -> Path:
    file = root / "baber" / "piqa" / "default" / "validation.jsonl"
    write_jsonl(file, rows)
    return file


def _mine(folder: Path, rows: list[Row], train: list[Row] | None = None, **config: Any) -> dict[str, Listed]:
    """A task of a person's own over rows below `folder / data`."""
    keep_index()
    usual = {"task": "mine", "dataset_path": "org/set", "test_split": "test", "metadata": {"version": 1}}
    (folder / "tasks").mkdir()
    (folder / "tasks" / "mine.yaml").write_text(yaml.safe_dump(usual | config))
    write_jsonl(folder / "data" / "org" / "set" / "test.jsonl", rows)
    write_jsonl(folder / "data" / "org" / "set" / "train.jsonl", train or rows)
    return load_index([folder / "tasks"])


_CHOOSING = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_WRITING = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def test_a_column_of_answers_that_is_not_there(index: dict[str, Listed], root: Path) -> None:
    """lm-eval takes its name for the answer, and every answer for a wrong one."""
    file = _piqa(root, [{key: value for key, value in piqa_row(n).items() if key != "label"} for n in range(4)])
    assert _problems(["piqa"], index, root) == [
        f"doc_to_target: expected the name of a column, got 'label'. The rows of {file} have goal, sol1, sol2."
    ]
    _piqa(root, [{("Label" if key == "label" else key): value for key, value in piqa_row(n).items()} for n in range(4)])
    assert "got 'label'; did you mean Label? The rows" in _problems(["piqa"], index, root)[0]


def test_answers_that_are_texts_of_numbers(index: dict[str, Listed], root: Path) -> None:
    """No choice has these words."""
    file = _piqa(root, [piqa_row(n) | {"label": f"{n % 2} "} for n in range(7)])
    told = _problems(["piqa"], index, root)
    assert told[0] == f'question 1 of {file}: {_NUMBER}, or one of them in words, got the text "0 ".'
    assert len(told) == 5


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"label": 2}, f"{_NUMBER}, got the number 2."),
        ({"label": -1}, f"{_NUMBER}, got the number -1."),
        ({"label": None}, "expected a value in the column 'label', got none."),
        ({"sol1": None}, "expected a text as choice 1 of 2, got none."),
        ({"sol2": ""}, 'expected a text as choice 2 of 2, got the text "".'),
        ({"goal": None}, "expected a value in the column 'goal', got none."),
    ],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_row_is_told_with_its_number(
    index: dict[str, Listed], root: Path, broken: Row, problem: str, number: int
) -> None:
    """The first row, at which lm-eval looks itself, and any other."""
    rows = [piqa_row(n) for n in range(4)]
    rows[number] |= broken
    file = _piqa(root, rows)
    assert _problems(["piqa"], index, root) == [f"question {number + 1} of {file}: {problem}"]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"answerKey": "Z"}, "ValueError: 'Z' is not in list."),
        ({"choices": None}, "UndefinedError: 'None' has no attribute 'text'."),
        ({"choices": {"text": [], "label": ["A"]}, "answerKey": "A"}, "expected a list of choices, got a list of 0."),
        ({"question": None}, "expected a value in the column 'question', got none."),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_row_over_which_a_template_fails(
    index: dict[str, Listed], root: Path, broken: Row, problem: str, number: int
) -> None:
    """Before anything is asked, and not as a task that fails after an hour."""
    rows = [arc_row(n) for n in range(3)]
    rows[number] |= broken
    file = root / "allenai" / "ai2_arc" / "ARC-Easy" / "test.jsonl"
    write_jsonl(file, rows)
    assert _problems(["arc_easy"], index, root) == [f"question {number + 1} of {file}: {problem}"]


def test_what_is_wrong_with_every_row_is_told_once(tmp_path: Path) -> None:
    """It is the task then, or the whole file."""
    rows = [{"question": "q", "choices": ["a", "b"], "label": 5}] * 9
    assert _problems(["mine"], _mine(tmp_path, rows, **_CHOOSING), tmp_path / "data") == [
        f"every question of {tmp_path}/data/org/set/test.jsonl: {_NUMBER}, got the number 5."
    ]


def test_a_column_that_the_prompt_needs(tmp_path: Path) -> None:
    """The template, the name, and those that there are."""
    rows = [{"question": "q", "choices": ["a", "b"], "label": 1}] * 3
    index = _mine(tmp_path, rows, **_CHOOSING | {"doc_to_text": "{{qestion}}", "doc_to_choice": "choises"})
    of_rows = f"The rows of {tmp_path}/data/org/set/test.jsonl have question, choices, label."
    assert _problems(["mine"], index, tmp_path / "data") == [
        f"doc_to_text: expected the name of a column, got 'qestion'; did you mean question? {of_rows}"
    ]
    (tmp_path / "tasks" / "mine.yaml").write_text(
        yaml.safe_dump(
            {"task": "mine", "dataset_path": "org/set", "test_split": "test"}
            | _CHOOSING
            | {"doc_to_text": "query", "doc_to_choice": "choises"}
        )
    )
    assert _problems(["mine"], load_index([tmp_path / "tasks"]), tmp_path / "data") == [
        f"doc_to_text: expected the name of a column, got 'query'. {of_rows}",
        f"doc_to_choice: expected the name of a column, got 'choises'; did you mean choices? {of_rows}",
    ]


@pytest.mark.parametrize(
    ("label", "choices"),
    [(1, ["a", "b"]), ("b", ["a", "b"]), (True, ["no", "yes"]), ([0, 2], ["a", "b", "c"])],
)
def test_answers_that_lm_eval_understands(tmp_path: Path, label: Any, choices: list[str]) -> None:
    """Numbers, words, several numbers; true is the second of two, as in Python."""
    index = _mine(tmp_path, [{"question": "q", "choices": choices, "label": label}] * 3, **_CHOOSING)
    assert _built(["mine"], index, tmp_path / "data")


@pytest.mark.parametrize(
    ("label", "got"),
    [(True, "the boolean true"), (1.0, "the number 1.0"), (["a"], 'the text "a"'), ([9], "the number 9")],
)
def test_answers_that_lm_eval_does_not_understand(tmp_path: Path, label: Any, got: str) -> None:
    """They would be scored as wrong, or fail after all was answered."""
    index = _mine(tmp_path, [{"question": "q", "choices": ["a", "b", "c"], "label": label}] * 3, **_CHOOSING)
    (line,) = _problems(["mine"], index, tmp_path / "data")
    assert line.endswith(f"expected the number of one of 3 choices as the answer, from 0, got {got}.")


def test_a_constant_answer_is_no_column(tmp_path: Path) -> None:
    """A word that is one of the choices is meant as it stands; so is a prompt of several words."""
    config = _CHOOSING | {"doc_to_target": "yes", "doc_to_choice": ["yes", "no"], "doc_to_text": "Is it so?"}
    assert _built(["mine"], _mine(tmp_path, [{"question": "q"}] * 3, **config), tmp_path / "data")


def test_a_null_in_an_answer_to_be_written(tmp_path: Path) -> None:
    """It would be compared with the word None."""
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}]
    index = _mine(tmp_path, rows, **_WRITING)
    assert _problems(["mine"], index, tmp_path / "data") == [
        f"question 2 of {tmp_path}/data/org/set/test.jsonl: expected a value in the column 'answer', got none."
    ]


def test_a_null_that_is_left_out_is_none_too_many(tmp_path: Path) -> None:
    """As in MGSM, whose test rows have no worked answer, and in prompts with a hint that not every row has."""
    rows = [
        {"question": "q", "hint": None, "answer": None, "number": 3},
        {"question": "q", "hint": "h", "answer": "a", "number": None},
    ]
    config = _WRITING | {
        "doc_to_text": "{% if hint %}Hint: {{hint}}{% endif %}{{question}}",
        "doc_to_target": "{% if answer is not none %}{{answer}}{% else %}{{number|string}}{% endif %}",
    }
    assert _built(["mine"], _mine(tmp_path, rows, **config), tmp_path / "data")


def test_a_null_in_an_example(tmp_path: Path) -> None:
    """Only where examples are asked for, and with the file that they are drawn from."""
    rows = [{"question": "q", "answer": "a"}] * 3
    train = [*rows, {"question": None, "answer": "a"}]
    index = _mine(tmp_path, rows, train, training_split="train", **_WRITING)
    assert _built(["mine"], index, tmp_path / "data")
    assert _problems(["mine"], index, tmp_path / "data", num_fewshot=2) == [
        f"example 4 of {tmp_path}/data/org/set/train.jsonl: expected a value in the column 'question', got none."
    ]


def _winogrande(root: Path, answers: list[str]) -> None:
    rows = [
        [f"The cup was not in the box as _ was too big on day {n}.", "cup", "box", a] for n, a in enumerate(answers)
    ]
    file = root / "allenai" / "winogrande" / "winogrande_xl" / "validation.csv"
    write_csv(file, [["sentence", "option1", "option2", "answer"], *rows])


def test_cells_that_a_task_compares_as_texts(index: dict[str, Listed], tmp_path: Path) -> None:
    """Winogrande's answers are the texts 1 and 2, and so are some of ARC's: in CSV they look like numbers."""
    _winogrande(tmp_path, ["1", "2", "2"])
    choices = json.dumps({"text": ["a", "b"], "label": ["1", "2"]})
    rows = [[str(n), "Why?", choices, str(1 + n % 2)] for n in range(4)]
    arc = tmp_path / "allenai" / "ai2_arc" / "ARC-Easy" / "test.csv"
    write_csv(arc, [["id", "question", "choices", "answerKey"], *rows])
    tasks = _built(["winogrande", "arc_easy"], index, tmp_path)
    assert [tasks["winogrande"].doc_to_text(doc) for doc in tasks["winogrande"].eval_docs] == [0, 1, 1]
    assert [tasks["arc_easy"].doc_to_target(doc) for doc in tasks["arc_easy"].eval_docs] == [0, 1, 0, 1]


def test_cells_that_are_both(index: dict[str, Listed], tmp_path: Path) -> None:
    """PIQA's answers are numbers, also where its solutions look like such."""
    file = tmp_path / "baber" / "piqa" / "default" / "validation.csv"
    write_csv(file, [["goal", "sol1", "sol2", "label"], *(["How many?", "12", str(n), str(n % 2)] for n in range(4))])
    task = _built(["piqa"], index, tmp_path)["piqa"]
    assert [(task.doc_to_choice(doc), task.doc_to_target(doc)) for doc in task.eval_docs] == [
        (["12", str(n)], n % 2) for n in range(4)
    ]


def test_cells_that_will_do_as_neither(index: dict[str, Listed], tmp_path: Path) -> None:
    """What the file's kind may have to do with it is said."""
    _winogrande(tmp_path, ["3", "3"])
    first, second = _problems(["winogrande"], index, tmp_path)
    assert first == f"every question of {tmp_path}/allenai/winogrande/winogrande_xl/validation.csv: KeyError: 3."
    assert second == (
        "numbers and texts look alike in CSV and TSV, and it can be asked about the cells as neither. If that is what "
        "is wrong: JSON Lines and Parquet tell the two apart, and so does a dataset's card, README.md."
    )


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("", "expected a value in the column 'label', got none."),
        ("x", f'{_NUMBER}, or one of them in words, got the text "x".'),
    ],
)
def test_the_cell_that_is_no_number(index: dict[str, Listed], tmp_path: Path, cell: str, problem: str) -> None:
    """It makes texts of all cells, and is told alone."""
    file = tmp_path / "baber" / "piqa" / "default" / "validation.csv"
    labels = ["0", "1", "0", cell, "1"]
    write_csv(file, [["goal", "sol1", "sol2", "label"], *(["How?", "a", "b", label] for label in labels)])
    assert _problems(["piqa"], index, tmp_path) == [f"question 4 of {file}: {problem}"]


@pytest.mark.parametrize("text", ["以下は質問です", " "])
def test_a_prompt_of_one_word_may_be_a_sentence(tmp_path: Path, text: str) -> None:
    """In a script without spaces; and a blank is no name."""
    rows = [{"question": "q", "answer": "a"}] * 2
    index = _mine(tmp_path, rows, **_WRITING | {"doc_to_text": text, "doc_to_choice": ["a", "b"]})
    assert _built(["mine"], index, tmp_path / "data")["mine"].doc_to_text(rows[0]) == text


def test_a_failure_that_no_closer_look_explains() -> None:
    """Not even at what the task is."""
    broken = SimpleNamespace(config=SimpleNamespace())
    told = why_not_set_up(broken, ValueError("no luck"), Supply(None), TaskOptions())
    assert str(told) == "it cannot be set up: ValueError: no luck."
