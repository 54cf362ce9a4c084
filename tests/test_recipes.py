"""The shipped recipes are valid, say nothing that is a default already, and the Guanaco ones are the QLoRA paper's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))

# QLoRA (arXiv 2305.14314), appendix B and table 9, row OASST1: dropout and learning rate by size.
GUANACO = {
    "llama-7b": ("huggyllama/llama-7b", 0.1, 2e-4),
    "llama-13b": ("huggyllama/llama-13b", 0.1, 2e-4),
    "llama-33b": ("huggyllama/llama-30b", 0.05, 1e-4),
    "llama-65b": ("huggyllama/llama-65b", 0.05, 1e-4),
}


def stem(path: Path) -> str:
    return path.stem


def stated_defaults(model: type[BaseModel], data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every leaf of `data` that equals the schema's default."""
    for key, value in data.items():
        field = model.model_fields[key]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from stated_defaults(field.annotation, value, f"{prefix}{key}.")
        elif not field.is_required() and value == field.get_default(call_default_factory=True):
            yield prefix + key


def test_there_are_recipes() -> None:
    """A glob that finds nothing would pass every other test here."""
    assert {path.stem for path in RECIPES} == {"smollm2-gsm8k", *GUANACO}


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_recipe_is_valid(path: Path) -> None:
    assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_recipe_states_no_default(path: Path) -> None:
    """What is written in a shipped recipe is there because it differs."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(stated_defaults(Recipe, data)) == []


def test_a_stated_default_would_be_found() -> None:
    data = {"task": "causal_lm", "lora": {"rank": 16, "alpha": 8}, "dataset": {"train": "x", "columns": {}}}
    assert list(stated_defaults(Recipe, data)) == ["task", "lora.rank", "dataset.columns"]


def schema_of(path: Path) -> Draft202012Validator:
    """The schema that a recipe's first line names, relative to the recipe, as editors read it."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    marker, _, name = first.partition("=")
    assert marker == "# yaml-language-server: $schema"
    return Draft202012Validator(json.loads((path.parent / name).read_text(encoding="utf-8")))


def misspelt(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that is not free, its last letter left out: its name, and the recipe with it."""
    for key, value in data.items():
        yield key, {(name[:-1] if name == key else name): inner for name, inner in data.items()}
        if isinstance(value, dict) and key != "columns":
            yield from ((f"{key}.{name}", data | {key: inner}) for name, inner in misspelt(value))


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_editors_check_it(path: Path) -> None:
    """Its first line names the schema; it is valid under it, and with any one key misspelt it is not."""
    schema = schema_of(path)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(schema.iter_errors(data)) == []
    wrong = dict(misspelt(data))
    assert {"base_model", "dataset.train", "training", "output_dir"} < wrong.keys()
    for name, recipe in wrong.items():
        said = [error.message for error in schema.iter_errors(recipe) if error.validator == "additionalProperties"]
        assert len(said) == 1, name
        assert f"'{name.split('.')[-1][:-1]}' was unexpected" in said[0]


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_recipe_is_listed(path: Path) -> None:
    assert f"({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GUANACO)
def test_guanaco_is_the_papers(name: str) -> None:
    """Every training setting that the paper gives, read from the resolved recipe: defaults are checked as well."""
    base_model, dropout, learning_rate = GUANACO[name]
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    assert recipe.base_model == base_model

    quantization = recipe.quantization
    assert (quantization.bits, quantization.quant_type, quantization.double_quant) == (4, "nf4", True)
    assert quantization.compute_dtype == "bfloat16"

    lora = recipe.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (64, 16, dropout, "all-linear")

    dataset = recipe.dataset
    assert dataset.train == dataset.validation == "timdettmers/openassistant-guanaco"
    assert (dataset.train_split, dataset.validation_split) == ("train", "test")
    assert (dataset.format, dataset.max_length, dataset.overlong) == ("text", 512, "truncate")

    training = recipe.training
    assert training.max_steps == 1875
    assert training.per_device_train_batch_size == 1
    assert training.gradient_accumulation_steps == 16
    assert training.learning_rate == learning_rate
    assert (training.lr_scheduler_type, training.warmup_steps) == ("constant", 0)
    assert training.optimizer == "paged_adamw_32bit"
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.999)
    assert (training.weight_decay, training.max_grad_norm) == (0.0, 0.3)
    assert training.gradient_checkpointing


def test_demo_recipe_finds_its_data() -> None:
    """Both files are in the repository, whole, and next to their licence."""
    dataset = load_recipe(FOLDER / "smollm2-gsm8k.yaml").dataset
    assert dataset.validation is not None
    train, validation = Path(dataset.train), Path(dataset.validation)
    assert len(train.read_text(encoding="utf-8").splitlines()) == 512
    assert len(validation.read_text(encoding="utf-8").splitlines()) == 64
    assert "MIT License" in (train.parent / "LICENSE").read_text(encoding="utf-8")
