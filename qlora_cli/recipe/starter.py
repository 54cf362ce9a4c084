"""A first recipe: from answers to commented YAML.

Comments and defaults come from the schema. Nothing is looked up here, and nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml
from pydantic import BaseModel

from qlora_cli.recipe.dump import RecipeDumper
from qlora_cli.recipe.fields import sections
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.substitution import escape_all
from qlora_cli.recipe.yaml_source import Value

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ROWS = "openai/gsm8k"
DEFAULT_SHARE = 0.05
# Of the default rows: what no look at local files could tell.
DEFAULT_CONFIG, DEFAULT_TEST = "main", "test"
DEFAULT_COLUMNS = {"prompt": "question", "completion": "answer"}

# What people change first, by section.
_CHANGED_FIRST: dict[str, tuple[str, ...]] = {
    "dataset": ("max_length",),
    "quantization": ("bits",),
    "lora": ("rank", "alpha"),
    "training": (
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
    ),
}
_SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"
_ADVICE = "# The rest has its default. To change one of these, take away the `# ` of its line and of its section."
_WIDEST = 60  # a longer line's comment stands two spaces after it, and moves no other


@dataclass(frozen=True)
class Answers:
    """What a first recipe says. Names and paths are as the recipe is to have them.

    `validation` is held-out rows or the share of `train` to hold out. `more` holds any other fields, by section.
    `rows_note` says what `train` has, `length_note` where `max_length` comes from.
    """

    base_model: str
    train: str
    output_dir: str
    validation: str | float | None = None
    hub_config: str | None = None
    validation_split: str | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    more: Mapping[str, Value] = field(default_factory=dict)
    rows_note: str = ""
    length_note: str = ""

    def settings(self) -> dict[str, Value]:
        """The recipe as plain data, in the schema's order, only with what it sets; `more` goes before the rest."""
        held_out = "validation" if isinstance(self.validation, str) else "validation_fraction"
        dataset: dict[str, Value] = {
            "train": self.train,
            held_out: self.validation,
            "hub_config": self.hub_config,
            "validation_split": self.validation_split,
            "format": self.format,
            "columns": {**self.columns} or None,
            "max_length": self.max_length,
        }
        answered: dict[str, Value] = {name: value for name, value in dataset.items() if value is not None}
        data: dict[str, Value] = {"base_model": self.base_model, "dataset": answered, "output_dir": self.output_dir}
        for name, value in self.more.items():
            section = data.get(name)
            data[name] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
        return _in_order(data, Recipe)


def starter_text(answers: Answers) -> str:
    """The recipe, a comment on every line that sets something, and what people change first, commented out."""
    settings = escape_all(answers.settings())  # a name that is `${x}` to the letter is no reference
    notes = {
        "train": answers.rows_note and f"the rows to learn: {answers.rows_note}",
        "max_length": answers.length_note and f"longest row, in tokens: {answers.length_note}",
    }
    top = {name: value for name, value in settings.items() if name not in _CHANGED_FIRST and name != "output_dir"}
    blocks = [
        [_SCHEMA_LINE],
        _aligned(_lines(top, Recipe, {}, "")),
        _section("dataset", settings, notes),
        _aligned(_lines({"output_dir": settings["output_dir"]}, Recipe, {}, "")),
        [_ADVICE],
        *(_section(name, settings, {}) for name in _CHANGED_FIRST if name != "dataset"),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _in_order(data: Mapping[str, Value], model: type[BaseModel]) -> dict[str, Value]:
    """`data` in the order of the model's fields, without sections that set nothing and null where it is the default."""
    result: dict[str, Value] = {}
    for name, known in model.model_fields.items():
        value = data.get(name)
        section = sections().get(name) if model is Recipe else None
        if section is not None and isinstance(value, dict):
            value = _in_order(value, section) or None
        if value is not None or (section is None and name in data and known.get_default() is not None):
            result[name] = value
    return result


def _section(name: str, settings: Mapping[str, Value], notes: Mapping[str, str]) -> list[str]:
    """A section's lines: what is set, then, commented out, what people change first."""
    model = sections().get(name)
    values = settings.get(name)
    if model is None:
        return []
    present = values if isinstance(values, dict) else {}
    # Of two fields that exclude each other, the one that is not set is no suggestion.
    left = [field for field in _CHANGED_FIRST[name] if field not in present]
    left = [field for field in left if not (field == "num_train_epochs" and present.get("max_steps") is not None)]
    defaults = {field: model.model_fields[field].get_default() for field in left}
    if not present:
        return [f"# {name}:", *_aligned(_lines(defaults, model, notes, "#   "))]
    return [f"{name}:", *_aligned(_lines(present, model, notes, "  ") + _lines(defaults, model, notes, "  # "))]


def _lines(
    values: Mapping[str, Value], model: type[BaseModel], notes: Mapping[str, str], start: str
) -> list[tuple[str, str]]:
    """`key: value` and its comment, for every value."""
    lines = []
    for name, value in values.items():
        known = model.model_fields[name]
        lines.append((f"{start}{name}: {_flow(value)}", _one_line(notes.get(name) or known.description or "")))
    return lines


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    width = max((len(text) for text, _ in lines if len(text) <= _WIDEST), default=0)
    return [f"{text:<{width}}  # {comment}" if comment else text for text, comment in lines]


def _one_line(comment: str) -> str:
    """A comment without what would end it, or what YAML allows nowhere: names of files and columns may have such."""
    return "".join(letter if letter.isprintable() else "?" for letter in comment)


def _flow(value: Value) -> str:
    """A value on one line, such that reading it gives it back."""
    text = yaml.dump(
        [value], Dumper=RecipeDumper, default_flow_style=True, sort_keys=False, width=sys.maxsize, allow_unicode=True
    )
    return text.strip()[1:-1]
