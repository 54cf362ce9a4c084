"""`qlora init` as a person or a script meets it: what is asked, what is taken, what is written, what is told."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from qlora_cli.cli import app
from qlora_cli.commands import init as init_command
from qlora_cli.commands.given import what_is_given
from qlora_cli.commands.interview import interview
from qlora_cli.errors import RequestError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.starter import Answers
from tests.test_cli import ENVIRONMENT, SPY

RECIPE = Path("recipe.yaml")
FLAGS = ("base_model", "train", "validation", "columns", "output_dir")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/qlora"])


def rows(name: str, *columns: str, count: int = 3) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict.fromkeys(columns, f"row {n}")) + "\n" for n in range(count)))
    return name


def model(name: str) -> str:
    Path(name).mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        Path(name, file).write_text("{}")
    return name


def init(*arguments: str, code: int = 0) -> Result:
    """The command in this process, which has no terminal."""
    result = CliRunner().invoke(app, ["init", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: str, code: int = 2) -> str:
    """What a command that writes nothing says on stderr."""
    before = sorted(os.listdir())  # noqa: PTH208
    result = init(*arguments, code=code)
    assert sorted(os.listdir()) == before  # noqa: PTH208
    assert result.stderr.startswith("error: ")
    assert "error" not in result.stdout
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def written(path: Path = RECIPE) -> Recipe:
    return load_recipe(path)


class Person:
    """Answers by what the question begins with; then with Enter. Remembers what was asked, and what was told."""

    def __init__(self, answers: Mapping[str, str | list[str]] | None = None) -> None:
        self._answers = {
            key: [value] if isinstance(value, str) else list(value) for key, value in (answers or {}).items()
        }
        self.asked: list[tuple[str, str | None]] = []
        self.told: list[str] = []

    def ask(self, question: str, default: str | None) -> str:
        self.asked.append((question, default))
        assert len(self.asked) < 40, self.told
        waiting = next((texts for key, texts in self._answers.items() if question.startswith(key)), [])
        return waiting.pop(0) if waiting else ""

    def tell(self, text: str) -> None:
        self.told.append(text)


def ask(person: Person, *overrides: str, folder: str = ".", **flags: str) -> Answers:
    given = what_is_given(dict.fromkeys(FLAGS) | flags, list(overrides))
    return interview(given, Path(folder), person)


# ------------------------------------------------------------------------------------------- Defaults


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
    assert (recipe.dataset.format, recipe.dataset.max_length, recipe.output_dir) == ("auto", 512, "runs/maths")
    assert "data     data/maths-train.jsonl: 100 rows in the format prompt_completion\n" in result.stdout
    text = RECIPE.read_text(encoding="utf-8")
    assert "  train: data/maths-train.jsonl  " in text
    assert "max_length: 512 " in text


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
        (10, True, 512),
        (200, True, 1024),
        (500, True, 2048),
        (5000, True, 16384),
        (10, False, 2048),
        (5000, False, 16384),
    ],
)
def test_a_length_that_is_enough(words: int, complete: bool, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer where it must be; shorter only if every row was seen. Held-out rows count, too."""
    rows("train.jsonl", "prompt", "completion", count=5)
    Path("test.jsonl").write_text(json.dumps({"prompt": "word " * words, "completion": "x"}) + "\n")
    if not complete:
        monkeypatch.setattr("qlora_cli.data.sample._ROWS", 3)
    init()
    assert written().dataset.max_length == length
    text = RECIPE.read_text(encoding="utf-8")
    assert ("  max_length: " in text) == (length != 2048)
    assert f"longest row, in tokens: no row {'here' if complete else 'of the first ones'} should have more" in text


# ------------------------------------------------------------------------------------------- Questions


def test_five_questions_at_most() -> None:
    """In this order, each with its default; the fourth only because the columns do not tell."""
    model("models/tiny")
    rows("train.jsonl", "sentence", "label")
    person = Person({"Columns": "sentence, label"})
    answers = ask(person)
    assert person.asked == [
        ("Base model (hub name or folder)", "models/tiny"),
        ("Rows to learn (file, folder, glob or hub name)", "train.jsonl"),
        ("Held-out rows (file, or a share of the rows; 0: none)", "0.05"),
        ("Columns of the prompt and the answer (there are sentence, label)", None),
        ("Run folder", "runs/tiny"),
    ]
    assert person.told == ["3 rows with the columns sentence, label"]
    assert answers.columns == {"prompt": "sentence", "completion": "label"}


def test_four_questions_where_the_columns_tell() -> None:
    rows("train.jsonl", "question", "answer")
    person = Person()
    ask(person)
    assert [question.split()[0] for question, _ in person.asked] == ["Base", "Rows", "Held-out", "Run"]


