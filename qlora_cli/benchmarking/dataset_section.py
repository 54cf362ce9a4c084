"""How the rows that `--dataset` names are read: as the target's run read its own, but for what is said otherwise."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.benchmarking.named_rows import OPTION, check_overrides, rows_path
from qlora_cli.benchmarking.target import Target
from qlora_cli.errors import Position, RecipeError
from qlora_cli.model.source import context_length
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.recipe.dump import RecipeDumper
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.paths import is_local
from qlora_cli.recipe.schema import DatasetSection, SourceSection
from qlora_cli.recipe.substitution import escape_all

# Stands in the recipe that is made here for what it is not about.
_NOBODY = "not-given/by-anyone"
_LONGEST = 2048  # tokens of a row, where no run says; fewer if the model has fewer positions
# Of a run's section, what says how rows are read, wherever they are.
_HOW = ("chat_template", "supervise", "on_bad_row", "max_length")


def dataset_section(file: str, target: Target, overrides: Sequence[str] = ()) -> DatasetSection:
    """The section of a recipe whose validation rows are those that `file` names.

    Format and columns are those of the target's run, if it is of one; if the run read these very rows, as it read
    them. Rows that are too long are cut and counted, unless `dataset.overlong` says otherwise.

    Args:
        file: a file, folder, glob or hub name; a path is relative to the current folder. Of a hub dataset it is the
            split `dataset.validation_split`.
        overrides: `dataset.KEY=VALUE`, as `--set` takes them.

    Raises:
        DataError: if there is no such file.
        RequestError: if an override is of something else than how rows are read.
        RecipeError: with every other mistake in the overrides.
    """
    check_overrides(overrides)
    path = rows_path(file)
    given = {override.partition("=")[0].strip().removeprefix("dataset.").partition(".")[0] for override in overrides}
    fields = {"train": path, "validation": path, **_as_the_run(path, target, given)}
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "recipe.yaml")
        data: dict[str, Any] = {"base_model": _NOBODY, "dataset": fields, "output_dir": _NOBODY}
        trial.write_text(yaml.dump(escape_all(data), Dumper=RecipeDumper, allow_unicode=True), encoding="utf-8")
        try:
            return load_recipe(trial, overrides).dataset
        except RecipeError as error:
            raise _told_otherwise(error, str(trial), target) from None


def _as_the_run(path: str, target: Target, given: set[str]) -> dict[str, Any]:
    """What the target's run says of how rows are read, without what is said otherwise."""
    recipe = None if target.adapter is None else target.adapter.recipe
    if recipe is None:
        positions = context_length(target.config()) or _LONGEST
        fields: dict[str, Any] = {"max_length": min(_LONGEST, positions), "overlong": "truncate"}
        return {name: value for name, value in fields.items() if name not in given}
    section = recipe.dataset
    fields = {name: getattr(section, name) for name in _HOW}
    if target.has_own_tokenizer:
        del fields["chat_template"]  # it is in the tokenizer, and its file may be gone
    # As for a row that is too long: what training refuses can be scored as far as it goes.
    fields["overlong"] = "truncate" if section.overlong == "error" else section.overlong
    like = _like(path, section)
    if like is not None and like.path == path:
        fields |= {"hub_config": like.hub_config, "validation_split": like.split}
    if is_local(path):
        fields = {name: value for name, value in fields.items() if name not in ("hub_config", "validation_split")}
    # Columns are those of a format: another one has its own.
    if like is not None and "format" not in given:
        fields |= {"format": like.format, "columns": dict(like.columns or {})}
    return {name: value for name, value in fields.items() if name not in given and value is not None}


def _like(path: str, section: DatasetSection) -> SourceSection | None:
    """The run's source that these rows are read like: themselves, else its validation rows, else its training rows, if
    all of those are read alike."""
    sources = (*section.validation_sources, *section.train_sources)
    if same := [source for source in sources if source.path == path]:
        return same[0]
    first, *others = section.validation_sources or section.train_sources
    alike = all((other.format, other.columns) == (first.format, first.columns) for other in others)
    return first if alike else None


def _told_otherwise(error: RecipeError, trial: str, target: Target) -> RecipeError:
    """The same mistakes, each where its reader can find it."""
    adapter = target.adapter
    recipe = OPTION if adapter is None or adapter.run is None else shown_path(adapter.run.recipe)
    mistakes = []
    for mistake in error.mistakes:
        of_rows = mistake.key in ("dataset.train", "dataset.validation")
        if mistake.position.file == trial:
            mistake = replace(mistake, position=Position(OPTION if of_rows else recipe))
        if mistake.key != "dataset.train":  # the rows are there under two names
            mistakes.append(replace(mistake, key="") if of_rows else mistake)
    return RecipeError(mistakes or error.mistakes)
