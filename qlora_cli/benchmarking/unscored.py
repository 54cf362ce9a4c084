"""Tasks and groups of which no number came, although all their questions were answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qlora_cli.benchmarking.rows import metrics_of
from qlora_cli.evaluation.tasks.names import few

if TYPE_CHECKING:
    from qlora_cli.evaluation.tasks.loaded import LoadedTasks


def unscored(loaded: LoadedTasks, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Sentences that name them and say why: lm-eval leaves out a metric that its answers do not give.

    Args:
        loaded: the tasks that were scored.
        results: by task and group, what lm-eval made of the answers.
    """
    found = {name: [metric for metric, _ in metrics_of(of)] for name, of in results.items()}
    alike: dict[tuple[str, str], list[str]] = {}
    for name, task in loaded.tasks.items():
        if not found.get(name):
            alike.setdefault((str(task.OUTPUT_TYPE), ", ".join(task.aggregation())), []).append(name)
    for (kind, metrics), names in alike.items():
        yield (
            f"no score came of {few(names)}: answers of the kind {kind} give no number for "
            f"{metrics or 'any metric'}; see metric_list in the definition"
        )
    for name, group in loaded.groups.items():
        members = dict.fromkeys(metric for task in group.get_all_tasks() for metric in found.get(task.task_name, ()))
        if members and group.has_aggregation and not found.get(name):
            wanted = ", ".join(each.metric for each in group.aggregate_metric_list or ())
            yield (
                f"no score came of the group {name}: it is to have {wanted}, and its tasks have {', '.join(members)}; "
                "see aggregate_metric_list in its definition"
            )