def test_answers_that_are_typed() -> None:
    """Each goes where it belongs; spaces around it do not."""
    model("m")
    rows("rows.csv.jsonl", "a", "b", "c")
    rows("held.jsonl", "a", "b")
    person = Person(
        {"Base": " m ", "Rows": "rows.csv.jsonl", "Held": "held.jsonl", "Columns": "b, a", "Run": " runs/my run "}
    )
    answers = ask(person)
    assert (answers.base_model, answers.train, answers.validation) == ("m", "rows.csv.jsonl", "held.jsonl")
    assert (answers.columns, answers.output_dir) == ({"prompt": "b", "completion": "a"}, "runs/my run")


def test_wrong_answers_are_told_and_asked_again() -> None:
    rows("train.jsonl", "a", "b", count=1)
    rows("bad.jsonl", "a", "b")
    with Path("bad.jsonl").open("a") as file:
        file.write("{\n")
    rows("test.jsonl", "a")
    Path("file").touch()
    Path("folder").mkdir()
    rows("old/run.json", "x")
    person = Person(
        {
            "Base": ["./none", "file", "folder", "two words", "org/model"],
            "Rows": ["trian.jsonl", "bad.jsonl", "no name", "folder", "train.jsonl"],
            "Held": ["1.5", "-1", "0.5", "none.csv", "test.jsonl"],
            "Columns": ["", ",", "a, c", "prompt=a", "a, b", "text=a"],
            "Run": ["file", "old", "runs/x"],
        }
    )
    ask(person)
    assert person.told == [
        "./none: there is no such folder.",
        "file is a file; expected a model folder, or a hub name such as org/name.",
        "folder holds no config.json, so it is not a model folder.",
        "expected a folder that is here, or a hub name such as org/name, got 'two words'.",
        "trian.jsonl: there is no such file or folder; did you mean train.jsonl?",
        'bad.jsonl, line 4: expected one JSON object, got "{" (expecting property name enclosed in double quotes at '
        "column 1).",
        "expected a file, folder or glob that is here, or a hub name such as org/name, got 'no name'.",
        "folder: no .jsonl, .json, .csv, .tsv or .parquet file in this folder.",
        "1 row with the columns a, b",
        "expected a share of the rows, above 0 and below 1 (0: none), got 1.5.",
        "expected a share of the rows, above 0 and below 1 (0: none), got -1.",
        "a share needs at least 2 rows, train.jsonl has 1; give a file, or 0 for none.",
        "none.csv: there is no such file or folder.",
        "train.jsonl: the columns a, b do not tell which is the prompt and which the answer. Name them as in "
        "`question, answer`, or one alone to learn all of its text.",
        "expected the columns of the prompt and of the answer, as in `question, answer`, or fields and columns, as in "
        "`prompt=question,completion=answer`; got ','.",
        "train.jsonl: dataset.columns takes completion from the column 'c', which is not there. The columns are a, b.",
        "train.jsonl: the columns a, b, with dataset.columns for prompt fit no format. A format needs\n"
        "  messages: messages\n  alpaca: instruction, output\n  prompt_completion: prompt, completion\n  text: text\n"
        "Set dataset.format, and dataset.columns as in {prompt: your_column}.",
        "test.jsonl: dataset.columns takes completion from the column 'b', which is not there. The columns are a.",
        "file is a file; expected a folder, or nothing, there",
        "old already holds a run; name another folder.",
    ]


def test_several_well_known_pairs_are_asked_about() -> None:
    """The likeliest is the default, so that Enter and --yes take it."""
    rows("train.jsonl", "problem", "solution", "answer")
    person = Person()
    columns = {"prompt": "problem", "completion": "solution"}
    assert ask(person).columns == columns
    assert person.asked[3] == (
        "Columns of the prompt and the answer (there are problem, solution, answer)",
        "problem, solution",
    )
    init("--yes")
    assert written().dataset.columns == columns


def test_a_pair_with_two_contexts_is_asked_about() -> None:
    """A default of more than two columns names their fields, as the answer may."""
    rows("train.jsonl", "question", "context", "input", "answer")
    person = Person()
    assert ask(person).columns == {"instruction": "question", "input": "context", "output": "answer"}
    assert person.asked[3][1] == "instruction=question,output=answer,input=context"


def test_columns_of_hub_rows_are_asked_for() -> None:
    """They cannot be looked at; Enter leaves them to be recognised. Those of the default rows are known."""
    person = Person({"Rows": "org/rows"})
    answers = ask(person)
    assert person.asked[3] == ("Columns of the prompt and the answer (auto: by their names)", "auto")
    assert (answers.train, answers.columns, answers.hub_config, answers.validation) == ("org/rows", {}, None, 0.05)
    person = Person({"Rows": "org/rows", "Columns": ["bad=x,worse=y,=z", "prompt=x,text=y", "q, a"]})
    assert ask(person).columns == {"prompt": "q", "completion": "a"}
    assert [text.split(",")[0] for text in person.told] == [
        "expected the columns of the prompt and of the answer",
        "expected fields of one format (messages: messages; alpaca: instruction",
    ]
    person = Person({"Rows": "openai/gsm8k"})
    assert ask(person).columns == {"prompt": "question", "completion": "answer"}
    assert len(person.asked) == 4


