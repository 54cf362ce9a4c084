"""Recipes written to a file and read back, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe

MINIMAL = "base_model: org/model\ndataset:\n  train: org/rows\noutput_dir: out\n"
"""Four lines; what a test adds begins on the fifth."""


def load(text: str, *overrides: str, must_exist: bool = False) -> Recipe:
    """The recipe of this text, as recipes/r.yaml below the current folder."""
    path = Path("recipes/r.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides, must_exist=must_exist)


def refusal(text: str, *overrides: str, must_exist: bool = False) -> str:
    """What is said of the recipe of this text; the file is called r.yaml."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, must_exist=must_exist)
    return str(caught.value).replace("recipes/r.yaml", "r.yaml")
