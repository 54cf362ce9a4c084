"""From a recipe and overrides to a checked `Recipe`: what wins, what is refused and how that is told, whose paths."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.load import dump_recipe, load_recipe
from qlora_cli.recipe.schema import Recipe

MINIMAL = "base_model: org/model\ndataset:\n  train: org/rows\noutput_dir: out\n"
TOP_LEVEL = "base_model, revision, trust_remote_code, task, quantization, lora, dataset, training, output_dir"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of its own; recipes are in recipes/, so that the two are never taken for each other."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    path = Path("recipes/r.yaml")
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return str(caught.value).replace("recipes/r.yaml", "r.yaml")


def test_defaults_then_recipe_then_overrides() -> None:
    """What nobody says has its default; the recipe beats the default, an override both."""
    text = MINIMAL + "lora: {rank: 4, alpha: 8}\n"
    assert (load(MINIMAL).lora.rank, load(MINIMAL).lora.alpha) == (16, 32)
    assert (load(text).lora.rank, load(text).lora.alpha) == (4, 8)
    recipe = load(text, "lora.rank=2")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (2, 8, 0.0)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("training.max_steps=20", "training.max_steps", 20),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("training.max_grad_norm=null", "training.max_grad_norm", None),
        ("training.max_grad_norm=~", "training.max_grad_norm", None),
        (" training.max_steps = 20 ", "training.max_steps", 20),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        (r"lora.target_modules=.*\.(q|v)_proj", "lora.target_modules", r".*\.(q|v)_proj"),
        ("lora={rank: 4}", "lora.rank", 4),
        ("revision=a=b", "revision", "a=b"),
        ("revision='5'", "revision", "5"),
        ("dataset.columns.prompt=question", "dataset.columns", {"prompt": "question"}),
        ("dataset.columns={prompt: q, completion: a}", "dataset.columns", {"prompt": "q", "completion": "a"}),
        ("trust_remote_code=true", "trust_remote_code", True),
    ],
)
def test_forms_of_an_override(override: str, name: str, value: object) -> None:
    """Nested names, lists, null, a whole section, a section that the recipe has not; `=` in a value is part of it."""
    found: Any = load(MINIMAL, override)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_whole_section_replaces_the_recipes() -> None:
    """What the old section said is gone, its positions too."""
    recipe = load(MINIMAL + "lora: {rank: 4, alpha: 8}\n", "lora={dropout: 0.1}")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (16, 32, 0.1)
    assert refusal(MINIMAL + "lora: {rank: 4}\n", "lora={rank: x}") == (
        "--set lora={rank: x}: lora.rank: input should be a valid integer, got 'x'"
    )


def test_the_last_override_wins() -> None:
    """As with a repeated key, a later override may even mend an earlier one."""
    assert load(MINIMAL, "lora.rank=2", "lora.rank=3").lora.rank == 3
    assert load(MINIMAL, "lora.rank=x", "lora.rank=3").lora.rank == 3
    assert load(MINIMAL, "lora.rank=3", "lora={alpha: 1}").lora.rank == 16


def test_an_override_fills_an_empty_section() -> None:
    """`lora:` with nothing under it is refused by itself, but one may be built there."""
    assert load(MINIMAL + "lora:\n", "lora.rank=4").lora.rank == 4


@pytest.mark.parametrize(
    ("text", "overrides", "steps", "epochs"),
    [
        ("num_train_epochs: 3", ["training.max_steps=20"], 20, 1.0),
        ("max_steps: 20", ["training.num_train_epochs=3"], None, 3.0),
        ("seed: 1", ["training.num_train_epochs=3", "training.max_steps=20"], 20, 1.0),
        ("seed: 1", ["training.max_steps=20", "training.num_train_epochs=3"], None, 3.0),
        ("num_train_epochs: 3", ["training.max_steps=null"], None, 3.0),
    ],
)
def test_an_override_takes_the_place_of_what_it_excludes(
    text: str, overrides: list[str], steps: int | None, epochs: float
) -> None:
    """--set training.max_steps=20 shortens any recipe, also one that gives epochs; and the other way round."""
    training = load(f"{MINIMAL}training: {{{text}}}\n", *overrides).training
    assert (training.max_steps, training.num_train_epochs) == (steps, epochs)


def test_an_override_takes_the_place_of_the_other_validation() -> None:
    text = MINIMAL.replace("org/rows", "org/rows\n  validation: org/held-out")
    dataset = load(text, "dataset.validation_fraction=0.1").dataset
    assert (dataset.validation, dataset.validation_fraction) == (None, 0.1)
    dataset = load(text, "dataset.validation_fraction=0.1", "dataset.validation=org/other").dataset
    assert (dataset.validation, dataset.validation_fraction) == ("org/other", None)


@pytest.mark.parametrize("override", ["a", "=x", "a..b=1", ".a=1", "a.=1", "", "=", " =1"])
def test_a_malformed_override(override: str) -> None:
    assert refusal(MINIMAL, override) == f"--set {override}: expected KEY=VALUE, as in --set training.max_steps=20"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=3", "lora.rnk: unknown key; did you mean `rank`?"),
        ("nope.x=3", f"nope: unknown key; expected one of: {TOP_LEVEL}"),
        ("base_model.x=1", "`base_model` is a value, not a section"),
        ("dataset.train.x.y=1", "`dataset.train` is a value, not a section"),
        ("lora.rank=", 'there is no value; write null to unset one, or "" for an empty text'),
        ("training.max_steps=  ", 'there is no value; write null to unset one, or "" for an empty text'),
        ("lora.rank=null", "lora.rank: input should be a valid integer, got nothing"),
        ("lora=3", "lora: expected a section of `key: value` lines, got 3"),
        ("lora.rank=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("lora.rank=!!int '1'", "the tag !!int is not allowed in a recipe"),
        ("dataset.columns.a.b=c", "dataset.columns.a: input should be a valid string, got {'b': 'c'}"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    """The argument takes the place of file and line."""
    assert refusal(MINIMAL, override) == f"--set {override}: {message}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        # Misspelt, or another tool's
        ("lora:\n  rnk: 3", "r.yaml:6:3: lora.rnk: unknown key; did you mean `rank`?"),
        ("trainng: {}", "r.yaml:5:1: trainng: unknown key; did you mean `training`?"),
        ("xyzzy: 1", f"r.yaml:5:1: xyzzy: unknown key; expected one of: {TOP_LEVEL}"),
        # In the wrong place
        ("learning_rate: 1", "r.yaml:5:1: learning_rate: unknown key here; it belongs under `training`"),
        ("lora: {max_length: 9}", "r.yaml:5:8: lora.max_length: unknown key here; it belongs under `dataset`"),
        ("lora: {revision: x}", "r.yaml:5:8: lora.revision: unknown key here; it belongs at the top level"),
        (
            "lora: {target_modules: '(q_proj'}",
            "r.yaml:5:8: lora.target_modules: '(q_proj' is not a regular expression: missing ), unterminated "
            "subpattern at position 0",
        ),
        ("quantization: {bit: 4}", "r.yaml:5:16: quantization.bit: unknown key; did you mean `bits`?"),
        # Of the wrong type
        ("lora: {rank: '4'}", "r.yaml:5:8: lora.rank: input should be a valid integer, got '4'"),
        ("lora: {rank: 4.5}", "r.yaml:5:8: lora.rank: input should be a valid integer, got 4.5"),
        ("lora: {rank: true}", "r.yaml:5:8: lora.rank: input should be a valid integer, got True"),
        ("lora: {alpha: true}", "r.yaml:5:8: lora.alpha: input should be a valid number, got True"),
        ("lora: {rank:}", "r.yaml:5:8: lora.rank: input should be a valid integer, got nothing"),
        ("revision: 5", "r.yaml:5:1: revision: input should be a valid string, got 5"),
        ("trust_remote_code: yes", "r.yaml:5:1: trust_remote_code: input should be a valid boolean, got 'yes'"),
        (
            "lora: {target_modules: 3}",
            "r.yaml:5:8: lora.target_modules: input should be a valid string, got 3; "
            "or input should be a valid list, got 3",
        ),
        ("lora:", "r.yaml:5:1: lora: expected a section of `key: value` lines, got nothing"),
        ("training: fast", "r.yaml:5:1: training: expected a section of `key: value` lines, got 'fast'"),
        ("training: [a]", "r.yaml:5:1: training: expected a section of `key: value` lines, got ['a']"),
        # Out of range
        ("lora: {rank: 0}", "r.yaml:5:8: lora.rank: input should be greater than 0, got 0"),
        ("lora: {dropout: 1}", "r.yaml:5:8: lora.dropout: input should be less than 1, got 1"),
        ("training: {max_steps: -1}", "r.yaml:5:12: training.max_steps: input should be greater than 0, got -1"),
        (
            "training: {learning_rate: .nan}",
            "r.yaml:5:12: training.learning_rate: input should be a finite number, got nan",
        ),
        (
            "training: {max_grad_norm: .inf}",
            "r.yaml:5:12: training.max_grad_norm: input should be a finite number, got inf",
        ),
        (
            "training: {seed: 4294967296}",
            "r.yaml:5:12: training.seed: input should be less than 4294967296, got 4294967296",
        ),
        (f"training: {{seed: {'9' * 9999}}}", "r.yaml:5:12: training.seed: input should be a valid integer, got inf"),
        # Not among the choices
        ("quantization: {bits: 5}", "r.yaml:5:16: quantization.bits: input should be 4 or 16, got 5"),
        ("quantization: {bits: '4'}", "r.yaml:5:16: quantization.bits: input should be 4 or 16, got '4'"),
        (
            "training: {lr_scheduler_type: cosin}",
            "r.yaml:5:12: training.lr_scheduler_type: input should be 'linear', 'cosine' or 'constant', got 'cosin'",
        ),
        # One excludes the other
        (
            "training: {max_steps: 1, num_train_epochs: 1}",
            "r.yaml:5:1: training: give either max_steps or num_train_epochs, not both",
        ),
        (
            "training:\n  eval_steps: 5",
            "r.yaml:5:1: training: eval_steps needs rows to evaluate on: "
            "give dataset.validation or dataset.validation_fraction",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(lines: str, message: str) -> None:
    """File, line and column of the key; its whole name; what was expected and what was got."""
    assert refusal(MINIMAL + lines + "\n") == message


def test_two_validations_exclude_each_other() -> None:
    text = MINIMAL.replace("org/rows", "org/rows\n  validation: org/x\n  validation_fraction: 0.1")
    assert refusal(text) == "r.yaml:2:1: dataset: give either validation or validation_fraction, not both"


def test_what_is_missing() -> None:
    """Told at the section it belongs in; at the top, where the file begins."""
    assert refusal("# nothing much\ntask: causal_lm\ndataset: {}\n") == (
        "r.yaml:2:1: base_model: is required and was not given\n"
        "r.yaml:3:1: dataset.train: is required and was not given\n"
        "r.yaml:2:1: output_dir: is required and was not given"
    )


def test_every_mistake_is_told_at_once() -> None:
    """Unknown keys, types, ranges, choices, what is missing, what excludes what, in the file and in an override:
    nobody has to run again to see the next one."""
    text = (
        "base_model: 3\n"
        "lora:\n"
        "  rnk: 3\n"
        "  target_modules: [q_proj, 7]\n"
        "dataset:\n"
        "  columns: {int: 3, 'a[0]': 4}\n"
        "training:\n"
        "  num_train_epochs: 1\n"
        "  max_steps: 3\n"
        "quantization:\n"
        "  bits: 3\n"
    )
    assert refusal(text, "quantization.quant_type=nf5", "output_dir=~") == (
        "r.yaml:1:1: base_model: input should be a valid string, got 3\n"
        "r.yaml:11:3: quantization.bits: input should be 4 or 16, got 3\n"
        "--set quantization.quant_type=nf5: quantization.quant_type: input should be 'nf4' or 'fp4', got 'nf5'\n"
        "r.yaml:4:3: lora.target_modules: input should be a valid string, got ['q_proj', 7]\n"
        "r.yaml:4:28: lora.target_modules.1: input should be a valid string, got 7\n"
        "r.yaml:3:3: lora.rnk: unknown key; did you mean `rank`?\n"
        "r.yaml:5:1: dataset.train: is required and was not given\n"
        "r.yaml:6:13: dataset.columns.int: input should be a valid string, got 3\n"
        "r.yaml:6:21: dataset.columns.a[0]: input should be a valid string, got 4\n"
        "r.yaml:7:1: training: give either max_steps or num_train_epochs, not both\n"
        "--set output_dir=~: output_dir: input should be a valid string, got nothing"
    )


def test_a_long_value_is_cut_in_the_message() -> None:
    told = refusal(f"{MINIMAL}lora: {{rank: {'x' * 5000}}}\n")
    assert told == f"r.yaml:5:8: lora.rank: input should be a valid integer, got '{'x' * 99}…"


@pytest.mark.parametrize("field", ["base_model", "output_dir", "train"])
def test_no_name_at_all_is_refused(field: str) -> None:
    """`base_model: ""` is not the recipe's own folder."""
    lines = [f'{line.split(":")[0]}: ""' if line.strip().startswith(field) else line for line in MINIMAL.splitlines()]
    assert refusal("\n".join(lines)).endswith(": string should have at least 1 character, got ''")