def test_odd_columns() -> None:
    """A comma in a name stands in quotes; spaces that a header has are put back; `=` is a letter like any other."""
    Path("train.csv").write_text('"a, b", c=d, e \n1,2,3\n')
    assert ask(Person({"Columns": '"a, b", c=d'})).columns == {"prompt": "a, b", "completion": " c=d"}
    assert ask(Person({"Columns": "c=d, e"})).columns == {"prompt": " c=d", "completion": " e "}
    assert ask(Person({"Columns": 'prompt=e,"completion=a, b"'})).columns == {"prompt": " e ", "completion": "a, b"}
    assert ask(Person({"Columns": "e"})).columns == {"text": " e "}


def test_nothing_held_out() -> None:
    rows("train.jsonl", "prompt", "completion")
    assert ask(Person({"Held": "0"})).validation is None


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


# ------------------------------------------------------------------------------------------- Terminals


def start(*arguments: str, spy: bool = False, **streams: int) -> subprocess.Popen[bytes]:
    program = ["-c", SPY] if spy else ["-m", "qlora_cli"]
    command = [sys.executable, *program, "init", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT | {"TERM": "xterm"}, start_new_session=True, **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("silent", ["nothing", "a pipe that stays open", "closed"])
def test_without_a_terminal_nothing_is_waited_for(silent: str) -> None:
    """Defaults are taken, whatever stands in for a person."""
    read, write = os.pipe()
    stdin = {"nothing": subprocess.DEVNULL, "a pipe that stays open": read}.get(silent)
    if stdin is None:
        command = f'"{sys.executable}" -m qlora_cli init <&-'
        done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, timeout=30, check=False)
        code = done.returncode
    else:
        with start(stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            running.communicate(timeout=30)
            code = running.returncode
    os.close(read)
    os.close(write)
    assert code == 0
    assert written().dataset.train == "openai/gsm8k"


@pytest.mark.parametrize("arguments", [["--yes"], ["--train", "none.csv"], ["--set", "lora.rnk=1"]], ids=" ".join)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    """Rows are looked at and the recipe is written without torch, or what needs it."""
    rows("train.jsonl", "question", "answer")
    with start(
        *arguments, spy=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        _, stderr = running.communicate(timeout=30)
    assert stderr.decode().endswith("IMPORTED ['typer']\n")


class Terminal:
    """The command at a terminal, a line at a time."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = start(*arguments, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Read until `text` is shown."""
        end = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            self._read()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        """The exit code, once all is read."""
        while self._read():
            pass
        os.close(self._master)
        return self.process.wait(30)

    def _read(self) -> bool:
        try:
            if not select.select([self._master], [], [], 30)[0]:
                return False
            data = os.read(self._master, 65536)
        except OSError:  # as Linux says that the other end is closed
            return False
        self.shown += re.sub(r"\x1b\[[0-9;]*m|\r", "", data.decode())
        return bool(data)


def test_at_a_terminal() -> None:
    """Questions, a mistake that is asked about again, and the recipe."""
    rows("train.jsonl", "question", "answer")
    terminal = Terminal()
    terminal.wait_for("Base model (hub name or folder) [HuggingFaceTB/SmolLM2-135M-Instruct]: ")
    assert terminal.shown.startswith("Enter takes what is in brackets.\n\n")
    terminal.type("org/model\n")
    terminal.wait_for("Rows to learn (file, folder, glob or hub name) [train.jsonl]: ")
    terminal.type("\n")
    terminal.wait_for("  3 rows with the columns question, answer\n")
    terminal.wait_for("Held-out rows (file, or a share of the rows; 0: none) [0.05]: ")
    terminal.type("2\n")
    terminal.wait_for("  expected a share of the rows, above 0 and below 1 (0: none), got 2.\n")
    terminal.type("0.5\n")
    terminal.wait_for("Run folder [runs/model]: ")
    terminal.type("\n")
    assert terminal.end() == 0
    recipe = written()
    assert (recipe.base_model, recipe.dataset.validation_fraction, recipe.output_dir) == (
        "org/model",
        0.5,
        "runs/model",
    )


def test_answers_that_end() -> None:
    """Ctrl-D: nothing is written, and that is said."""
    terminal = Terminal()
    terminal.wait_for("]: ")
    terminal.type("\x04")
    assert terminal.end() == 2
    assert "error: the answers ended early, and nothing was written; --yes takes every default\n" in terminal.shown
    assert os.listdir() == []  # noqa: PTH208


def test_a_stop() -> None:
    """Ctrl-C: so too, with the exit code of what was interrupted."""
    terminal = Terminal()
    terminal.wait_for("]: ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "error: stopped; nothing was written\n" in terminal.shown
    assert os.listdir() == []  # noqa: PTH208


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
