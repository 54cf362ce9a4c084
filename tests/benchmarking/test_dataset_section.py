"""How rows named for an evaluation are read: as the target's run read its own, but for what is said otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.benchmarking.dataset_section import dataset_section
from qlora_cli.benchmarking.target import Target, find_target
from qlora_cli.errors import DataError, RecipeError, RequestError
from qlora_cli.recipe.schema import DatasetSection, SourceSection
from tests.support.adapters import write_run
from tests.support.models import save_tiny_model
from tests.support.runs import tiny_recipe, write_rows


@pytest.fixture
def model(here: Path) -> Target:
    save_tiny_model(here / "llama")
    write_rows(here / "rows.jsonl", 4)
    return find_target("llama")


def run(here: Path, **dataset: Any) -> Target:
    write_run(tiny_recipe(here, dataset=dataset))
    write_rows(here / "rows.jsonl", 4)
    return find_target("run")


def source(section: DatasetSection) -> SourceSection:
    (only,) = section.validation_sources
    return only


def test_without_a_run_format_is_recognised_and_long_rows_are_cut(here: Path, model: Target) -> None:
    """At the model's positions, of which the tiny one has 256, or 2048."""
    section = dataset_section("rows.jsonl", model)
    assert source(section).path == str(here / "rows.jsonl")
    assert (section.format, section.columns, section.max_length, section.overlong) == ("auto", {}, 256, "truncate")
    assert dataset_section("rows.jsonl", model, ["dataset.max_length=100"]).max_length == 100


def test_what_is_said_is_taken(model: Target) -> None:
    overrides = ["dataset.format=prompt_completion", "dataset.columns.prompt=completion", "dataset.overlong=drop"]
    section = dataset_section("rows.jsonl", model, [*overrides, "dataset.columns.completion=prompt"])
    assert section.format == "prompt_completion"
    assert section.columns == {"prompt": "completion", "completion": "prompt"}
    assert section.overlong == "drop"


def test_rows_are_read_as_the_run_read_its_own(here: Path) -> None:
    """Format, columns, length, template and what is learned are the run's; packing, which changes nothing in what a
    model says, is not."""
    target = run(
        here,
        format="prompt_completion",
        columns={"prompt": "prompt", "completion": "completion"},
        max_length=99,
        supervise="everything",
        on_bad_row="skip",
        chat_template="{{ messages }}",
        packing=True,
    )
    section = dataset_section("rows.jsonl", target)
    assert source(section).format == "prompt_completion"
    assert source(section).columns == {"prompt": "prompt", "completion": "completion"}
    assert (section.max_length, section.supervise, section.on_bad_row) == (99, "everything", "skip")
    assert section.chat_template == "{{ messages }}"
    assert not section.packing
    # What training refuses is scored as far as it goes.
    assert section.overlong == "truncate"
    assert dataset_section("rows.jsonl", target, ["dataset.overlong=error"]).overlong == "error"


def test_another_format_has_columns_of_its_own(here: Path) -> None:
    target = run(here, format="prompt_completion", columns={"prompt": "prompt"})
    section = dataset_section("rows.jsonl", target, ["dataset.format=text", "dataset.columns.text=prompt"])
    assert (source(section).format, source(section).columns) == ("text", {"text": "prompt"})


def test_the_runs_own_rows_are_read_as_they_were(here: Path) -> None:
    """Of several sources, each of its own layout, the very one; of rows that are none of them, where these differ,
    nothing is taken over."""
    write_rows(here / "a.jsonl", 4)
    sources = [
        {"path": str(here / "a.jsonl"), "format": "text", "columns": {"text": "prompt"}},
        {"path": str(here / "train-32.jsonl"), "format": "prompt_completion"},
    ]
    target = run(here, train=sources, validation=sources)
    section = dataset_section("a.jsonl", target)
    assert (source(section).format, source(section).columns) == ("text", {"text": "prompt"})
    section = dataset_section("rows.jsonl", target)
    assert (source(section).format, source(section).columns) == ("auto", {})


def test_a_template_that_lies_with_the_adapter_is_not_looked_for(here: Path) -> None:
    """The recipe names a file that is gone; the tokenizer has what was in it."""
    template = here / "t.jinja"
    template.write_text("{{ messages }}")
    target = run(here, chat_template=str(template))
    assert dataset_section("rows.jsonl", target).chat_template == str(template)
    tokenizer = target.tokenizer()
    assert target.adapter is not None
    tokenizer.save_pretrained(target.adapter.folder)
    template.unlink()
    assert dataset_section("rows.jsonl", target).chat_template is None


