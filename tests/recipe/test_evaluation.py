"""The benchmarks of a recipe: what can be said, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.foreign import explain, foreign_name
from qlora_cli.recipe.load import load_recipe
from tests.support.recipes import MINIMAL, load, refusal

NO_USE = "has no use without `tasks`: name there what to score the model on, as in [mmlu, arc_easy]"


def test_by_default_nothing_is_scored() -> None:
    """A recipe that says nothing of benchmarks has none, and what a run keeps of it is read back."""
    recipe = load(MINIMAL)
    assert recipe.evaluation.names == ()
    assert load(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(("tasks", "names"), [("mmlu", ("mmlu",)), ("[mmlu, arc_easy]", ("mmlu", "arc_easy"))])
def test_one_task_or_several(tasks: str, names: tuple[str, ...]) -> None:
    """A name alone is as good as a list of one."""
    assert load(MINIMAL + f"evaluation: {{tasks: {tasks}}}\n").evaluation.names == names


@pytest.mark.parametrize(("limit", "kind"), [("100", int), ("0.5", float), ("null", type(None))])
def test_a_limit_is_a_number_or_a_share(limit: str, kind: type) -> None:
    """As lm-eval reads it: documents, or below 1 the share of them."""
    assert type(load(MINIMAL + f"evaluation: {{tasks: mmlu, limit: {limit}}}\n").evaluation.limit) is kind


def test_what_a_run_keeps_is_read_back() -> None:
    """Every field that is not as usual."""
    text = (
        "evaluation: {tasks: [mmlu, piqa], every_steps: 5, at_start: true, limit: 0.5, num_fewshot: 0, "
        "data_root: d$$, task_path: t, allow_partial: true, apply_chat_template: true, per_device_batch_size: 3, "
        "keep_best: mmlu/acc}\n"
    )
    recipe = load(MINIMAL + text)
    assert recipe.evaluation.data_root == str(Path("recipes/d$").absolute())
    assert load(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{tasks: 3}", "5:21: evaluation.tasks: expected text or a list of text, got 3; in quotes it is text: '3'"),
        ("{tasks: [mmlu, '']}", "5:28: evaluation.tasks.1: expected text that is not empty, got ''"),
        ("{tasks: 'mmlu, arc_easy'}",
         "5:21: evaluation.tasks: got 'mmlu, arc_easy', the name of no task; write [mmlu, arc_easy]"),
        ("{tasks: ['a b', c]}", "5:22: evaluation.tasks.0: got 'a b', the name of no task; write [a, b]"),
        ("{tasks: [mmlu, piqa, mmlu]}", "5:34: evaluation.tasks.2: 'mmlu' is named twice; leave one out"),
        ("{tasks: mmlu, limit: 0}",
         "5:34: evaluation.limit: expected a whole number above 0 or a number between 0 and 1, or null, got 0"),
        ("{tasks: mmlu, limit: 100.0}",
         "5:34: evaluation.limit: expected a whole number above 0 or a number between 0 and 1, or null, got 100.0; "
         "write 100"),
        ("{tasks: mmlu, num_fewshot: -1}",
         "5:40: evaluation.num_fewshot: expected a whole number of at least 0, or null, got -1"),
        ("{tasks: mmlu, every_steps: 5, keep_best: acc}",
         "5:54: evaluation.keep_best: expected TASK/METRIC, as in mmlu/acc, got 'acc'"),
        ("{tasks: mmlu, keep_best: mmlu/acc}",
         "5:27: evaluation.keep_best: needs `every_steps`: scored at the end alone, there is one checkpoint to choose "
         "from"),
        ("{every_steps: 5}", f"5:14: evaluation.every_steps: {NO_USE}"),
        ("{tasks: [], at_start: true}", f"5:25: evaluation.at_start: {NO_USE}"),
        ("mmlu", "5:13: evaluation: expected a section of `key: value` lines, got 'mmlu'"),
        ("{task: mmlu}", "5:14: evaluation.task: unknown key; did you mean `tasks`?"),
        ("{data_rot: d}", "5:14: evaluation.data_rot: unknown key; did you mean `data_root`?"),
        ("{tasks: mmlu, batch_size: 3}",
         "5:27: evaluation.batch_size: unknown key; did you mean `per_device_batch_size`?"),
    ],
)  # fmt: skip
def test_what_is_wrong(section: str, message: str) -> None:
    """The first line: the place, what was expected, what was got, what to write."""
    assert refusal(MINIMAL + f"evaluation: {section}\n").splitlines()[0] == f"r.yaml:{message}"


def test_what_belongs_in_the_section() -> None:
    """`tasks` at the top level is not `task` misspelt."""
    assert refusal(MINIMAL + "tasks: [mmlu]\n") == "r.yaml:5:1: tasks: `tasks` belongs under `evaluation`"


def test_usual_values_without_tasks_are_no_mistake() -> None:
    """As a run writes its defaults out."""
    text = MINIMAL + "evaluation: {tasks: [], every_steps: null, at_start: false, allow_partial: false}\n"
    assert load(text).evaluation.names == ()


def test_an_argument_ends_the_benchmarks() -> None:
    """`--set evaluation.tasks=[]` takes what is said about them with it."""
    text = MINIMAL + "evaluation: {tasks: mmlu, every_steps: 5, keep_best: mmlu/acc, data_root: d}\n"
    assert load(text, "evaluation.tasks=[]").evaluation == load(MINIMAL).evaluation
    assert refusal(text, "evaluation.every_steps=null").startswith("r.yaml:5:43: evaluation.keep_best: needs")


def test_folders_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And must be there, unless a run is looked at on another machine; in an argument, they are the command's."""
    monkeypatch.setenv("BENCHMARKS", "data")
    text = MINIMAL + "evaluation: {tasks: mmlu, data_root: '${BENCHMARKS}', task_path: own}\n"
    with pytest.raises(RecipeError) as caught:
        load(text, must_exist=True)
    folder = Path("recipes")
    assert str(caught.value).splitlines() == [
        "recipes/r.yaml:5:38: evaluation.data_root: recipes/data: there is no such folder.",
        "recipes/r.yaml:5:66: evaluation.task_path: recipes/own: there is no such folder.",
    ]
    (folder / "data").mkdir()
    (folder / "own").write_text("")
    (told,) = refusal(text, must_exist=True).splitlines()
    assert told.endswith("evaluation.task_path: recipes/own is a file; expected a folder.")
    (folder / "own").unlink()
    (folder / "own").mkdir()
    recipe = load_recipe(folder / "r.yaml")
    assert recipe.evaluation.data_root == str(folder.absolute() / "data")
    Path("here").mkdir()
    assert load(text, "evaluation.data_root=here").evaluation.data_root == str(Path("here").absolute())


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lm_eval_tasks", "`lm_eval_tasks` is axolotl's name; here it is `evaluation.tasks`"),
        ("do_mmlu_eval", "`do_mmlu_eval` is QLoRA's name; here it is `evaluation.tasks`: [mmlu] in place of true"),
        ("max_mmlu_samples", "`max_mmlu_samples` is QLoRA's name; here it is `evaluation.limit`"),
        ("n_shot", "`n_shot` is LLaMA-Factory's name; here it is `evaluation.num_fewshot`"),
        ("include_path", "`include_path` is lm-eval's name; here it is `evaluation.task_path`"),
        (
            "metric_for_best_model",
            "`metric_for_best_model` is Hugging Face's name; here it is `evaluation.keep_best`: a task and its metric, "
            "as in mmlu/acc; by held-out loss, it is `training.load_best`",
        ),
        ("load_best_model_at_end", "`load_best_model_at_end` is Hugging Face's name; here it is `training.load_best`"),
        (
            "greater_is_better",
            "`greater_is_better` is Hugging Face's name; a metric says itself whether more of it is better",
        ),
    ],
)
def test_what_other_tools_call_it(key: str, told: str) -> None:
    """QLoRA's own script scored MMLU; others have names for the same."""
    name = foreign_name(key)
    assert name is not None
    assert explain(key, name) == told
