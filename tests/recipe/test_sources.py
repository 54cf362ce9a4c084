"""Several sources of rows: a list of names, and of sections that say more of a source."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import RecipeError
from qlora_cli.recipe.schema import SourceSection
from tests.support.recipes import load, refusal

HEAD = "base_model: org/model\noutput_dir: out\ndataset:\n"
SOURCE = "    `dataset.train.{}` takes path, weight, hub_config, split, format, columns"
FORMATS = "auto, messages, conversations, alpaca, prompt_completion, classification or text"


def refused(lines: str, *overrides: str, must_exist: bool = False) -> str:
    """What is said of a recipe with these lines in its dataset; they begin on line 4."""
    return refusal(f"{HEAD}{lines}\n", *overrides, must_exist=must_exist).replace("r.yaml:", "")


# ---------------------------------------------------------------------------------------------------------- What holds


def test_a_list_of_names_and_sections(tmp_path: Path) -> None:
    """Each item is text or has fields of its own; what it leaves out is as the dataset has it."""
    dataset = load(
        f"{HEAD}  train:\n  - a.jsonl\n  - path: org/b\n    weight: 2\n    split: part\n    columns: {{text: body}}\n"
        "  format: text\n  hub_config: main\n"
    ).dataset
    first, second = dataset.train_sources
    assert first == SourceSection(
        path=str(tmp_path / "recipes" / "a.jsonl"), hub_config="main", split="train", format="text", columns={}
    )
    assert second == SourceSection(
        path="org/b", weight=2, hub_config="main", split="part", format="text", columns={"text": "body"}
    )
    assert dataset.validation_sources == ()


def test_paths_of_items_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text and as `path`: beside the recipe, in the home folder, by an environment variable; a hub name stays."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    (tmp_path / "recipes" / "here").mkdir()
    names = ["a.jsonl", "here", "~/b.jsonl", "${DATA}/c.jsonl", "../d/*.csv", "org/rows", "./e$$f.jsonl"]
    found = [f"{tmp_path}/{name}" for name in ("recipes/a.jsonl", "recipes/here", "home/b.jsonl", "data/c.jsonl")]
    found += [f"{tmp_path}/d/*.csv", "org/rows", f"{tmp_path}/recipes/e$f.jsonl"]
    for form in ("'{}'", "{{path: '{}'}}"):
        items = ", ".join(form.format(name) for name in names)
        assert [source.path for source in load(f"{HEAD}  train: [{items}]\n").dataset.train_sources] == found
        rows = load(f"{HEAD}  train: org/x\n  validation: [{items}]\n").dataset.validation_sources
        assert [source.path for source in rows] == found


def test_what_is_there_is_accepted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "recipes" / f"{name}.jsonl").touch()
    text = f"{HEAD}  train: [a.jsonl, {{path: b.jsonl}}]\n  validation_fraction: 0.1\n"
    assert len(load(text, must_exist=True).dataset.train_sources) == 2


def test_a_source_twice_where_its_rows_are_read_otherwise() -> None:
    """Another split, configuration or format, or other columns, are other rows to learn."""
    items = "org/a, {path: org/a, split: more}, {path: org/a, hub_config: b}, {path: org/a, format: text}"
    assert len(load(f"{HEAD}  train: [{items}]\n").dataset.train_sources) == 4
    both = "{path: a.csv, columns: {prompt: q, completion: a}}, {path: a.csv, columns: {prompt: a, completion: q}}"
    assert len(load(f"{HEAD}  train: [{both}]\n").dataset.train_sources) == 2


def test_defaults_that_one_source_takes_up() -> None:
    """What is said for all has a use as long as one source needs it; so has a choice among turns."""
    items = "[{path: a.jsonl, format: text}, org/b, {path: org/c, split: x, hub_config: y}]"
    more = "  train_split: part\n  hub_config: main\n  streaming: true\n  supervise: last_assistant\n  packing: true\n"
    assert load(f"{HEAD}  train: {items}\n{more}").dataset.streaming


# ---------------------------------------------------------------------------------------------------------- Mistakes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        # Keys
        ("  train:\n  - a.jsonl\n  - pth: b.jsonl",
         f"6:5: dataset.train.1.pth: unknown key; did you mean `path`?\n{SOURCE.format(1)}"),
        ("  train: [{path: a, wieght: 3}]",
         f"4:21: dataset.train.0.wieght: unknown key; did you mean `weight`?\n{SOURCE.format(0)}"),
        ("  train: [{path: a, xyzzy: 3}]", f"4:21: dataset.train.0.xyzzy: unknown key\n{SOURCE.format(0)}"),
        ("  train: [{path: a, train_split: x}]",
         f"4:21: dataset.train.0.train_split: unknown key; did you mean `split`?\n{SOURCE.format(0)}"),
        ("  train: [{path: a, name: main}]",
         f"4:21: dataset.train.0.name: unknown key; did you mean `hub_config`?\n{SOURCE.format(0)}"),
        ("  train: [{file: a.jsonl}]",
         f"4:12: dataset.train.0.file: unknown key; did you mean `path`?\n{SOURCE.format(0)}"),
        ("  train: [{name: a.jsonl}]",
         f"4:12: dataset.train.0.name: unknown key; did you mean `path`?\n{SOURCE.format(0)}"),
        ("  train: [{path: a, max_length: 9}]",
         "4:21: dataset.train.0.max_length: `max_length` belongs under `dataset`"),
        ("  train: [{path: a, prompt: q}]",
         "4:21: dataset.train.0.prompt: `prompt` belongs under `dataset.train.0.columns`"),
        ("  train: [{path: a, type: alpaca}]",
         "4:21: dataset.train.0.type: `type` is axolotl's name; here it is `dataset.train.0.format`"),
        ("  train: [{path: a, field_messages: turns}]",
         "4:21: dataset.train.0.field_messages: `field_messages` is axolotl's name; here it is "
         "`dataset.train.0.columns`: a mapping, as in {messages: your_column}"),
        ("  train: a\n  weight: 3",
         "5:3: dataset.weight: `weight` belongs to an item of `dataset.train`, as in [{path: ..., weight: ...}]"),
        ("  train: [{path: a, path: b}]",
         "4:21: dataset.train.0.path: `path` is given twice (first on line 4); leave one out"),
        # Values
        ("  train: [{weight: 2}]",
         "4:11: dataset.train.0.path: is required and was not given: file, folder, glob or hub name; a path is "
         "relative to the recipe"),
        ("  train: []",
         "4:10: dataset.train: expected text or a list of text and sections, with at least one item, got []"),
        ("  train: [a, '']", "4:14: dataset.train.1: expected text that is not empty, got ''"),
        ("  train: [{path: ''}]", "4:18: dataset.train.0.path: expected text that is not empty, got ''"),
        ("  train: [a, 3]", "4:14: dataset.train.1: expected text or a section, got 3; in quotes it is text: '3'"),
        ("  train: [[a, b]]", "4:11: dataset.train.0: expected text or a section, got [a, b]"),
        ("  train:\n  - a\n  -", "6:4: dataset.train.1: expected text or a section, got nothing"),
        ("  train: {path: a, weight: 2}",
         "4:10: dataset.train: expected text or a list of text and sections, got a section; a section is an item of a "
         "list: put `- ` before its first line"),
        ("  train: [{path: a, weight: 0}]",
         "4:29: dataset.train.0.weight: expected a number above 0, at most 1000, got 0"),
        ("  train: [{path: a, weight: half}]",
         "4:29: dataset.train.0.weight: expected a number above 0, at most 1000, got 'half'"),
        ("  train: [{path: a, weight: '2'}]",
         "4:29: dataset.train.0.weight: expected a number above 0, at most 1000, got '2'; without quotes it is a "
         "number: 2"),
        ("  train: [{path: a, format: sharegpt}]",
         f"4:29: dataset.train.0.format: expected {FORMATS}, or null, got 'sharegpt'; did you mean `conversations`?"),
        ("  train: [{path: a, columns: [q]}]",
         "4:30: dataset.train.0.columns: expected a mapping such as {prompt: question}, or null, got [q]"),
        ("  train: [{path: a, columns: {prompt: 3}}]",
         "4:39: dataset.train.0.columns.prompt: expected text, got 3; in quotes it is text: '3'"),
        # References
        ("  train: [a, {path: '${NO_SUCH}/b'}]",
         "4:21: dataset.train.1.path: the environment variable NO_SUCH is not set"),
        ("  train: ['${NO_SUCH}/b']", "4:11: dataset.train.0: the environment variable NO_SUCH is not set"),
        ("  train: [{path: a/b, split: '${X}'}]",
         "4:30: dataset.train.0.split: environment variables are not read in this field, only in extends, base_model, "
         "output_dir, dataset.train, dataset.validation, dataset.chat_template, evaluation.data_root, "
         "evaluation.task_path; got '${X}'"),
        # What contradicts itself
        ("  train: [a.jsonl, ./a.jsonl]",
         "4:20: dataset.train.1: is the same source as `dataset.train.0` (line 4): give it once, with a `weight` above "
         "1"),
        ("  train: [org/a, {path: org/a, split: train}]",
         "4:25: dataset.train.1.path: is the same source as `dataset.train.0` (line 4): give it once, with a `weight` "
         "above 1"),
        ("  train: org/a\n  validation: [org/b, org/b]",
         "5:23: dataset.validation.1: is the same source as `dataset.validation.0` (line 5): give it once"),
        ("  train: org/a\n  validation: [{path: org/b, weight: 2}]",
         "5:30: dataset.validation.0.weight: has no meaning in `validation`, whose rows are evaluated once each: leave "
         "it out"),
        ("  train: [{path: a.jsonl, split: x}]",
         "4:27: dataset.train.0.split: is for datasets of the hub, and `path` is a local path: leave it out"),
        ("  train: [{path: a.jsonl, hub_config: x}]",
         "4:27: dataset.train.0.hub_config: is for datasets of the hub, and `path` is a local path: leave it out"),
        ("  train: [a.jsonl, b.jsonl]\n  train_split: x",
         "5:3: dataset.train_split: is for datasets of the hub, and `train` names none: leave it out"),
        ("  train: [a.jsonl, b.jsonl]\n  hub_config: x",
         "5:3: dataset.hub_config: is for datasets of the hub, and `train` names none: leave it out"),
        ("  train: a.jsonl\n  validation: [b.jsonl]\n  hub_config: x",
         "6:3: dataset.hub_config: is for datasets of the hub, and neither `train` nor `validation` names one: leave "
         "it out"),
        ("  train: a.jsonl\n  streaming: true",
         "5:3: dataset.streaming: is for datasets of the hub, and `train` is a local path: leave it out"),
        ("  train: [a.jsonl, {path: org/b, split: x}]\n  train_split: y",
         "5:3: dataset.train_split: has no use: every source of the hub has its own `split`; leave it out"),
        ("  train: [{path: a.jsonl, format: text}]\n  format: alpaca",
         "5:3: dataset.format: has no use: every source has its own `format`; leave it out"),
        ("  train: org/a\n  validation_split: test",
         "5:3: dataset.validation_split: is for `validation`, which is not given: name the dataset there"),
        ("  train: [{path: a.jsonl, columns: {promt: q}}]",
         "4:37: dataset.train.0.columns.promt: no format has a field 'promt'; did you mean `prompt`?"),
        ("  train: [{path: a.jsonl, format: text, columns: {prompt: q}}]",
         "4:51: dataset.train.0.columns.prompt: the format text has no field 'prompt'; expected text"),
        ("  train: [{path: a.jsonl, columns: {prompt: q}}]\n  format: text",
         "4:37: dataset.train.0.columns.prompt: the format text has no field 'prompt'; expected text"),
        ("  train: [a.jsonl, {path: b.jsonl, format: text}]\n  columns: {prompt: q}",
         "5:13: dataset.columns.prompt: the format text has no field 'prompt', and another source has: give `columns` "
         "to each source that it is for"),
        ("  train: a.jsonl\n  format: text\n  supervise: last_assistant",
         "6:3: dataset.supervise: has no meaning with `format: text` (line 5), of which everything is learned: leave "
         "it out"),
        ("  train: [{path: a.jsonl, format: text}]\n  supervise: last_assistant",
         "5:3: dataset.supervise: has no meaning with `format: text`, of which everything is learned: leave it out"),
        ("  train: a.jsonl\n  format: text\n  chat_template: plain",
         "6:3: dataset.chat_template: has no meaning with `format: text` (line 5), which is learned as it stands: "
         "leave it out"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_sources(lines: str, message: str) -> None:
    """The place, the name with the item's number, and what is told of such a mistake anywhere."""
    assert refused(lines) == message


