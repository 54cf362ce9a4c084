"""`qlora eval` as a person or a script meets it: what it prints and where, how it exits, and no traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.benchmarking import evaluate as evaluating
from qlora_cli.benchmarking.events import Evaluated, Event, Prepared, ScoreRow, Written
from qlora_cli.benchmarking.request import EvalRequest
from qlora_cli.cli import app
from qlora_cli.data.cache import cache_folder
from qlora_cli.errors import EvaluationError, TaskError
from qlora_cli.evaluation.events import Asking
from qlora_cli.evaluation.tasks.index import load_index
from tests.support.benchmarks import EVAL_ROWS, TEST_ROWS, keep_index, write_data_root
from tests.support.cli import ENVIRONMENT, offline_libraries, process
from tests.support.merge_runs import merge_run

TASK = "--tasks", "arc_easy", "--data-root", "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its base, and the data of some tasks; nobody writes into them."""
    folder = tmp_path_factory.mktemp("eval")
    merge_run(folder)
    write_data_root(folder / "data")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, with links to what was made."""
    for name in ("run", "llama", "data"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "rows.jsonl").symlink_to(made / "validation.jsonl")
    monkeypatch.chdir(tmp_path)
    keep_index()
    with offline_libraries(monkeypatch):
        yield tmp_path


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def scored(*arguments: str) -> list[str]:
    """What a command that does its work prints."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.splitlines()


