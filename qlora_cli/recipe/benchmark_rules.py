"""What the fields of `evaluation` need of each other, and names in it that can be seen to fit nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlora_cli.errors import Mistake
from qlora_cli.recipe.facts import Facts
from qlora_cli.recipe.schema import EvaluationSection
from qlora_cli.recipe.yaml_source import Path, shorten

TASKS: Path = ("evaluation", "tasks")
# All but those that say what is scored.
NEED_TASKS: tuple[Path, ...] = tuple(("evaluation", name) for name in EvaluationSection.model_fields if name != "tasks")
_KEEP_BEST: Path = ("evaluation", "keep_best")
_EVERY_STEPS: Path = ("evaluation", "every_steps")


def benchmark_contradictions(facts: Facts, *, whole: bool) -> list[Mistake]:
    """Everything that is wrong between the fields of `evaluation`; `whole` is as in `rules.contradictions`."""
    return [*_tasks(facts), *_best(facts), *(_without_use(facts) if whole else ())]


def _without_use(facts: Facts) -> Iterator[Mistake]:
    """What is said about benchmarks where none is named, and a choice where there is nothing to choose from."""
    if facts.get(TASKS) in (None, []) and not (facts.given(TASKS) and facts.get(TASKS) is None):
        usual = EvaluationSection()
        for path in NEED_TASKS:
            if facts.get(path) not in (None, getattr(usual, str(path[-1]))) and not facts.is_told(path):
                text = "has no use without `tasks`: name there what to score the model on, as in [mmlu, arc_easy]"
                yield facts.key_mistake(path, text)
    elif facts.get(_KEEP_BEST) is not None and not facts.is_told(_KEEP_BEST) and not facts.given(_EVERY_STEPS):
        text = "needs `every_steps`: scored at the end alone, there is one checkpoint to choose from"
        yield facts.key_mistake(_KEEP_BEST, text)


def _tasks(facts: Facts) -> Iterator[Mistake]:
    given = facts.get(TASKS)
    names = given if isinstance(given, list) else [given]
    for number, name in enumerate(names):
        path = (*TASKS, number) if isinstance(given, list) else TASKS
        if isinstance(name, str) and re.search(r"[,\s]", name.strip()):
            parts = ", ".join(re.findall(r"[^,\s]+", name))
            yield facts.mistake(path, f"got {shorten(repr(name))}, the name of no task; write {shorten(f'[{parts}]')}")
        elif isinstance(name, str) and name in names[:number]:
            yield facts.mistake(path, f"{shorten(repr(name))} is named twice; leave one out")


def _best(facts: Facts) -> Iterator[Mistake]:
    given = facts.get(_KEEP_BEST)
    if isinstance(given, str) and given and not re.fullmatch(r"[^/\s].*/[^/\s]+", given):
        text = f"expected TASK/METRIC, as in mmlu/acc, got {shorten(repr(given))}"
        yield facts.mistake(_KEEP_BEST, text)
