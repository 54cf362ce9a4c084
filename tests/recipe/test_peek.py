"""What is here that a first recipe may name, and how the recipe names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_cli.recipe.paths import is_local
from qlora_cli.recipe.peek import as_recipe_path, guess_model, guess_run_folder, guess_train, guess_validation


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("[]")


def model(name: str) -> None:
    touch(f"{name}/config.json", f"{name}/tokenizer.json")


@pytest.mark.parametrize("name", ["models/tiny", "models/org/tiny", "tiny"])
def test_the_only_model(name: str) -> None:
    model(name)
    touch("models/adapter/adapter_config.json", "models/half/config.json", ".cache/x/config.json")
    assert guess_model(Path()) == name


def test_no_model_that_is_obvious() -> None:
    """None, or more than one."""
    assert guess_model(Path()) is None
    model("models/a")
    model("b")
    assert guess_model(Path()) is None


@pytest.mark.parametrize(
    ("files", "guess"),
    [
        (["train.jsonl"], "train.jsonl"),
        (["train.csv", "data/train.jsonl", "a.jsonl"], "train.csv"),
        (["data/train.tsv", "a.jsonl"], "data/train.tsv"),
        (["gsm8k_train-v2.parquet", "other.csv"], "gsm8k_train-v2.parquet"),
        (["TRAIN.JSON", "package.json"], "TRAIN.JSON"),
        (["train.csv", "train.jsonl"], "train.jsonl"),  # the kind with one of it
        (["a-train.jsonl", "b-train.jsonl"], None),
        (["rows.jsonl"], "rows.jsonl"),
        (["rows.jsonl", "numbers.csv"], "rows.jsonl"),
        (["rows.jsonl", "test.jsonl", "dev-set.jsonl"], "rows.jsonl"),
        (["data/rows.parquet"], "data/rows.parquet"),
        (["a.jsonl", "b.jsonl"], None),
        (["test.jsonl"], None),
        (["constraint.jsonl", "x.jsonl"], None),
        (["notes.txt", "sub/train.jsonl"], None),
        (["~train.csv"], "./~train.csv"),
        ([], None),
    ],
)
def test_the_obvious_training_rows(files: list[str], guess: str | None) -> None:
    touch(*files)
    assert guess_train(Path()) == guess


def test_settings_in_json_are_no_rows() -> None:
    """A list may be rows; one object is a setting."""
    touch("package.json")
    Path("package.json").write_text(' {"name": "x"}')
    assert guess_train(Path()) is None
    touch("rows.json")
    assert guess_train(Path()) == "rows.json"


@pytest.mark.parametrize(
    ("train", "beside", "guesses"),
    [
        ("train.jsonl", ["test.jsonl", "valid.jsonl"], ["valid.jsonl", "test.jsonl"]),
        ("d/gsm8k_train-v2.csv", ["d/gsm8k_test-v2.csv", "d/test.csv"], ["d/gsm8k_test-v2.csv"]),
        ("train.jsonl", ["dev.csv", "test.jsonl"], ["test.jsonl", "dev.csv"]),  # its own kind first
        ("rows.jsonl", ["validation.jsonl"], ["validation.jsonl"]),
        ("test.jsonl", ["other.jsonl"], []),
        ("d/train/a.jsonl", ["d/test/a.jsonl"], []),
        ("none.jsonl", ["test.jsonl"], []),
    ],
)
def test_held_out_rows_beside(train: str, beside: list[str], guesses: list[str]) -> None:
    touch(*beside, *([train] if train != "none.jsonl" else []))
    assert guess_validation(train) == guesses


def test_held_out_folders_beside_folders() -> None:
    touch("d/train/a.jsonl", "d/test/a.jsonl", "d/dev")
    assert guess_validation("d/train") == ["d/test"]


@pytest.mark.parametrize(
    ("train", "base", "folder"),
    [
        ("data/gsm8k/train.jsonl", "m", "runs/gsm8k"),
        ("gsm8k_train.jsonl", "m", "runs/gsm8k"),
        ("train.jsonl", "models/Tiny-1B", "runs/Tiny-1B"),
        ("data/*.jsonl", "org/model", "runs/model"),
        ("openai/gsm8k", "m", "runs/gsm8k"),
        ("a b: #c.csv", "m", "runs/a-b-c"),
        ("../my rows/train.csv", "m", "runs/my-rows"),
        ("training.csv", "..", "runs/first"),
        ("restrained.csv", "m", "runs/restrained"),
    ],
)
def test_a_name_for_the_run(train: str, base: str, folder: str) -> None:
    """From the data, or else from the model; words that say nothing are left out."""
    assert guess_run_folder(train, base) == folder


def test_a_run_folder_is_a_new_one() -> None:
    touch("runs/gsm8k/run.json", "runs/gsm8k-2/x")
    assert guess_run_folder("openai/gsm8k", "m") == "runs/gsm8k-3"


def test_what_is_local() -> None:
    """What looks like a path, or is there."""
    touch("org/rows/x")
    assert [is_local(name) for name in ("org/rows", "org/other", "./x", "x.csv", "*", "", "a" * 5000)] == [
        True, False, True, True, True, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "recipe", "written"),
    [
        ("data/x.csv", "r.yaml", "data/x.csv"),
        ("./data//x.csv", "r.yaml", "data/x.csv"),
        ("data/x.csv", "conf/deep/r.yaml", "../../data/x.csv"),
        ("conf/x.csv", "conf/r.yaml", "x.csv"),
        ("data/*.csv", "conf/r.yaml", "../data/*.csv"),
        ("model", "r.yaml", "model"),
        ("./none", "r.yaml", "./none"),  # or it would be a name for the hub
        ("./~x", "r.yaml", "./~x"),
        ("/data/x.csv", "conf/r.yaml", "/data/x.csv"),
        ("~/x.csv", "conf/r.yaml", "~/x.csv"),
        ("~nobody-here/x.csv", "conf/r.yaml", "../~nobody-here/x.csv"),
    ],
)
def test_paths_are_written_relative_to_the_recipe(name: str, recipe: str, written: str) -> None:
    touch("data/x.csv", "conf/x.csv", "conf/deep/y", "model/config.json")
    assert as_recipe_path(name, Path(recipe).parent) == written


def test_a_recipe_behind_a_link(tmp_path: Path) -> None:
    """`..` from a linked folder leads out of what it links to; the path written is the one that leads there."""
    touch("data/x.csv", "far/away/conf/y")
    Path("conf").symlink_to("far/away/conf")
    written = as_recipe_path("data/x.csv", Path("conf"))
    assert Path("conf", written).samefile("data/x.csv")
    assert written == "../../../data/x.csv"


def test_a_folder_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `lost+found` on a disk of its own. Root may enter any, so the refusal is played."""
    touch("closed/config.json", "open/config.json", "open/tokenizer.json")
    allowed = os.path.isfile

    def refuse(path: object) -> bool:
        return "closed" not in str(path) and allowed(str(path))

    def refused(path: Path) -> bool:
        raise PermissionError(str(path))

    monkeypatch.setattr("os.path.isfile", refuse)
    monkeypatch.setattr(Path, "is_file", refused)
    assert guess_model(Path()) == "open"