def test_a_list_in_place_of_the_section() -> None:
    """As LLaMA-Factory and mlx-lm have it, and torchtune: it belongs one step further in."""
    keys = refused("  train: a\n  nope: 1").splitlines()[1]
    text = HEAD.replace("dataset:", "dataset: {}")
    assert refusal(text.format("[a.jsonl, b]")).splitlines() == [
        "r.yaml:3:10: dataset: expected a section of `key: value` lines, got [a.jsonl, b]; that is for `dataset.train`",
        keys,
    ]
    assert refusal(text.format("alpaca_en")).splitlines()[0].endswith("got 'alpaca_en'; that is for `dataset.train`")


def test_another_tools_list_is_looked_into() -> None:
    """axolotl's `datasets` is taken for ours, and what is wrong in its items is told in the same breath."""
    text = "base_model: a/b\noutput_dir: o\ndatasets:\n- path: org/x\n  type: sharegpt\n  name: main\n"
    assert [line for line in refusal(text).splitlines() if line[0] != " "] == [
        "r.yaml:3:1: datasets: `datasets` is axolotl's name; here it is `dataset.train`",
        "r.yaml:5:3: dataset.train.0.type: `type` is axolotl's name; here it is `dataset.train.0.format`",
        f"r.yaml:5:9: dataset.train.0.format: expected {FORMATS}, or null, got 'sharegpt'; did you mean "
        "`conversations`?",
        "r.yaml:6:3: dataset.train.0.name: unknown key; did you mean `hub_config`?",
    ]


