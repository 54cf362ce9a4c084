"""Keys that the grammar does not have: what was meant by each, and the data with that put right.

A key is put where it was meant, as a compiler goes on after a slip, so that what is wrong below it is told in the
same breath. The mistake itself stays one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlora_cli.errors import Mistake
from qlora_cli.recipe.fields import all_fields, item_sections, main_field, section_at, section_fields, sections
from qlora_cli.recipe.foreign import explain, foreign_name, is_anothers
from qlora_cli.recipe.schema import FORMAT_COLUMNS
from qlora_cli.recipe.words import alike, is_slip, misspelt, plain
from qlora_cli.recipe.yaml_source import Path, Source, Value, dotted, shorten, value_at

_MANY_KEYS = 50  # unknown ones in one section: more is no recipe, or one of another tool
_DATASET: Path = ("dataset",)
# What people call rows, where it is plain that rows are meant.
_ROWS = dict.fromkeys(("file", "files", "name", "path", "train_file", "train_data"), "train") | dict.fromkeys(
    ("test", "val", "valid", "dev", "eval", "evaluation", "validation_file", "test_file", "held_out"), "validation"
)
# Lists of sources, and what is said of a source by the dataset's names, or by others.
_SOURCES: tuple[Path, ...] = ((*_DATASET, "train"), (*_DATASET, "validation"))
_OF_A_SOURCE = {
    **dict.fromkeys(("train", "validation", "file", "files", "source", "dataset", "url", "uri"), "path"),
    **dict.fromkeys(("train_split", "validation_split"), "split"),
    **dict.fromkeys(("config", "config_name", "subset"), "hub_config"),
    **dict.fromkeys(("ratio", "proportion", "probability", "prob", "probabilities", "fraction", "share"), "weight"),
}


@dataclass(frozen=True)
class _Reading:
    """What a key was taken for: the message, the field that was meant, and whether the value can go there."""

    message: str
    meant: Path | None = None
    movable: bool = True


def repair_keys(source: Source) -> list[Mistake]:
    """Every unknown key as a mistake; in `source` each is moved to the field that was meant, or taken out."""
    mistakes: list[Mistake] = []
    # What is moved into a section that was looked at before may be wrong itself.
    while found := [mistake for place in _section_paths(source.data) for mistake in _repair_section(source, place)]:
        mistakes += found
    return mistakes


def _section_paths(data: Value, path: Path = ()) -> list[Path]:
    """Where in the data the sections are that the grammar has, those in lists among them; outer ones first."""
    if isinstance(data, dict) and section_at(path):
        known = section_fields(path)
        inner = ((*path, key) for key in data if key in known)
        return [path, *(found for at in inner for found in _section_paths(value_at(data, at[-1:]), at))]
    items = enumerate(data if isinstance(data, list) and section_at((*path, 0)) else [])
    return [found for number, item in items for found in _section_paths(item, (*path, number))]


def _repair_section(source: Source, section: Path) -> list[Mistake]:
    known = section_fields(section)
    data = value_at(source.data, section)
    unknown = [key for key in data if key not in known] if isinstance(data, dict) else []
    if not isinstance(data, dict) or not unknown:
        return []
    where = f"`{dotted(section)}`" if section else "the top level"
    allowed = f"{where} takes {', '.join(known)}"
    mistakes = []
    for key in unknown[:_MANY_KEYS]:
        path = (*section, key)
        reading = _read_key(key, section, beside=data)
        mistakes.append(
            Mistake(
                source.places[path].key,
                dotted(path),
                reading.message,
                suggestion=dotted(reading.meant) if reading.meant else None,
                allowed=allowed if reading.message.startswith("unknown") else "",
            )
        )
        value = data.pop(key)
        if reading.meant and reading.movable:
            _put(source, path, reading.meant, value)
        elif reading.meant:
            source.hinted.add(reading.meant)
    if rest := unknown[_MANY_KEYS:]:
        first = source.places[(*section, rest[0])].key
        told = f"{len(rest):,} more unknown keys, from here on"
        mistakes.append(Mistake(first, dotted(section), told, allowed=allowed))
        for key in rest:
            del data[key]
    return mistakes


def _read_key(key: str, section: Path, *, beside: Mapping[str, Value] | None = None) -> _Reading:
    """What a key was taken for; `beside` is what the section has."""
    word, beside = plain(key), beside or {}
    return (
        _slip(key, word, section, beside.get(key))
        or _dotted_name(key, section)
        or _in_source(key, word, section, beside)
        or _misplaced(key, word, section)
        or _other_tools(key, section)
        or _alike(word, section)
        or _Reading("unknown key")
    )


def _in_source(key: str, word: str, section: Path, beside: Mapping[str, Value]) -> _Reading | None:
    """A key of one of several sources, by the name of what the dataset says for all of them, or by another."""
    if section[:-1] not in _SOURCES:
        return None
    here, foreign = section_fields(section), foreign_name(key)
    name = _OF_A_SOURCE.get(word)
    if word == "name":  # beside a path, other tools call the configuration so
        name = "hub_config" if "path" in beside else "path"
    if name:
        return _did_you_mean((*section, name), f"`{name}`")
    of_dataset = (foreign.here or "").removeprefix("dataset.") if foreign else ""
    name = of_dataset if of_dataset in here else _OF_A_SOURCE.get(of_dataset)
    if foreign and name:
        at = (*section, name)
        return _Reading(explain(key, replace(foreign, here=dotted(at))), at, foreign.same_value)
    if any(word in columns.fields for columns in FORMAT_COLUMNS.values()):
        at = (*section, "columns")
        return _Reading(f"`{shorten(key)}` belongs under `{dotted(at)}`", at, movable=False)
    return None


def _slip(key: str, word: str, section: Path, value: Value) -> _Reading | None:
    """Another way of writing a key of this section, a slip of one letter, or the one key that has its words."""
    here = section_fields(section)
    exact = not section and any(path[-1] == word for path, _ in all_fields())  # `tasks` is not `task` misspelt
    slips = () if exact else (name for name in here if is_slip(word, name))
    name = word if word in here else next(iter(slips), None)
    foreign = foreign_name(key)
    at = dotted((*section, name or ""))
    inner = is_anothers(key) and not isinstance(value, dict)  # what a section has would be no section
    if foreign and foreign.here and (foreign.here == at or (inner and foreign.here.startswith(f"{at}."))):
        return None  # a list called `datasets` is not `dataset` misspelt
    if name is None and section and not (foreign and foreign.here and foreign.here.startswith(f"{section[0]}.")):
        parts = [name for name in here if f"_{word}_" in f"_{name}_"]
        name = parts[0] if len(parts) == 1 else None
    return _did_you_mean((*section, name), f"`{name}`") if name else None


def _dotted_name(key: str, section: Path) -> _Reading | None:
    """A key with its section before it, as `--set` has it."""
    head, dot, rest = key.partition(".")
    if not dot or section or head not in sections() or not rest:
        return None
    path = (head, rest) if rest in section_fields((head,)) else _read_key(rest, (head,)).meant
    if path is None:
        return _Reading(f"unknown key; write keys of `{head}` on lines of their own, indented under it")
    return _Reading(f"write `{path[-1]}` on a line of its own, indented under `{path[0]}`", path)


def _misplaced(key: str, word: str, section: Path) -> _Reading | None:
    """A key of another section, or one of `dataset.columns`."""
    homes = [path for path, _ in all_fields() if path[:-1] != section and path[-1] == word]
    if homes:
        place = f"under `{homes[0][0]}`" if len(homes[0]) > 1 else "at the top level"
        return _Reading(f"`{shorten(key)}` belongs {place}", homes[0])
    for path, model in item_sections():
        if word in model.model_fields and word not in _ROWS and foreign_name(key) is None:
            example = f"[{{{main_field(model)}: ..., {word}: ...}}]"
            return _Reading(f"`{shorten(key)}` belongs to an item of `{dotted(path)}`, as in {example}")
    if section and word in section_fields(()):
        return _Reading(f"`{shorten(key)}` belongs at the top level", (word,))
    if section in ((), _DATASET) and any(word in columns.fields for columns in FORMAT_COLUMNS.values()):
        return _Reading(f"`{shorten(key)}` belongs under `dataset.columns`", (*_DATASET, "columns"), movable=False)
    return None


def _other_tools(key: str, section: Path) -> _Reading | None:
    if section == _DATASET and (name := _ROWS.get(plain(key))):
        return _did_you_mean((*_DATASET, name), f"`{name}`")
    foreign = foreign_name(key)
    if foreign is None or (section and foreign.here == section[0]):
        return None
    meant = tuple(foreign.here.split(".")) if foreign.here else None
    return _Reading(explain(key, foreign), meant, foreign.same_value)


def _alike(word: str, section: Path) -> _Reading | None:
    """A key that is like one of this section, or else of another. Only what is likely to be a slip is acted upon."""
    here = section_fields(section)
    if near := misspelt(word, here):
        return _did_you_mean((*section, near), f"`{near}`")
    elsewhere = {path[-1]: path for path, _ in all_fields() if path[:-1] != section}
    if near := misspelt(word, elsewhere):
        return _did_you_mean(elsewhere[near], f"`{dotted(elsewhere[near])}`")
    if near := alike(word, here):
        return _did_you_mean((*section, near), f"`{near}`", movable=False)
    if near := alike(word, elsewhere, cutoff=0.75):
        return _did_you_mean(elsewhere[near], f"`{dotted(elsewhere[near])}`", movable=False)
    return None


def _did_you_mean(path: Path, name: str, *, movable: bool = True) -> _Reading:
    return _Reading(f"unknown key; did you mean {name}?", path, movable)


def _put(source: Source, path: Path, meant: Path, value: Value) -> None:
    """Move a value with the places of everything in it; what stands there already goes before."""
    target: Value = source.data
    for length, part in enumerate(meant[:-1], 1):
        if isinstance(target, dict):
            target.setdefault(str(part), {})
        target = value_at(target, (part,))
        source.places.setdefault(meant[:length], source.places[path])
    if not isinstance(target, dict):
        return
    name = str(meant[-1])
    present = target.setdefault(name, value)
    if present is not value:
        if not (isinstance(present, dict) and isinstance(value, dict)):
            return
        target[name] = value | present
    for old in [old for old in source.places if old[: len(path)] == path]:
        source.places.setdefault((*meant, *old[len(path) :]), source.places[old])
