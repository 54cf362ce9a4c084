"""What a check says of the benchmarks that a run would be scored on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from qlora_cli.check_view import show_check
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.checking import check_data
from qlora_cli.training.facts import BenchmarkFacts
from tests.support.benchmarks import write_data_root
from tests.support.scored_runs import scored_recipe

pytestmark = pytest.mark.usefixtures("indexed")


def _shown(recipe: Recipe) -> list[str]:
    out = io.StringIO()
    show_check(Console(file=out, width=200, soft_wrap=True), Path("r.yaml"), check_data(recipe))
    return out.getvalue().splitlines()


def test_what_it_will_be_scored_on(tmp_path: Path) -> None:
    """Tasks, documents after the limit, and how often: before the first of 8 steps, every 3, and after the last."""
    recipe = scored_recipe(tmp_path, evaluation={"limit": 3})
    facts = check_data(recipe)
    assert facts.benchmarks == BenchmarkFacts(("words", "colours"), 2, 6, 4)
    assert facts.problems == ()
    assert "scores   words, colours: 6 documents, 4 times" in _shown(recipe)


def test_a_part_of_a_group(tmp_path: Path) -> None:
    """The group by its name, with its tasks counted; that it is a part is a note."""
    root = write_data_root(tmp_path / "data")
    names = {"tasks": "mmlu", "task_path": None, "data_root": str(root), "allow_partial": True}
    recipe = scored_recipe(tmp_path, evaluation=names)
    lines = _shown(recipe)
    assert "scores   mmlu: 4 tasks, 24 documents, 4 times" in lines
    assert any(line.startswith("note     mmlu: scored on 4 of its 57 tasks") for line in lines)


def test_what_training_would_refuse(tmp_path: Path) -> None:
    """A misspelt task is one problem among those of the data, in training's words; the data is looked at as well."""
    facts = check_data(scored_recipe(tmp_path, evaluation={"tasks": ["wrods"]}))
    (problem,) = facts.problems
    assert problem == "evaluation.tasks: 'wrods' is no task, group or tag that lm-eval knows; did you mean words?"
    assert (facts.benchmarks, facts.train is None) == (None, False)
    facts = check_data(scored_recipe(tmp_path, evaluation={"keep_best": "words/acc"}))
    (problem,) = facts.problems
    assert problem.startswith("evaluation.keep_best: words has word_perplexity, bits_per_byte, not 'acc'")


def test_no_benchmarks_no_line(tmp_path: Path) -> None:
    """A recipe without them reads as before."""
    nothing = {"tasks": [], "every_steps": None, "at_start": False, "data_root": None, "task_path": None}
    assert not any(line.startswith("scores") for line in _shown(scored_recipe(tmp_path, evaluation=nothing)))
