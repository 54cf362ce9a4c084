"""Benchmark scores of a run as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_cli.training.events import BenchmarkRecord, Finished

_LARGE = 10_000  # of a perplexity, no decimals are worth reading


def score_lines(record: BenchmarkRecord, limit: int) -> Iterator[str]:
    """A line for each task and group asked for, at most `limit`; the first says after which step.

    Beside the name stands what the score is of, where that is less or other than the name says.
    """
    tasks = _by_task(record.scores)
    seconds = f"  ({record.seconds:,.0f} s)"
    start = f"step {record.step}  "
    for number, (task, metrics) in enumerate(tasks.items()):
        if number == limit - 1 and len(tasks) > limit:
            yield f"{' ' * len(start)}and {len(tasks) - number} more, in metrics.jsonl"
            return
        partly = f" ({record.partial[task]})" if task in record.partial else ""
        shown = "  ".join(f"{metric} {_value(value, error)}" for metric, (value, error) in metrics.items())
        yield f"{' ' * len(start) if number else start}{task}{partly}  {shown}{'' if number else seconds}"


def change_lines(event: Finished, limit: int) -> Iterator[str]:
    """What each score was at first and at last, at most `limit`; nothing for a run that was scored once."""
    before, after = event.first_scores or {}, event.last_scores or {}
    names = [name for name in after if not _is_error(name) and name in before]
    if before == after:
        return
    for name in names[:limit]:
        yield f"{name} {_value(before[name], None)} before, {_value(after[name], None)} after"


def _by_task(scores: Mapping[str, float | None]) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """By task and metric, the value and its standard error."""
    tasks: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for name, value in scores.items():
        if not _is_error(name):
            task, _, metric = name.rpartition("/")
            base, comma, filter = metric.partition(",")
            tasks.setdefault(task, {})[metric] = value, scores.get(f"{task}/{base}_stderr{comma}{filter}")
    return tasks


def _is_error(name: str) -> bool:
    return name.rpartition("/")[2].partition(",")[0].endswith("_stderr")


def _value(value: float | None, error: float | None) -> str:
    if value is None:
        return "no number"
    form = ".4f" if abs(value) < _LARGE else ".5g"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form}}"
