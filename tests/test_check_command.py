"""`qlora check`: what it prints, as text and as JSON, where it prints it, and how it exits."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from qlora_cli.check_view import show_check
from qlora_cli.cli import app
from qlora_cli.commands import libraries
from qlora_cli.data.end_of_turn import EndOfTurn
from qlora_cli.errors import RunError
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.training.events import DataReady, SourceReady
from qlora_cli.training.facts import Example, Facts, Lengths, Overlong, Piece, SomeRows, SplitFacts, Steps
from tests.support.cli import offline_libraries, process, settings
from tests.support.runs import tiny_recipe

KEYS = {
    "ok", "checked", "recipe", "mistakes", "problems", "notices", "context_length", "train", "validation", "steps",
    "examples",
    "benchmarks",
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without weights, rows and recipe.yaml, made once; nobody writes into it."""
    folder = tmp_path_factory.mktemp("check")
    recipe = tiny_recipe(folder, training={"warmup_steps": 2}).model_copy(update={"output_dir": "run"})
    (Path(recipe.base_model) / "model.safetensors").unlink()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of the shared recipe, to be checked in a folder of its own and without a network."""
    monkeypatch.chdir(tmp_path)
    with offline_libraries(monkeypatch):
        yield str(shared / "recipe.yaml")


def check(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def facts_of(*arguments: str) -> dict[str, Any]:
    """What --json gives: one line, and nothing beside it on stdout."""
    result = check(*arguments, "--json")
    assert result.stdout.count("\n") == 1
    facts: dict[str, Any] = json.loads(result.stdout)
    assert facts.keys() == KEYS
    assert facts["ok"] == (result.exit_code == 0)
    return facts


# ------------------------------------------------------------------------------------------- Text


def test_a_recipe_that_is_right(recipe: str, shared: Path) -> None:
    """Every line, from the recipe to what it comes to; nothing on stderr, no file made, exit code 0."""
    result = check(recipe, "--show", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    facts = facts_of(recipe)
    counts = {name: facts[name] for name in ("train", "validation")}
    lines = result.stdout.splitlines()
    assert lines[0] == f"recipe   {recipe}: every field is right"
    assert lines[1] == "model    has positions for 256 tokens"
    for first, name, file in ((2, "train", "train-32.jsonl"), (7, "validation", "validation.jsonl")):
        split = counts[name]
        lengths = split["lengths"]
        assert lines[first : first + 5] == [
            f"data     {name}: {split['rows']} rows, {split['tokens']:,} tokens, {split['supervised_tokens']} of them "
            f"supervised (prompt_completion, {shared / file})",
            f"length   {lengths['min']} to {lengths['max']} tokens: half of the rows have up to {lengths['p50']}, 90% "
            f"{lengths['p90']}, 95% {lengths['p95']}, 99% {lengths['p99']}",
            "         no row is longer than max_length (128)",
            "labels   rows with no label: none",
            "end      <|im_end|> (token 2) is supervised at the end of every row",
        ]
    assert lines[12:] == [
        "steps    8 steps of 4 rows, 1 epoch, on one process; warmup over the first 2",
        f"         {facts['steps']['padding']:.1%} of the tokens in a batch are padding",
        f"example  {shared / 'train-32.jsonl'}, line 1: {len(facts['examples'][0]['input_ids'])} tokens, 4 of them "
        "supervised, marked «so»",
        "<|im_start|>user",
        "red<|im_end|>",
        "<|im_start|>assistant",
        "«apple<|im_end|>»",
        "",
        "result   nothing found that would stop or spoil training",
    ]
    assert list(Path.cwd().iterdir()) == []


def test_packs(recipe: str) -> None:
    """Steps are counted in packs, each as full as the rows make it; eight of four packs are several epochs."""
    packed = settings("dataset.packing=true")
    facts = facts_of(recipe, *packed)
    steps, tokens = facts["steps"], facts["train"]["tokens"]
    packs = steps["sequences"]
    assert steps["packed"]
    assert -(-tokens // 128) <= packs <= -(-tokens // 96)  # rows of up to 50 tokens leave little of 128
    assert (steps["total"], steps["epochs"]) == (8, 8 / -(-packs // 4))
    assert steps["fill"] == pytest.approx(tokens / packs / 128)
    assert check(recipe, *packed).stdout.splitlines()[12:14] == [
        f"steps    8 steps of 4 packs, {steps['epochs']:.3g} epochs, on one process; warmup over the first 2",
        f"         {packs} packs of up to 128 tokens, {steps['fill']:.1%} full; "
        f"{steps['padding']:.1%} of the tokens in a batch are padding",
    ]


def test_problems_are_errors(recipe: str, shared: Path) -> None:
    """Each on stderr, the facts on stdout, exit code 2: two files with rows that are too long."""
    result = check(recipe, *settings("dataset.max_length=10"))
    assert result.exit_code == 2
    errors = result.stderr.splitlines()
    assert [error.partition(" rows are longer")[0] for error in errors] == [
        f"error: {shared / 'train-32.jsonl'}: 32 of 32",
        f"error: {shared / 'validation.jsonl'}: 8 of 8",
    ]
    lines = result.stdout.splitlines()
    assert "         32 rows are longer than max_length (10) and refused" in lines
    assert lines[-1] == "result   training would be refused: 2 problems"


def test_a_note_is_no_problem(recipe: str) -> None:
    result = check(recipe, *settings("training.warmup_steps=8"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-2:] == [
        "note     warmup_steps is 8 and the run ends after 8",
        "result   no mistake was found; see 1 note above",
    ]


SOURCES = (SourceReady("rows.csv", "messages", 1997, 1.0),)
FACTS = Facts(
    checked="recipe and data",
    context_length=8192,
    train=SplitFacts(
        data=DataReady(
            "train",
            (SourceReady("rows.csv", "messages", 1997, 1.0),),
            "f" * 64,
            1997,
            2000,
            1_234_567,
            987_654,
            3,
            0,
            4,
        ),
        lengths=Lengths(12, 1000, 2000, 3000, 4000, 50_000),
        max_length=2048,
        overlong=Overlong(3, "dropped", 3, 3, 1234),
        without_labels=SomeRows(7, (1, 20, 300, 4000, 50_000), "row 1, 20, 300, 4000, 50000, …"),
        silent=SomeRows(1, (5,), "row 5"),
        end_of_turn=EndOfTurn(2, "<|im_end|>", 1990),
    ),
    validation=None,
    steps=Steps(1, 16, 0.008, 0, packed=False, sequences=1997, padding=0.0123, fill=None),
    notices=(),
    problems=(),
    examples=(),
)


def shown(facts: Facts, *, terminal: bool = False) -> list[str]:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, highlight=False, soft_wrap=True, color_system=(
        "standard" if terminal else None
    ))  # fmt: skip
    show_check(console, Path("r.yaml"), facts)
    return file.getvalue().splitlines()


def test_the_lines_of_rows_with_something_the_matter() -> None:
    """Long numbers, rows that are dropped, without labels, with empty answers, without their end."""
    assert shown(FACTS)[2:8] == [
        "data     train: 1,997 rows as 2,000 sequences, 1,234,567 tokens, 987,654 of them supervised, 4 skipped, "
        "3 dropped (messages, rows.csv)",
        "length   12 to 50,000 tokens: half of the rows have up to 1,000, 90% 2,000, 95% 3,000, 99% 4,000",
        "         3 rows are longer than max_length (2,048) and dropped, with 1,234 supervised tokens",
        "labels   rows with no label: 7 (row 1, 20, 300, 4000, 50000, …); with an empty answer: 1 (row 5)",
        "end      <|im_end|> (token 2) is supervised at the end of 1,990 of 1,997 rows",
        "steps    1 step of 16 rows, 0.008 epochs, on one process",
    ]


@pytest.mark.parametrize(
    ("overlong", "line"),
    [
        (Overlong(1, "refused", 0, 0, 0), "1 row is longer than max_length (2,048) and refused"),
        (
            Overlong(20, "truncated", 19, 2, 1),
            "20 rows are longer than max_length (2,048) and truncated; 19 of them lose part of an answer (2 a whole "
            "one), 1 supervised token in all",
        ),
    ],
)
def test_the_fate_of_long_rows(overlong: Overlong, line: str) -> None:
    assert FACTS.train is not None
    split = SplitFacts(**{**vars(FACTS.train), "overlong": overlong, "end_of_turn": EndOfTurn(None, "")})
    lines = shown(Facts(**{**vars(FACTS), "train": split}))
    assert lines[4] == f"         {line}"
    assert lines[6] == "end      no token ends an answer"


EXAMPLE = Example(
    4,
    "rows.csv, row 4",
    (1, 2, 3),
    (-100, 2, 3),
    (Piece("\x1b[31mQ [b]\x07\n", supervised=False), Piece("É", supervised=True)),
)


def test_an_example_does_not_steer_the_terminal() -> None:
    """Control characters of a row are written out, brackets are no markup, and what is learned is marked."""
    lines = shown(Facts(**{**vars(FACTS), "examples": (EXAMPLE,)}))
    assert lines[9:12] == [
        "example  rows.csv, row 4: 3 tokens, 2 of them supervised, marked «so»",
        "\\x1b[31mQ [b]\\x07",
        "«É»",
    ]


def test_on_a_terminal_what_is_learned_is_coloured() -> None:
    """Green, and marked all the same."""
    lines = shown(Facts(**{**vars(FACTS), "examples": (EXAMPLE,)}), terminal=True)
    assert "\x1b[32m«É»\x1b[0m" in lines


# ------------------------------------------------------------------------------------------- JSON


def test_the_facts_as_json(recipe: str, shared: Path) -> None:
    """Every key and its shape; three examples unless another number is asked for, labels -100 or the token."""
    facts = facts_of(recipe)
    assert (facts["ok"], facts["checked"], facts["recipe"]) == (True, "recipe and data", recipe)
    assert (facts["mistakes"], facts["problems"], facts["notices"], facts["context_length"]) == ([], [], [], 256)
    assert facts["steps"] == {
        "total": 8, "sequences_per_step": 4, "epochs": 1.0, "warmup": 2, "packed": False, "sequences": 32,
        "padding": facts["steps"]["padding"], "fill": None, "processes": 1,
    }  # fmt: skip
    train = facts["train"]
    assert train.keys() == facts["validation"].keys() == {
        "sources", "fingerprint", "rows", "sequences", "tokens", "supervised_tokens", "dropped", "truncated",
        "skipped",
        "lengths", "max_length", "overlong", "without_labels", "silent", "end_of_turn",
    }  # fmt: skip
    assert train["sources"] == [
        {"source": str(shared / "train-32.jsonl"), "format": "prompt_completion", "rows": 32, "weight": 1.0}
    ]
    assert train["lengths"].keys() == {"min", "p50", "p90", "p95", "p99", "max"}
    assert train["overlong"] == {
        "rows": 0, "fate": "refused", "rows_losing_labels": 0, "rows_losing_answers": 0, "lost_supervised_tokens": 0
    }  # fmt: skip
    assert train["without_labels"] == train["silent"] == {"rows": 0, "first": [], "named": ""}
    assert train["end_of_turn"] == {"token": 2, "text": "<|im_end|>", "rows": 32, "turns": 32, "unended": 0}
    assert [example["row"] for example in facts["examples"]] == [1, 2, 3]
    for example in facts["examples"]:
        assert example.keys() == {"row", "where", "input_ids", "labels"}
        assert len(example["input_ids"]) == len(example["labels"])
        assert all(label in (token, -100) for token, label in zip(example["input_ids"], example["labels"], strict=True))
    assert len(facts_of(recipe, "--show", "1")["examples"]) == 1
    assert len(facts_of(recipe, "--show", "100")["examples"]) == 32


def test_json_of_problems(recipe: str) -> None:
    """The problems are in it and on stderr, and nothing else is on stdout."""
    result = check(recipe, "--json", *settings("dataset.max_length=10"))
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == 2
    assert result.stderr == "".join(f"error: {problem}\n" for problem in problems)
    assert result.exit_code == 2


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_recipe_that_is_wrong(as_json: list[str], recipe: str) -> None:
    """On stderr as ever, in JSON on stdout if asked for: every mistake, nothing of the data, exit code 2."""
    Path("r.yaml").write_text("base_model: gpt2\nlora: {rnk: 3}\ndataset: {train: no.csv}\noutput_dir: o\n")
    result = check("r.yaml", *as_json, *settings("quantization.bits=5"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: r.yaml:2:8: lora.rnk: ")
    if not as_json:
        assert result.stdout == ""
        return
    facts = json.loads(result.stdout)
    assert facts.keys() == KEYS
    assert (facts["ok"], facts["checked"], facts["train"], facts["examples"]) == (False, "recipe", None, [])
    mistakes = {mistake["key"]: mistake for mistake in facts["mistakes"]}
    assert mistakes.keys() == {"lora.rnk", "dataset.train", "quantization.bits"}
    assert mistakes["lora.rnk"].keys() == {"file", "line", "column", "key", "message", "suggestion", "allowed"}
    place = ("file", "line", "column", "suggestion")
    assert [mistakes["lora.rnk"][name] for name in place] == ["r.yaml", 2, 8, "lora.rank"]
    assert [mistakes["dataset.train"][name] for name in place[:3]] == ["r.yaml", 3, 18]
    assert [mistakes["quantization.bits"][name] for name in place[:3]] == ["--set quantization.bits=5", 0, 0]
    assert all(f"{mistake['key']}: {mistake['message']}" in result.stderr for mistake in facts["mistakes"])


# ------------------------------------------------------------------------------------------- Elsewhere


def test_how_many_is_no_negative_number(recipe: str) -> None:
    result = check(recipe, "--show", "-1")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--show" in result.stderr


def test_a_hub_that_is_out_of_reach(shared: Path, tmp_path: Path) -> None:
    """Nobody at the hub's door: told in seconds, not the minute that the client's retries take; exit code 0, and the
    JSON does not call itself complete."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    closed = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "", "no_proxy": "127.0.0.1"}
    started = time.monotonic()
    words = ["check", str(shared / "recipe.yaml"), "--json", *settings("base_model=org/none", "dataset.train=org/none")]
    done = process(*words, folder=tmp_path, HF_HOME=str(tmp_path / "home"), **closed)
    assert time.monotonic() - started < 20  # nearly all of it is the import of torch and transformers
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert (facts["ok"], facts["checked"], facts["train"], facts["problems"]) == (True, "recipe", None, [])
    assert [notice.partition(": ")[0] for notice in facts["notices"]] == [
        "tokens were not counted",
        "the training rows were not read",
    ]


def test_the_last_line_where_the_hub_is_out_of_reach(recipe: str) -> None:
    result = check(recipe, *settings("base_model=org/none"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == (
        "result   the recipe is right; not all of what is on the hub could be looked at"
    )


def test_a_stop(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: 130, one line, no traceback."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(libraries, "set_up_libraries", interrupted)
    result = check(recipe)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "error: stopped; nothing was changed\n")


def test_a_check_that_fails_is_told(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system killed a process that encodes: exit code 1, and no traceback."""

    def killed(*_: object, **__: object) -> None:
        raise RunError("a process that encodes rows was killed")

    monkeypatch.setattr("qlora_cli.training.checking.check_data", killed)
    result = check(recipe)
    assert (result.exit_code, result.stderr) == (1, "error: a process that encodes rows was killed\n")
