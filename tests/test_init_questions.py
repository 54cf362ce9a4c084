"""The questions of `qlora init`: which are asked, with which defaults, and what an answer means."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.first_recipes import Person, ask, init, model, rows, written


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/qlora"])


def test_five_questions_at_most() -> None:
    """In this order, each with its default; the fourth only because the columns do not tell."""
    model("models/tiny")
    rows("train.jsonl", "remark", "verdict")
    person = Person({"Columns": "remark, verdict"})
    answers = ask(person)
    assert person.asked == [
        ("Base model (hub name or folder)", "models/tiny"),
        ("Rows to learn (file, folder, glob or hub name)", "train.jsonl"),
        ("Held-out rows (file, or a share of the rows; 0: none)", "0.05"),
        ("Columns of the prompt and the answer (there are remark, verdict)", None),
        ("Run folder", "runs/tiny"),
    ]
    assert person.told == ["3 rows with the columns remark, verdict"]
    assert answers.columns == {"prompt": "remark", "completion": "verdict"}


def test_rows_among_several_files_are_not_guessed() -> None:
    """Whoever has data here does not mean a dataset on the hub: asked without a default, or refused."""
    rows("a.jsonl", "question", "answer")
    rows("b.jsonl", "question", "answer")
    missing = "which rows to learn is not plain from what is here: a.jsonl, b.jsonl. Name them."
    person = Person({"Rows": ["", "b.jsonl"]})
    assert ask(person).train == "b.jsonl"
    assert person.asked[1] == ("Rows to learn (file, folder, glob or hub name)", None)
    assert person.told[0] == missing
    assert init("--yes", code=2).stderr == f"error: --train: {missing}\n"
    assert not Path("recipe.yaml").exists()


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
        "column 2).",
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
        "  messages: messages\n  conversations: conversations\n  alpaca: instruction, output\n"
        "  prompt_completion: prompt, completion\n  classification: text, label\n  text: text\n"
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
        "expected fields of one format (messages: messages",
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