def refused(*arguments: str, code: int = 2) -> str:
    """The message of a command that fails as it should, whole on stderr; it has written nothing."""
    before = sorted(Path.cwd().rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert sorted(Path.cwd().rglob("*")) == before
    return result.stderr.removeprefix("error: ").removesuffix("\n")


# ------------------------------------------------------------------------------------------- What it prints


def test_a_whole_evaluation(here: Path) -> None:
    """Every line, from the run to the files; nothing on stderr; the numbers are those of the results file."""
    lines = scored(
        "run", "--tasks", "mmlu,arc_easy", "--data-root", "data", "--allow-partial", "--baseline", "--num-fewshot",
        "0", "--output", "out/results.json", "--log-samples", "--device", "cpu",
    )  # fmt: skip
    written = json.loads(Path("out/results.json").read_text())
    assert lines[:2] == ["         looking at run …", "         reading the tasks' documents …"]
    facts = [line for line in lines if line.startswith(("target", "base", "tasks", "ask "))]
    assert facts == [
        "target   the run run; weights: NF4, double quantisation, float32 compute",
        "base     llama",
        f"tasks    5 tasks, {4 * TEST_ROWS + EVAL_ROWS} documents",
        "ask      the target",
        "ask      the base, without the adapter",
    ]
    heads = next(n for n, line in enumerate(lines) if line.startswith("task "))
    assert lines[heads].split() == [
        "task", "n", "metric", "base", "target", "difference", "95", "%", "interval", "McNemar", "p", "won:lost",
    ]  # fmt: skip
    rows = written["qlora"]["scores"]
    table = lines[heads + 1 : heads + 1 + len(rows)]
    assert table[0].startswith("mmlu ")
    assert table[0].endswith("  4 of 57 tasks")
    for line, row in zip(table, rows, strict=True):
        assert f" {row['base']:.4f} ± {row['base_error']:.4f}  {row['value']:.4f} ± {row['error']:.4f} " in line
        assert row["value"] == written["results"][row["task"]][f"{row['metric']},{row['filter']}"]
    told = lines[heads + 1 + len(rows) :]
    assert [line.partition(" ")[0] for line in told] == ["", "verdict", "asked", "done", "results", "samples"]
    assert told[2] == (
        "asked    0-shot; plain prompts; weights: NF4, double quantisation, float32 compute; shared prefixes "
        "computed once"
    )
    assert re.fullmatch(r"done     \d+ answers, in [\d.]+ s", told[3])
    assert told[4] == "results  out/results.json  (in lm-eval's format)"
    assert told[5].endswith(f"({2 * 5} files)")
    assert len(list(Path("out").glob("samples_*.jsonl"))) == 2 * 5


def test_the_same_command_goes_on(here: Path) -> None:
    """What was answered is not asked again, whatever is written or compared now; with --no-keep it is."""
    first = scored("run", *TASK)
    answers = re.search(r"done     (\d+) answers, in", "\n".join(first))
    assert answers is not None
    again = scored("run", *TASK, "--output", "out.json")
    assert f"done     {answers[1]} answers, all of them kept from an earlier start, in" in "\n".join(again)
    assert "kept" not in "\n".join(scored("run", *TASK, "--no-keep"))
    assert first[-4:-2] == again[-5:-3]  # the scores


def test_a_file_that_came_to_be_there_is_not_written_over(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evaluations may have been given one name: of neither is anything lost."""
    run = evaluating.evaluate

    def evaluate(request: EvalRequest, *, listeners: Sequence[Callable[[Event], None]]) -> Evaluated:
        (here / "out.json").write_text("another's")
        (here / "samples_arc_easy_out-2.jsonl").write_text("another's")
        return run(request, listeners=listeners)

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    lines = scored("run", *TASK, "--output", "out.json", "--log-samples")
    assert lines[-2:] == [
        "results  out-2.json  (in lm-eval's format; out.json has come to be there, and is not written over)",
        "samples  samples_arc_easy_out-2-2.jsonl",
    ]
    assert Path("out.json").read_text() == Path("samples_arc_easy_out-2.jsonl").read_text() == "another's"
    assert json.loads(Path("out-2.json").read_text())["results"]["arc_easy"]
    assert len(Path("samples_arc_easy_out-2-2.jsonl").read_text().splitlines()) == EVAL_ROWS


def test_scores_are_shown_though_they_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full at the end does not take them along."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    result = invoke("run", *TASK, "--no-keep", "--output", "out.json")
    assert result.exit_code == 1
    assert result.stderr == "error: out.json: could not be written: No space left on device\n"
    lines = result.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines[-4:]] == ["arc_easy", "", "asked", "done"]
    assert not [path.name for path in here.iterdir() if path.name.endswith((".json", ".writing"))]


def test_the_loss_on_rows(here: Path) -> None:
    """With and without tasks; with the base beside it."""
    lines = scored("run", "--dataset", "rows.jsonl", "--baseline", "--set", "dataset.max_length=200")
    assert not any(line.startswith(("tasks", "task ")) for line in lines)
    heads = next(n for n, line in enumerate(lines) if line.startswith("dataset "))
    assert lines[heads + 1].split()[2:5] == ["loss", "per", "token"]
    assert lines[heads + 2].split()[0] == "perplexity"
    told = scored("run", "--dataset", "rows.jsonl", "--output", "rows.json")[-1]
    assert told == "results  rows.json", "lm-eval has no losses"
    both = scored("run", "--dataset", "rows.jsonl", *TASK)
    assert [line.split()[0] for line in both if line.startswith(("task ", "dataset "))] == ["task", "dataset"]


def test_a_model_folder(here: Path) -> None:
    """Without an adapter there is no base to tell of, and none to compare with."""
    lines = scored("llama", *TASK, "--limit", "3")
    assert any(line.startswith("target   the model folder llama; weights: ") for line in lines)
    assert not any(line.startswith("base") for line in lines)
    assert refused("llama", *TASK, "--baseline").startswith("--baseline: llama is a whole model")


def test_names(here: Path) -> None:
    """The list is of what --tasks takes: a pattern, a word, or a folder's own."""
    assert scored("--list", "arc_eas*") == ["arc_easy  task  multiple_choice"]
    lines = scored("--list", "mmlu")
    assert [line.split() for line in lines if line.split()[0] == "mmlu"] == [["mmlu", "group", "57", "tasks"]]
    assert len(scored("--list")) > 10_000
    assert refused("--list", "arc_eazy*") == (
        "no task, group or tag matches 'arc_eazy*'. qlora eval --list shows those there are."
    )
    Path("own").mkdir()
    Path("own/mine.yaml").write_text("task: my_own_task\ndataset_path: json\noutput_type: generate_until\n")
    assert scored("--list", "my_own*", "--task-path", "own") == ["my_own_task  task  generate_until"]
    assert refused("--list", "--task-path", "nowhere") == "--task-path: nowhere: there is no such folder."


# ------------------------------------------------------------------------------------------- Before torch


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 2),
        (["run", "--bits", "5"], 2),
        (["nowhere/at/all", "--tasks", "arc_eazy", "--output", "full", "--data-root", "nowhere"], 2),
        (["--list", "arc_easy"], 0),
        (["some/where", "--dataset", "nowhere.jsonl", "--set", "training.seed=1"], 2),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_needs_no_torch_imports_none(arguments: list[str], code: int, tmp_path: Path) -> None:
    """Help is there at once, and so are the names and what is wrong with the request."""
    keep_index()
    (tmp_path / "full").mkdir()
    done = process("eval", *arguments, folder=tmp_path, spy=True, **cache())
    assert done.stderr.endswith("IMPORTED ['typer']\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code


def cache() -> dict[str, str]:
    """Where this test keeps lm-eval's index, for another process."""
    from qlora_cli.data.cache import cache_folder

    return {"XDG_CACHE_HOME": str(cache_folder().parent)}


def test_help() -> None:
    """Every option, and the exit codes."""
    text = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["eval", "--help"]).stdout
    for word in (
        "TARGET", "--tasks", "--list", "--num-fewshot", "--limit", "--batch-size", "--data-root", "--task-path",
        "--allow-partial", "--bits", "--apply-chat-template", "--system-instruction", "--baseline", "--output",
        "--log-samples", "--dataset", "--set", "--base-model", "--revision", "--trained-base", "--device", "--seed",
        "--no-keep", "--trust-remote-code", "--run-unsafe-code", "130 interrupted, answers kept", "N|auto", "4|8|16",
    ):  # fmt: skip
        assert word in text


# ------------------------------------------------------------------------------------------- Options


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected a TARGET to score, or --list to see what it can be scored on"),
        (["run", "--limit", "0"], "'--limit': expected a whole number above 0, or a share such as 0.1, got '0'"),
        (["run", "--limit", "1.5"], "'--limit': expected a whole number above 0, or a share such as 0.1, got '1.5'"),
        (["run", "--limit", "-3"], "'--limit': expected a whole number above 0, or a share such as 0.1, got '-3'"),
        (["run", "--limit", "nan"], "'--limit': expected a whole number above 0, or a share such as 0.1, got 'nan'"),
        (["run", "--batch-size", "0"], "'--batch-size': expected a whole number above 0, or auto, got '0'"),
        (["run", "--batch-size", "big"], "'--batch-size': expected a whole number above 0, or auto, got 'big'"),
        (["run", "--bits", "5"], "'--bits': expected 4, 8 or 16, got '5'"),
        (["run", "--num-fewshot", "-1"], "Invalid value for '--num-fewshot': "),
        (["run", "--seed", "x"], "Invalid value for '--seed': "),
        (["run", "--device", "tpu"], "'--device': Value error, 'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["run", "--trained-base", "8bit"], "'--trained-base': Value error, '8bit' is not one of '16bit', "),
        (["run", "--tasks", "mmlu", "arc_easy"], "unexpected extra argument"),
        (["run", "--task", "mmlu"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_read(arguments: list[str], told: str) -> None:
    """The usage, and what was expected."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: ")
    assert told in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def test_what_is_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option has its place in the request."""
    asked: list[EvalRequest] = []
    monkeypatch.setattr(evaluating, "evaluate", lambda request, *, listeners: asked.append(request))
    home = here / "home"
    (home / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    scored("run", *TASK)
    scored(
        "run", "--tasks", "arc_easy, piqa,", "--tasks", "rte", "--num-fewshot", "3", "--limit", "0.5", "--batch-size",
        "7", "--data-root", "~/data", "--allow-partial", "--bits", "8", "--apply-chat-template",
        "--system-instruction", "Be brief.", "--baseline", "--output", "~/out.json", "--log-samples", "--dataset",
        "rows.jsonl", "--set", "dataset.format=text", "--set", "dataset.max_length=9", "--base-model", "llama",
        "--revision", "r", "--trained-base", "nf4", "--device", "cpu", "--seed", "0", "--no-keep",
        "--trust-remote-code", "--run-unsafe-code",
    )  # fmt: skip
    assert asked == [
        EvalRequest("run", tasks=("arc_easy",), data_root=Path("data")),
        EvalRequest(
            "run", tasks=("arc_easy", "piqa", "rte"), num_fewshot=3, limit=0.5, batch_size=7, data_root=home / "data",
            allow_partial=True, bits=8, chat_template=True, system_instruction="Be brief.", baseline=True,
            output=home / "out.json", log_samples=True, dataset="rows.jsonl",
            overrides=("dataset.format=text", "dataset.max_length=9"), base_model="llama", revision="r",
            trained_base="nf4", device="cpu", seed=0, keep_answers=False, trust_remote_code=True, run_unsafe_code=True,
        ),
    ]  # fmt: skip
    assert type(asked[1].limit) is float
    scored("run", *TASK, "--limit", "12", "--batch-size", "auto")
    assert (asked[2].limit, type(asked[2].limit), asked[2].batch_size) == (12, int, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            [],
            "expected --tasks NAME,... for what to be scored on (qlora eval --list tells the names), or --dataset ROWS",
        ),
        (
            ["--dataset", "rows.jsonl", "--seed", "1", "--no-keep", "--num-fewshot", "0", "--apply-chat-template"],
            "--num-fewshot, --apply-chat-template, --seed, --no-keep: without --tasks, there is no use for this",
        ),
        ([*TASK, "--set", "dataset.format=text"], "--set: without --dataset, there is no use for this"),
        (
            [*TASK, "--log-samples"],
            "--log-samples: the answers are written beside the scores; say where, with --output FILE",
        ),
        (["--tasks", "arc_eazy", "--data-root", "data"], "'arc_eazy' is no task, group or tag that lm-eval knows; did "
         "you mean arc_easy?"),
        (["--tasks", "arc_easy", "--data-root", "date"], "--data-root: date: there is no such folder; did you mean "
         "data?"),
        (["--tasks", "arc_easy", "--data-root", "rows.jsonl"], "--data-root: rows.jsonl is a file; expected a folder"),
        ([*TASK, "--task-path", "x" * 300], f"--task-path: {'x' * 200}: cannot be looked up: File name too long"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)  # fmt: skip
def test_options_that_cannot_be_followed(here: Path, arguments: list[str], told: str) -> None:
    """One line that says which, and why."""
    assert refused("run", *arguments) == told


def test_all_that_is_wrong_is_told_at_once(here: Path) -> None:
    """Target, options, folders, file and names: a person mends them in one go."""
    told = refused(
        "rum", "--tasks", "mmul,arc_easy", "--tasks", "piqua", "--data-root", "date", "--output", "data",
        "--log-samples", "--set", "dataset.format=text",
    )  # fmt: skip
    assert told.splitlines() == [
        "--set: without --dataset, there is no use for this",
        "rum: there is no such folder; did you mean run? Expected the folder of a run, a checkpoint, an adapter or a "
        "model, or a hub name such as org/name",
        "--data-root: date: there is no such folder; did you mean data?",
        "--output: data is a folder; expected the name of a file, such as data/results.json",
        "'mmul' is no task, group or tag that lm-eval knows; did you mean mmlu?",
        "'piqua' is no task, group or tag that lm-eval knows; did you mean piqa?",
    ]


def test_rows_that_are_not_there(here: Path) -> None:
    """Told with what else is wrong, before anything heavy is imported."""
    told = refused("rum", "--dataset", "row.jsonl", "--set", "dataset.packing=true")
    assert told.splitlines()[1:] == [
        "--dataset: row.jsonl: there is no such file or folder; did you mean rows.jsonl?",
        "--set dataset.packing=true: `dataset.packing` is for training; rows are scored one by one, which says the "
        "same",
    ]


def test_finding_out_which_tasks_there_are_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, once. On stderr: a list of names is for others to read."""
    listed = invoke("--list", "arc_easy")
    whole = load_index()
    next(cache_folder().glob("tasks-*.json")).unlink()
    monkeypatch.setattr("qlora_cli.evaluation.tasks.index._scan", lambda folder, own: whole)
    first, second = invoke("--list", "arc_easy"), invoke("--list", "arc_easy")
    assert first.stdout == second.stdout == listed.stdout
    assert " ".join(first.stderr.split()) == "finding out which tasks lm-eval has; once, for some seconds …"
    assert second.stderr == ""


def test_options_that_a_list_has_no_use_for(here: Path) -> None:
    assert refused("--list", "--bits", "4", "--tasks", "mmlu", "--baseline") == (
        "--bits, --tasks, --baseline: --list lists names, and has no use for this"
    )


def test_an_output_in_the_way(here: Path) -> None:
    """Nothing is ever written over, neither the scores nor the samples beside them."""
    (here / "there.json").touch()
    (here / "dangling.json").symlink_to("nothing")
    (here / "samples_arc_easy_a-b.jsonl").touch()
    for output, told in (
        ("there.json", "there.json is there already. Name another file, or delete it: nothing is ever written over"),
        ("dangling.json", "dangling.json is there already. Name another file, or delete it: nothing is ever written "
         "over"),
        ("out", "expected the name of a JSON file, such as results.json, got out"),
        ("out.jsonl", "expected the name of a JSON file, such as results.json, got out.jsonl"),
        ("there.json/out.json", "there.json is no folder, so there.json/out.json cannot be made"),
        ("x" * 300 + ".json", f"{'x' * 200}: cannot be written: File name too long"),
        (".", ". is a folder; expected the name of a file, such as ./results.json"),
        ("~nobody-of-that-name/a.json", "~nobody-of-that-name/a.json: there is no user nobody-of-that-name; write the "
         "folder's path"),
        ("x" * 240 + ".json", f"the samples would be called samples_arc_easy_{'x' * 63}…, 263 bytes long, and a name "
         "may have 255. Name a file whose name is shorter by 8"),
        ("a_b.json", "samples_arc_easy_a-b.jsonl is there already, and the samples of a_b.json would have its name. "
             "Name another file, or delete it"),
    ):  # fmt: skip
        assert refused("run", *TASK, "--output", output, "--log-samples") == f"--output: {told}"


def test_a_folder_may_be_called_after_a_home_that_is_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is there; so may a file, and the longest name that there can be is one."""
    asked: list[EvalRequest] = []
    monkeypatch.setattr(evaluating, "evaluate", lambda request, *, listeners: asked.append(request))
    Path("~nobody-of-that-name").mkdir()
    outputs = ["~nobody-of-that-name/a.json", "~nobody.json", "é" * 113 + "x.json"]
    for output in outputs:
        scored("run", *TASK, "--output", output, "--log-samples", "--baseline")
    assert [str(request.output) for request in asked] == outputs
    assert refused("run", *TASK, "--output", "é" * 114 + ".json", "--log-samples", "--baseline").endswith(
        "…, 256 bytes long, and a name may have 255. Name a file whose name is shorter by 1"
    )


def test_samples_that_an_evaluation_left_are_not_written_over(here: Path) -> None:
    """Also where the scores beside them are gone."""
    scored("run", *TASK, "--output", "out/results_a_b.json", "--log-samples")
    Path("out/results_a_b.json").unlink()
    assert refused("run", *TASK, "--output", "out/results_a_b.json", "--log-samples").startswith(
        "--output: out/samples_arc_easy_a-b.jsonl is there already"
    )
    scored("run", *TASK, "--output", "out/results_a_b.json")
    Path("out/samples_arc_easy_c-base.jsonl").touch()
    assert refused("run", *TASK, "--output", "out/c.json", "--log-samples", "--baseline").startswith(
        "--output: out/samples_arc_easy_c-base.jsonl is there already"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="folders are closed otherwise there")
def test_an_output_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is computed. Who may do everything may write there, too."""
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK | os.X_OK)
    assert refused("run", *TASK, "--output", "new/out.json") == (
        "--output: . cannot be written, so new/out.json cannot be made there"
    )


# ------------------------------------------------------------------------------------------- Stopped, failed

PREPARED = Prepared("the run run", "NF4", "llama", 1, 8)
SCORE = ScoreRow("arc_easy", "arc_easy", 0, False, 8, "acc", "none", 0.5, 0.1, True, 0)
DONE = Evaluated(PREPARED, (SCORE,), (), None, "prefix tree", 33, 0, 1.0)
Act = Callable[[EvalRequest], object]


def standing_in(monkeypatch: pytest.MonkeyPatch, act: Act, *events: Event) -> None:
    """The evaluation tells these events, and then does this."""

    def evaluate(request: EvalRequest, *, listeners: Sequence[Callable[[Event], None]]) -> None:
        for event in events:
            for listener in listeners:
                listener(event)
        act(request)

    monkeypatch.setattr(evaluating, "evaluate", evaluate)


def asking(answered: int) -> Asking:
    return Asking("loglikelihood", answered, 33, 0, 0, 0, 1.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_stopped(here: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Ctrl-C, or from outside: exit code 130, what is kept is said, and the signal means what it did."""
    before = signal.getsignal(number)
    standing_in(monkeypatch, lambda _: signal.raise_signal(number), PREPARED, asking(0), asking(20))
    assert refused("run", *TASK, code=130) == (
        "stopped; the answers so far are kept, and the same command goes on from them"
    )
    assert signal.getsignal(number) == before


def test_what_there_is_when_it_was_stopped(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is promised that is not so."""

    def stop(_: EvalRequest) -> None:
        raise KeyboardInterrupt

    standing_in(monkeypatch, stop, PREPARED)
    assert refused("run", *TASK, code=130) == "stopped; no question was answered yet"
    standing_in(monkeypatch, stop, PREPARED, asking(20))
    assert refused("run", *TASK, "--no-keep", code=130) == "stopped; as --no-keep says, no answers are kept"
    standing_in(monkeypatch, stop, PREPARED, asking(33), DONE)
    assert refused("run", *TASK, code=130) == "stopped; all was scored"
    output = "--output", "out.json"
    results = Written("results", (Path("out-2.json"),), Path("out.json"))
    standing_in(monkeypatch, lambda request: (here / "out.json").touch() or stop(request), PREPARED, asking(33), DONE)
    result = invoke("run", *TASK, *output)
    assert (result.exit_code, result.stderr) == (130, "error: stopped; all was scored\n"), "another's file"
    (here / "out.json").unlink()
    standing_in(monkeypatch, stop, PREPARED, asking(33), DONE, results)
    assert refused("run", *TASK, *output, code=130) == "stopped; out-2.json is whole"
    told = refused("run", *TASK, *output, "--log-samples", code=130)
    assert told == "stopped; out-2.json is whole, but not all samples are there"
    standing_in(monkeypatch, stop, PREPARED, asking(33), DONE, results, Written("samples", (Path("a.jsonl"),)))
    assert refused("run", *TASK, *output, "--log-samples", code=130) == "stopped; out-2.json is whole"


def test_stopped_before_it_began(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While libraries are imported: which may make another error of it, as transformers does."""

    def break_off(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module") from None

    monkeypatch.setattr("qlora_cli.commands.libraries.set_up_libraries", break_off)
    assert refused("run", *TASK, code=130) == "stopped; nothing was asked yet"


def test_an_evaluation_that_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 for one that was begun; what was answered by then is not lost, and that is said."""

    def fail(error: Exception) -> Act:
        def act(_: EvalRequest) -> None:
            raise error

        return act

    standing_in(monkeypatch, fail(EvaluationError("out of memory")), PREPARED, asking(20))
    assert refused("run", *TASK, code=1) == (
        "out of memory\nThe answers so far are kept: the same command goes on from them"
    )
    assert refused("run", *TASK, "--no-keep", code=1) == "out of memory"
    standing_in(monkeypatch, fail(EvaluationError("out of memory")), PREPARED)
    assert refused("run", *TASK, code=1) == "out of memory"
    standing_in(monkeypatch, fail(TaskError("no data")), PREPARED)
    assert refused("run", *TASK) == "no data"


def test_a_fault_of_our_own_is_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a traceback to be reported."""
    standing_in(monkeypatch, lambda _: 1 / 0)
    assert isinstance(CliRunner().invoke(app, ["eval", "run", *TASK]).exception, ZeroDivisionError)


def test_data_that_is_not_there(here: Path) -> None:
    """A task that was asked for by its name is never left out."""
    told = refused("run", "--tasks", "arc_challenge", "--data-root", "data")
    assert told.startswith("arc_challenge: ")
    assert "ARC-Challenge" in told


def test_a_process_that_is_stopped_and_goes_on(here: Path) -> None:
    """SIGTERM while it asks: one line on stderr, exit code 130, and what was answered by then is not asked again."""
    tasks = ("--tasks", "mmlu_anatomy,arc_easy,piqa", "--data-root", "data", "--batch-size", "1")
    command = [sys.executable, "-m", "qlora_cli", "eval", "run", *tasks, "--device", "cpu"]
    with subprocess.Popen(
        command, env=ENVIRONMENT | cache(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert any(line.startswith("         loading ") for line in running.stdout)
        running.terminate()
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert stderr in (
        "error: stopped; no question was answered yet\n",
        "error: stopped; the answers so far are kept, and the same command goes on from them\n",
    )
    assert any(line.startswith("arc_easy ") for line in scored("run", *tasks))


def test_what_is_asked_of_the_hub_is_known_before_its_client_is_there(tmp_path: Path) -> None:
    """Or it would ask a hub that cannot be reached, six times a file. With --data-root nothing is asked of it."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text("{}")
    keep_index()
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import sys\nfrom pathlib import Path\n"
            "from qlora_cli.commands import eval, libraries\n"
            "from qlora_cli.recipe.paths import is_local\n"
            "def look(names, **_):\n"
            "    there = {'torch', 'huggingface_hub', 'transformers'} & {*sys.modules}\n"
            "    print(sorted(there), all(map(is_local, names)))\n"
            "    raise KeyboardInterrupt\n"
            "libraries.set_up_libraries = look\n"
            "def ask(**more):\n    eval.evaluate(eval.EvalRequest(**{'target': 'llama', **more}), given={})\n"
            "ask(tasks=('arc_easy',))\n"
            "ask(tasks=('arc_easy',), data_root=Path('llama'))\n"
            "ask(dataset='llama')\n"
            "ask(dataset='org/rows')\n"
            "ask(tasks=('arc_easy',), data_root=Path('llama'), target='org/model')\n",
        ],
        cwd=tmp_path, env=ENVIRONMENT | cache(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["[] False", "[] True", "[] True", "[] False", "[] False"]
