"""The JSON Schema says what the pydantic models say, and what an editor can underline of the rules between fields."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.json_schema import recipe_schema, recipe_schema_text
from qlora_cli.recipe.schema import Recipe, SourceSection

SCHEMA = recipe_schema()
MINIMAL: dict[str, Any] = {"base_model": "b", "dataset": {"train": "t"}, "output_dir": "o"}


def complaints(data: dict[str, Any], schema: dict[str, Any] = SCHEMA) -> list[str]:
    """Where the mistakes are, as section.key; of a key that must not be there, its section; "" is the recipe itself."""
    return [".".join(map(str, error.absolute_path)) for error in Draft202012Validator(schema).iter_errors(data)]


def accepts(data: dict[str, Any]) -> bool:
    """Whether pydantic does."""
    try:
        Recipe.model_validate(data)
    except ValidationError:
        return False
    return True


def recipe(**sections: Any) -> dict[str, Any]:
    """The minimal recipe with more keys; those of the dataset are added to its own."""
    dataset = MINIMAL["dataset"] | sections.pop("dataset", {})
    return copy.deepcopy(MINIMAL | {"dataset": dataset} | sections)


def models() -> Iterator[tuple[tuple[str, ...], type[BaseModel], dict[str, Any]]]:
    """The recipe, its sections, and the items of lists: where each is, its model, and the schema's description of its
    keys."""
    yield (), Recipe, SCHEMA
    yield ("dataset", "train"), SourceSection, SCHEMA["$defs"]["SourceSection"]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield (name,), field.annotation, SCHEMA["properties"][name]["allOf"][0]


def rule_schemas(schema: Any, *, in_rule: bool = False) -> Iterator[tuple[str, Any]]:
    """What rules (`if`, `then`, `else`, and all below them) say of keys: each key with its schema."""
    if isinstance(schema, list):
        for item in schema:
            yield from rule_schemas(item, in_rule=in_rule)
    elif isinstance(schema, dict):
        if in_rule:
            yield from schema.get("properties", {}).items()
        for word, inner in schema.items():
            children = inner.values() if word == "properties" else [inner]
            for child in children:
                yield from rule_schemas(child, in_rule=in_rule or word in ("if", "then", "else"))


# ------------------------------------------------------------------------------------------- What it is


def test_it_is_a_schema() -> None:
    """It names draft 2020-12 and is valid under that draft's own schema."""
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(SCHEMA)


def test_its_text() -> None:
    """Indented by 2, one newline at the end, and nothing lost; a caller's changes do not reach the next one."""
    text = recipe_schema_text()
    assert json.loads(text) == SCHEMA
    assert text.startswith('{\n  "$schema": ')
    assert text.endswith("\n}\n")
    recipe_schema()["properties"].clear()
    recipe_schema()["else"]["required"].clear()
    assert recipe_schema_text() == text


def test_every_field_is_there_with_its_meaning_and_default() -> None:
    """Keys, descriptions and defaults are the models', factories' among them; titles are the keys."""
    for path, model, schema in models():
        assert list(schema["properties"]) == list(model.model_fields)
        for name, field in model.model_fields.items():
            said = schema["properties"][name]
            if "allOf" in said:  # a section
                assert said["description"] == field.annotation.__doc__
                assert (said["title"], said["type"]) == (f"{name} section", "object")
                assert "default" not in said
                continue
            assert (said["title"], said["description"]) == (name, field.description), (path, name)
            assert "default" in said or field.is_required(), (path, name)
            if not field.is_required():
                assert said["default"] == field.get_default(call_default_factory=True), (path, name)
    assert (SCHEMA["title"], SCHEMA["description"]) == ("Recipe", Recipe.__doc__)


def test_choices_and_bounds() -> None:
    """Every Literal is an enum (or a const), and bounds stand where pydantic has them, null or not."""
    sections = {path[0]: schema["properties"] for path, _, schema in models() if len(path) == 1}
    assert sections["quantization"]["bits"]["enum"] == [4, 16]
    assert sections["training"]["seed"] | {"minimum": 0, "exclusiveMaximum": 2**32} == sections["training"]["seed"]
    fraction = sections["dataset"]["validation_fraction"]
    assert (fraction["type"], fraction["exclusiveMinimum"], fraction["exclusiveMaximum"]) == (["number", "null"], 0, 1)
    for path, model, schema in models():
        for name, field in model.model_fields.items():
            choices = [value for part in (field.annotation, *get_args(field.annotation)) for value in literal(part)]
            said = schema["properties"][name]
            said = next((part for part in said.get("anyOf", ()) if "enum" in part), said)
            assert said.get("enum", [said["const"]] if "const" in said else []) == choices, (path, name)


