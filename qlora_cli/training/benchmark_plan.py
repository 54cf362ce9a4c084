"""What a run is scored on: the tasks of a recipe and their data, checked before any weights are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import load_index
from qlora_cli.evaluation.tasks.loaded import LoadedTasks, TaskOptions
from qlora_cli.evaluation.tasks.names import choose
from qlora_cli.recipe.schema import EvaluationSection
from qlora_cli.training.best_checkpoint import BestCheckpoint
from qlora_cli.training.score_names import find_score, headlines

# What the options of `qlora eval` are in a recipe; what a run never does is left to that command.
_IN_A_RECIPE = {
    "--data-root": "evaluation.data_root",
    "--task-path": "evaluation.task_path",
    "--allow-partial": "evaluation.allow_partial",
    "--trust-remote-code": "qlora eval --trust-remote-code",
    "--run-unsafe-code": "qlora eval --run-unsafe-code",
}


@dataclass(frozen=True, eq=False)
class BenchmarkPlan:
    """What a run is scored on, ready to be asked.

    Attributes:
        names: the tasks and groups whose scores are shown.
        best: the score that chooses a checkpoint to keep; None where none does.
    """

    section: EvaluationSection
    loaded: LoadedTasks
    names: tuple[str, ...]
    best: BestCheckpoint | None


def plan_benchmarks(section: EvaluationSection) -> BenchmarkPlan | None:
    """Read the tasks of a recipe and their data; None where it names none. No model is needed.

    Raises:
        TaskError: with all that stands against it: names that lm-eval does not know, data that is missing or cannot be
            read, a score to choose by that there is not.
        HubUnreachableError: if data is to come from the hub, and that gives no answer.
    """
    if not section.names:
        return None
    options = TaskOptions(
        data_root=None if section.data_root is None else Path(section.data_root),
        allow_partial=section.allow_partial,
        num_fewshot=section.num_fewshot,
    )
    try:
        index = load_index([Path(section.task_path)] if section.task_path else [])
        chosen = choose(section.names, index)  # before lm-eval is imported, which takes seconds
        from qlora_cli.evaluation.randomness import seeded

        with seeded(None):
            loaded = build_tasks(chosen, index, options)
    except TaskError as error:
        raise TaskError(f"evaluation.tasks: {_in_a_recipe(str(error))}") from None
    wanted = section.keep_best
    best = None if wanted is None else BestCheckpoint(wanted, higher_is_better=find_score(wanted, loaded))
    return BenchmarkPlan(section, loaded, headlines(chosen, loaded, index), best)


def check_answerable(
    plan: BenchmarkPlan, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, num_processes: int
) -> None:
    """Raise TaskError for tasks that cannot be asked of a model with this tokenizer and context, all at once."""
    from lm_eval.models.utils import resolve_max_length

    from qlora_cli.evaluation.harness import refuse_unanswerable

    section = plan.section
    asked = _Asked(tokenizer, resolve_max_length(config, tokenizer), num_processes)
    try:
        refuse_unanswerable(asked, plan.loaded, limit=section.limit, chat_template=section.apply_chat_template)
    except TaskError as error:
        raise TaskError(f"evaluation: {error}") from None


def count_documents(plan: BenchmarkPlan) -> int:
    """How many documents are asked about each time."""
    from lm_eval.evaluator_utils import get_sample_size

    total = 0
    for task in plan.loaded.tasks.values():
        there = len(task.eval_docs)
        asked = get_sample_size(task, plan.section.limit)
        total += there if asked is None else min(there, asked)
    return total


def times_scored(section: EvaluationSection, total_steps: int) -> int:
    """How often a run of so many steps is scored."""
    return sum(is_due(section, step, total_steps) for step in range(total_steps + 1))


def is_due(section: EvaluationSection, step: int, total_steps: int) -> bool:
    """Whether the model is to be scored after `step` steps."""
    if step == 0:
        return section.at_start
    return step == total_steps or (section.every_steps is not None and step % section.every_steps == 0)


@dataclass(frozen=True)
class _Asked:
    """What is known of a model before it is loaded."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    world_size: int


def _in_a_recipe(text: str) -> str:
    """A message with what a recipe calls the options that it names."""
    return re.sub(r"(?<![\w-])--[a-z-]+(?: DIR)?", _field_for, text)


def _field_for(option: re.Match[str]) -> str:
    name = option[0].removesuffix(" DIR")
    return _IN_A_RECIPE.get(name, option[0])
