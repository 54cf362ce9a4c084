"""What no field can know alone: fields that exclude, need or choose each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qlora_cli.errors import Mistake
from qlora_cli.recipe.foreign import foreign_value
from qlora_cli.recipe.schema import FORMAT_COLUMNS
from qlora_cli.recipe.values import position_of
from qlora_cli.recipe.words import distance, nearest
from qlora_cli.recipe.yaml_source import Path, Place, Value, dotted, shorten

_PAIRS: tuple[tuple[Path, Path], ...] = (
    (("training", "max_steps"), ("training", "num_train_epochs")),
    (("dataset", "validation"), ("dataset", "validation_fraction")),
)
_OF_FOUR_BITS: tuple[Path, ...] = (("quantization", "quant_type"), ("quantization", "double_quant"))
_BITS: Path = ("quantization", "bits")


def displaced_by(path: Path, value: Value) -> list[Path]:
    """What lower layers said that no longer holds once a layer gives `path` this value.

    So that `--set training.max_steps=20` shortens any recipe, also one that counts in epochs.
    """
    if value is None:
        return []
    others = [b if path == a else a for a, b in _PAIRS if path in (a, b)]
    if path == _BITS and value == 16:
        others += _OF_FOUR_BITS
    if path == ("base_model",):
        others.append(("revision",))
    return others


def contradictions(data: dict[str, Value], places: Mapping[Path, Place], hinted: set[Path]) -> list[Mistake]:
    """Every pair of fields that cannot both hold, or need each other, and names that fit nothing.

    `hinted` are fields that were meant, with a value that is not known.
    """
    facts = _Facts(data, places, hinted)
    return [*_excluding(facts), *_meaningless(facts), *_without_validation(facts), *_names(facts)]


class _Facts:
    """The data of a recipe by paths; what is of the wrong type is told elsewhere, and here only looked at."""

    def __init__(self, data: dict[str, Value], places: Mapping[Path, Place], hinted: set[Path]) -> None:
        self._data, self._places, self._hinted = data, places, hinted

    def given(self, path: Path) -> bool:
        """Whether there is a value, or at least one was meant."""
        return self.get(path) is not None or path in self._hinted

    def get(self, path: Path) -> Any:
        value: Value = self._data
        for part in path:
            value = value.get(str(part)) if isinstance(value, dict) else None
        return value

    def mistake(self, path: Path, message: str, suggestion: str | None = None) -> Mistake:
        return Mistake(position_of(path, self._places), dotted(path), message, suggestion)

    def key_mistake(self, path: Path, message: str, suggestion: str | None = None) -> Mistake:
        return Mistake(self._places[path].key, dotted(path), message, suggestion)

    def line(self, path: Path) -> str:
        """` (line 7)`, or the argument, where another field stands."""
        place = self._places.get(path)
        if place is None:
            return ""
        return f" (line {place.key.line})" if place.key.line else f" ({place.key})"

    def later(self, a: Path, b: Path) -> tuple[Path, Path]:
        """Both paths, the one that stands further down first."""
        return (a, b) if self._places[a].key > self._places[b].key else (b, a)


def _excluding(facts: _Facts) -> list[Mistake]:
    mistakes = []
    for pair in _PAIRS:
        if all(facts.get(path) is not None for path in pair):
            path, other = facts.later(*pair)
            text = f"excludes `{other[-1]}`{facts.line(other)}: give one of the two"
            mistakes.append(facts.key_mistake(path, text))
    return mistakes


def _meaningless(facts: _Facts) -> list[Mistake]:
    mistakes = []
    if facts.get(_BITS) == 16:
        for path in _OF_FOUR_BITS:
            if facts.get(path) is not None:
                text = f"has no meaning with `bits: 16`{facts.line(_BITS)}, which quantises nothing: leave one out"
                mistakes.append(facts.key_mistake(path, text))
    model = facts.get(("base_model",))
    if facts.get(("revision",)) is not None and isinstance(model, str) and os.path.isabs(model):  # noqa: PTH117
        text = "is for models of the hub, and `base_model` is a local folder: leave it out"
        mistakes.append(facts.key_mistake(("revision",), text))
    return mistakes


def _without_validation(facts: _Facts) -> list[Mistake]:
    sources: tuple[Path, ...] = (("dataset", "validation"), ("dataset", "validation_fraction"))
    path = ("training", "eval_steps")
    if facts.get(path) is None or any(facts.given(source) for source in sources):
        return []
    text = "needs rows to evaluate on: give dataset.validation or dataset.validation_fraction"
    return [facts.key_mistake(path, text)]


def _names(facts: _Facts) -> list[Mistake]:
    """Names that are no choice of the grammar's own, but that can be seen to fit nothing."""
    mistakes = []
    path: Path = ("lora", "target_modules")
    targets = facts.get(path)
    if isinstance(targets, str) and targets != "all-linear":
        # Any text is a regular expression, and one like these matches no module.
        meant = foreign_value(dotted(path), targets)
        if meant == "all-linear" or distance(targets.lower(), "all-linear") <= 2:
            mistakes.append(facts.mistake(path, f"got {targets!r}; did you mean `all-linear`?", "all-linear"))
    return [*mistakes, *_columns(facts)]


def _columns(facts: _Facts) -> list[Mistake]:
    path: Path = ("dataset", "columns")
    columns, form = facts.get(path), facts.get(("dataset", "format"))
    if not isinstance(columns, dict):
        return []
    problems = column_problems(form, columns)
    return [facts.key_mistake((*path, name), text, near) for name, (text, near) in problems.items()]


def column_problems(format: object, columns: Mapping[str, object]) -> dict[str, tuple[str, str | None]]:
    """The keys of `dataset.columns` that are no fields of the format: what is wrong, and which was probably meant."""
    formats = [format] if isinstance(format, str) and format in FORMAT_COLUMNS else list(FORMAT_COLUMNS)
    known = [field for name in formats for field in FORMAT_COLUMNS[name].fields]
    lack = f"the format {format} has no" if formats == [format] else "no format has a"
    problems = {}
    for name in columns:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean `{near}`?" if near else f"expected {', '.join(known)}"
            problems[name] = f"{lack} field {shorten(repr(name))}; {hint}", near
    return problems
