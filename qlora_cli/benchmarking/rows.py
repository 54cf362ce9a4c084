"""The tables of an evaluation: a row for each metric of each task and group, and for each dataset, with the base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean

from qlora_cli.benchmarking.events import LossRow, ScoreRow
from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.statistics import (
    Comparison,
    align,
    compare,
    compare_aggregated,
    compare_group,
    stratum,
)

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from qlora_cli.benchmarking.dataset_loss import DatasetRows, DatasetScore
    from qlora_cli.evaluation.harness import TaskScores
    from qlora_cli.evaluation.tasks.loaded import LoadedTasks


def score_rows(loaded: LoadedTasks, target: TaskScores, base: TaskScores | None) -> tuple[ScoreRow, ...]:
    """A row for each metric, groups before their members, as lm-eval aggregates them.

    Args:
        loaded: the tasks that were scored.
        target: what came of them.
        base: the same of the base; None without a baseline.
    """
    return tuple(_Table(loaded, target, base).rows())


def loss_row(rows: DatasetRows, ours: DatasetScore, theirs: DatasetScore | None) -> LossRow:
    """The loss on a dataset's rows, with the base's beside it if there is one."""
    return LossRow(
        dataset=rows.source,
        rows=ours.rows,
        tokens=ours.tokens,
        loss=ours.loss,
        error=ours.standard_error,
        perplexity=ours.perplexity,
        bits_per_byte=ours.bits_per_byte,
        base=None if theirs is None else theirs.loss,
        base_error=None if theirs is None else theirs.standard_error,
        base_perplexity=None if theirs is None else theirs.perplexity,
        base_bits_per_byte=None if theirs is None else theirs.bits_per_byte,
        comparison=None if theirs is None else ours.against(theirs),
    )


@dataclass(frozen=True)
class _Table:
    loaded: LoadedTasks
    target: TaskScores
    base: TaskScores | None

    def rows(self) -> Iterator[ScoreRow]:
        children = {name for names in self._members().values() for name in names}
        for name in (*self.loaded.groups, *self.loaded.tasks):
            if name not in children:
                yield from self._within(name, 0)

    def _members(self) -> Mapping[str, Sequence[str]]:
        members: Mapping[str, Sequence[str]] = self.target.results["group_subtasks"]
        return members

    def _within(self, name: str, depth: int) -> Iterator[ScoreRow]:
        """The rows of a task or a group, and of all that is in it: of a group without a score, as if it were not."""
        metrics = metrics_of(self.target.results["results"].get(name, {}))
        for metric, filter_name in metrics:
            yield self._row(name, depth, metric, filter_name, self._compared(name, metric, filter_name))
        for child in self._members().get(name, ()):
            yield from self._within(child, depth + 1 if metrics else depth)

    def _row(self, name: str, depth: int, metric: str, filter_name: str, comparison: Comparison | None) -> ScoreRow:
        results = self.target.results
        found = results["results"][name]
        of_base: Mapping[str, Any] = {} if self.base is None else self.base.results["results"][name]
        key, error = f"{metric},{filter_name}", f"{metric}_stderr,{filter_name}"
        return ScoreRow(
            task=name,
            label=str(found.get("alias") or name).strip(" -"),
            depth=depth,
            is_group=name in self.loaded.groups,
            documents=self._documents(name),
            metric=metric,
            filter=filter_name,
            value=float(found[key]),
            error=_number(found.get(error)),
            higher_is_better=self._higher(name, metric),
            num_fewshot=self._shots(name),
            partial=self.loaded.partly(name),
            base=_number(of_base.get(key)),
            base_error=_number(of_base.get(error)),
            comparison=comparison,
        )

    def _leaves(self, name: str) -> list[str]:
        group = self.loaded.groups.get(name)
        return [name] if group is None else [task.task_name for task in group.get_all_tasks()]

    def _documents(self, name: str) -> int:
        counts = self.target.results["n-samples"]
        return sum(int(counts[task]["effective"]) for task in self._leaves(name))

    def _shots(self, name: str) -> int | None:
        shots = {self.target.results["n-shot"].get(task) for task in self._leaves(name)}
        return int(found) if len(shots) == 1 and (found := shots.pop()) is not None else None

    def _higher(self, name: str, metric: str) -> bool | None:
        """Whether higher is better; None where no task says, or not all say the same.

        A group's is asked of its tasks: lm-eval, which goes from the outermost group inwards, has none for a group of
        groups.
        """
        told = [self.target.results["higher_is_better"].get(task) or {} for task in self._leaves(name)]
        found = {each[metric] for each in told if metric in each}
        return found.pop() if len(found) == 1 else None

    def _compared(self, name: str, metric: str, filter_name: str) -> Comparison | None:
        """With the base; where nothing tells which is better, no document is won or lost."""
        if self.base is None:
            return None
        of = self._compare_group if name in self.loaded.groups else self._compare_task
        comparison = of(name, metric, filter_name)
        if comparison is None or self._higher(name, metric) is not None:
            return comparison
        return replace(comparison, wins=None, losses=None, ties=None)

    def _compare_task(self, name: str, metric: str, filter_name: str) -> Comparison | None:
        """A task's documents in pairs; aggregated anew in each resample where the metric is no mean."""
        ours, theirs = self._pairs(name, metric, filter_name)
        if not ours:
            return None
        aggregate = _aggregation(self.loaded.tasks[name], metric)
        if _is_mean(aggregate) and _are_numbers(ours) and _are_numbers(theirs):
            return compare(ours, theirs, higher_is_better=self._higher(name, metric) is not False)
        if aggregate is None:
            return None
        with warnings.catch_warnings(action="ignore"):  # of a resample in which all documents are alike
            return compare_aggregated(ours, theirs, aggregate)

    def _compare_group(self, name: str, metric: str, filter_name: str) -> Comparison | None:
        """A group's tasks as strata, weighted as lm-eval weights them; None if one of them has no mean to pair."""
        config = _aggregated(self.loaded.groups[name], metric)
        strata = []
        for task in self._leaves(name):
            if f"{metric},{filter_name}" not in self.target.results["results"][task]:
                continue  # lm-eval leaves it out, too
            ours, theirs = self._pairs(task, metric, filter_name)
            means = _is_mean(_aggregation(self.loaded.tasks[task], metric))
            if not (ours and means and _are_numbers(ours) and _are_numbers(theirs)):
                return None
            weight = float(len(ours)) if config is None or config.weight_by_size else 1.0
            strata.append(stratum(ours, theirs, weight))
        higher = self._higher(name, metric) is not False
        return compare_group(strata, higher_is_better=higher) if strata else None

    def _pairs(self, task: str, metric: str, filter_name: str) -> tuple[list[Any], list[Any]]:
        """What the task's documents are worth to target and base, in one order; empty where no document has a value."""
        if self.base is None:
            raise EvaluationError("there is no base to compare with")
        ours, theirs = (_values(scores, task, metric, filter_name) for scores in (self.target, self.base))
        return align(ours, theirs, f"{task}, {metric}")


def _values(scores: TaskScores, task: str, metric: str, filter_name: str) -> list[tuple[int, Any]]:
    return [
        (sample["doc_id"], sample[metric])
        for sample in scores.samples[task]
        if sample["filter"] == filter_name and metric in sample["metrics"]
    ]


def metrics_of(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics, with their filters, of which a task's or a group's results hold a number."""
    keys = [key.split(",", 1) for key in found if "," in key]
    return [
        (metric, filter_name)
        for metric, filter_name in keys
        if not metric.endswith("_stderr") and _number(found[f"{metric},{filter_name}"]) is not None
    ]


def _aggregation(task: Task, metric: str) -> Any:
    return task.aggregation().get(metric)


def _is_mean(aggregate: Any) -> bool:
    return aggregate in (mean, np.mean)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, bool | int | float | np.bool_ | np.number) for value in values)


def _aggregated(group: Group, metric: str) -> Any:
    return next((each for each in group.aggregate_metric_list or () if each.metric == metric), None)


def _number(value: Any) -> float | None:
    """A figure of lm-eval's results, which writes `N/A` where there is none."""
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else None
