"""From a recipe and overrides to a checked `Recipe`: what wins, which files are read, and back to YAML."""

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
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from tests.support.recipes import MINIMAL, load, refusal


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
        "--set lora={rank: x}: lora.rank: expected a whole number from 1 to 65,536, got 'x'"
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


TOP_LEVEL = (
    "the top level takes extends, base_model, revision, trust_remote_code, task, quantization, lora, dataset, "
    "training, evaluation, output_dir"
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=3",
         "lora.rnk: unknown key; did you mean `rank`?\n    `lora` takes rank, alpha, dropout, target_modules"),
        ("nope.x=3", f"nope: unknown key\n    {TOP_LEVEL}"),
        ("rank=3", "rank: `rank` belongs under `lora`"),
        ("lora_r=3", "lora_r: `lora_r` is PEFT's name; here it is `lora.rank`"),
        ("base_model.x=1", "base_model: expected text, got a section"),
        ("dataset.train.x.y=1", "dataset.train: expected text or a list of text and sections, got a section"),
        ("lora.rank=", 'there is no value; write null to unset one, or "" for an empty text'),
        ("training.max_steps=  ", 'there is no value; write null to unset one, or "" for an empty text'),
        ("extends=other.yaml", "a recipe can extend another only in its file"),
        ("lora.rank=null", "lora.rank: expected a whole number from 1 to 65,536, got nothing; its default is 16"),
        ("lora=3", "lora: expected a section of `key: value` lines, got 3\n"
         "    `lora` takes rank, alpha, dropout, target_modules"),
        ("lora.rank=[1", "not valid YAML: this bracket is never closed: `]` is missing"),
        ("lora.rank=!!int 1", "the tag !!int is not allowed in a recipe"),
        ("lora={rank: 1, rank: 2}", "lora.rank: `rank` is given twice; leave one out"),
        ("dataset.columns.prompt.b=c", "dataset.columns.prompt: expected text, got a section"),
        ("training={max_steps: 1, num_train_epochs: 2}",
         "training.num_train_epochs: excludes `max_steps` (--set training={max_steps: 1, num_train_epochs: 2}): "
         "give one of the two"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    """The argument takes the place of file and line; the rest is as in a file."""
    assert refusal(MINIMAL, override) == f"--set {override}: {message}"


def test_all_wrong_overrides_are_told() -> None:
    """One that cannot be read at all does not hide the next."""
    assert refusal(MINIMAL, "lora.rank", "=1", "lora.rank=[", "lora.rank=0").splitlines() == [
        "--set lora.rank: expected KEY=VALUE, as in --set training.max_steps=20",
        "--set =1: expected KEY=VALUE, as in --set training.max_steps=20",
        "--set lora.rank=[: not valid YAML: this bracket is never closed",
        "--set lora.rank=0: lora.rank: expected a whole number from 1 to 65,536, got 0",
    ]


def test_a_contradiction_between_recipe_and_override() -> None:
    """What an override asks for wins over what it contradicts, but where it needs something, it says so."""
    text = MINIMAL + "quantization: {quant_type: fp4}\ntraining: {eval_steps: 5}\n"
    assert (
        load(text.replace("train: org", "validation: a/b\n  train: org"), "quantization.bits=16").quantization.bits
        == 16
    )
    assert refusal(MINIMAL, "training.eval_steps=5") == (
        "--set training.eval_steps=5: training.eval_steps: needs rows to evaluate on: give dataset.validation or "
        "dataset.validation_fraction"
    )
    assert load(text, "dataset.validation_fraction=0.1", "base_model=org/other").training.eval_steps == 5


def test_another_model_is_not_read_at_the_old_revision() -> None:
    """But the same model said again is, and a revision given beside a model is that model's, in either order."""
    text = MINIMAL + "revision: abc\n"
    assert load(text).revision == load(text, "base_model=org/model").revision == "abc"
    assert load(text, "base_model=org/other").revision is None
    assert load(text, "base_model=org/other", "revision=def").revision == "def"
    assert load(text, "revision=def", "base_model=org/other").revision == "def"


def test_what_is_taken_back_takes_no_place() -> None:
    """An override that a later one unsets leaves what the recipe said."""
    training = load(MINIMAL + "training: {num_train_epochs: 3}\n", "training.max_steps=20", "training.max_steps=null")
    assert (training.training.max_steps, training.training.num_train_epochs) == (None, 3)
    text = MINIMAL + "quantization: {quant_type: fp4}\n"
    assert load(text, "quantization.bits=16", "quantization.bits=4").quantization.quant_type == "fp4"


def test_a_local_file_in_place_of_hub_rows_leaves_the_split_behind() -> None:
    text = MINIMAL.replace("org/rows", "org/rows\n  train_split: part")
    assert load(text).dataset.train_split == "part"
    assert load(text, "dataset.train=rows.csv").dataset.train_split == "train"


@pytest.mark.parametrize("override", ["output_dir=runs/a #1", "revision=#x", "dataset.validation=#v.jsonl"])
def test_a_comment_in_an_override(override: str) -> None:
    """A shell's argument has no comments; YAML would cut the value, or leave none."""
    assert refusal(MINIMAL, override) == f"--set {override}: `#` begins a comment; put the value in quotes"
    assert load(MINIMAL, "output_dir='runs/a #1'").output_dir == "runs/a #1"
    assert load(MINIMAL, "output_dir=runs/a#1").output_dir == "runs/a#1"


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
    assert load_recipe(Path("mark.yaml"), must_exist=False).base_model == "org/model"


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
        "rank": st.integers(1, 65_536),
        "alpha": st.floats(1e-300, 1e300) | POSITIVE,
        "dropout": st.floats(0, 1, exclude_max=True),
        "target_modules": WORDS.map(lambda word: ".*" + re.escape(word)) | st.lists(WORDS, min_size=1, max_size=3),
    },
    "training": {
        "num_train_epochs": st.floats(1e-9, 1e4),
        "max_steps": st.none() | POSITIVE,
        "learning_rate": st.floats(5e-324, 1),
        "max_grad_norm": st.none() | st.floats(1e-3, 10),
        "save_steps": st.none() | POSITIVE,
        "seed": st.integers(0, 2**32 - 1),
        "optimizer": st.sampled_from(["adamw_torch", "paged_lion_8bit"]),
    },
}
COLUMNS = st.dictionaries(st.sampled_from(["prompt", "completion", "text", "input"]), WORDS, max_size=3).filter(
    lambda columns: len({*columns.values()}) == len(columns)
)
TEMPLATES = ["plain", "/chat/${x} $$.jinja", "{{ '${HOME}' }}$$", "{% for m in messages %}\n{{- m }}\n{% endfor %}\n"]
DATASET: dict[str, st.SearchStrategy[Any]] = {
    "columns": COLUMNS,
    "max_length": st.integers(2, 10**6),
    "chat_template": st.none() | st.sampled_from(TEMPLATES),
    "supervise": st.sampled_from(["all_assistant", "last_assistant", "everything"]),
    "on_bad_row": st.sampled_from(["error", "skip"]),
    "packing": st.booleans(),
}
# One name that takes up what the dataset says for all sources, so that any of it has a use.
HUB = "org/rows"


