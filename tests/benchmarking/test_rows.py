"""The rows of real results of lm-eval's: groups within groups, which way is better, and groups without a score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import AggMetricConfig

from qlora_cli.benchmarking.events import ScoreRow
from qlora_cli.benchmarking.rows import score_rows
from qlora_cli.evaluation.harness import TaskScores, score_tasks
from qlora_cli.evaluation.scoring import AnsweringModel
from qlora_cli.evaluation.tasks.loaded import LoadedTasks
from qlora_cli.score_table import legend, shown_scores, verdict
from tests.support.models import tiny_model
from tests.support.small_tasks import choice_task
from tests.support.tokenizers import tiny_tokenizer


def group(name: str, *members: Task | Group, metrics: tuple[str, ...] = ("acc",)) -> Group:
    made = Group(name, aggregate_metric_list=[AggMetricConfig(metric=metric) for metric in metrics])
    for member in members:
        made.add(member)
    return made


def loaded(*items: Task | Group) -> LoadedTasks:
    """As `build_tasks` has them: each group before those within it."""
    groups: dict[str, Group] = {}
    tasks: dict[str, Task] = {}
    for item in items:
        if isinstance(item, Group):
            groups |= {each.name: each for each in (item, *item.get_all_groups())}
            tasks |= {task.task_name: task for task in item.get_all_tasks()}
        else:
            tasks[item.task_name] = item
    return LoadedTasks(tasks, groups)


def rows(asked: LoadedTasks) -> tuple[ScoreRow, ...]:
    """Of a target whose `acc` is 1 for each document, and of a base whose `acc` is 0."""
    words = tiny_tokenizer()
    lm = AnsweringModel(tiny_model("llama", vocab_size=len(words)), words, report=lambda _: None)
    scores = score_tasks(lm, asked, bootstrap_iters=0)

    def all_of(acc: float) -> TaskScores:
        samples = {
            task: [{**row, "acc": acc} if "acc" in row else row for row in of] for task, of in scores.samples.items()
        }
        return replace(scores, samples=samples)

    return score_rows(asked, all_of(1.0), all_of(0.0))


def direction(better: bool | None, **more: Any) -> dict[str, Any]:
    return {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": better, **more}]}


def test_a_group_of_groups_is_better_or_worse() -> None:
    """lm-eval tells no direction of the outermost group, whose verdict it is."""
    found = rows(loaded(group("all", group("one", choice_task("a")), group("two", choice_task("b")))))
    assert {row.task: row.higher_is_better for row in found if row.metric == "acc"} == {
        "all": True, "one": True, "a": True, "two": True, "b": True,
    }  # fmt: skip
    assert found[0].num_fewshot == 0
    assert verdict(found) == "better than the base on all (acc)"


def test_lower_may_be_better_of_a_group_of_groups() -> None:
    """Then the target has lost what it has more of, and that lower is better is said."""
    found = rows(loaded(group("all", group("one", choice_task("a", **direction(False))))))
    for row in found:
        assert row.higher_is_better is False
        assert row.comparison is not None
        assert (row.comparison.wins, row.comparison.losses) == (0, 6)
    assert verdict(found) == "worse than the base on all (acc)"
    assert next(legend(found)) == "lower is better: acc"


def test_tasks_that_do_not_agree_leave_no_direction() -> None:
    """Of such a group nothing is better or worse, won or lost."""
    inner = group("one", choice_task("a", **direction(False))), group("two", choice_task("b", **direction(True)))
    found = {row.task: row for row in rows(loaded(group("all", *inner)))}
    assert {name: row.higher_is_better for name, row in found.items()} == {
        "all": None, "one": False, "a": False, "two": True, "b": True,
    }  # fmt: skip
    comparison = found["all"].comparison
    assert comparison is not None
    assert (comparison.wins, comparison.losses, comparison.ties) == (None, None, None)
    assert (comparison.difference, comparison.n) == (1.0, 12)
    assert verdict([*found.values()]) == "another score than the base's on all (acc)"


@pytest.mark.parametrize("nested", [False, True])
def test_the_members_of_a_group_without_a_score_stand_on_top(nested: bool) -> None:
    """Many of lm-eval's groups are lists only: their members are named in full, and have the verdict."""
    inner = group("inner", choice_task("b"))
    outer = group("outer", choice_task("a"), group("list", inner, metrics=()) if nested else inner, metrics=())
    found = [row for row in rows(loaded(outer)) if row.metric == "acc"]
    assert [(row.task, row.depth, row.is_group) for row in found] == [
        ("a", 0, False), ("inner", 0, True), ("b", 1, False),
    ]  # fmt: skip
    assert [str(line).split()[0] for line in shown_scores(found, None)] == ["task", "a", "inner", "b"]
    assert verdict(found) == "better than the base on a (acc), inner (acc)"
