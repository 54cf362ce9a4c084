"""The recipe's grammar as JSON Schema (draft 2020-12), from which editors complete and underline.

It is derived from the pydantic models, so it cannot lag behind them. It is a little wider than they are: to JSON Schema
`1.0` is an integer, `.inf` a number, and any text a regular expression. Editors read YAML by the 1.2 core rules, as
we do, so `2e-4` is a number to both; but `1_000`, an integer to us, is text to them, and `0x10` the other way round.

Of the rules between fields it has those that one key breaks by being there: that key is what gets underlined. Two words
here are not JSON Schema's, whose validators pass over them, but yaml-language-server's and VS Code's: `errorMessage`,
what is said of a key, and `doNotSuggest`, because what a rule says of a key must not be offered as one more key.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from qlora_cli.recipe.schema import Recipe

Schema: TypeAlias = dict[str, Any]

# Null is as good as nothing: it is the default of every field that may be null.
_GIVEN: Schema = {"not": {"type": "null"}, "doNotSuggest": True}
_NOT_GIVEN: Schema = {"type": "null", "doNotSuggest": True}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, as plain data; every call builds a new one."""
    schema = Recipe.model_json_schema(schema_generator=_EditorSchema)
    definitions = schema.pop("$defs")
    rules = _section_rules()
    required_in_sections = {}
    for name, field in schema["properties"].items():
        if "$ref" in field:
            definition = definitions[field["$ref"].removeprefix("#/$defs/")]
            if "required" in definition:
                required_in_sections[name] = {"required": definition.pop("required"), "doNotSuggest": True}
            del definitions[field["$ref"].removeprefix("#/$defs/")]
            schema["properties"][name] = _section(name, definition, rules.get(name, []))
    for definition in definitions.values():  # of the sections that are items of lists
        definition["title"] = f"{definition['title'].removesuffix('Section').lower()} section"
    schema["$defs"] = definitions
    # What a recipe that extends another leaves out, the other may say.
    schema["if"] = {"properties": {"extends": _GIVEN}, "required": ["extends"]}
    schema["else"] = {
        "required": schema.pop("required"),
        "properties": required_in_sections,
        "allOf": [_evaluation_needs_rows()],
    }
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def recipe_schema_text() -> str:
    """The schema as the text of a file: indented by 2, ending in a newline."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


class _EditorSchema(GenerateJsonSchema):
    """Pydantic's JSON Schema, with what editors show: the keys' own names, and the defaults that factories make."""

    def get_title_from_name(self, name: str) -> str:
        return name

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        factory: Any = schema.get("default_factory")
        value = factory() if factory else None
        # A section's default is said by its own fields.
        return super().get_default_value(schema) if factory is None or isinstance(value, BaseModel) else value

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        inner = self.generate_inner(schema["schema"])
        if isinstance(inner.get("type"), str) and not inner.keys() & {"enum", "const"}:
            # One list of types, not two alternatives: an editor then names both when a value is neither.
            return {**inner, "type": [inner["type"], "null"]}
        if "anyOf" in inner:
            return {**inner, "anyOf": [*inner["anyOf"], {"type": "null"}]}
        return super().nullable_schema(schema)

    def union_schema(self, schema: core_schema.UnionSchema) -> JsonSchemaValue:
        union = super().union_schema(schema)
        sections = [part for part in union.get("anyOf", ()) if "$ref" in part]
        if len(sections) == 1:
            # Said so, an editor tells what is wrong in a section; of two alternatives it would take the shorter.
            others = [part for part in union["anyOf"] if part not in sections]
            otherwise = others[0] if len(others) == 1 else {"anyOf": others}
            return {"if": {"type": "object", "doNotSuggest": True}, "then": sections[0], "else": otherwise}
        return union

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        model = super().model_schema(schema)
        for field in model["properties"].values():
            if "anyOf" in field and "minLength" in field:
                # What is text or a list is held to it as either; pydantic writes only what holds for text.
                field["minItems"] = field["minLength"]
        return model


def _section(name: str, definition: Schema, rules: list[Schema]) -> Schema:
    """A section in its place, its keys a storey below.

    Were they its own, an editor that completes the section's name would write every default into the recipe.
    """
    keys = {word: definition.pop(word) for word in ("properties", "additionalProperties")}
    return {**definition, "title": f"{name} section", "allOf": [keys, *rules]}


def _section_rules() -> dict[str, list[Schema]]:
    """What contradicts itself within a section."""
    return {
        "quantization": [
            _refuse(
                {"bits": {"const": 16, "doNotSuggest": True}},
                "with bits: 16 nothing is stored in 4 bits; leave this out",
                "quant_type",
                "double_quant",
            )
        ],
        "dataset": [
            _refuse(
                {"validation": _GIVEN, "validation_fraction": _GIVEN},
                "give either validation or validation_fraction, not both",
                "validation_fraction",
            ),
            _one_weight("validation"),
        ],
        "training": [
            _refuse({"max_steps": _GIVEN}, "give either max_steps or num_train_epochs, not both", "num_train_epochs")
        ],
    }


def _one_weight(rows: str) -> Schema:
    """The rule that the sources of `rows` have no weight, or say that it is 1."""
    message = f"a weight has no meaning in {rows}, whose rows are evaluated once each"
    weight = {"weight": {"const": 1, "errorMessage": message, "doNotSuggest": True}}
    return {"properties": {rows: {"items": {"properties": weight, "doNotSuggest": True}, "doNotSuggest": True}}}


def _evaluation_needs_rows() -> Schema:
    """A rule between two sections; of a recipe that extends another it cannot be asked."""
    message = "eval_steps needs rows to evaluate on: give dataset.validation or dataset.validation_fraction"
    no_rows = {"properties": {"validation": _NOT_GIVEN, "validation_fraction": _NOT_GIVEN}, "doNotSuggest": True}
    rule = _refuse({"eval_steps": _GIVEN}, message, "eval_steps")
    return {
        "if": {"properties": {"dataset": no_rows}, "required": ["dataset"]},
        "then": {"properties": {"training": {**rule, "doNotSuggest": True}}},
    }


def _refuse(when: dict[str, Schema], message: str, *keys: str) -> Schema:
    """The rule that, when all of `when` is there and holds, `keys` must not be."""
    return {
        "if": {"properties": when, "required": list(when)},
        "then": {"properties": dict.fromkeys(keys, False), "errorMessage": message},
    }
