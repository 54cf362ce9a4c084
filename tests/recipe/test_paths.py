"""Paths in a recipe: whose folder they are relative to, what is a hub name, and what is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.data_files import find_data_files
from qlora_cli.recipe.load import load_recipe
from tests.support.recipes import MINIMAL, load, refusal


def test_a_recipes_paths_are_its_own(tmp_path: Path) -> None:
    """Relative to the recipe, wherever the command is run; `..` is folded away."""
    text = "base_model: ../models/m\ndataset: {train: data/t.jsonl, validation: ./v}\noutput_dir: runs/x\n"
    recipe = load(text)
    assert recipe.base_model == str(tmp_path / "models" / "m")
    assert recipe.dataset.train == str(tmp_path / "recipes" / "data" / "t.jsonl")
    assert recipe.dataset.validation == str(tmp_path / "recipes" / "v")
    assert recipe.output_dir == "runs/x"


def test_the_same_recipe_from_anywhere_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named from another folder it gives equal paths, so that a run can be gone on with from there."""
    text = "base_model: ../models/m\ndataset: {train: data/t.jsonl}\noutput_dir: /runs/x\n"
    here = load(text)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert load_recipe(Path("../recipes/r.yaml"), must_exist=False) == here
    monkeypatch.chdir(tmp_path / "recipes")
    assert load_recipe(Path("r.yaml"), must_exist=False) == here
    assert load_recipe(tmp_path / "deep" / ".." / "recipes" / "r.yaml", must_exist=False) == here


def test_dots_behind_a_symbolic_link(tmp_path: Path) -> None:
    """`link/../m` is beside what the link points to, as the file system has it."""
    real = tmp_path / "elsewhere" / "inner"
    (real.parent / "m").mkdir(parents=True)
    real.mkdir()
    (tmp_path / "recipes" / "link").symlink_to(real)
    recipe = load(MINIMAL.replace("org/model", "link/../m"))
    assert Path(recipe.base_model).is_absolute()
    assert Path(recipe.base_model).samefile(real.parent / "m")


def test_an_overrides_paths_are_the_commands(tmp_path: Path) -> None:
    """--set is typed where the command is run: one field or a whole section."""
    text = "base_model: ./m\ndataset: {train: t.jsonl, validation: v.jsonl}\noutput_dir: o\n"
    recipe = load(text, "base_model=./m", "dataset.train=t.jsonl")
    assert recipe.base_model == str(tmp_path / "m")
    assert recipe.dataset.train == str(tmp_path / "t.jsonl")
    assert recipe.dataset.validation == str(tmp_path / "recipes" / "v.jsonl")
    assert load(text, "dataset={train: t.jsonl}").dataset.train == str(tmp_path / "t.jsonl")
    assert load(MINIMAL, "base_model=./m").base_model == str(tmp_path / "m")
    assert load(text, "base_model=org/m").base_model == "org/m"


def test_absolute_paths_stay() -> None:
    text = "base_model: /models/m\ndataset: {train: /data/t.jsonl}\noutput_dir: /runs/o\n"
    recipe = load(text)
    assert (recipe.base_model, recipe.dataset.train, recipe.output_dir) == ("/models/m", "/data/t.jsonl", "/runs/o")


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org/name-1.5_b", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_names_stay(name: str) -> None:
    recipe = load(MINIMAL.replace("org/model", name).replace("org/rows", name))
    assert (recipe.base_model, recipe.dataset.train) == (name, name)


def test_what_is_there_is_no_hub_name(tmp_path: Path) -> None:
    """A folder beside the recipe is meant, whatever its name looks like."""
    (tmp_path / "recipes" / "org" / "model").mkdir(parents=True)
    recipe = load(MINIMAL)
    assert recipe.base_model == str(tmp_path / "recipes" / "org" / "model")
    assert recipe.dataset.train == "org/rows"