def test_sections_are_frozen() -> None:
    """A recipe is what was asked for; nothing on the way changes it."""
    recipe = load(MINIMAL)
    for section, field in (
        (recipe, "task"),
        (recipe.lora, "rank"),
        (recipe.dataset, "train"),
        (recipe.training, "seed"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, getattr(section, field))


# ---------------------------------------------------------------------------------------------------------- Paths


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
    assert load_recipe(Path("../recipes/r.yaml")) == here
    monkeypatch.chdir(tmp_path / "recipes")
    assert load_recipe(Path("r.yaml")) == here
    assert load_recipe(tmp_path / "deep" / ".." / "recipes" / "r.yaml") == here


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
    with pytest.raises(RecipeError) as caught:
        load(MINIMAL + "tsk: x\n")
    assert str(caught.value).splitlines()[1:] == [
        "recipes/r.yaml:3:3: dataset.train: org/rows is not beside the recipe but in the current folder; "
        "a path is relative to the recipe: write ../org/rows"
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


# ---------------------------------------------------------------------------------------------------------- Files


def told(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    """Missing, a folder, behind a file, not UTF-8, too large, empty: named as the user named it, and why."""
    Path("bytes.yaml").write_bytes(b"base_model: \xff")
    Path("utf16.yaml").write_text("a: b", encoding="utf-16")
    Path("large.yaml").write_bytes(b"#" * 1_000_001)
    Path("empty.yaml").touch()
    assert told(Path("none.yaml")) == "none.yaml: no such file; expected a recipe, a YAML file"
    assert told(Path("recipes")) == "recipes: is a folder; expected a recipe, a YAML file"
    assert told(Path("empty.yaml/x.yaml")) == "empty.yaml/x.yaml: cannot be read: Not a directory"
    assert told(Path("x" * 300)) == f"{'x' * 300}: cannot be read: File name too long"
    assert told(Path("bytes.yaml")) == "bytes.yaml: not UTF-8 text at byte 12"
    assert told(Path("utf16.yaml")) == "utf16.yaml: not UTF-8 text at byte 0"
    assert told(Path("large.yaml")) == "large.yaml: larger than 1,000,000 bytes, which no recipe is"
    assert told(Path("empty.yaml")) == "empty.yaml: expected `key: value` lines at the top level, got nothing"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_a_file_without_an_end() -> None:
    """Its size says 0; it is not read to the end to find out."""
    assert told(Path("/dev/zero")) == "/dev/zero: larger than 1,000,000 bytes, which no recipe is"


def test_an_unreadable_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is played."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    Path("secret.yaml").write_text(MINIMAL)
    monkeypatch.setattr(Path, "open", refuse)
    assert told(Path("secret.yaml")) == "secret.yaml: cannot be read: Permission denied"


def test_a_byte_order_mark_is_passed_over() -> None:
    Path("mark.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(Path("mark.yaml")).base_model == "org/model"


# ---------------------------------------------------------------------------------------------------------- Round trip

WORDS = st.text(min_size=1, max_size=20) | st.sampled_from(
    ["1e5", "08", "12345e6", "1_000", "no", "null", "~x", ".5", "5.", "0x1F", "2024-01-01", "<<", "é🙂", "\x85", "a: b"]
)
POSITIVE = st.integers(1, 10**6)
SECTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "quantization": {
        "bits": st.sampled_from([4, 16]),
        "quant_type": st.sampled_from(["nf4", "fp4"]),
        "double_quant": st.booleans(),
    },
    "lora": {
        "rank": POSITIVE,
        "alpha": st.floats(1e-300, 1e300) | POSITIVE,
        "dropout": st.floats(0, 1, exclude_max=True),
        "target_modules": WORDS.map(re.escape) | st.lists(WORDS, min_size=1, max_size=3),
    },
    "training": {
        "num_train_epochs": st.floats(1e-9, 1e9),
        "max_steps": st.none() | POSITIVE,
        "learning_rate": st.floats(5e-324, 1),
        "max_grad_norm": st.none() | st.floats(1e-3, 10),
        "save_steps": st.none() | POSITIVE,
        "seed": st.integers(0, 2**32 - 1),
        "optimizer": st.sampled_from(["adamw_torch", "paged_lion_8bit"]),
    },
}
DATASET: dict[str, st.SearchStrategy[Any]] = {
    "validation": st.none() | st.just("/data/held out/é.jsonl"),
    "hub_config": st.none() | WORDS,
    "columns": st.dictionaries(WORDS, WORDS, max_size=3),
    "max_length": st.integers(2, 10**6),
}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Valid recipes; any field may be left to its default."""
    data: dict[str, Any] = {
        "base_model": draw(st.sampled_from(["gpt2", "org/name", "/models/a b", "1e5/08"])),
        "dataset": {"train": "/data/*.jsonl"} | draw(st.fixed_dictionaries({}, optional=DATASET)),
        "output_dir": draw(WORDS.filter(lambda name: not name.startswith("~"))),
    }
    data |= draw(
        st.fixed_dictionaries({}, optional={"revision": st.none() | WORDS, "trust_remote_code": st.booleans()})
    )
    for name, fields in SECTIONS.items():
        if draw(st.booleans()):
            data[name] = draw(st.fixed_dictionaries({}, optional=fields))
    if data.get("training", {}).get("max_steps") is not None:
        data["training"].pop("num_train_epochs", None)
    return Recipe.model_validate(data)


@settings(max_examples=150, deadline=None)
@given(recipe=recipes())
def test_a_dumped_recipe_is_read_back(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every default written out, also with max_steps, and words that look like numbers: equal when read again."""
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_dump_states_every_default() -> None:
    """A reader of a run folder need not know the defaults of the version that made it; of the two lengths, the one in
    force."""
    text = dump_recipe(load(MINIMAL, "training.max_steps=5"))
    assert "  max_steps: 5\n" in text
    assert "num_train_epochs" not in text
    assert "  quant_type: nf4\n" in text
    assert "  num_train_epochs: 1.0\n  max_steps: null\n" in dump_recipe(load(MINIMAL))
    assert 'revision: "1e5"\n' in dump_recipe(load(MINIMAL, "revision='1e5'"))