def test_a_section_under_another_tools_name_of_the_list() -> None:
    """`datasets` is a slip where it holds what our section does."""
    told = refusal("base_model: a/b\noutput_dir: o\ndatasets: {train: org/x, max_lenght: 4}\n").splitlines()
    assert [line for line in told if line[0] != " "] == [
        "r.yaml:3:1: datasets: unknown key; did you mean `dataset`?",
        "r.yaml:3:26: dataset.max_lenght: unknown key; did you mean `max_length`?",
    ]


def test_items_that_are_not_there(tmp_path: Path) -> None:
    """Each with its place and what may have been meant; a name that only the current folder has is no hub name."""
    (tmp_path / "recipes" / "train.jsonl").touch()
    (tmp_path / "org" / "rows").mkdir(parents=True)
    assert refused("  train: [trian.jsonl, {path: 'two words'}, org/rows]", must_exist=True).splitlines() == [
        "4:11: dataset.train.0: recipes/trian.jsonl: there is no such file or folder; did you mean train.jsonl?",
        "4:31: dataset.train.1.path: 'two words' is no path that is there, and no hub name such as org/name.",
        "4:45: dataset.train.2: org/rows is not beside the recipe but in the current folder; "
        "a path is relative to the recipe: write ../org/rows",
    ]