def literal(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if getattr(get_origin(annotation), "__name__", "") == "Literal" else []


def test_only_columns_may_have_any_key() -> None:
    """Everything else is closed, so that a misspelt key is underlined."""
    assert all(schema["additionalProperties"] is False for _, _, schema in models())
    for path, _, schema in models():
        for name, said in schema["properties"].items():
            if "object" in said.get("type", ()) and "allOf" not in said:
                assert (path[0], name) == ("dataset", "columns")
                assert said["additionalProperties"] == {"type": "string"}


def test_what_is_for_editors_alone() -> None:
    """Completing a section's name does not write all its defaults; what rules say of a key is not one more key."""
    assert all("properties" not in SCHEMA["properties"][path[0]] for path, _, _ in models() if len(path) == 1)
    said = list(rule_schemas(SCHEMA))
    assert {"max_steps", "validation_fraction", "quant_type", "extends", "training"} <= {key for key, _ in said}
    assert [key for key, schema in said if schema is not False and not schema.get("doNotSuggest")] == []


def test_rules_name_keys_that_exist() -> None:
    """A renamed field does not leave a rule behind. `extends` alone may come later than its rule."""
    keys = {name for _, model, _ in models() for name in model.model_fields} | {"extends"}
    assert {key for key, _ in rule_schemas(SCHEMA)} <= keys
    assert set(SCHEMA["else"]["required"]) == set(MINIMAL)


# ------------------------------------------------------------------------------------------- Rules between fields

ROWS = {"validation": "v"}


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (recipe(training={"max_steps": 5, "num_train_epochs": 1}), "training.num_train_epochs"),
        (recipe(dataset={"validation": "v", "validation_fraction": 0.1}), "dataset.validation_fraction"),
        (recipe(quantization={"bits": 16, "quant_type": "nf4"}), "quantization.quant_type"),
        (recipe(quantization={"bits": 16, "double_quant": False}), "quantization.double_quant"),
        (recipe(training={"eval_steps": 5}), "training.eval_steps"),
        (recipe(dataset={"validation": None}, training={"eval_steps": 5}), "training.eval_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions(data: dict[str, Any], key: str) -> None:
    """One complaint, of the one key that must not be there: that is what an editor underlines."""
    section, name = key.split(".")
    (error,) = Draft202012Validator(SCHEMA).iter_errors(data)
    assert error.schema is False
    assert (list(error.absolute_path), error.instance) == ([section], data[section][name])
    assert complaints(data | {section: {k: v for k, v in data[section].items() if k != name}}) == []


@pytest.mark.parametrize(
    "data",
    [
        recipe(training={"max_steps": None, "num_train_epochs": 1}),
        recipe(training={"max_steps": 5}),
        recipe(dataset={"validation": None, "validation_fraction": 0.1}),
        recipe(dataset={"validation": "v", "validation_fraction": None}),
        recipe(quantization={"bits": 16, "compute_dtype": "float32"}),
        recipe(quantization={"bits": 4, "quant_type": "fp4", "double_quant": False}),
        recipe(quantization={"quant_type": "fp4"}),
        recipe(training={"eval_steps": None}),
        recipe(dataset=ROWS, training={"eval_steps": 5}),
        recipe(dataset={"validation_fraction": 0.1}, training={"eval_steps": 5}),
    ],
    ids=json.dumps,
)
def test_no_contradiction(data: dict[str, Any]) -> None:
    """Null is not given; one of two alone is fine."""
    assert complaints(data) == []
    assert accepts(data)


def test_a_weight_of_validation_rows() -> None:
    """Underlined where it says more than the default; training rows have one."""
    items = ["a.jsonl", {"path": "b.jsonl", "weight": 2}]
    assert complaints(recipe(dataset={"train": items})) == []
    assert complaints(recipe(dataset={"validation": items})) == ["dataset.validation.1.weight"]
    assert complaints(recipe(dataset={"validation": [{"path": "b.jsonl", "weight": 1.0}]})) == []
    assert recipe_schema_text().count("a weight has no meaning in validation") == 1


def test_what_an_editor_knows_in_an_item_of_a_list() -> None:
    """The keys with their meanings, the formats and the fields of `columns`; what is unknown or wrong is underlined."""
    (section,) = [part for part in SCHEMA["properties"]["dataset"]["allOf"] if "additionalProperties" in part]
    alternatives = section["properties"]["train"]["anyOf"]
    (items,) = [part["items"] for part in alternatives if part["type"] == "array"]
    assert items["if"] == {"type": "object", "doNotSuggest": True}
    assert (items["then"], items["else"]["type"]) == ({"$ref": "#/$defs/SourceSection"}, "string")
    assert SCHEMA["$defs"]["SourceSection"]["title"] == "source section"
    assert [*SCHEMA["$defs"]] == ["SourceSection"]
    for item in ({"pth": "a"}, {"path": "a", "weight": 0}, {"path": "a", "format": "x"}, {"weight": 1}, 3, "", ["a"]):
        assert complaints(recipe(dataset={"train": ["a", item]})) == ["dataset.train"], item
        assert not accepts(recipe(dataset={"train": ["a", item]}))


def test_messages_are_those_of_the_recipe() -> None:
    """An editor that knows `errorMessage` says why, not `Property num_train_epochs is not allowed`."""
    text = recipe_schema_text()
    for message in (
        "give either max_steps or num_train_epochs, not both",
        "give either validation or validation_fraction, not both",
        "with bits: 16 nothing is stored in 4 bits; leave this out",
        "eval_steps needs rows to evaluate on: give dataset.validation or dataset.validation_fraction",
    ):
        assert text.count(f'"errorMessage": "{message}"') == 1


# ------------------------------------------------------------------------------------------- extends

# The same whether the model has the field yet or not.
EXTENSIBLE = SCHEMA | {"properties": {"extends": {"type": ["string", "null"]}} | SCHEMA["properties"]}


@pytest.mark.parametrize("nothing", [{}, {"extends": None}], ids=["absent", "null"])
def test_required_without_extends(nothing: dict[str, Any]) -> None:
    """A recipe that stands alone must say these, and in `dataset` which rows."""
    for key in MINIMAL:
        assert complaints(nothing | {k: v for k, v in MINIMAL.items() if k != key}, EXTENSIBLE) == [""]
    assert complaints(nothing | recipe() | {"dataset": {}}, EXTENSIBLE) == ["dataset"]
    assert complaints(nothing | recipe(), EXTENSIBLE) == []


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        ({}, []),
        ({"dataset": {"max_length": 5}, "training": {"eval_steps": 5}}, []),
        ({"quantization": {"bits": 16}}, []),
        ({"lora": {"rnk": 4}}, ["lora"]),
        ({"training": {"max_steps": 5, "num_train_epochs": 1}}, ["training"]),
    ],
    ids=json.dumps,
)
def test_nothing_is_required_with_extends(data: dict[str, Any], keys: list[str]) -> None:
    """The other recipe may say the rest, rows to evaluate on among it; what is said here is still checked."""
    assert complaints({"extends": "base.yaml"} | data, EXTENSIBLE) == keys


