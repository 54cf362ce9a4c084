"""The results file of a whole evaluation: lm-eval's, with the target, the base beside it and losses under `qlora`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_cli.benchmarking.events import Evaluated
from qlora_cli.benchmarking.target import Target
from qlora_cli.evaluation.harness import TaskScores
from qlora_cli.evaluation.results import ResultFacts, write_facts, write_results
from qlora_cli.training.environment import versions


def write_file(file: Path, target: Target, ours: TaskScores | None, theirs: TaskScores | None, all_: Evaluated) -> None:
    """Write what an evaluation came to, whole or not at all.

    Args:
        ours: what came of the tasks; None if only rows of a dataset were scored.
        theirs: the same of the base; None without a baseline.

    Raises:
        RunError: if it cannot be written.
    """
    own = _facts(target, theirs, all_)
    if ours is not None:
        facts = target.facts()
        write_results(file, ours, ResultFacts(str(facts["target"]), facts["base_revision"], own=own))
        return
    write_facts(file, {"results": {}, "qlora": own})


def _facts(target: Target, theirs: TaskScores | None, all_: Evaluated) -> dict[str, Any]:
    rows = [asdict(row) for row in all_.scores]
    return {
        "versions": versions(),
        **target.facts(),
        "partial": {row.task: row.partial for row in all_.scores if row.partial is not None},
        "limit": all_.limit,
        "scores": rows,
        "dataset": [asdict(row) for row in all_.losses],
        "base": None if theirs is None else theirs.results["results"],
        "wall_seconds": all_.seconds,
    }
