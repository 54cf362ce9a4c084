"""What `qlora init` need not ask, because a flag or `--set` says it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qlora_cli.commands.replies import read_columns, understood
from qlora_cli.errors import RequestError
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.paths import is_local
from qlora_cli.recipe.schema import Section
from qlora_cli.recipe.yaml_source import Value

# Stands in the recipe that `--set` is tried on for what nobody gave.
_NOBODY = "not-given/by-anyone"
_TRIAL = f"""base_model: {_NOBODY}
dataset: {{train: {_NOBODY}, validation: {_NOBODY}}}
output_dir: {_NOBODY}
"""


class Said(NamedTuple):
    """An answer given beforehand; `owner` is the flag or the `--set` that gave it."""

    owner: str
    text: str


@dataclass(frozen=True)
class Given:
    """What need not be asked. `columns` is as in the recipe, empty if nobody gave it; `more` holds the fields that no
    question is for, by section."""

    base_model: Said | None = None
    train: Said | None = None
    validation: Said | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    output_dir: Said | None = None
    more: Mapping[str, Value] = field(default_factory=dict)

    def of_dataset(self, name: str) -> Any:
        """A field of the dataset section in `more`, or None."""
        section = self.more.get("dataset")
        return section.get(name) if isinstance(section, dict) else None


def what_is_given(flags: dict[str, str | None], overrides: list[str]) -> Given:
    """Flags and `--set`, the flag where both speak. Raises RecipeError for a wrong `--set`, before any question."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "recipe.yaml")
        trial.write_text(_TRIAL, encoding="utf-8")
        more = _set_fields(load_recipe(trial, overrides))
    dataset = more.get("dataset", {})
    said = {
        "base_model": _path_said("base_model", more.pop("base_model")),
        "train": _path_said("dataset.train", dataset.pop("train")),
        "validation": _held_out_said(dataset),
        "output_dir": None if more["output_dir"] == _NOBODY else Said("--set output_dir", more["output_dir"]),
    }
    del more["output_dir"]
    columns: dict[str, str] = dataset.pop("columns", {})
    if (text := flags.get("columns")) is not None:
        columns = understood("--columns", read_columns, text)
    answers = {name: text for name, text in flags.items() if text is not None and name != "columns"}
    said |= {name: Said(f"--{name.replace('_', '-')}", text) for name, text in answers.items()}
    return Given(**said, columns=columns, more=more)


def _set_fields(section: Section) -> dict[str, Any]:
    """The fields that were set, as plain data, sections as mappings of theirs."""
    values = ((name, getattr(section, name)) for name in type(section).model_fields if name in section.model_fields_set)
    return {name: _set_fields(value) if isinstance(value, Section) else value for name, value in values}


def _path_said(key: str, value: str | list[Any]) -> Said | None:
    """The value of a field that names a path or something on the hub, near to how it was typed."""
    if isinstance(value, list):
        raise RequestError(f"--set {key}: init asks about one source; give one, and list the others in the recipe")
    if value == _NOBODY:
        return None
    short = shown_path(Path(value)) if is_local(value) else value
    return Said(f"--set {key}", short if is_local(short) else value)


def _held_out_said(dataset: dict[str, Any]) -> Said | None:
    share = dataset.pop("validation_fraction", None)
    if share is not None:
        return Said("--set dataset.validation_fraction", str(share))
    if "validation" not in dataset:
        return None
    value = dataset.pop("validation")
    return Said("--set dataset.validation", "0") if value is None else _path_said("dataset.validation", value)
