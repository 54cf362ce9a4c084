"""What the sources of rows exclude, and what the dataset says for all of them that none takes up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from qlora_cli.errors import Mistake
from qlora_cli.recipe.facts import TRAIN, VALIDATION, Facts, GivenSource
from qlora_cli.recipe.fields import field_at
from qlora_cli.recipe.yaml_source import Path, dotted

_BOTH = (TRAIN, VALIDATION)
_FORMAT: Path = ("dataset", "format")


class _ForAll(NamedTuple):
    """A field of the dataset that holds for the sources of `rows`, those of the hub alone where `hub` says so, but not
    for those that say it themselves, under the name `own`."""

    path: Path
    rows: tuple[Path, ...]
    own: str | None
    hub: bool


_FOR_ALL = (
    _ForAll(("dataset", "train_split"), (TRAIN,), "split", hub=True),
    _ForAll(("dataset", "validation_split"), (VALIDATION,), "split", hub=True),
    _ForAll(("dataset", "hub_config"), _BOTH, "hub_config", hub=True),
    _ForAll(("dataset", "streaming"), _BOTH, None, hub=True),
    _ForAll(_FORMAT, _BOTH, "format", hub=False),
    _ForAll(("dataset", "columns"), _BOTH, "columns", hub=False),
)
_OF_A_FORMAT_WITH_TURNS: dict[Path, str] = {
    ("dataset", "supervise"): "of which everything is learned",
    ("dataset", "chat_template"): "which is learned as it stands",
}


def source_contradictions(facts: Facts) -> list[Mistake]:
    """Everything that is wrong between the sources and what is said of them."""
    unused = [facts.key_mistake(path, why) for path, _, why in without_use(facts)]
    each = [mistake for rows in _BOTH for source in facts.sources(rows) for mistake in _of_one(facts, rows, source)]
    return [*unused, *each, *_given_twice(facts)]


def without_use(facts: Facts) -> Iterator[tuple[Path, tuple[Path, ...], str]]:
    """What the dataset says for sources and none takes up: the field, the fields that make it so, and why."""
    yield from _not_taken_up(facts)
    yield from _without_turns(facts)


def _not_taken_up(facts: Facts) -> Iterator[tuple[Path, tuple[Path, ...], str]]:
    for field in _FOR_ALL:
        if _is_usual(facts, field.path) or any(facts.given(rows) and not facts.sources(rows) for rows in field.rows):
            continue
        sources = [source for rows in field.rows for source in facts.sources(rows)]
        able = [source for source in sources if not (field.hub and source.is_local)]
        if not sources:
            if field.rows == (VALIDATION,):
                yield field.path, field.rows, "is for `validation`, which is not given: name the dataset there"
        elif not able:
            yield field.path, field.rows, f"is for datasets of the hub, and {_none(facts, field.rows)}: leave it out"
        elif field.own and all(source.said.get(field.own) is not None for source in able):
            all_of_them = "every source of the hub" if field.hub else "every source"
            yield field.path, field.rows, f"has no use: {all_of_them} has its own `{field.own}`; leave it out"


def effective(facts: Facts, source: GivenSource, name: str) -> Any:
    """What holds for a source: what it says itself, or else what the dataset says for all."""
    own = source.said.get(name)
    for field in _FOR_ALL:
        if own is None and field.own == name and source.at[:2] in field.rows:
            own = _usual(field.path) if facts.get(field.path) is None else facts.get(field.path)
    return own


def _usual(path: Path) -> Any:
    field = field_at(path)
    return field.get_default(call_default_factory=True) if field is not None else None


def _is_usual(facts: Facts, path: Path) -> bool:
    return facts.get(path) is None or facts.get(path) == _usual(path)


def _none(facts: Facts, rows: tuple[Path, ...]) -> str:
    """That these fields name nothing on the hub."""
    given = [path for path in rows if facts.given(path)]
    if len(given) > 1:
        return f"neither {' nor '.join(f'`{path[-1]}`' for path in given)} names one"
    return f"`{given[0][-1]}` {'is a local path' if isinstance(facts.get(given[0]), str) else 'names none'}"


def _of_one(facts: Facts, rows: Path, source: GivenSource) -> Iterator[Mistake]:
    for name in ("hub_config", "split"):
        if source.is_local and source.said.get(name) is not None:
            text = "is for datasets of the hub, and `path` is a local path: leave it out"
            yield facts.key_mistake((*source.at, name), text)
    if rows == VALIDATION and source.said.get("weight") not in (None, 1):
        text = "has no meaning in `validation`, whose rows are evaluated once each: leave it out"
        yield facts.key_mistake((*source.at, "weight"), text)


def _given_twice(facts: Facts) -> Iterator[Mistake]:
    """A source whose rows, read in the same way, another one of the list gives already."""
    for rows in _BOTH:
        first: dict[str, Path] = {}
        for source in facts.sources(rows):
            names = ("format", "columns") if source.is_local else ("format", "columns", "hub_config", "split")
            same = json.dumps([source.path, *(effective(facts, source, name) for name in names)], sort_keys=True)
            other = first.setdefault(same, source.at)
            if other != source.at:
                instead = "give it once, with a `weight` above 1" if rows == TRAIN else "give it once"
                text = f"is the same source as `{dotted(other)}`{facts.line(other)}: {instead}"
                yield facts.mistake(source.named_at, text)


def _without_turns(facts: Facts) -> Iterator[tuple[Path, tuple[Path, ...], str]]:
    """What chooses among turns, or puts them into words, where there are none."""
    sources = [source for rows in _BOTH for source in facts.sources(rows)]
    if not sources or any(effective(facts, source, "format") != "text" for source in sources):
        return
    for path, why in _OF_A_FORMAT_WITH_TURNS.items():
        if not _is_usual(facts, path) and facts.get(path) != "everything":
            text = f"has no meaning with `format: text`{facts.line(_FORMAT)}, {why}: leave it out"
            yield path, (_FORMAT, *_BOTH), text
