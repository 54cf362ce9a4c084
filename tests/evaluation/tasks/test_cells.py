"""Cells of CSV that a task can be asked about as numbers only, or as texts only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import load_index
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from tests.support.benchmarks import keep_index, write_csv

_WRITING = {
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
_CHOOSING = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _built(folder: Path, cells: Sequence[Sequence[str]], num_fewshot: int | None = None, **config: Any) -> Any:
    """A task over these cells, which are both its questions and its examples."""
    keep_index()
    (folder / "tasks").mkdir(exist_ok=True)
    usual = {"task": "mine", "dataset_path": "org/set", "training_split": "train", "test_split": "test"}
    (folder / "tasks" / "mine.yaml").write_text(yaml.safe_dump(usual | config))
    for split in ("train", "test"):
        write_csv(folder / "data" / "org" / "set" / f"{split}.csv", cells)
    options = TaskOptions(data_root=folder / "data", num_fewshot=num_fewshot)
    return build_tasks(["mine"], load_index([folder / "tasks"]), options).tasks["mine"]


def _problems(folder: Path, cells: Sequence[Sequence[str]], **config: Any) -> list[str]:
    with pytest.raises(TaskError) as caught:
        _built(folder, cells, **config)
    told = str(caught.value).replace(f"{folder}/data/org/set/", "")
    return [line.partition("): ")[2] for line in told.splitlines()]


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_questions_of_numbers_are_asked(tmp_path: Path, kind: str) -> None:
    """As texts: lm-eval asks nothing else."""
    cells = [["question", "answer"], ["17", "a"], ["23", "b"]]
    task = _built(tmp_path, cells, **_WRITING | {"output_type": kind, "metric_list": [{"metric": "perplexity"}]})
    assert [task.fewshot_context(doc, 0) for doc in task.eval_docs] == ["17", "23"]


def test_answers_of_numbers_are_texts_in_examples(tmp_path: Path) -> None:
    """And where a likelihood is asked for; otherwise they stay numbers, which lm-eval compares as it likes."""
    cells = [["question", "answer"], ["why?", "17"], ["how?", "23"]]
    task = _built(tmp_path, cells, num_fewshot=1, **_WRITING)
    assert task.fewshot_context(task.eval_docs[0], 1).partition("\n\n")[0] in ("why? 17", "how? 23")
    likely = _WRITING | {"output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}]}
    task = _built(tmp_path, cells, **likely)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == ["17", "23"]
    assert _built(tmp_path, cells, **_WRITING).eval_docs["answer"][:] == [17, 23]


@pytest.mark.parametrize("target", ["{{answer-1}}", "answer", "the answer"])
def test_the_answer_is_a_number_among_texts(tmp_path: Path, target: str) -> None:
    """Whatever its template makes of it: the choices are numbers, which have to be texts."""
    column = "the answer" if " " in target else "answer"
    first = 1 if "-" in target else 0
    cells = [["question", "one", "two", column], *(["q?", "7", str(n), str(first + n % 2)] for n in range(4))]
    config = _CHOOSING | {"doc_to_target": target, "doc_to_choice": "{{[one, two]}}"}
    task = _built(tmp_path, cells, **config)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [0, 1, 0, 1]
    assert task.doc_to_choice(task.eval_docs[2]) == ["7", "2"]


@pytest.mark.parametrize(
    ("choices", "answers"),
    [
        (["true", "false"], ["true", "false"]),
        (["false", "true"], [True, False]),
        (["no", "yes"], [True, False]),
    ],
)
def test_truth_among_the_choices(tmp_path: Path, choices: list[str], answers: list[Any]) -> None:
    """As a number it stands for the second of two: where its word is the first, it is that word."""
    cells = [["question", "answer"], ["q?", "true"], ["r?", "false"]]
    task = _built(tmp_path, cells, **_CHOOSING, doc_to_choice=choices)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == answers


def test_truth_among_the_choices_that_is_no_text_either(tmp_path: Path) -> None:
    """lm-eval would take each for the other."""
    cells = [["question", "answer"], ["q?", "[true]"], ["r?", "[false]"]]
    config = _CHOOSING | {"doc_to_choice": ["True", "False"]}
    one, two = _problems(tmp_path, cells, **config)
    assert one == (
        "question 1 of test.csv: expected the number of one of 2 choices as the answer, from 0, got the boolean true."
    )
    assert two.endswith("got the boolean false.")


def _card(**types: str) -> str:
    features = [{"name": name, "dtype": dtype} for name, dtype in types.items()]
    return f"---\n{yaml.safe_dump({'dataset_info': {'features': features}})}---\n"


def test_a_card_is_not_overruled(tmp_path: Path) -> None:
    """Where it says that cells are numbers, they are no texts, and no card is advised; one of other columns is none."""
    cells = [["question", "answer"], ["17", "a"], ["23", "b"]]
    card = tmp_path / "data" / "org" / "set" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text(_card(question="int64", answer="string"))
    assert _problems(tmp_path, cells, **_WRITING) == [
        "question 1 of test.csv: expected a text to ask, got the number 17.",
        "question 2 of test.csv: expected a text to ask, got the number 23.",
    ]
    same = [["question", "answer"], ["17", "a"], ["17", "b"]]
    assert _problems(tmp_path, same, **_WRITING) == [
        "every question of test.csv: expected a text to ask, got the number 17."
    ]
    card.write_text(_card(other="int64"))
    assert _built(tmp_path, cells, **_WRITING)


_SHUFFLING = """
import random
def shuffled(docs):
    order = list(range(len(docs)))
    random.shuffle(order)
    return docs.select(order)
"""


def test_what_a_task_draws_does_not_hang_on_its_cells(tmp_path: Path) -> None:
    """A second try draws what the first would have."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text(_SHUFFLING)
    orders = []
    for numbers in (range(50, 70), [f"no. {n}" for n in range(50, 70)]):  # the first are read twice, the second once
        cells = [["question", "answer"], *([str(number), "a"] for number in numbers)]
        _built(tmp_path, cells, **_WRITING)
        config = tmp_path / "tasks" / "mine.yaml"
        config.write_text(config.read_text() + "process_docs: !function utils.shuffled\n")
        options = TaskOptions(data_root=tmp_path / "data")
        task = build_tasks(["mine"], load_index([tmp_path / "tasks"]), options).tasks["mine"]
        orders.append([text[-2:] for text in task.eval_docs["question"]])
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_an_end_may_be_a_number(tmp_path: Path) -> None:
    """Where the choices are beginnings: lm-eval writes it behind each of them."""
    cells = [["question", "answer", "end"], ["q?", "0", "cat"], ["r?", "1", "13"]]
    config = _CHOOSING | {"doc_to_text": "answer", "doc_to_choice": ["one", "two"], "doc_to_target": "{{end}}"}
    task = _built(tmp_path, cells, **config)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == ["cat", 13]