# ---------------------------------------------------------------------------------------------------------- Layers

TWO = f"{HEAD}  train: [a.jsonl, {{path: b.jsonl, format: text}}]\n"


def test_an_override_replaces_a_list(tmp_path: Path) -> None:
    """By one name, or by another list, whose paths are relative to where it is typed."""
    assert load(TWO, "dataset.train=x.jsonl").dataset.train == str(tmp_path / "x.jsonl")
    assert load(TWO, "dataset.train=[a.jsonl, org/b]").dataset.train == [str(tmp_path / "a.jsonl"), "org/b"]


def test_an_override_of_an_item(tmp_path: Path) -> None:
    """A key of it, beside those that it has; the whole of it; and a key of one that was only named."""
    here = tmp_path / "recipes"
    first, second = load(TWO, "dataset.train.1.weight=2", "dataset.train.0.weight=3").dataset.train
    assert first == SourceSection(path=str(here / "a.jsonl"), weight=3)
    assert second == SourceSection(path=str(here / "b.jsonl"), weight=2, format="text")
    assert load(TWO, "dataset.train.1=c.jsonl").dataset.train == [str(here / "a.jsonl"), str(tmp_path / "c.jsonl")]
    replaced = load(TWO, "dataset.train.1={path: c.jsonl}").dataset.train[1]
    assert replaced == SourceSection(path=str(tmp_path / "c.jsonl"))
    targets = load(TWO + "lora: {target_modules: [q, k]}\n", "lora.target_modules.1=v").lora.target_modules
    assert targets == ["q", "v"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.train.2.weight=2", "dataset.train: there is no item 2: the list has 2, numbered from 0"),
        ("dataset.validation.0.split=x",
         "dataset.validation: is no list that has items by number; give it whole, as in --set "
         "'dataset.validation=[...]'"),
        ("dataset.train.1.weihgt=2",
         f"dataset.train.1.weihgt: unknown key; did you mean `weight`?\n{SOURCE.format(1)}"),
        ("dataset.train.0.weight=x", "dataset.train.0.weight: expected a number above 0, at most 1000, got 'x'"),
        ("dataset.train.x.weight=2",
         "dataset.train: expected text or a list of text and sections, got a section"),
        ("dataset.train.1=null", "dataset.train.1: expected text or a section, got nothing"),
        ("dataset.train.99999999999=a",
         "dataset.train: expected text or a list of text and sections, got a section"),
    ],
)  # fmt: skip
def test_a_wrong_override_of_an_item(override: str, message: str) -> None:
    assert refused("  train: [a.jsonl, {path: b.jsonl, format: text}]", override) == f"--set {override}: {message}"