def test_a_template_that_is_gone_is_told_of_the_runs_recipe(here: Path) -> None:
    template = here / "t.jinja"
    template.write_text("{{ messages }}")
    target = run(here, chat_template=str(template))
    template.unlink()
    with pytest.raises(RecipeError, match=r"^run/recipe.yaml: dataset.chat_template: t.jinja: there is no such file"):
        dataset_section("rows.jsonl", target)


def test_a_hub_dataset(here: Path, model: Target) -> None:
    """Its validation split, or the one that is said; of the run's own dataset, the run's configuration and split."""
    hub = source(dataset_section("org/rows", model))
    assert (hub.path, hub.split, hub.hub_config) == ("org/rows", "validation", None)
    hub = source(dataset_section("org/rows", model, ["dataset.validation_split=test", "dataset.hub_config=main"]))
    assert (hub.split, hub.hub_config) == ("test", "main")
    target = run(here, train="org/rows", hub_config="main", validation=None)
    hub = source(dataset_section("org/rows", target))
    assert (hub.split, hub.hub_config) == ("train", "main")
    hub = source(dataset_section("org/others", target))
    assert (hub.split, hub.hub_config) == ("validation", None)


def test_rows_with_odd_names(here: Path, model: Target) -> None:
    """What YAML or the grammar would read otherwise is a name all the same."""
    for name in ("a: b #c.jsonl", "${HOME}.jsonl", "it's [1].jsonl", "été.jsonl"):
        write_rows(here / name, 2)
        if "[" not in name:  # which is a glob, if nothing is called so
            assert source(dataset_section(name, model)).path == str(here / name)
    assert source(dataset_section("*.jsonl", model)).path == str(here / "*.jsonl")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("row.jsonl", "--dataset: row.jsonl: there is no such file or folder; did you mean rows.jsonl?"),
        ("./nothing", "--dataset: nothing: there is no such file or folder"),
        ("llama/tokenizer.json.txt", "--dataset: 'llama/tokenizer.json.txt'"),
        ("*.csv", "--dataset: *.csv: no file matches."),
        ("https://example.org/a.jsonl", "--dataset: https://example.org/a.jsonl is a URL; expected a path"),
        (" ", "--dataset: expected a file, folder, glob or hub name, got nothing"),
        ("a b", "--dataset: 'a b' is no path that is there, and no hub name such as org/name"),
    ],
)
def test_rows_that_are_not_there(model: Target, file: str, message: str) -> None:
    if file.endswith(".txt"):
        Path(file).write_text("x")
        message = "--dataset: llama/tokenizer.json.txt: expected a"
    with pytest.raises(DataError) as caught:
        dataset_section(file, model)
    assert str(caught.value).startswith(message)


def test_only_how_rows_are_read_can_be_set(model: Target) -> None:
    """All that is something else is told at once, before anything is read."""
    with pytest.raises(RequestError) as caught:
        dataset_section(
            "rows.jsonl", model, ["training.seed=1", "dataset.train=x", "dataset.packing=true", "dataset.train_split=a"]
        )
    assert str(caught.value).splitlines() == [
        "--set training.seed=1: an evaluation takes `dataset.KEY=VALUE` alone, which says how rows are read",
        "--set dataset.train=x: `dataset.train` is for training; --dataset names the rows",
        "--set dataset.packing=true: `dataset.packing` is for training; rows are scored one by one, which says the "
        "same",
        "--set dataset.train_split=a: `dataset.train_split` is for training; set dataset.validation_split",
    ]


def test_mistakes_in_what_is_set_are_the_houses(model: Target) -> None:
    with pytest.raises(RecipeError) as caught:
        dataset_section("rows.jsonl", model, ["dataset.fromat=text", "dataset.max_length=lots"])
    text = str(caught.value)
    assert "--set dataset.fromat" in text
    assert "did you mean" in text
    assert "--set dataset.max_length" in text
    assert "recipe.yaml" not in text


def test_the_section_is_one_that_the_grammar_takes(here: Path) -> None:
    """Through a recipe and back, as a run would keep it."""
    section = dataset_section("rows.jsonl", run(here))
    assert DatasetSection.model_validate(json.loads(section.model_dump_json())) == section