def test_a_name_that_only_the_current_folder_has_is_refused(tmp_path: Path) -> None:
    """transformers and datasets would take it from there, whatever the recipe meant; told with what to write, beside
    the other mistakes. An override may name it."""
    (tmp_path / "org" / "rows").mkdir(parents=True)
    assert refusal(MINIMAL + "task: x\n", must_exist=True).splitlines() == [
        "r.yaml:5:7: task: expected causal_lm, got 'x'",
        "r.yaml:3:10: dataset.train: org/rows is not beside the recipe but in the current folder; "
        "a path is relative to the recipe: write ../org/rows",
    ]
    assert load(MINIMAL, "dataset.train=org/rows").dataset.train == str(tmp_path / "org" / "rows")


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "a/t.jsonl",
        "T.JSONL",
        "t.csv",
        "t.parquet",
        "a/*.jsonl",
        "data/part-?",
        "data/[ab]",
        "./x",
        "../x",
        ".",
    ],
)
def test_what_no_hub_name_is_like_is_a_path(name: str, tmp_path: Path) -> None:
    """Two slashes, a data file's suffix, a pattern or a leading dot: it need not exist to be a path."""
    recipe = load(MINIMAL.replace("org/rows", f"'{name}'"))
    assert recipe.dataset.train == os.path.normpath(tmp_path / "recipes" / name)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home folder in every path, the run folder's too; a user that is not there is no crash."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = "base_model: ~/m\ndataset: {train: ~/t}\noutput_dir: ~/o\n"
    recipe = load(text)
    home = tmp_path / "home"
    assert (recipe.base_model, recipe.dataset.train, recipe.output_dir) == (f"{home}/m", f"{home}/t", f"{home}/o")
    assert load(text, "output_dir=~/p").output_dir == f"{home}/p"
    nobody = load(MINIMAL.replace("org/model", "~no-such-user/m"))
    assert nobody.base_model == str(tmp_path / "recipes" / "~no-such-user" / "m")


@pytest.mark.parametrize("name", ["x" * 5000, "a\\0b"], ids=["too long", "null byte"])
def test_names_that_no_file_can_have(name: str) -> None:
    """Left for the hub to refuse."""
    assert load(MINIMAL.replace("org/model", f'"{name}"')).base_model == name.replace("\\0", "\0")


# ---------------------------------------------------------------------------------------------------------- Not there

LOCAL = "base_model: ../models/m\ndataset:\n  train: data/train.jsonl\n  validation: data/test.jsonl\noutput_dir: out\n"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """What LOCAL names, in the current folder and beside the recipe."""
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text("{}")
    (tmp_path / "recipes" / "data").mkdir(parents=True)
    for name in ("train", "test"):
        (tmp_path / "recipes" / "data" / f"{name}.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def test_what_is_there_is_accepted(here: Path) -> None:
    assert load(LOCAL, must_exist=True).base_model == str(here / "models" / "m")
    assert load(MINIMAL, must_exist=True).base_model == "org/model"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("../models/m", "../model/m",
         "1:13: base_model: model/m: there is no such folder; the folder model is not there."),
        ("../models/m", "../mdels", "1:13: base_model: mdels: there is no such folder; did you mean models?"),
        ("../models/m", "../modles/m",
         "1:13: base_model: modles/m: there is no such folder; the folder modles is not there."),
        ("../models/m", "../models", "1:13: base_model: models holds no config.json, so it is not a model folder."),
        ("../models/m", "./data/train.jsonl",
         "1:13: base_model: recipes/data/train.jsonl is a file; expected a model folder, or a hub name such as "
            "org/name."),
        ("../models/m", "my model!",
         "1:13: base_model: 'my model!' is no path that is there, and no hub name such as org/name."),
        ("data/train.jsonl", "data/trian.jsonl",
         "3:10: dataset.train: recipes/data/trian.jsonl: there is no such file or folder; did you mean train.jsonl?"),
        ("data/train.jsonl", "dta/train.jsonl",
         "3:10: dataset.train: recipes/dta/train.jsonl: there is no such file or folder; the folder recipes/dta is not "
         "there."),
        ("data/train.jsonl", "data/*.csv", "3:10: dataset.train: recipes/data/*.csv: no file matches."),
        ("data/train.jsonl", "../models",
         "3:10: dataset.train: models: no .jsonl, .json, .csv, .tsv or .parquet file in this folder."),
        ("data/train.jsonl", "./r.yaml",
         "3:10: dataset.train: recipes/r.yaml: expected a .jsonl, .json, .csv, .tsv or .parquet file, got r.yaml."),
        ("data/test.jsonl", "data/none.jsonl",
         "4:15: dataset.validation: recipes/data/none.jsonl: there is no such file or folder."),
        ("data/test.jsonl", "two words",
         "4:15: dataset.validation: 'two words' is no path that is there, and no hub name such as org/name."),
    ],
)  # fmt: skip
def test_a_path_that_is_not_there(old: str, new: str, message: str, here: Path) -> None:
    """Told with the recipe's line, before anything is loaded, and with the name that may have been meant."""
    with pytest.raises(RecipeError) as caught:
        load(LOCAL.replace(old, new), must_exist=True)
    assert str(caught.value) == f"recipes/r.yaml:{message}"
    assert load(LOCAL.replace(old, new)).output_dir == "out"


