"""What no field can know alone: fields that exclude, need or choose each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_cli.errors import Mistake
from qlora_cli.recipe.benchmark_rules import NEED_TASKS, TASKS, benchmark_contradictions
from qlora_cli.recipe.facts import TRAIN, VALIDATION, Facts
from qlora_cli.recipe.foreign import foreign_value
from qlora_cli.recipe.schema import ALL_LINEAR, FORMAT_COLUMNS
from qlora_cli.recipe.source_rules import effective, source_contradictions, without_use
from qlora_cli.recipe.training_rules import MAX_SKIPPED, ON_NONFINITE, training_contradictions
from qlora_cli.recipe.words import distance, nearest
from qlora_cli.recipe.yaml_source import Path, Place, Value, shorten, value_at

_PAIRS: tuple[tuple[Path, Path], ...] = (
    (("training", "max_steps"), ("training", "num_train_epochs")),
    (VALIDATION, ("dataset", "validation_fraction")),
)
_OF_FOUR_BITS: tuple[Path, ...] = (("quantization", "quant_type"), ("quantization", "double_quant"))
_BITS: Path = ("quantization", "bits")
_MODEL: Path = ("base_model",)
_REVISION: Path = ("revision",)
_FORMAT: Path = ("dataset", "format")
_COLUMNS: Path = ("dataset", "columns")
# What is asked of the hub, and for which model or rows.
_ABOUT: dict[Path, Path] = {
    _REVISION: _MODEL,
    ("dataset", "train_split"): TRAIN,
    ("dataset", "validation_split"): VALIDATION,
}
# What is given in place of validation rows, and so ends what is said of them.
_IN_PLACE_OF_ROWS: tuple[Path, ...] = (("dataset", "validation_fraction"),)


def displaced(data: dict[str, Value], set_by: Mapping[Path, int], first_override: int) -> list[Path]:
    """What a layer said that no longer holds under what a later one says.

    So that `--set training.max_steps=20` shortens any recipe, also one that counts in epochs. `set_by` has the number
    of the layer that each field comes from; those from `first_override` on are arguments.
    """
    given = {path for path in set_by if value_at(data, path) is not None}
    facts = Facts(data, {}, set())
    over = [pair for a, b in _PAIRS for pair in ((a, b), (b, a))]
    over += [(path, _BITS) for path in _OF_FOUR_BITS if value_at(data, _BITS) == 16]
    over += [(MAX_SKIPPED, ON_NONFINITE)] if value_at(data, ON_NONFINITE) == "stop" else []
    over += [(path, TASKS) for path in NEED_TASKS if value_at(data, TASKS) == []]
    gone = [path for path, owner in over if {path, owner} <= given and set_by[path] < set_by[owner]]
    # What is said about another field. Of arguments, the order is no matter: a revision or a split given with a model
    # or rows is of those, before them or after.
    about: list[tuple[Path, tuple[Path, ...]]] = [(path, (owner,)) for path, owner in _ABOUT.items()]
    about += [(path, (*others, *_IN_PLACE_OF_ROWS)) for path, others, _ in without_use(facts)]
    for path, owners in about:
        latest = max((set_by[owner] for owner in owners if owner in set_by), default=0)
        if path in given and set_by[path] < min(latest, first_override):
            gone.append(path)
    return gone


def contradictions(
    data: dict[str, Value],
    places: Mapping[Path, Place],
    hinted: set[Path],
    told: frozenset[str],
    *,
    whole: bool,
) -> list[Mistake]:
    """Every pair of fields that cannot both hold, or need each other, and names that fit nothing.

    `hinted` are fields that were meant, with a value that is not known. `told` are the names of those that something
    is wrong with already, misspelt ones by their right names: of them it is not said what they need. `whole` is off if
    some fields could not be read, so that what is missing may be there.
    """
    facts = Facts(data, places, hinted, told)
    needs = training_contradictions(facts) if whole else []
    benchmarks = benchmark_contradictions(facts, whole=whole)
    pairs = [*_excluding(facts), *_meaningless(facts)]
    return [*pairs, *source_contradictions(facts), *needs, *benchmarks, *_names(facts)]


def _excluding(facts: Facts) -> list[Mistake]:
    mistakes = []
    for pair in _PAIRS:
        if all(facts.get(path) is not None for path in pair):
            path, other = facts.later(*pair)
            text = f"excludes `{other[-1]}`{facts.line(other)}: give one of the two"
            mistakes.append(facts.key_mistake(path, text))
    return mistakes


def _meaningless(facts: Facts) -> list[Mistake]:
    mistakes = []
    if facts.get(_BITS) == 16:
        for path in _OF_FOUR_BITS:
            if facts.get(path) is not None:
                text = f"has no meaning with `bits: 16`{facts.line(_BITS)}, which quantises nothing: leave one out"
                mistakes.append(facts.key_mistake(path, text))
    if facts.get(_REVISION) is not None and facts.is_local(_MODEL):
        text = "is for models of the hub, and `base_model` is a local folder: leave it out"
        mistakes.append(facts.key_mistake(_REVISION, text))
    return mistakes


def _names(facts: Facts) -> list[Mistake]:
    """Names that are no choice of the grammar's own, but that can be seen to fit nothing."""
    path: Path = ("lora", "target_modules")
    targets = facts.get(path)
    mistakes = []
    if isinstance(targets, str) and (problem := _target_problem(targets)):
        mistakes.append(facts.mistake(path, *problem))
    for number, target in enumerate(targets if isinstance(targets, list) else []):
        if isinstance(target, str) and (not target or _is_all_linear(target)):
            text = "`all-linear` is written without a list" if target else "expected the name of a module, got ''"
            mistakes.append(facts.mistake((*path, number), text, ALL_LINEAR if target else None))
    return [*mistakes, *_columns(facts)]


