"""Whether a task that was built can be asked about all of its rows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora_cli.data.raw_rows import name_columns
from qlora_cli.errors import TaskError
from qlora_cli.evaluation.randomness import seeded
from qlora_cli.evaluation.tasks.examples import are_given, could_be_drawn, split_of
from qlora_cli.evaluation.tasks.layouts.found import PROBLEMS
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from qlora_cli.evaluation.tasks.rows import BadRow, bad_examples, bad_questions, misnamed_columns
from qlora_cli.evaluation.tasks.supply import Supply, describe_failure
from qlora_cli.evaluation.tasks.templates import key_that_takes
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.recipe.words import nearest

_UNDEFINED = re.compile(r"'(\w+)' is undefined")


class RowsError(TaskError):
    """There are rows that a task cannot be asked about. `every`: no row is otherwise, as far as is known."""

    def __init__(self, problems: Iterable[str], *, every: bool = False) -> None:
        self.every = every
        super().__init__("\n".join(itertools.islice(problems, PROBLEMS)))


def check_rows(task: Any, supply: Supply, options: TaskOptions) -> None:
    """Raise TaskError if there is nothing to ask about, too little to draw examples from, or a metric is no function.

    With rows from the data root, that every row gives a question and an answer is checked as well.
    """
    docs = getattr(task, "task_docs", None) or task.eval_docs
    asked = supply.files_of(_split_asked(task))
    if not len(docs):
        raise TaskError(f"there is no row to ask about{_of(asked)}.")
    _refuse_metrics(task)
    shots = task.get_config("num_fewshot") or 0
    pool = getattr(getattr(task, "sampler", None), "df", None) if shots else None
    drawn_from: list[Path] = []
    if pool is not None:
        drawn_from = [] if are_given(task) else supply.files_of(split_of(task))
        # One more is drawn where the question itself may be among them.
        drawn = shots + (task.fewshot_cfg.split == task.config.test_split)
        if len(pool) < drawn:
            raise TaskError(
                f"expected {drawn} rows at least to draw {shots} examples from, got {len(pool)}{_of(drawn_from)}."
            )
        pool = could_be_drawn(task, pool, drawn)
    if options.data_root is None or not hasattr(task, "features"):
        return
    with seeded(options.seed):  # a task's functions may draw, and the next task is to draw as if they had not
        _refuse_rows(task, docs, asked)
        if pool is not None:
            _refuse(_problems("example", bad_examples(task, pool), drawn_from))


def why_not_set_up(task: Any, error: Exception, supply: Supply, options: TaskOptions) -> TaskError:
    """What is to be told of a task whose `__init__` failed; the last thing that it does is to look at the first row."""
    files = supply.files_of(_split_asked(task))
    try:
        _refuse_metrics(task)
        if not hasattr(task, "features"):
            return TaskError(describe_failure(error, supply.all_files))
        undefined = _UNDEFINED.fullmatch(str(error))
        if undefined and undefined[1] not in task.features:
            return TaskError(_no_column(key_that_takes(undefined[1], task.config), undefined[1], task, files))
        if options.data_root is not None:
            with seeded(options.seed):
                _refuse_rows(task, task.task_docs, files)
    except TaskError as problem:
        return problem
    except Exception:  # the closer look failed as the first did
        pass
    return RowsError([describe_failure(error, files)], every=True)


def _refuse_metrics(task: Any) -> None:
    if getattr(task, "config", None) is None or task.config.process_results is not None:
        return
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None:
            raise TaskError(f"metric {metric!r} is neither one of lm-eval nor could it be had from the hub.")


def _refuse_rows(task: Any, docs: Any, files: list[Path]) -> None:
    misnamed = [_no_column(key, name, task, files) for key, name in misnamed_columns(task)]
    if misnamed:
        raise TaskError("\n".join(misnamed))
    bad = bad_questions(task, docs)
    if len(bad) == len(docs) > 1 and len({row.problem for row in bad}) == 1:
        raise RowsError([f"every question{_of(files)}: {bad[0].problem}"], every=True)
    _refuse(_problems("question", bad, files))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise RowsError(problems)


def _no_column(key: str, name: str, task: Any, files: list[Path]) -> str:
    close = nearest(name, task.features)
    return (
        f"{key}: expected the name of a column, got {name!r}{f'; did you mean {close}?' if close else '.'} "
        f"The rows{_of(files)} have {name_columns(task.features)}."
    )


def _problems(what: str, rows: Sequence[BadRow], files: list[Path]) -> list[str]:
    return [f"{what} {row.number}{_of(files)}: {row.problem}" for row in rows]


def _split_asked(task: Any) -> str | None:
    config = getattr(task, "config", None)
    split: str | None = getattr(config, "test_split", None) or getattr(config, "validation_split", None)
    return split


def _of(files: list[Path]) -> str:
    return f" of {', '.join(dict.fromkeys(map(shown_path, files)))}" if files else ""
