"""Tasks of a few documents made up here, in lm-eval's own classes; no index, no hub, no files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.config.group import AggMetricConfig

_LINE = "the of and to in is that it for was on are with as they at be this have from or one had by"
_WORDS = _LINE.split(" ")

_MEAN = {"aggregation": "mean", "higher_is_better": True}


@dataclass
class SmallTasks:
    """Tasks and groups by name, as whoever builds tasks hands them over."""

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)


def phrase(number: int, length: int = 5) -> str:
    """Words that the tiny tokenizer knows; different numbers give different ones."""
    return " ".join(_WORDS[(number * 7 + 5 * k + number // 23) % len(_WORDS)] for k in range(length))


def small_tasks(*tasks: Task, group: str | None = None) -> SmallTasks:
    """These tasks, in a group of this name if one is given, which takes the mean of `acc`."""
    found = SmallTasks({task.task_name: task for task in tasks})
    if group:
        made = Group(group, aggregate_metric_list=[AggMetricConfig(metric="acc")])
        for task in tasks:
            made.add(task)
        found.groups[group] = made
    return found


def choice_task(name: str = "choices", documents: int = 6, **config: Any) -> Task:
    """Questions with three answers each; examples are drawn from ten others."""
    return _task(
        name,
        {"test": [_choice(n) for n in range(documents)], "train": [_choice(100 + n) for n in range(10)]},
        **{
            "output_type": "multiple_choice",
            "training_split": "train",
            "fewshot_split": "train",
            "doc_to_text": "{{question}}\nThe answer is",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [_MEAN | {"metric": "acc"}, _MEAN | {"metric": "acc_norm"}],
            **config,
        },
    )


def writing_task(name: str = "writing", documents: int = 4, **generation: Any) -> Task:
    """Questions that are answered in writing."""
    rows = [{"question": phrase(n, 6 + n), "answer": phrase(n, 2)} for n in range(documents)]
    return _task(
        name,
        {"test": rows},
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [" the"], "max_gen_toks": 12, "do_sample": False, **generation},
        metric_list=[_MEAN | {"metric": "exact_match"}],
    )


def text_task(name: str = "texts", documents: int = 3, length: int = 40) -> Task:
    """Texts whose perplexity is asked for."""
    return _task(
        name,
        {"test": [{"text": phrase(n, length + n)} for n in range(documents)]},
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )


def request(kind: str, *arguments: Any, task: str = "task", document: int = 0) -> Instance:
    """A question as lm-eval asks it."""
    return Instance(kind, {}, arguments, 0, (task, document, 1))


def _choice(number: int) -> dict[str, Any]:
    choices = [phrase(number * 3 + k, 1 + (number + k) % 3) for k in range(3)]
    return {"question": phrase(number, 8), "choices": choices, "label": number % 3}


def _task(name: str, rows: dict[str, list[dict[str, Any]]], **config: Any) -> Task:
    splits = {split: Dataset.from_list(documents) for split, documents in rows.items()}
    custom: Callable[..., Any] = lambda **_: splits  # noqa: E731
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": custom,
            "test_split": "test",
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
            **config,
        }
    )
