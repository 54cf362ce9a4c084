"""Pydantic's errors in our words: where, what was expected, what was got, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.yaml_source import Position, YamlSource, shorten


def describe_errors(details: Sequence[ErrorDetails], source: YamlSource) -> list[str]:
    """One line a place."""
    reasons: dict[yaml_source.Path, list[str]] = {}
    for detail in details:
        location: yaml_source.Path = ()
        for part in detail["loc"]:
            if (*location, part) in source.positions or not _is_union_tag(part):
                location = (*location, part)
        reasons.setdefault(location, []).append(_reason(detail, location))
    lines = []
    for location, texts in reasons.items():
        position = position_of(location, source)
        name = ".".join(str(part) for part in location)
        # A field that takes either of two types fails once for each.
        lines.append(f"{position}: {name + ': ' if name else ''}{'; or '.join(texts)}")
    return lines


def _is_union_tag(part: str | int) -> bool:
    # pydantic names the member of a union that failed, as in ("lora", "target_modules", "list[str]").
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part)


def position_of(location: yaml_source.Path, source: YamlSource) -> Position:
    """The position of the value itself, or of the nearest section around it."""
    for length in range(len(location), -1, -1):
        if position := source.positions.get(location[:length]):
            return position
    return Position(next(iter(source.positions.values())).file, 0, 0)


def _reason(detail: ErrorDetails, location: yaml_source.Path) -> str:
    got = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            known = list(_section_fields(location[:-1]))
            owners = [name for name in Recipe.model_fields if str(location[-1]) in _section_fields((name,))]
            if owners:
                return f"unknown key here; it belongs under `{owners[0]}`"
            if str(location[-1]) in Recipe.model_fields:
                return "unknown key here; it belongs at the top level"
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"expected one of: {', '.join(known)}"
            return f"unknown key; {hint}"
        case "missing":
            return "is required and was not given"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "model_type" | "model_attributes_type":
            return f"expected a section of `key: value` lines, got {_show(got)}"
        case _:
            message = detail["msg"]
            return f"{message[0].lower()}{message[1:]}, got {_show(got)}"


def _section_fields(location: yaml_source.Path) -> dict[str, Any]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return {}
        model = annotation
    return dict(model.model_fields)


def _show(value: object) -> str:
    return "nothing" if value is None else shorten(repr(value))
