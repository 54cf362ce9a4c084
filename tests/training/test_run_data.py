"""A run over data that needs care: mixed sources, dates in the template, rows that were skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import OutputError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training import record
from qlora_cli.training.events import Event, Notice
from qlora_cli.training.run import train
from tests.support.runs import read_metrics, tiny_recipe, write_rows
from tests.support.tokenizers import CHATML, tiny_tokenizer


def change(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    data = recipe.model_dump()
    data[section] |= fields
    return Recipe.model_validate(data)


def losses(run: str) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(run), "train")]


def test_a_run_that_goes_on_tomorrow_learns_what_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chat template writes the date: the day on which it began, whenever it is resumed; another run has its own."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2, "save_steps": 2})
    tiny_tokenizer("{{ strftime_now('%d %B %Y') }}" + CHATML).save_pretrained(recipe.base_model)
    with monkeypatch.context() as patch:
        patch.setattr(record, "_now", lambda: "2026-01-02T23:59:00+00:00")
        whole = recipe.model_copy(update={"output_dir": str(tmp_path / "whole")})
        train(change(whole, "training", max_steps=4))
        train(recipe)
    train(change(recipe, "training", max_steps=4), resume=True)
    assert losses(recipe.output_dir) == losses(str(tmp_path / "whole"))
    later = recipe.model_copy(update={"output_dir": str(tmp_path / "later")})
    train(change(later, "training", max_steps=4))
    assert losses(later.output_dir) != losses(recipe.output_dir)


def test_another_template_is_another_run(tmp_path: Path) -> None:
    """Its file was edited under the same name: to go on would be to learn something else."""
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    recipe = tiny_recipe(tmp_path, dataset={"chat_template": str(template)}, training={"max_steps": 2})
    train(recipe)
    template.write_text(CHATML.replace("<|im_start|>", "<|bos|>"))
    with pytest.raises(OutputError, match="the train and validation rows are not those that the run in"):
        train(change(recipe, "training", max_steps=4), resume=True)


def test_the_adapter_keeps_the_template_that_was_learned(tmp_path: Path) -> None:
    """That of the recipe, not the base model's: whoever generates with the adapter must render alike."""
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML.replace("user", "person"))
    recipe = tiny_recipe(tmp_path, dataset={"chat_template": str(template)}, training={"max_steps": 1})
    train(recipe)
    assert (Path(recipe.output_dir) / "adapter" / "chat_template.jinja").read_text() == template.read_text()


def test_a_mixture_is_recorded_and_told(tmp_path: Path) -> None:
    """Every source with its rows and weight in run.json; the epoch has as many rows as the weights say."""
    first, second = write_rows(tmp_path / "a.jsonl", 12), write_rows(tmp_path / "b.jsonl", 8, start=100)
    with second.open("a") as file:
        file.write("{\n")
    sources = [{"path": str(first), "weight": 2.0}, {"path": str(second), "weight": 0.5}]
    recipe = tiny_recipe(tmp_path, dataset={"train": sources, "on_bad_row": "skip"}, training={"max_steps": 14})
    events: list[Event] = []
    train(recipe, listeners=[events.append])
    data = json.loads((Path(recipe.output_dir) / "run.json").read_text())["data"]["train"]
    assert [(source["rows"], source["weight"]) for source in data["sources"]] == [(12, 2.0), (8, 0.5)]
    assert (data["rows"], data["skipped"]) == (20, 1)
    # 24 + 4 rows an epoch, 4 in a step.
    assert read_metrics(Path(recipe.output_dir), "train")[-1]["epoch"] == 2.0
    assert any("1 row could not be read and was skipped" in event.text for event in events if isinstance(event, Notice))