# ------------------------------------------------------------------------------------------- Agreement with pydantic

FIELDS = [said for _, _, schema in models() for said in schema["properties"].values()]
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 2**32, -0.5, 1e-9, 0.5, 1.5),
    *("", "x", "4", "true", [], ["q_proj"], [""], [1], [None], {}, {"prompt": "q"}, {"prompt": 1}),
    *([{}], [{"path": "a"}], [["a"]], ["a", {"path": "b", "weight": 1}], [{"pth": "a"}], [{"path": ""}], [{"path": 1}]),
    *sorted({choice for said in FIELDS for choice in said.get("enum", ())}, key=str),
]


def mutations() -> Iterator[dict[str, Any]]:
    """Recipes with one field set to each value, one key that is unknown or elsewhere, or one that is missing.

    Rules between fields are left alone: evaluation has rows, but not where `validation_fraction` gives them.
    """
    for path, model, _ in models():
        base = recipe() if path == () else recipe(dataset=ROWS)
        names = {*model.model_fields, "unknown", "extend", "rank", "base_model", model.__name__}
        for name in sorted(names):
            for value in VALUES:
                data = copy.deepcopy(base)
                section = data.setdefault(path[0], {}) if path else data
                if len(path) > 1:  # of one item of a list
                    section[path[1]] = ["a.jsonl", {"path": "org/rows"}]
                    section = section[path[1]][1]
                section[name] = value
                if name == "validation_fraction":
                    del section["validation"]
                yield data
    yield from ({k: v for k, v in recipe().items() if k != key} for key in MINIMAL)


def test_it_agrees_with_pydantic() -> None:
    """On types, ranges, choices, unknown and missing keys: over a thousand recipes, each with one thing changed."""
    verdicts = [(data, accepts(data), not complaints(data)) for data in mutations()]
    assert [data for data, pydantic, schema in verdicts if pydantic != schema] == []
    accepted = sum(pydantic for _, pydantic, _ in verdicts)
    assert accepted > 200
    assert len(verdicts) - accepted > 800


@pytest.mark.parametrize(
    "data",
    [
        recipe(training={"max_steps": 10.0}),
        recipe(training={"weight_decay": math.inf}),
        recipe(lora={"target_modules": "("}),
    ],
    ids=["whole number with a point", "infinity", "no regular expression"],
)
def test_where_it_is_wider(data: dict[str, Any]) -> None:
    """JSON Schema cannot say these: an editor lets them pass, and the recipe is refused when it is read."""
    assert complaints(data) == []
    assert not accepts(data)


@pytest.mark.parametrize(
    "data",
    [
        recipe(),
        recipe(training={"max_steps": 5}, dataset={"validation_fraction": 0.5}),
        recipe(dataset={"train": ["a", {"path": "b", "weight": 2}], "validation": [{"path": "c", "columns": {}}]}),
    ],
    ids=["epochs", "steps", "sources"],
)
def test_what_a_run_keeps_is_valid(data: dict[str, Any]) -> None:
    """The recipe with every default written out, nulls among them, has nothing to underline."""
    assert complaints(yaml.safe_load(dump_recipe(Recipe.model_validate(data)))) == []