def test_paths_are_told_after_what_is_wrong_everywhere(here: Path) -> None:
    """A model that is not fetched yet does not come before a slip in the recipe; one field is not told twice."""
    text = LOCAL.replace("/m\n", "/n\n").replace("data/train.jsonl", "${NO_SUCH_FOLDER}/train.jsonl") + "task: x\n"
    assert [line.split(":")[3].strip() for line in refusal(text, must_exist=True).splitlines() if line[0] != " "] == [
        "dataset.train",
        "task",
        "base_model",
    ]


def test_a_path_in_an_override_that_is_not_there(here: Path) -> None:
    assert refusal(LOCAL, "dataset.train=no.jsonl", must_exist=True) == (
        "--set dataset.train=no.jsonl: dataset.train: no.jsonl: there is no such file or folder."
    )


@pytest.mark.parametrize("field", ["base_model", "dataset.train", "dataset.validation", "output_dir", "extends"])
@pytest.mark.parametrize(
    "name",
    ["a\\0b", "/a\\0b", "x" * 5000, "/" + "x" * 5000, "/" + "x/" * 3000, "\\ud800", "./\\ud800", "~", ".", "*",
     "./[", "\\n", " ", "http://x/y", "C:\\\\x", "/dev/null", "~nobody/y"],
    ids=ascii,
)  # fmt: skip
def test_names_that_no_model_or_data_has(field: str, name: str, here: Path) -> None:
    """Whatever stands where a path is expected is refused with a message, or is a name; nothing falls over."""
    data = {"base_model": "org/m", "dataset.train": "org/t", "output_dir": "out", field: name}
    lines = [f'{key}: "{value}"' for key, value in data.items() if "." not in key]
    rows = ", ".join(f'{key.split(".")[1]}: "{value}"' for key, value in data.items() if "." in key)
    text = "\n".join([*lines, f"dataset: {{{rows}}}"])
    if field == "output_dir" and "ud800" not in name:
        assert load(text, must_exist=True).base_model == "org/m"
    else:
        assert f" {field}: " in refusal(text, must_exist=True).splitlines()[0]


def test_an_override_of_endless_depth() -> None:
    assert refusal(MINIMAL, "dataset.columns" + ".a" * 5000 + "=1").endswith(
        "…: expected KEY=VALUE, as in --set training.max_steps=20"
    )


def test_what_would_steer_a_terminal_is_written_out() -> None:
    """A recipe from elsewhere does not get to colour, clear or rename the window of whoever checks it."""
    told = refusal(MINIMAL + '"\\e[31mk": 1\nrevision: "${\\e]0;x\\a}"\n"a\\rb": 2\n')
    assert not any(letter in told for letter in "\x1b\x07\r")
    assert told.splitlines()[0] == "r.yaml:5:1: \\x1b[31mk: unknown key"


@pytest.mark.parametrize("name", ["https://huggingface.co/org/name", "s3://bucket/rows.jsonl"])
def test_a_url_is_no_path(name: str) -> None:
    assert refusal(MINIMAL.replace("org/rows", name), must_exist=True) == (
        f"r.yaml:3:10: dataset.train: {name} is a URL; expected a path, or a hub name such as org/name."
    )


def test_a_recipe_in_a_folder_with_brackets(tmp_path: Path) -> None:
    """Its glob is one; the folder's name is not."""
    folder = tmp_path / "x[1]"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "r.yaml").write_text(MINIMAL.replace("org/rows", "'*.jsonl'"))
    recipe = load_recipe(folder / "r.yaml")
    assert [path.name for path in find_data_files(recipe.dataset.train)] == ["a.jsonl"]


def test_the_likeliest_of_several_names(tmp_path: Path) -> None:
    """Data, and not another file of the same stem."""
    for name in ("train.yaml", "train.jsonl", "train.txt"):
        (tmp_path / "recipes" / name).touch()
    told = refusal(MINIMAL.replace("org/rows", "./train.json"), must_exist=True)
    assert told.endswith("did you mean train.jsonl?")


def test_names_do_not_steer_a_terminal() -> None:
    told = refusal(MINIMAL.replace("org/rows", '"./a\\e]0;x\\a\\n.jsonl"'), must_exist=True)
    assert told == "r.yaml:3:10: dataset.train: recipes/a\\x1b]0;x\\x07\\n.jsonl: there is no such file or folder."
