"""The files of a whole evaluation: lm-eval's, with the target, the base beside it and losses under `qlora`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_cli.benchmarking.events import Evaluated, Written
from qlora_cli.benchmarking.model_args import model_args, model_name
from qlora_cli.benchmarking.target import Target
from qlora_cli.evaluation.harness import TaskScores
from qlora_cli.evaluation.new_files import base_of
from qlora_cli.evaluation.results import ResultFacts, write_facts, write_results, write_samples
from qlora_cli.evaluation.tasks.loaded import LoadedTasks
from qlora_cli.training.environment import versions


def write_files(
    output: Path,
    target: Target,
    loaded: LoadedTasks,
    ours: TaskScores | None,
    theirs: TaskScores | None,
    evaluated: Evaluated,
    *,
    log_samples: bool,
) -> Iterator[Written]:
    """Write what an evaluation came to, each file whole or not at all, and tell of what is there.

    Args:
        output: the results file; the next free name beside it is taken if another file has come to be there.
        ours: what came of the tasks; None if only rows of a dataset were scored.
        theirs: the same of the base; None without a baseline.
        log_samples: whether every answer is written as well, of the base, too.

    Raises:
        RunError: if one cannot be written.
    """
    own = _facts(target, loaded, theirs, evaluated)
    if ours is None:
        file = write_facts(output, {"results": {}, "qlora": own})
    else:
        facts = ResultFacts(model_name(target), model_args(target), target.base.revision, own=own)
        file = write_results(output, ours, facts)
    yield Written("results", (file,), None if file == output else output, is_lm_evals=ours is not None)
    if log_samples and ours is not None:
        samples = write_samples(file, ours.samples)
        samples += [] if theirs is None else write_samples(base_of(file), theirs.samples)
        yield Written("samples", tuple(samples))


def _facts(target: Target, loaded: LoadedTasks, theirs: TaskScores | None, evaluated: Evaluated) -> dict[str, Any]:
    return {
        "versions": versions(),
        **target.facts(),
        # Of tags, too, and of groups without a score: they have no row.
        "partial": {name: loaded.partly(name) for name in (*loaded.partial, *loaded.splits)},
        "limit": evaluated.limit,
        "scores": [asdict(row) for row in evaluated.scores],
        "dataset": [asdict(row) for row in evaluated.losses],
        "base": None if theirs is None else theirs.results["results"],
        "wall_seconds": evaluated.seconds,
    }
