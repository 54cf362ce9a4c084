"""What the fields of `training` need of each other, and in which words that is told."""

from __future__ import annotations

import pytest

from qlora_cli.recipe.dump import dump_recipe
from tests.support.recipes import MINIMAL, load, refusal

# Five lines.
WITH_ROWS = MINIMAL.replace("  train: org/rows\n", "  train: org/rows\n  validation_fraction: 0.1\n")
ROWS = MINIMAL.replace("dataset: {", "dataset: {validation_fraction: 0.1, ")
ROWS = "needs rows to evaluate on: give dataset.validation or dataset.validation_fraction"


@pytest.mark.parametrize(
    ("section", "messages"),
    [
        ("{max_skipped_steps: 5}",
         ["5:12: training.max_skipped_steps: has no meaning with `on_nonfinite: stop`: set skip_step there, or leave "
          "this out"]),
        ("{on_nonfinite: stop, max_skipped_steps: 5}",
         ["5:32: training.max_skipped_steps: has no meaning with `on_nonfinite: stop` (line 5), which skips none: set "
          "skip_step there, or leave this out"]),
        ("{on_nonfinite: skip}",
         ["5:26: training.on_nonfinite: expected stop or skip_step, got 'skip'; did you mean `skip_step`?"]),
        ("{on_nonfinite: skip_step, max_skipped_steps: 0}",
         ["5:56: training.max_skipped_steps: expected a whole number above 0, got 0"]),
        ("{early_stopping_patience: 3, eval_steps: 5}",
         [f"5:12: training.early_stopping_patience: {ROWS}", f"5:40: training.eval_steps: {ROWS}"]),
        ("{load_best: true}",
         [f"5:12: training.load_best: {ROWS}",
          "5:12: training.load_best: needs `eval_steps`: evaluated at the end alone, there is one checkpoint to choose "
          "from"]),
    ],
)  # fmt: skip
def test_what_is_refused(section: str, messages: list[str]) -> None:
    """At the field that cannot be as it is, all at once."""
    assert refusal(MINIMAL + f"training: {section}\n").splitlines() == [f"r.yaml:{message}" for message in messages]


def test_with_rows_they_still_need_evaluations() -> None:
    """The one at the end is too late for both."""
    text = WITH_ROWS + "training: {early_stopping_patience: 3, load_best: true}\n"
    assert refusal(text).splitlines() == [
        "r.yaml:6:12: training.early_stopping_patience: needs `eval_steps`: evaluated at the end alone, there is "
        "nothing to stop before",
        "r.yaml:6:40: training.load_best: needs `eval_steps`: evaluated at the end alone, there is one checkpoint to "
        "choose from",
    ]
    assert load(text, "training.eval_steps=5").training.early_stopping_patience == 3


@pytest.mark.parametrize("steps", [20, 25])
def test_evaluations_before_the_last_step(steps: int) -> None:
    """The first one is not before the end: the same as none. An argument that shortens the recipe of a file is for a
    try, and refuses nothing."""
    text = WITH_ROWS + f"training:\n  eval_steps: {steps}\n  early_stopping_patience: 3\n  load_best: true\n"
    needs = "needs `eval_steps` (line 7) below `max_steps` ({}): evaluated at the end alone, there is "
    first, second = f"{needs}nothing to stop before", f"{needs}one checkpoint to choose from"
    assert refusal(text + "  max_steps: 20\n").splitlines() == [
        f"r.yaml:8:3: training.early_stopping_patience: {first.format('line 10')}",
        f"r.yaml:9:3: training.load_best: {second.format('line 10')}",
    ]
    for_a_try = "training.max_steps=20"
    assert load(text, for_a_try).training.load_best
    meant = refusal(text, for_a_try, f"training.eval_steps={steps}").splitlines()
    assert meant[0].endswith(
        f"needs `eval_steps` (--set training.eval_steps={steps}) below `max_steps` (--set {for_a_try}): "
        "evaluated at the end alone, there is nothing to stop before"
    )
    assert load(text, f"training.max_steps={steps + 1}").training.load_best
    assert load(text).training.load_best  # how many steps there are is not known yet
    assert load(WITH_ROWS, f"training.eval_steps={steps}", "training.max_steps=20").training.eval_steps == steps


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.load_best=maybe", "training.load_best: expected true or false, got 'maybe'"),
        ("training.load_bst=true", "training.load_bst: unknown key; did you mean `load_best`?"),
        ("training.early_stopping_patience=0",
         "training.early_stopping_patience: expected a whole number above 0, or null, got 0"),
        ("training.eval_steps=x", "training.eval_steps: expected a whole number above 0, or null, got 'x'"),
        ("training.max_skipped_steps=-1", "training.max_skipped_steps: expected a whole number above 0, got -1"),
        ("evaluation.keep_best=3", "evaluation.keep_best: expected text, or null, got 3; in quotes it is text: '3'"),
    ],
)  # fmt: skip
def test_what_is_wrong_already_needs_nothing(setting: str, message: str) -> None:
    """What the field is to be is not known, so neither is what it needs; there are no rows either."""
    said = [line for line in refusal(MINIMAL, setting).splitlines() if not line.startswith(" ")]
    assert said == [f"--set {setting}: {message}"]


def test_another_field_that_is_wrong_hides_nothing() -> None:
    """What is told of one field is of no matter to what the others need; its value decides nothing."""
    text = WITH_ROWS + "training: {load_best: maybe, early_stopping_patience: 3, seed: -1}\n"
    assert [line.split(": ", 2)[1:] for line in refusal(text).splitlines()] == [
        ["training.load_best", "expected true or false, got 'maybe'"],
        ["training.early_stopping_patience",
         "needs `eval_steps`: evaluated at the end alone, there is nothing to stop before"],
        ["training.seed", "expected a whole number from 0 to 4,294,967,295, got -1"],
    ]  # fmt: skip
    text = WITH_ROWS + "training: {load_best: true, eval_steps: 5, max_steps: -1}\n"
    assert refusal(text) == "r.yaml:6:55: training.max_steps: expected a whole number above 0, or null, got -1"


@pytest.mark.parametrize(
    "section",
    [
        "{on_nonfinite: skip_step}",
        "{on_nonfinite: skip_step, max_skipped_steps: 3}",
        "{early_stopping_patience: 2, load_best: true, eval_steps: 5}",
        "{early_stopping_patience: null, load_best: false}",
    ],
)
def test_what_a_run_keeps_is_read_back(section: str) -> None:
    """Usual values written out are no contradiction, as `max_skipped_steps: 10` under `on_nonfinite: stop`."""
    recipe = load(WITH_ROWS + f"training: {section}\n")
    assert load(dump_recipe(recipe)) == recipe
    load(dump_recipe(load(MINIMAL)))


def test_an_argument_ends_the_skipping() -> None:
    """`--set training.on_nonfinite=stop` takes the bound with it."""
    text = MINIMAL + "training: {on_nonfinite: skip_step, max_skipped_steps: 3}\n"
    assert load(text, "training.on_nonfinite=stop").training == load(MINIMAL).training
    assert load(text, "training.max_skipped_steps=4").training.max_skipped_steps == 4


def test_a_value_that_is_none_is_no_stop() -> None:
    """`on_nonfinite` was meant, with a value that is none: its bound is not called meaningless on top of that."""
    text = MINIMAL + "training: {on_nonfinite: 3, max_skipped_steps: 5}\n"
    assert refusal(text).splitlines() == ["r.yaml:5:26: training.on_nonfinite: expected stop or skip_step, got 3"]
