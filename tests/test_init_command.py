"""`qlora init` as a script meets it: what defaults, flags and --set give, what is written and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qlora_cli.cli import app
from qlora_cli.commands import init as init_command
from qlora_cli.errors import RequestError
from qlora_cli.recipe.load import load_recipe
from tests.support.first_recipes import FLAGS, RECIPE, Person, ask, init, model, refused, rows, written


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/qlora"])


def test_defaults_where_nothing_is() -> None:
    """A small model and a well-known dataset from the hub: something that can be tried."""
    result = init("--yes")
    assert result.stdout == (
        "model    HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "data     openai/gsm8k: a dataset on the hub\n"
        "held out openai/gsm8k\n"
        "run      runs/gsm8k\n"
        "wrote    recipe.yaml\n"
        "         recipe.schema.json\n"
        "\nNext:\n  qlora check recipe.yaml\n  qlora train recipe.yaml\n"
    )
    dataset = written().dataset
    assert written().base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (dataset.train, dataset.hub_config, dataset.validation) == ("openai/gsm8k", "main", "openai/gsm8k")
    assert dataset.validation_split == "test"
    assert dataset.columns == {"prompt": "question", "completion": "answer"}


def test_defaults_from_what_is_here() -> None:
    """The only model, the training rows, and the held-out rows beside them; recognised, and long enough."""
    model("models/tiny")
    rows("data/maths/../maths-train.jsonl", "question", "answer", count=100)
    rows("data/maths-test.jsonl", "question", "answer", count=7)
    result = init()
    recipe = written()
    assert recipe.base_model == str(Path.cwd() / "models/tiny")
    assert recipe.dataset.train == str(Path.cwd() / "data/maths-train.jsonl")
    assert recipe.dataset.validation == str(Path.cwd() / "data/maths-test.jsonl")
    assert recipe.dataset.columns == {"prompt": "question", "completion": "answer"}
    assert (recipe.dataset.format, recipe.dataset.max_length, recipe.output_dir) == ("auto", 2048, "runs/maths")
    assert "data     data/maths-train.jsonl: 100 rows in the format prompt_completion\n" in result.stdout
    text = RECIPE.read_text(encoding="utf-8")
    assert "  train: data/maths-train.jsonl  " in text
    assert "  # max_length: 2048 " in text


def test_columns_that_need_no_word() -> None:
    """A recognised format stays out of the recipe, but for a comment."""
    rows("train.jsonl", "instruction", "output")
    init()
    text = RECIPE.read_text(encoding="utf-8")
    assert "# the rows to learn: 3 rows in the format alpaca\n" in text
    assert "format:" not in text
    assert "columns:" not in text


def test_a_format_that_has_to_be_named() -> None:
    rows("train.jsonl", "instruction", "output", "text")
    init()
    assert written().dataset.format == "alpaca"


@pytest.mark.parametrize(("count", "share"), [(1, None), (2, 0.05), (3, 0.05)])
def test_held_out_rows_of_a_few(count: int, share: float | None) -> None:
    """Of one row nothing can be held out; of two, one."""
    rows("train.jsonl", "prompt", "completion", count=count)
    result = init()
    assert written().dataset.validation_fraction == share
    assert f"held out {'none' if share is None else '0.05 of them'}\n" in result.stdout


def test_held_out_rows_that_do_not_fit_are_not_the_default() -> None:
    """A test file without answers is common; the next one beside is taken, or a share."""
    rows("train.jsonl", "question", "answer")
    rows("test.jsonl", "question")
    person = Person()
    assert ask(person).validation == 0.05
    rows("dev.jsonl", "question", "answer", "more")
    assert ask(person).validation == "dev.jsonl"


@pytest.mark.parametrize(
    ("words", "complete", "length"),
    [
        (10, True, 2048),
        (500, True, 2048),
        (5000, True, 16384),
        (10, False, 2048),
        (5000, False, 16384),
    ],
)
def test_a_length_that_is_enough(words: int, complete: bool, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer where it must be, and never shorter, which would save nothing. Held-out rows count, too."""
    rows("train.jsonl", "prompt", "completion", count=5)
    Path("test.jsonl").write_text(json.dumps({"prompt": "word " * words, "completion": "x"}) + "\n")
    if not complete:
        monkeypatch.setattr("qlora_cli.data.sample._ROWS", 3)
    init()
    assert written().dataset.max_length == length
    text = RECIPE.read_text(encoding="utf-8")
    assert ("  max_length: " in text) == (length != 2048)
    assert f"longest row, in tokens: no row {'here' if complete else 'of the first ones'} should have more" in text


