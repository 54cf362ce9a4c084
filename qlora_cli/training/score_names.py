"""What a score is called in a recipe, in records and on the screen: `mmlu/acc`, `gsm8k/exact_match,strict-match`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.index import Index
from qlora_cli.evaluation.tasks.loaded import LoadedTasks
from qlora_cli.recipe.words import nearest

_USUAL = ",none"  # lm-eval's name for answers as they are, without a filter


def headlines(names: Sequence[str], loaded: LoadedTasks, index: Index) -> tuple[str, ...]:
    """The tasks and groups whose scores answer for the names asked for: a tag, and a group that aggregates nothing,
    is answered for by its members."""
    found: dict[str, None] = {}
    for name in names:
        found.update(dict.fromkeys(_headlines(name, loaded, index)))
    return tuple(found)


def _headlines(name: str, loaded: LoadedTasks, index: Index) -> Iterator[str]:
    group = loaded.groups.get(name)
    if name in loaded.tasks or (group is not None and group.has_aggregation):
        yield name
    else:
        members = group.child_names if group is not None else index[name].members if name in index else ()
        for member in members:
            yield from _headlines(member, loaded, index)


def flatten(results: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float | None]:
    """The scores of one task or group out of lm-eval's `results`; None for what is no number, and no error unless there
    is one."""
    scores: dict[str, float | None] = {}
    for key, value in results.get(name, {}).items():
        metric, comma, _ = key.partition(",")
        if not comma or isinstance(value, str | bool):
            continue
        finite = value is not None and math.isfinite(value)
        if finite or not metric.endswith("_stderr"):
            scores[f"{name}/{key.removesuffix(_USUAL)}"] = float(value) if finite else None
    return scores


def find_score(wanted: str, loaded: LoadedTasks) -> bool:
    """Whether more of the score that `evaluation.keep_best` names is better.

    Raises:
        TaskError: if these tasks have no such score, with those that they have, or if lm-eval does not say which of two
            is better.
    """
    task, _, metric = wanted.rpartition("/")
    names = [*loaded.groups, *loaded.tasks]
    if task not in names:
        near = nearest(task, names)
        hint = f"did you mean {near}?" if near else f"expected one of {', '.join(names[:10])}"
        raise TaskError(f"evaluation.keep_best: {task!r} is not among the tasks and groups that are scored; {hint}")
    known = _metrics(task, loaded)
    if metric not in known:
        filtered = [name for name in known if name.partition(",")[0] == metric]
        meant = filtered[0] if filtered else nearest(metric, known)
        hint = f"; did you mean {task}/{meant}?" if meant else ""
        raise TaskError(f"evaluation.keep_best: {task} has {', '.join(known) or 'no score'}, not {metric!r}{hint}")
    better = known[metric]
    if better is None:
        told = f"lm-eval does not say whether more of {wanted} is better; choose another"
        raise TaskError(f"evaluation.keep_best: {told}")
    return better


def _metrics(name: str, loaded: LoadedTasks) -> dict[str, bool | None]:
    """The scores that a task or a group will have, and of each whether more of it is better."""
    if name in loaded.tasks:
        task = loaded.tasks[name]
        better = task.higher_is_better()
        filters = [each.name for each in getattr(task, "_filters", None) or ()] or ["none"]
        keys = [(metric, f"{metric},{filter}") for metric in task.aggregation() for filter in filters]
        return {key.removesuffix(_USUAL): better.get(metric) for metric, key in keys}
    group = loaded.groups[name]
    found: dict[str, bool | None] = {}
    for task in group.get_all_tasks():
        for key, better in _metrics(task.task_name, loaded).items():
            if _aggregates(group, key):
                found[key] = better if found.get(key, better) == better else None
    return found


def _aggregates(group: Any, key: str) -> bool:
    metric, _, filter = key.partition(",")
    return any(
        each.metric == metric and (each.filter_list is None or (filter or "none") in each.filter_list)
        for each in group.aggregate_metric_list or ()
    )
