"""The fields of a recipe by their dotted names, and in words what each of them takes."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_cli.recipe.schema import ENVIRONMENT, Recipe
from qlora_cli.recipe.yaml_source import Path


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a recipe by name, in order."""
    return {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def item_sections() -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every field that may be a list with sections in it, with its path and the section that an item is."""
    for path, _ in all_fields():
        if model := section_at((*path, 0)):
            yield path, model


def section_at(path: Path) -> type[BaseModel] | None:
    """The section that stands, or may stand, at `path`: the recipe itself for (); None if there is no such section."""
    field = field_at(path)
    kinds = [_plain(part) for part in _alternatives(field.annotation)] if field else []
    return next((kind for kind in kinds if _is_section(kind)), None) if path else Recipe


def section_fields(path: Path) -> dict[str, FieldInfo]:
    """The fields of the section at `path`, of the top level for (); empty if there is no such section."""
    model = section_at(path)
    return dict(model.model_fields) if model else {}


def field_at(path: Path) -> FieldInfo | None:
    """The field at `path`, or None. An item of a list is one, and so is a value of a mapping."""
    field = Recipe.model_fields.get(str(path[0])) if path else None
    for part in path[1:]:
        field = _inner_field(field, part) if field is not None else None
    return field


def main_field(model: type[BaseModel]) -> str | None:
    """The one field of a section that must be given, if it is one: what the section is about."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    return required[0] if len(required) == 1 else None


def all_fields() -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field that is no section, with its path."""
    for name, field in Recipe.model_fields.items():
        if name not in sections():
            yield (name,), field
    for name, model in sections().items():
        for inner, field in model.model_fields.items():
            yield (name, inner), field


def takes_environment(path: Path) -> bool:
    """Whether `${NAME}` in this field stands for an environment variable."""
    field = field_at(path)
    return field is not None and field.json_schema_extra == ENVIRONMENT


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """The values to choose from, if the field has a choice."""
    return next((get_args(part) for part in _alternatives(field.annotation) if get_origin(part) is Literal), ())


def takes(field: FieldInfo, kind: type) -> bool:
    """Whether values of this plain type, such as `bool` or `list`, are among what the field takes."""
    parts = [_plain(part) for part in _alternatives(field.annotation)]
    return any(part is kind or get_origin(part) is kind for part in parts)


def expected(field: FieldInfo, kind: type | None = None) -> str:
    """What the field takes: "a whole number above 0", "nf4 or fp4", "text or null"; or what of one `kind` it takes."""
    found = [part for part in _alternatives(field.annotation) if kind is None or _plain(part) is kind]
    return _either([_in_words(part, field.metadata) for part in found])


def _inner_field(field: FieldInfo, part: str | int) -> FieldInfo | None:
    """What is in a field: by its number in a list, or by its key."""
    for kind in (_plain(alternative) for alternative in _alternatives(field.annotation)):
        if get_origin(kind) is list and isinstance(part, int):
            item = FieldInfo.from_annotation(get_args(kind)[0])
            if field.json_schema_extra == ENVIRONMENT:
                item.json_schema_extra = ENVIRONMENT
            return item
        if get_origin(kind) is dict and isinstance(part, str):
            return FieldInfo.from_annotation(get_args(kind)[1])
        if _is_section(kind) and isinstance(part, str):
            return _own_field(kind, part)
    return None


def _own_field(model: type[BaseModel], name: str) -> FieldInfo | None:
    return model.model_fields.get(name)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _plain(annotation: Any) -> Any:
    return _plain(annotation.__origin__) if hasattr(annotation, "__metadata__") else annotation


def _in_words(annotation: Any, metadata: list[Any]) -> str:
    if hasattr(annotation, "__metadata__"):
        return _in_words(annotation.__origin__, [*annotation.__metadata__, *metadata])
    if get_origin(annotation) is Literal:
        return _either([str(value) for value in get_args(annotation)])
    if get_origin(annotation) is list:
        return f"a list of {' and '.join(_in_plural(part) for part in _alternatives(get_args(annotation)[0]))}"
    if get_origin(annotation) is dict:
        return "a mapping such as {prompt: question}"
    names = {str: "text", bool: "true or false", types.NoneType: "null", int: "a whole number", float: "a number"}
    if annotation in (int, float):
        return f"{names[annotation]}{_bounds(metadata, whole=annotation is int)}"
    return names.get(annotation, "a section")


def _in_plural(annotation: Any) -> str:
    return "sections" if _is_section(_plain(annotation)) else _in_words(annotation, [])


def _bounds(metadata: list[Any], *, whole: bool) -> str:
    found = {name: value for name in ("gt", "ge", "lt", "le") if (value := _limit(metadata, name)) is not None}
    if whole and "lt" in found:
        found["le"] = found.pop("lt") - 1
    if whole and "gt" in found and "le" in found:
        found["ge"] = found.pop("gt") + 1
    found = {name: f"{limit:,}" if whole else limit for name, limit in found.items()}
    match found:
        case {"gt": low, "le": high}:
            return f" above {low}, at most {high}"
        case {"gt": low, "lt": high}:
            return f" between {low} and {high}"
        case {"ge": low, "lt": high}:
            return f" from {low} to below {high}"
        case {"ge": low, "le": high}:
            return f" from {low} to {high}"
        case {"gt": low}:
            return f" above {low}"
        case {"ge": low}:
            return f" of at least {low}"
    return ""


def _limit(metadata: list[Any], name: str) -> Any:
    # pydantic keeps `Field(gt=0)` inside Annotated as a FieldInfo with metadata of its own.
    holders = [holder for item in metadata for holder in (item, *getattr(item, "metadata", []))]
    return next((limit for holder in holders if (limit := getattr(holder, name, None)) is not None), None)


def _either(parts: list[str]) -> str:
    if parts[-1] == "null":
        return f"{_either(parts[:-1])}, or null"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