# ------------------------------------------------------------------------------------------- Flags and --set


def test_every_flag_answers_its_question() -> None:
    """With all of them nothing is asked, and the recipe says what they do."""
    model("m")
    rows("here/rows.jsonl", "q", "a")
    rows("held.jsonl", "q", "a")
    flags = {
        "base_model": "m",
        "train": "here/rows.jsonl",
        "validation": "held.jsonl",
        "columns": "prompt=q,completion=a",
        "output_dir": "runs/x",
    }
    person = Person()
    ask(person, **flags)
    assert person.asked == []
    init(*(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()))
    recipe = written()
    assert recipe.base_model == str(Path.cwd() / "m")
    assert recipe.dataset.train == str(Path.cwd() / "here/rows.jsonl")
    assert recipe.dataset.validation == str(Path.cwd() / "held.jsonl")
    assert recipe.dataset.columns == {"prompt": "q", "completion": "a"}
    assert recipe.output_dir == "runs/x"


@pytest.mark.parametrize(
    ("flag", "gone"),
    [
        ({"base_model": "org/model"}, "Base"),
        ({"train": "train.jsonl"}, "Rows"),
        ({"validation": "0.25"}, "Held-out"),
        ({"columns": "a, b"}, "Columns"),
        ({"output_dir": "x"}, "Run"),
    ],
    ids=str,
)
def test_a_flag_takes_its_question_away(flag: dict[str, str], gone: str) -> None:
    """And no other."""
    rows("train.jsonl", "a", "b")
    person = Person({"Columns": "a, b"})
    ask(person, **flag)
    words = ["Base", "Rows", "Held-out", "Columns", "Run"]
    assert [question.split()[0] for question, _ in person.asked] == [word for word in words if word != gone]


def test_set_answers_questions_too() -> None:
    """Any field of the recipe; paths are relative to the current folder, as everywhere in --set."""
    model("m")
    rows("here/rows.jsonl", "q", "a")
    Path("conf").mkdir()
    person = Person()
    answers = ask(
        person, "base_model=./m", "dataset.train=here/rows.jsonl", "dataset.validation_fraction=0.2", "lora.rank=8",
        "dataset.columns={prompt: q, completion: a}", "output_dir=runs/y", "training.max_grad_norm=null", folder="conf",
    )  # fmt: skip
    assert person.asked == []
    assert (answers.base_model, answers.train, answers.validation) == ("../m", "../here/rows.jsonl", 0.2)
    assert answers.columns == {"prompt": "q", "completion": "a"}
    assert answers.output_dir == "runs/y"
    assert answers.settings()["lora"] == {"rank": 8}
    assert answers.settings()["training"] == {"max_grad_norm": None}


def test_set_writes_what_it_sets() -> None:
    rows("train.jsonl", "prompt", "completion")
    init("--set", "training.max_steps=20", "--set", "lora={rank: 4, alpha: 8}", "--set", "dataset.validation=null")
    recipe = written()
    assert (recipe.training.max_steps, recipe.lora.rank, recipe.lora.alpha) == (20, 4, 8.0)
    assert (recipe.dataset.validation, recipe.dataset.validation_fraction) == (None, None)


def test_a_list_of_sources_is_for_the_recipe() -> None:
    """The questions are about one source; nothing is written."""
    for name in ("a.jsonl", "b.jsonl"):
        rows(name, "prompt", "completion")
    told = init("--set", "dataset.train=[a.jsonl, b.jsonl]", code=2).stderr
    message = "init asks about one source; give one, and list the others in the recipe"
    assert told == f"error: --set dataset.train: {message}\n"
    assert not RECIPE.exists()


def test_what_set_says_of_rows_and_templates_is_written() -> None:
    """A template that stands in the recipe keeps its dollars."""
    rows("train.jsonl", "prompt", "completion")
    template = "{{ '${HOME} $$' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    init("--set", f"dataset.chat_template={json.dumps(template)}", "--set", "dataset.packing=true")
    assert (written().dataset.chat_template, written().dataset.packing) == (template, True)


