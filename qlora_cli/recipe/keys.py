"""Keys that the grammar does not have: what was meant by each, and the data with that put right.

A key is put where it was meant, as a compiler goes on after a slip, so that what is wrong below it is told in the
same breath. The mistake itself stays one.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.errors import Mistake
from qlora_cli.recipe.fields import all_fields, section_fields, sections
from qlora_cli.recipe.foreign import explain, foreign_name
from qlora_cli.recipe.words import is_slip, nearest, plain
from qlora_cli.recipe.yaml_source import Path, Source, Value, dotted, shorten


@dataclass(frozen=True)
class _Reading:
    """What a key was taken for: the message, the field that was meant, and whether the value can go there."""

    message: str
    meant: Path | None = None
    movable: bool = True


def repair_keys(source: Source) -> list[Mistake]:
    """Every unknown key as a mistake; in `source` each is moved to the field that was meant, or taken out."""
    mistakes = _repair_section(source, ())
    for name in sections():
        if isinstance(source.data.get(name), dict):
            mistakes += _repair_section(source, (name,))
    return mistakes


def _repair_section(source: Source, section: Path) -> list[Mistake]:
    known = section_fields(section)
    data = _section(source.data, section)
    mistakes = []
    for key in [key for key in data if key not in known]:
        reading = _read_key(key, section)
        path = (*section, key)
        where = f"`{section[0]}`" if section else "the top level"
        mistakes.append(
            Mistake(
                source.places[path].key,
                dotted(path),
                reading.message,
                suggestion=dotted(reading.meant) if reading.meant else None,
                allowed=f"{where} takes {', '.join(known)}" if reading.message.startswith("unknown") else "",
            )
        )
        value = data.pop(key)
        if reading.meant and reading.movable:
            _put(source, path, reading.meant, value)
        elif reading.meant:
            source.hinted.add(reading.meant)
    return mistakes


def _read_key(key: str, section: Path) -> _Reading:
    word = plain(key)
    return (
        _slip(key, word, section)
        or _misplaced(key, word, section)
        or _other_tools(key)
        or _alike(word, section)
        or _Reading("unknown key")
    )


def _slip(key: str, word: str, section: Path) -> _Reading | None:
    """Another way of writing a key of this section, a slip of one letter, or the one key that has it as a part."""
    here = section_fields(section)
    name = word if word in here else next((name for name in here if is_slip(word, name)), None)
    foreign = foreign_name(key)
    if foreign and foreign.here == dotted((*section, name or "")):
        return None  # `datasets` is not `dataset` misspelt
    if name is None and section and not (foreign and foreign.here and foreign.here.startswith(f"{section[0]}.")):
        parts = [name for name in here if word in name.split("_")]
        name = parts[0] if len(parts) == 1 else None
    return _did_you_mean((*section, name), f"`{name}`") if name else None


def _misplaced(key: str, word: str, section: Path) -> _Reading | None:
    """A key of another section."""
    elsewhere = {dotted(path): path for path, _ in all_fields() if path[:-1] != section}
    if "." in key and key in elsewhere:
        path = elsewhere[key]
        return _Reading(f"write `{path[-1]}` on a line of its own, indented under `{path[0]}`", path)
    if homes := [path for path in elsewhere.values() if path[-1] == word]:
        place = f"under `{homes[0][0]}`" if len(homes[0]) > 1 else "at the top level"
        return _Reading(f"`{shorten(key)}` belongs {place}", homes[0])
    if section and word in section_fields(()):
        return _Reading(f"`{shorten(key)}` belongs at the top level", (word,))
    return None


def _other_tools(key: str) -> _Reading | None:
    foreign = foreign_name(key)
    if foreign is None:
        return None
    meant = tuple(foreign.here.split(".")) if foreign.here else None
    return _Reading(explain(key, foreign), meant, foreign.same_value)


def _alike(word: str, section: Path) -> _Reading | None:
    """A key that is much like one of this section, or else of another."""
    if near := nearest(word, section_fields(section)):
        return _did_you_mean((*section, near), f"`{near}`")
    paths = [path for path, _ in all_fields() if path[:-1] != section]
    if near := nearest(word, [path[-1] for path in paths]):
        path = next(path for path in paths if path[-1] == near)
        return _did_you_mean(path, f"`{dotted(path)}`")
    return None


def _did_you_mean(path: Path, name: str) -> _Reading:
    return _Reading(f"unknown key; did you mean {name}?", path)


def _section(data: dict[str, Value], section: Path) -> dict[str, Value]:
    inner = data[str(section[0])] if section else data
    return inner if isinstance(inner, dict) else {}


def _put(source: Source, path: Path, meant: Path, value: Value) -> None:
    """Move a value with the places of everything in it; what stands there already goes before."""
    target: dict[str, Value] = source.data
    for part in meant[:-1]:
        inner = target.setdefault(str(part), {})
        if not isinstance(inner, dict):
            return
        target = inner
        source.places.setdefault((part,), source.places[path])
    name = str(meant[-1])
    present = target.setdefault(name, value)
    if present is not value:
        if not (isinstance(present, dict) and isinstance(value, dict)):
            return
        target[name] = value | present
    for old in [old for old in source.places if old[: len(path)] == path]:
        source.places.setdefault((*meant, *old[len(path) :]), source.places[old])
