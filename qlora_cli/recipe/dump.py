"""A recipe back to YAML, such that reading it gives it back."""

from __future__ import annotations

import yaml

from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.substitution import escape_all


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with every default spelled out, so that `load_recipe` gives back an equal one."""
    data = recipe.model_dump()
    # Of fields that exclude each other, only those in force: the grammar refuses both at once.
    if recipe.training.max_steps is not None:
        del data["training"]["num_train_epochs"]
    if recipe.quantization.bits == 16:
        del data["quantization"]["quant_type"], data["quantization"]["double_quant"]
    return yaml.dump(escape_all(data), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


class RecipeDumper(yaml.SafeDumper):
    """Quotes what PyYAML leaves bare but we read as a number, such as the commit `12345e6`, and escapes what is no
    letter: PyYAML loses some of the rarer line breaks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if yaml_source.parse_scalar(text) == text and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


RecipeDumper.add_representer(str, _represent_text)