def test_a_list_replaces_the_list_of_the_recipe_that_is_extended(tmp_path: Path) -> None:
    """As other lists do; what the other said of datasets of the hub goes with its rows."""
    (tmp_path / "base.yaml").write_text(
        f"{HEAD}  train: [org/a, org/b]\n  hub_config: main\n  train_split: part\n  streaming: true\n"
    )
    dataset = load("extends: ../base.yaml\ndataset: {train: [c.jsonl]}\n").dataset
    assert dataset.train == [str(tmp_path / "recipes" / "c.jsonl")]
    assert (dataset.hub_config, dataset.train_split, dataset.streaming) == (None, "train", False)


def test_what_no_longer_has_a_use_under_an_override_goes() -> None:
    """So that `--set` fits any recipe: validation rows that are taken away take what is said of them along."""
    text = f"{HEAD}  train: org/a\n  validation: org/a\n  validation_split: test\n  hub_config: main\n"
    dataset = load(text, "dataset.validation_fraction=0.1").dataset
    assert (dataset.validation, dataset.validation_split, dataset.hub_config) == (None, "validation", "main")
    assert load(text, "dataset.validation=null").dataset.validation_split == "validation"
    assert load(text, "dataset.train=a.jsonl").dataset.hub_config == "main"


@pytest.mark.parametrize("first", [0, 1])
def test_of_arguments_the_order_is_no_matter(first: int) -> None:
    """A split that is given with rows is of those rows, before them or after; one that fits none of them is told."""
    text = f"{HEAD}  train: org/a\n  train_split: part\n"
    rows, split = "dataset.train=org/b", "dataset.train_split=half"
    dataset = load(text, *([rows, split] if first else [split, rows])).dataset
    assert (dataset.train, dataset.train_split) == ("org/b", "half")
    assert load(text, rows).dataset.train_split == "train"
    with pytest.raises(RecipeError, match=r"^--set dataset\.train_split=half: .* is for datasets of the hub"):
        load(text, *(["dataset.train=a.jsonl", split] if first else [split, "dataset.train=a.jsonl"]))


@pytest.mark.parametrize("override", ["dataset.format=text", "dataset.train=[{path: a.jsonl, format: text}]"])
def test_what_is_said_of_turns_goes_where_there_are_none(override: str) -> None:
    """A recipe for conversations is tried on text; the template given with the text is still told."""
    text = f"{HEAD}  train: a.jsonl\n  supervise: last_assistant\n  chat_template: plain\n"
    dataset = load(text, override).dataset
    assert (dataset.supervise, dataset.chat_template) == ("all_assistant", None)
    with pytest.raises(
        RecipeError, match=r"^--set dataset\.chat_template=x\.jinja: .*has no meaning with `format: text`"
    ):
        load(text, "dataset.chat_template=x.jinja", "dataset.format=text")


