"""Runs that are scored while they train, on a task whose score moves with every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_cli.recipe.schema import Recipe
from tests.support.runs import tiny_recipe

# The perplexity of a few words, which falls as they are learned: less of it is better.
_WORDS = """\
task: words
dataset_path: made_up/words
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
metadata: {version: 1.0}
"""

# A choice between two things, with an example before it: drawn, so that another draw is another prompt.
_COLOURS = """\
task: colours
dataset_path: made_up/colours
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
num_fewshot: 2
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {version: 1.0}
"""

_GROUP = """\
group: both
task: [colours, words]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""

_THINGS = {"red": "apple", "blue": "sky", "green": "leaf", "black": "night", "white": "snow"}


def write_tasks(folder: Path) -> tuple[Path, Path]:
    """A folder of definitions, tasks `words` and `colours` and their group `both`, and one of their data."""
    tasks, data = folder / "tasks", folder / "root"
    tasks.mkdir()
    for name, text in (("words", _WORDS), ("colours", _COLOURS), ("both", _GROUP)):
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    _write(
        data / "made_up" / "words" / "test.jsonl", [{"text": f"{colour} {thing}"} for colour, thing in _THINGS.items()]
    )
    colours = list(_THINGS)
    rows = [
        {"prompt": colour, "choices": [_THINGS[colour], _THINGS[colours[place - 1]]], "label": 0}
        for place, colour in enumerate(colours)
    ]
    _write(data / "made_up" / "colours" / "train.jsonl", rows)
    _write(data / "made_up" / "colours" / "test.jsonl", rows[:4])
    return tasks, data


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scored_recipe(folder: Path, *, evaluation: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """`tiny_recipe`, scored on `words` and `colours` every 3 steps and before the first."""
    recipe = tiny_recipe(folder, **sections)
    tasks, root = (folder / "tasks", folder / "root") if (folder / "tasks").exists() else write_tasks(folder)
    section = {"tasks": ["words", "colours"], "task_path": str(tasks), "data_root": str(root)}
    section |= {"every_steps": 3, "at_start": True}
    return Recipe.model_validate(recipe.model_dump(exclude_unset=True) | {"evaluation": section | (evaluation or {})})