@st.composite
def sources(draw: st.DrawFn, *, weighted: bool) -> Any:
    """A name, or a list of names and sections; one of them at least takes up what is said for all."""
    names = draw(st.lists(st.sampled_from(["/d/a.jsonl", "/d/${x}$$/b*.csv", "org/b", "1e5/08"]), unique=True))
    items: list[Any] = [HUB]
    for name in names:
        more = {"format": st.none() | st.just("auto"), "columns": st.none() | COLUMNS}
        if weighted:
            more["weight"] = st.floats(1e-9, 1000)
        if not name.startswith("/"):
            more |= {"split": st.none() | WORDS, "hub_config": st.none() | WORDS}
        items.append(draw(st.just(name) | st.fixed_dictionaries({"path": st.just(name)}, optional=more)))
    return draw(st.permutations(items)) if draw(st.booleans()) else HUB


@st.composite
def datasets(draw: st.DrawFn) -> dict[str, Any]:
    """Valid ones: local rows alone, or any, with what is said of the hub's."""
    data: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=DATASET))
    if draw(st.booleans()):
        data |= {"train": "/data/*.jsonl", "validation": draw(st.none() | st.just("/data/held out/é.jsonl"))}
        return data
    data["train"] = draw(sources(weighted=True))
    of_the_hub = {"hub_config": st.none() | WORDS, "train_split": WORDS, "streaming": st.booleans()}
    if draw(st.booleans()):
        data["validation"] = draw(sources(weighted=False))
        of_the_hub["validation_split"] = WORDS
    return data | draw(st.fixed_dictionaries({}, optional=of_the_hub))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Valid recipes; any field may be left to its default."""
    data: dict[str, Any] = {
        "base_model": draw(st.sampled_from(["gpt2", "org/name", "/models/a b", "1e5/08", "/m/${HOME}", "/$${x}$$"])),
        "dataset": draw(datasets()),
        "output_dir": draw(WORDS.filter(lambda name: not name.startswith("~"))),
    }
    local = data["base_model"].startswith("/")
    revision = st.none() if local else st.none() | WORDS
    data |= draw(st.fixed_dictionaries({}, optional={"revision": revision, "trust_remote_code": st.booleans()}))
    for name, fields in SECTIONS.items():
        if draw(st.booleans()):
            data[name] = draw(st.fixed_dictionaries({}, optional=fields))
    if data.get("training", {}).get("max_steps") is not None:
        data["training"].pop("num_train_epochs", None)
    if data.get("quantization", {}).get("bits") == 16:
        data["quantization"] = {"bits": 16}
    return Recipe.model_validate(data)


@settings(max_examples=150, deadline=None)
@given(recipe=recipes())
def test_a_dumped_recipe_is_read_back(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every default written out, also with max_steps, and words that look like numbers: equal when read again."""
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path, must_exist=False) == recipe


def test_a_dump_states_every_default() -> None:
    """A reader of a run folder need not know the defaults of the version that made it; of the two lengths, the one in
    force."""
    text = dump_recipe(load(MINIMAL, "training.max_steps=5"))
    assert "  max_steps: 5\n" in text
    assert "num_train_epochs" not in text
    assert "  quant_type: nf4\n" in text
    assert "  num_train_epochs: 1.0\n  max_steps: null\n" in dump_recipe(load(MINIMAL))
    assert 'revision: "1e5"\n' in dump_recipe(load(MINIMAL, "revision='1e5'"))
