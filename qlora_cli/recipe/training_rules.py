"""What the fields of `training` need of each other, and of the dataset."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.errors import Mistake
from qlora_cli.recipe.facts import VALIDATION, Facts
from qlora_cli.recipe.schema import TrainingSection
from qlora_cli.recipe.yaml_source import Path

ON_NONFINITE: Path = ("training", "on_nonfinite")
MAX_SKIPPED: Path = ("training", "max_skipped_steps")
_EVAL_STEPS: Path = ("training", "eval_steps")
_MAX_STEPS: Path = ("training", "max_steps")
# What is decided by evaluations on the way, and what is said where there is one at the end alone.
_BY_EVALUATIONS: dict[Path, str] = {
    ("training", "early_stopping_patience"): "there is nothing to stop before",
    ("training", "load_best"): "there is one checkpoint to choose from",
}


def training_contradictions(facts: Facts) -> list[Mistake]:
    """Everything that is wrong between the fields of `training`, and what needs rows where there are none.

    Only of a recipe that could be read as a whole, since what is missing may be what could not; and of a field that
    nothing is wrong with already, since what it is to be, and so what it needs, is not known before that is mended.
    """
    return [*_without_rows(facts), *_without_evaluations(facts), *_without_skipping(facts)]


def _without_rows(facts: Facts) -> Iterator[Mistake]:
    if any(facts.given(source) for source in (VALIDATION, ("dataset", "validation_fraction"))):
        return
    for path in (_EVAL_STEPS, *_BY_EVALUATIONS):
        if _is_wanted(facts, path):
            text = "needs rows to evaluate on: give dataset.validation or dataset.validation_fraction"
            yield facts.key_mistake(path, text)


def _without_evaluations(facts: Facts) -> Iterator[Mistake]:
    for path, why in _BY_EVALUATIONS.items():
        if _is_wanted(facts, path) and (needed := _for_evaluations(facts)):
            yield facts.key_mistake(path, f"needs {needed}: evaluated at the end alone, {why}")


def _for_evaluations(facts: Facts) -> str | None:
    """What it takes for an evaluation before the one at the end; None if there is one, or may be."""
    if not facts.given(_EVAL_STEPS):
        return "`eval_steps`"
    steps, last = _number(facts, _EVAL_STEPS), _number(facts, _MAX_STEPS)
    if steps is None or last is None or steps < last:
        return None
    if facts.is_argument(_MAX_STEPS) and not facts.is_argument(_EVAL_STEPS):
        return None  # `--set training.max_steps=2` tries any recipe
    return f"`eval_steps`{facts.line(_EVAL_STEPS)} below `max_steps`{facts.line(_MAX_STEPS)}"


def _number(facts: Facts, path: Path) -> int | None:
    """The whole number that is given, if nothing is wrong with it."""
    value = facts.get(path)
    return value if isinstance(value, int) and not facts.is_told(path) else None


def _without_skipping(facts: Facts) -> Iterator[Mistake]:
    usual = TrainingSection.model_fields["max_skipped_steps"].default
    if facts.get(MAX_SKIPPED) in (None, usual) or facts.is_told(MAX_SKIPPED):
        return
    if facts.given(ON_NONFINITE) and facts.get(ON_NONFINITE) != "stop":
        return  # it is skip_step, or was meant and is not known
    where = f"{facts.line(ON_NONFINITE)}, which skips none" if facts.given(ON_NONFINITE) else ""
    text = f"has no meaning with `on_nonfinite: stop`{where}: set skip_step there, or leave this out"
    yield facts.key_mistake(MAX_SKIPPED, text)


def _is_wanted(facts: Facts, path: Path) -> bool:
    return facts.get(path) not in (None, False) and not facts.is_told(path)
