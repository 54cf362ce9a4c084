"""`extends`: one recipe builds on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.recipe.dump import dump_recipe
from tests.support.recipes import load, refusal

BASE = (
    "base_model: ../models/m\n"
    "dataset:\n"
    "  train: data/train.jsonl\n"
    "  columns: {prompt: q, completion: a}\n"
    "lora: {rank: 4, target_modules: [q_proj, v_proj]}\n"
    "training: {num_train_epochs: 3, learning_rate: 1e-3}\n"
    "output_dir: base\n"
)


@pytest.fixture(autouse=True)
def base(tmp_path: Path) -> Path:
    """A recipe to build on, in a folder of its own."""
    path = tmp_path / "common" / "base.yaml"
    path.parent.mkdir()
    path.write_text(BASE)
    return path


def test_defaults_then_base_then_recipe_then_overrides() -> None:
    """Section by section and key by key; what nobody says has its default."""
    text = "extends: ../common/base.yaml\nlora: {rank: 8, alpha: 8}\noutput_dir: mine\n"
    recipe = load(text, "lora.alpha=2", "training.seed=1")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (8, 2, 0.0)
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert (recipe.training.num_train_epochs, recipe.training.seed, recipe.output_dir) == (3, 1, "mine")
    assert recipe.extends is None
    assert "extends" not in dump_recipe(recipe)


def test_lists_and_columns_are_replaced_whole() -> None:
    """Half of the columns of another dataset would be no help."""
    text = "extends: ../common/base.yaml\nlora: {target_modules: [k_proj]}\ndataset: {columns: {text: t}}\n"
    recipe = load(text)
    assert recipe.lora.target_modules == ["k_proj"]
    assert recipe.dataset.columns == {"text": "t"}


def test_paths_are_relative_to_the_file_that_says_them(tmp_path: Path) -> None:
    recipe = load("extends: ../common/base.yaml\ndataset: {validation: held.jsonl}\n")
    assert recipe.base_model == str(tmp_path / "models" / "m")
    assert recipe.dataset.train == str(tmp_path / "common" / "data" / "train.jsonl")
    assert recipe.dataset.validation == str(tmp_path / "recipes" / "held.jsonl")


def test_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through several folders, an absolute path, an environment variable."""
    (tmp_path / "middle.yaml").write_text(f"extends: {tmp_path}/common/base.yaml\nlora: {{rank: 5, dropout: 0.5}}\n")
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    recipe = load("extends: ${SOMEWHERE}/middle.yaml\nlora: {rank: 6}\n")
    assert (recipe.lora.rank, recipe.lora.dropout, recipe.training.learning_rate) == (6, 0.5, 1e-3)


def test_what_the_recipe_excludes_is_left_behind() -> None:
    """As with an override: its max_steps takes the place of the epochs that the base counts."""
    training = load("extends: ../common/base.yaml\ntraining: {max_steps: 5}\n").training
    assert (training.max_steps, training.num_train_epochs) == (5, 1.0)


def test_null_unsets() -> None:
    recipe = load(
        "extends: ../common/base.yaml\ntraining: {max_grad_norm: null}\nextends_not: 1\n".replace(
            "extends_not: 1\n", ""
        )
    )
    assert recipe.training.max_grad_norm is None
    assert load("extends: null\nbase_model: a/b\ndataset: {train: c/d}\noutput_dir: o\n").base_model == "a/b"


def test_mistakes_are_told_where_they_stand(base: Path) -> None:
    """In the recipe, then in the file it builds on, each by its own name and line."""
    base.write_text(BASE.replace("rank", "rnk") + "sed: 1\n")
    told = refusal("extends: ../common/base.yaml\nlora: {alpha: x}\n")
    assert [line for line in told.splitlines() if not line.startswith(" ")] == [
        "r.yaml:2:15: lora.alpha: expected a number above 0, got 'x'",
        "common/base.yaml:5:8: lora.rnk: unknown key; did you mean `rank`?",
        "common/base.yaml:8:1: sed: unknown key; did you mean `training.seed`?",
    ]


def test_a_mistake_that_is_written_over_is_none(base: Path) -> None:
    base.write_text(BASE.replace("rank: 4", "rank: x"))
    assert load("extends: ../common/base.yaml\nlora: {rank: 8}\n").lora.rank == 8


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("../common/bse.yaml", "common/bse.yaml: there is no such file; did you mean base.yaml?"),
        ("none/base.yaml", "recipes/none/base.yaml: there is no such file; the folder recipes/none is not there."),
        ("5", "expected the path of a recipe, got 5"),
        ("[a.yaml]", "expected the path of a recipe, got ['a.yaml']"),
        ("${NO_SUCH_VARIABLE}/a.yaml", "the environment variable NO_SUCH_VARIABLE is not set"),
    ],
)
def test_what_cannot_be_built_on(extends: str, message: str) -> None:
    """One line: that base_model is not given is no news then."""
    assert refusal(f"extends: {extends}\nlora: {{rank: 4}}\n") == f"r.yaml:1:10: extends: {message}"


def test_a_base_that_is_no_recipe(base: Path) -> None:
    base.write_text("- 1\n")
    assert refusal("extends: ../common/base.yaml\n").splitlines() == [
        "r.yaml:1:10: extends: cannot be read",
        "common/base.yaml: expected `key: value` lines at the top level, got a list",
    ]


def test_a_cycle_is_refused(base: Path) -> None:
    """To itself, or around several files; told once, with the way round."""
    assert refusal("extends: r.yaml\n") == ("r.yaml:1:10: extends: builds on itself: r.yaml -> r.yaml")
    base.write_text("extends: ../recipes/r.yaml\n" + BASE)
    assert refusal("extends: ../common/base.yaml\n") == (
        "common/base.yaml:1:10: extends: builds on itself: r.yaml -> common/base.yaml -> r.yaml"
    )


def test_a_cycle_through_a_symbolic_link(base: Path) -> None:
    (base.parent / "link.yaml").symlink_to(base)
    base.write_text("extends: link.yaml\n" + BASE)
    assert "builds on itself" in refusal("extends: ../common/base.yaml\n")


def test_a_chain_without_an_end(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "19.yaml:1:10: extends: more than 20 recipes build on each other" in refusal("extends: ../0.yaml\n")


def test_each_file_may_be_large_but_not_beyond_reason(base: Path) -> None:
    base.write_text("#" * 1_000_001)
    assert "common/base.yaml: larger than 1,000,000 bytes, which no recipe is" in refusal(
        "extends: ../common/base.yaml\n"
    )