def _target_problem(targets: str) -> tuple[str, str] | None:
    """Why this text, a regular expression of whole paths, can match none; and what was probably meant."""
    shown = shorten(repr(targets))
    if targets == ALL_LINEAR or not targets:
        return None
    if _is_all_linear(targets):
        return f"got {shown}; did you mean `all-linear`?", ALL_LINEAR
    if re.fullmatch(r"[\w\s,-]+", targets):
        names = f"[{', '.join(re.findall(r'[^, ]+', targets))}]"
        return f"got {shown}, an expression that matches no whole path of a module; write {shorten(names)}", names
    return None


def _is_all_linear(target: str) -> bool:
    meant = foreign_value("lora.target_modules", target)
    return meant == ALL_LINEAR or (len(target) < 20 and distance(target.lower(), ALL_LINEAR) <= 2)


def _columns(facts: Facts) -> list[Mistake]:
    """Fields in `columns` that the format lacks which they are for, in the dataset and in its sources."""
    places: dict[Path, list[Any]] = {_COLUMNS: []}
    for source in [source for rows in (TRAIN, VALIDATION) for source in facts.sources(rows)]:
        own = source.said.get("columns") is not None
        places.setdefault((*source.at, "columns") if own else _COLUMNS, []).append(effective(facts, source, "format"))
    mistakes: dict[Path, Mistake] = {}
    for path, formats in places.items():
        columns = facts.get(path)
        for format in formats or [facts.get(_FORMAT)] if isinstance(columns, dict) else []:
            for name, problem in column_problems(format, columns).items():
                if name not in _fields(format) and any(name in _fields(other) for other in formats):
                    text = f"the format {format} has no field {shorten(repr(name))}, and another source has: "
                    problem = f"{text}give `columns` to each source that it is for", None
                mistakes.setdefault((*path, name), facts.key_mistake((*path, name), *problem))
    return [*mistakes.values()]


def column_problems(format: object, columns: Mapping[str, object]) -> dict[str, tuple[str, str | None]]:
    """The keys of `dataset.columns` that are no fields of the format: what is wrong, and which was probably meant."""
    known = _fields(format)
    lack = f"the format {format} has no" if _is_format(format) else "no format has a"
    problems: dict[str, tuple[str, str | None]] = {}
    owners: dict[str, str] = {}
    for name, column in columns.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean `{near}`?" if near else f"expected {', '.join(known)}"
            problems[name] = f"{lack} field {shorten(repr(name))}; {hint}", near
        elif isinstance(column, str) and (twin := owners.setdefault(column, name)) != name:
            problems[name] = f"takes the same column as `{twin}`: {shorten(repr(column))}", None
    return problems


def _fields(format: object) -> list[str]:
    """The fields of a row of this format; those of all of them for auto, and for what is no format."""
    formats = [name for name in FORMAT_COLUMNS if name == format or not _is_format(format)]
    return [field for name in formats for field in FORMAT_COLUMNS[name].fields]


def _is_format(format: object) -> bool:
    return isinstance(format, str) and format in FORMAT_COLUMNS
