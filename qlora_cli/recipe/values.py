"""Pydantic's errors in our words: where, what was expected, what was got, what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qlora_cli.errors import Mistake, Position
from qlora_cli.recipe.fields import (
    choices,
    expected,
    field_at,
    main_field,
    section_at,
    section_fields,
    sections,
    takes,
    takes_environment,
)
from qlora_cli.recipe.foreign import foreign_value
from qlora_cli.recipe.words import nearest
from qlora_cli.recipe.yaml_source import Path, Place, dotted, parse_scalar, shorten

_NO_SPACE = re.compile(r"([\w-]+):\S")
_TRUE, _FALSE = {"yes", "on", "y"}, {"no", "off", "n"}


def describe_errors(details: Sequence[ErrorDetails], places: Mapping[Path, Place]) -> list[Mistake]:
    """One mistake a place: a field that takes either of two types fails once for each in pydantic."""
    # Of what is wrong with one value, that it is of another type says the least.
    ranked = sorted(details, key=lambda detail: detail["type"].endswith("_type"))
    found = {_location(detail, places): detail for detail in reversed(ranked)}
    # A list with a wrong item is no text either, nor is an item with a wrong key; the inner one says more.
    outer = {path[:length] for path in found for length in range(1, len(path))}
    return [_mistake(path, found[path], places) for path in reversed(found) if path not in outer]


def position_of(path: Path, places: Mapping[Path, Place]) -> Position:
    """Where the value at `path` stands, or the nearest section around it."""
    for length in range(len(path), 0, -1):
        if place := places.get(path[:length]):
            return place.value if length == len(path) else place.key
    return places[()].value


def _location(detail: ErrorDetails, places: Mapping[Path, Place]) -> Path:
    # pydantic names the member of a union that failed, as in ("lora", "target_modules", "list[str]").
    path: Path = ()
    for part in detail["loc"]:
        if (*path, part) in places or field_at((*path, part)) is not None:
            path = (*path, part)
    return path


def _mistake(path: Path, detail: ErrorDetails, places: Mapping[Path, Place]) -> Mistake:
    if detail["type"] == "missing":
        field = field_at(path)
        about = f": {field.description}" if field is not None and field.description else ""
        section = places.get(path[:-1])
        position = section.key if section else position_of(path[:-1], places)
        return Mistake(position, dotted(path), f"is required and was not given{about}")
    if detail["type"] == "value_error":
        return Mistake(position_of(path, places), dotted(path), str(detail["ctx"]["error"]))
    got, place = detail["input"], places.get(path)
    position = position_of(path, places)
    if got is None and place:
        position = place.key
    if detail["type"] == "extra_forbidden":
        return Mistake(place.key if place else position, dotted(path), "unknown key")
    if len(path) == 1 and path[0] in sections():
        allowed = f"`{path[0]}` takes {', '.join(section_fields(path))}"
        message = f"expected a section of `key: value` lines, got {_show(got, place)}"
        if isinstance(got, str) and (found := _NO_SPACE.match(got)):
            message += f"; a space is missing after `{found[1]}:`"
        elif inner := _main_field_for(got, path):
            message += f"; that is for `{dotted(inner)}`"
        return Mistake(position, dotted(path), message, allowed=allowed)
    field = field_at(path)
    if field is None:
        return Mistake(position, dotted(path), f"is not what can be here: {_show(got, place)}")
    hint, suggestion = _hint(got, path, field, place)
    message = f"expected {_words(detail, field, got)}, got {_show(got, place)}{hint}"
    return Mistake(position, dotted(path), message, suggestion)


def _main_field_for(got: Any, path: Path) -> Path | None:
    """The field that a section is about, where its value stands in place of the section."""
    section = section_at(path)
    name = main_field(section) if section else None
    field = field_at((*path, name)) if name and got else None
    return (*path, name) if name and field and takes(field, list) and isinstance(got, str | list) else None


def _words(detail: ErrorDetails, field: FieldInfo, got: Any) -> str:
    match detail["type"]:
        case "finite_number":
            return f"{expected(field)}; one that is finite"
        case "string_unicode":
            return f"{expected(field)} (this holds half a character)"
        case "string_too_short" | "too_short" if got == "":
            return f"{expected(field, str)} that is not empty"
        case "too_short":
            return f"{expected(field)}, with at least one item"
    return expected(field)


def _hint(got: Any, path: Path, field: FieldInfo, place: Place | None) -> tuple[str, str | None]:
    """What to write instead, to be put after the message, and the word alone."""
    if got is None:
        return _unset(field), None
    if isinstance(got, str) and "${" in got and not takes_environment(path):
        return "; environment variables are not read in this field", None
    if known := choices(field):
        meant = _choice(got, path, known)
        return (f"; did you mean `{meant}`?", meant) if meant else ("", None)
    if isinstance(got, str):
        return _from_text(got, path, field)
    if isinstance(got, float) and takes(field, int) and got.is_integer() and abs(got) < 1e15:
        return f"; write {int(got)}", str(int(got))
    if isinstance(got, dict) and got.keys() & section_fields((*path, 0)):
        return "; a section is an item of a list: put `- ` before its first line", None
    if hint := takes(field, str) and _text_hint(got, place):
        return hint, None
    return "", None


def _unset(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    return f"; its default is {_show(default, None)}"


def _choice(got: Any, path: Path, known: tuple[Any, ...]) -> str | None:
    names = [str(value) for value in known]
    word = str(got)
    if word in names:
        return word  # 4 in quotes
    if not isinstance(got, str) or any(isinstance(value, int) for value in known):
        return None
    # What an item of a list says means the same as in the section that has the list.
    field = dotted((path[0], path[-1]) if any(isinstance(part, int) for part in path) else path)
    return foreign_value(field, word) or nearest(word, names)


def _from_text(got: str, path: Path, field: FieldInfo) -> tuple[str, str | None]:
    if takes(field, bool):
        word = got.strip().lower()
        for words, meant in ((_TRUE, "true"), (_FALSE, "false")):
            if word in {*words, meant}:
                return f"; write {meant}", meant
    if (takes(field, int) or takes(field, float)) and isinstance(parse_scalar(got.strip()), int | float):
        return f"; without quotes it is a number: {got.strip()}", got.strip()
    return "", None


def _text_hint(got: Any, place: Place | None) -> str:
    if isinstance(got, bool | int | float):
        return f"; in quotes it is text: '{shorten(_written(got, place))}'"
    return ""


def _show(got: Any, place: Place | None) -> str:
    match got:
        case None:
            return "nothing"
        case bool() | int() | float():
            return shorten(_written(got, place))
        case dict():
            return "a section" if got else "an empty section"
        case str():
            return shorten(repr(got))
        case _:
            return shorten(yaml.safe_dump(got, default_flow_style=True, allow_unicode=True, width=200).strip())


def _written(got: Any, place: Place | None) -> str:
    """A number or a truth as the recipe has it: 1e3, not 1000.0."""
    if place and place.text and type(parse_scalar(place.text)) is type(got):
        return place.text
    return str(got).lower() if isinstance(got, bool) else str(got)