def test_shared_conversations() -> None:
    """ShareGPT's turns need no word: `auto` sees them."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    Path("train.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    init()
    assert (written().dataset.format, written().dataset.columns) == ("auto", {})


def test_a_flag_beats_set() -> None:
    init("--set", "output_dir=a", "--output-dir", "b")
    assert written().output_dir == "b"


def test_a_length_that_is_set_is_the_length() -> None:
    rows("train.jsonl", "prompt", "completion")
    init("--set", "dataset.max_length=77")
    assert written().dataset.max_length == 77
    assert "  max_length: 77             # longest row, in tokens\n" in RECIPE.read_text(encoding="utf-8")


def test_a_format_that_is_set() -> None:
    """Its columns are looked for, and it is in the recipe."""
    rows("train.jsonl", "question", "answer", "text")
    init("--set", "dataset.format=prompt_completion")
    assert written().dataset.format == "prompt_completion"
    assert written().dataset.columns == {"prompt": "question", "completion": "answer"}


def test_a_wrong_set_is_told_before_any_question() -> None:
    person = Person()
    with pytest.raises(RequestError) as caught:
        ask(person, "lora.rnk=3")
    assert str(caught.value).startswith("--set lora.rnk=3: lora.rnk: unknown key")
    assert person.asked == []
    assert refused("--set", "lora.rank=x").startswith("--set lora.rank=x: lora.rank: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base-model", "./none"], "--base-model: ./none: there is no such folder."),
        (["--base-model", ""], "--base-model: expected a folder that is here, or a hub name such as org/name, got ''."),
        (["--train", "none.csv"], "--train: none.csv: there is no such file or folder."),
        (["--validation", "7"], "--validation: expected a share of the rows, above 0 and below 1 (0: none), got 7."),
        (["--validation", "short.jsonl"], "--validation: short.jsonl: the format prompt_completion needs a column"),
        (["--columns", "prompt=x,completion=y"], "--columns: train.jsonl: dataset.columns takes prompt from"),
        (["--validation", "1"], "--validation: expected a share of the rows, above 0 and below 1 (0: none), got 1."),
        (["--output-dir", "\udc80"], "--output-dir: '\\udc80' cannot be looked up: it is not Unicode text"),
        (["--columns", ","], "--columns: expected the columns of the prompt and of the answer"),
        (["--output-dir", ""], "--output-dir: expected a folder, got nothing."),
        (["--output-dir", "train.jsonl"], "--output-dir: train.jsonl is a file; expected a folder, or nothing, there"),
        (["--set", "dataset.train=none.csv"], "--set dataset.train"),
        (["--train", "a" * 3000 + ".csv"], "--train: "),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_refused_by_its_name(arguments: list[str], message: str) -> None:
    rows("train.jsonl", "prompt", "completion")
    rows("short.jsonl", "prompt")
    assert refused(*arguments).startswith(message)


def test_a_default_that_cannot_be_says_whose_it_is() -> None:
    Path("train.jsonl").write_text("{")
    assert refused().startswith("--train (not given, so train.jsonl): train.jsonl, line 1: expected one JSON object")


def test_a_row_without_an_answer_is_told_at_once() -> None:
    Path("train.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer": null}\n')
    message = "train.jsonl, line 2: completion (column 'answer'): expected text, got null."
    assert refused("--train", "train.jsonl") == f"--train: {message}"
    person = Person({"Rows": ["train.jsonl", "org/rows"]})
    ask(person)
    assert person.told == [message]


def test_columns_are_not_guessed_without_a_person() -> None:
    """Two columns could be either way round."""
    rows("train.jsonl", "a", "b")
    assert refused("--yes") == (
        "--columns: train.jsonl: the columns a, b do not tell which is the prompt and which the answer. Name them as "
        "in `question, answer`, or one alone to learn all of its text."
    )


def test_settings_that_contradict_the_answers() -> None:
    """Told as every command tells it, and nothing is left."""
    rows("train.jsonl", "prompt", "completion")
    message = refused("--validation", "0", "--set", "training.eval_steps=5")
    assert message.startswith("nothing was written, because the recipe would be wrong:\nrecipe.yaml:")
    assert "eval_steps" in message


# ------------------------------------------------------------------------------------------- Files


def test_a_recipe_that_is_there_is_refused_before_any_question() -> None:
    RECIPE.write_text("mine")
    assert refused() == "recipe.yaml is already there; --force writes over it"
    assert refused("--yes") == "recipe.yaml is already there; --force writes over it"
    assert RECIPE.read_text() == "mine"
    init("--force")
    assert written().output_dir == "runs/gsm8k"


def test_a_target_that_cannot_be() -> None:
    Path("folder").mkdir()
    message = "folder is a folder; expected the name of a recipe to write, such as folder/recipe.yaml"
    assert refused("folder", "--force") == message
    assert refused("none/r.yaml") == "none: there is no such folder to write r.yaml in"
    assert refused("a" * 300) == f"{'a' * 300} cannot be written: File name too long"


@pytest.mark.parametrize("name", ["1e5", "a b", "a: b #c", "null", "[x]", "'", '"', "é", "$x", "${x}", "-", "%", "org"])
def test_odd_names(name: str) -> None:
    """Folders and files of any name, from a recipe that is elsewhere, are the ones that were meant."""
    base = model(f"{name}/{name} model")
    train = rows(f"{name}/{name}.jsonl", "prompt", "completion")
    Path("conf").mkdir()
    init("conf/r.yaml", f"--base-model={base}", f"--train={train}", f"--output-dir={name}/run")
    recipe = written(Path("conf/r.yaml"))
    assert Path(recipe.base_model).samefile(base)
    assert Path(recipe.dataset.train).samefile(train)
    assert recipe.output_dir == f"{name}/run"
    assert sorted(os.listdir("conf")) == ["r.yaml", "recipe.schema.json"]  # noqa: PTH208


def test_a_hub_name_that_the_recipes_folder_has() -> None:
    """Here it is a name for the hub; beside the recipe it would be that folder."""
    model("conf/org/model")
    message = refused("conf/r.yaml", "--base-model", "org/model")
    assert message == "org/model is no path here, so a hub name, but the recipe would find conf/org/model"


names = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=20).filter(lambda x: x not in (".", ".."))
nowhere = st.text(st.characters(exclude_categories=()), max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(folder=names, file=names, output=nowhere, base=nowhere | st.none(), columns=st.tuples(names, names))
def test_any_answers_are_written_right_or_refused(
    folder: str,
    file: str,
    output: str,
    base: str | None,
    columns: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What is written names the folders and files that were meant; a refusal leaves nothing."""
    here = tmp_path_factory.mktemp("any")
    os.chdir(here)
    (here / "conf").mkdir()
    try:
        train = rows(f"{folder}/{file}.jsonl", *columns)
        if base is None:
            Path(folder, "config.json").touch()
    except (OSError, UnicodeError):  # no name for a file
        return
    flags: dict[str, str | None] = {
        "base_model": f"./{folder}" if base is None else base,
        "train": train,
        "output_dir": output,
        "columns": f"prompt={columns[0]},completion={columns[1]}",
    }
    path = Path("conf/r.yaml")
    code = init_command.init(path, flags=flags, overrides=[], defaults=True, force=False)
    assert code == (0 if path.exists() else 2)
    assert len(os.listdir("conf")) == (2 if path.exists() else 0)  # noqa: PTH208
    if path.exists():
        recipe = load_recipe(path)
        assert Path(recipe.dataset.train).samefile(train)
        assert recipe.base_model == base or Path(recipe.base_model).samefile(os.path.expanduser(base or folder))  # noqa: PTH111
        assert recipe.output_dir == os.path.expanduser(output)  # noqa: PTH111
        assert [name.strip() for name in recipe.dataset.columns.values()] == [name.strip() for name in columns]


# ------------------------------------------------------------------------------------------- What is told


def test_what_is_told_to_type_can_be_typed() -> None:
    """The name is quoted for the shell."""
    assert "  qlora check 'my recipe.yaml'\n  qlora train 'my recipe.yaml'\n" in init("my recipe.yaml").stdout


def test_help() -> None:
    text = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["init", "--help"]).stdout
    for word in (
        "PATH",
        *(f"--{name.replace('_', '-')}" for name in FLAGS),
        "--set",
        "--yes",
        "--force",
        "recipe.yaml",
    ):
        assert word in text