# ---------------------------------------------------------------------------------------------------------- Templates


@pytest.mark.parametrize("template", ["plain", "{{ messages }}", "{% for m in messages %}${X} $$ {{ m }}{% endfor %}"])
def test_a_template_that_is_no_file(template: str) -> None:
    """The word, and Jinja's own marks: to the letter, dollars and all."""
    assert (
        load(f"{HEAD}  train: a/b\n  chat_template: '{template}'\n", must_exist=True).dataset.chat_template == template
    )


def test_a_template_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the recipe, whatever its name looks like; a reference is replaced in a path."""
    monkeypatch.setenv("WHERE", str(tmp_path))
    for name in ("org", "chat[1].jinja", "plain"):
        (tmp_path / "recipes" / name).touch()
    (tmp_path / "x.jinja").touch()
    for name, found in {
        **{name: f"recipes/{name}" for name in ("org", "chat[1].jinja")},
        **{"./plain": "recipes/plain", "${WHERE}/x.jinja": "x.jinja", "../x.jinja": "x.jinja"},
    }.items():
        recipe = load(f"{HEAD}  train: a/b\n  chat_template: '{name}'\n", must_exist=True)
        assert recipe.dataset.chat_template == str(tmp_path / found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpaca", "recipes/alpaca: there is no such file; expected a Jinja file, the template itself, or plain; "
         "left out, it is the tokenizer's own."),
        ("chat.jnja", "recipes/chat.jnja: there is no such file; did you mean chat.jinja?"),
        ("no/chat.jinja", "recipes/no/chat.jinja: there is no such file; the folder recipes/no is not there."),
        ("Plain", "recipes/Plain: there is no such file; did you mean plain?"),
        (".", "recipes is no file; expected a Jinja file, the template itself, or plain; left out, it is "
         "the tokenizer's own."),
        ("https://x/chat.jinja", "https://x/chat.jinja is a URL; expected a Jinja file, the template itself, or plain; "
         "left out, it is the tokenizer's own."),
        ("''", "expected text that is not empty, got ''"),
        ("3", "expected text, or null, got 3; in quotes it is text: '3'"),
        ("${NO_SUCH}/chat.jinja", "the environment variable NO_SUCH is not set"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_read(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "chat.jinja").touch()
    told = refused(f"  train: a/b\n  chat_template: {name}", must_exist=True)
    assert told == f"5:18: dataset.chat_template: {message}"


def test_columns_for_one_of_several_formats() -> None:
    """Given for all sources, they are told to be given to those that they are for."""
    train = "[{path: a.jsonl, format: messages}, {path: b.jsonl, format: alpaca}]"
    assert refused(f"  train: {train}\n  columns: {{messages: chat}}") == (
        "5:13: dataset.columns.messages: the format alpaca has no field 'messages', and another source has: give "
        "`columns` to each source that it is for"
    )


def test_a_list_in_place_of_a_section_is_told_over_another(tmp_path: Path) -> None:
    """In a recipe and in the one it extends, with fewer items: what is wrong is said, and nothing else goes wrong."""
    (tmp_path / "base.yaml").write_text("base_model: org/m\ndataset: [a]\noutput_dir: out\n")
    for items in ("[a, b]", "[]"):
        with pytest.raises(RecipeError, match=r"2:10: dataset: expected a section of `key: value` lines, got \["):
            load(f"extends: ../base.yaml\ndataset: {items}\n")


def test_a_list_that_belongs_elsewhere_is_told() -> None:
    """Given for an item, with more items than the list that was meant has."""
    text = f"{HEAD}  train: [org/a]\nlora: {{target_modules: [q]}}\n"
    override = "dataset.train.0.target_modules=[a,b,c]"
    message = "dataset.train.0.target_modules: `target_modules` belongs under `lora`"
    with pytest.raises(RecipeError) as caught:
        load(text, override)
    assert str(caught.value) == f"--set {override}: {message}"
