"""The command line as a person or a script meets it: exit codes, what is on stdout and stderr, and no traceback."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from qlora_cli import __version__
from qlora_cli.cli import app
from qlora_cli.commands import train as train_command
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.training import checkpoint as checkpoint_module
from qlora_cli.training.events import Finished
from tests.support.cli import ENVIRONMENT, offline_libraries, process, settings
from tests.support.runs import read_metrics, tiny_recipe


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, rows and recipe.yaml, made once; nobody writes into it."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = tiny_recipe(folder, training={"max_steps": 3, "save_steps": 2}).model_copy(update={"output_dir": "run"})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of the shared recipe, to be run in a folder of its own and without a network."""
    monkeypatch.chdir(tmp_path)
    with offline_libraries(monkeypatch):
        yield str(shared / "recipe.yaml")


def invoke(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["train", *arguments])


# ------------------------------------------------------------------------------------------- Before torch


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["check", "--help"], 0),
        (["-h"], 0),
        (["--version"], 0),
        ([], 2),
        (["train", "r.yaml"], 2),
        (["check", "r.yaml"], 2),
        (["check", "r.yaml", "--json"], 2),
        (["schema"], 0),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_needs_no_torch_imports_none(arguments: list[str], code: int, tmp_path: Path) -> None:
    """Help, the version and a wrong recipe are there at once: nothing heavy is imported for them."""
    (tmp_path / "r.yaml").write_text("base_model: gpt2\nlora: {rnk: 3}\n")
    done = process(*arguments, folder=tmp_path, spy=True)
    assert done.stderr.endswith("IMPORTED ['typer']\n")
    assert "Traceback" not in done.stderr
    assert done.returncode == code


def test_version_and_help() -> None:
    """--version is the package's; every option of train is in its help, with the exit codes."""
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{__version__}\n"
    assert "train" in CliRunner().invoke(app, ["-h"]).stdout
    text = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["train", "--help"]).stdout
    for word in ("RECIPE", "--set", "KEY=VALUE", "--output-dir", "--resume", "--no-rehearsal", "130 interrupted"):
        assert word in text


@pytest.mark.parametrize("arguments", [["train"], ["train", "r.yaml", "--no-such-option"], ["trian"]], ids=" ".join)
def test_wrong_usage(arguments: list[str]) -> None:
    """Exit code 2, the usage on stderr, nothing on stdout."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


# ------------------------------------------------------------------------------------------- Wrong requests


def refused(*arguments: str, code: int = 2) -> str:
    """The message on stderr of a command that fails as it should: no traceback, and nothing of it on stdout."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert "error" not in result.stdout
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def test_no_such_recipe(recipe: str) -> None:
    assert refused("none.yaml") == "none.yaml: no such file; expected a recipe, a YAML file"


def test_a_wrong_recipe(recipe: str) -> None:
    """All mistakes, a line each."""
    Path("r.yaml").write_text("base_model: gpt2\nlora: {rnk: 3}\ndataset: {train: a.csv}\noutput_dir: o\n")
    assert refused("r.yaml", "--set", "training.seed=x") == (
        "r.yaml:2:8: lora.rnk: unknown key; did you mean `rank`?\n"
        "    `lora` takes rank, alpha, dropout, target_modules\n"
        "--set training.seed=x: training.seed: expected a whole number from 0 to 4,294,967,295, got 'x'\n"
        "r.yaml:3:18: dataset.train: a.csv: there is no such file or folder."
    )


def test_no_such_model_folder(recipe: str) -> None:
    assert refused(recipe, "--set", "base_model=./none") == (
        "--set base_model=./none: base_model: none: there is no such folder."
    )


def test_a_hub_that_cannot_be_reached(recipe: str) -> None:
    """Model and dataset: the name, what it was taken for, and what to do."""
    message = refused(recipe, "--set", "base_model=org/none")
    assert message.startswith(
        "base_model: the tokenizer of org/none (revision main) cannot be had from the hub, and there is no such folder "
        "here. Check the name and the network"
    )
    message = refused(recipe, "--set", "dataset.train=org/none")
    assert message.startswith(
        "org/none: there is no such local file or folder, so it was taken for a dataset on the hub"
    )


EMPTY, CUT = "", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (EMPTY, "rows.jsonl: the file is empty."),
        (
            CUT,
            r'rows.jsonl, line 2: expected one JSON object, got "{\"prompt\": \"a\"," '
            "(expecting property name enclosed in double quotes at column 17).\n"
            "Mend the data, or set dataset.on_bad_row: skip to leave such rows out.",
        ),
    ],
    ids=["empty", "malformed"],
)
def test_wrong_data(text: str, message: str, recipe: str) -> None:
    """The file and the row are named."""
    Path("rows.jsonl").write_text(text)
    assert refused(recipe, "--set", "dataset.train=rows.jsonl") == message
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "rows.jsonl: 1 row (line 1) has nothing to learn: no token has a loss."),
        (
            {"prompt": "a " * 300, "completion": "b"},
            "rows.jsonl: cut at dataset.max_length (8 tokens), 1 row (line 1) would keep nothing to learn. "
            "Raise dataset.max_length, or set dataset.overlong to drop.",
        ),
    ],
    ids=["empty", "cut"],
)
def test_no_supervised_token(row: dict[str, str], message: str, recipe: str) -> None:
    """Rows that are empty, or whose every answer is cut away, would teach nothing."""
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    cut = settings("dataset.train=rows.jsonl", "dataset.max_length=8", "dataset.overlong=truncate")
    assert refused(recipe, *cut) == message
    assert not Path("run").exists()


def test_a_folder_that_holds_a_run(recipe: str) -> None:
    Path("run").mkdir()
    Path("run/metrics.jsonl").touch()
    assert refused(recipe) == (
        "output_dir: run already holds a run. Add --resume to go on with it, name another folder with --output-dir, "
        "or delete it if no run is at work there"
    )


def test_a_run_folder_that_cannot_be(recipe: str) -> None:
    """A file in its place."""
    Path("file").touch()
    message = "output_dir: file is a file; expected a folder, or nothing, there"
    assert refused(recipe, "--output-dir", "file") == message


def test_a_run_folder_that_cannot_be_made(recipe: str) -> None:
    """Below a file: refused at once. In a system's folder, which only the attempt shows: a message that names it."""
    message = "output_dir: /dev/null is no folder, so /dev/null/x cannot be made"
    assert refused(recipe, "--output-dir", "/dev/null/x") == message
    result = invoke(recipe, "--output-dir", "/proc/x/y")
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code in (1, 2)
    assert "/proc/x" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(recipe: str) -> None:
    message = refused(recipe, "--set", "training.device=cuda")
    assert message.startswith("training.device: cuda was asked for, but torch ")
    assert message.endswith("Set training.device to auto or cpu, or install a CUDA build of torch and check nvidia-smi")


def test_a_loss_that_is_not_finite(recipe: str, shared: Path) -> None:
    """A base whose last norm holds a NaN: exit code 1, the step and its rows named, the record says failed."""
    base = Path("base")
    base.mkdir()
    for file in (shared / "llama").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    broken = settings("base_model=./base", "dataset.validation=null")
    message = refused(recipe, *broken, code=1)
    assert message.startswith("rehearsal: the loss is nan in the shortest batch, before step 1. Rows of ")
    assert not Path("run").exists()
    message = refused(recipe, *broken, "--no-rehearsal", code=1)
    assert message.startswith("step 1: the loss is nan, so training stopped; nothing was trained yet. Rows of ")
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"
    assert not Path("run/adapter").exists()


# ------------------------------------------------------------------------------------------- Names with meaning


@pytest.mark.parametrize("name", ["123", "a: b #c", "null", "[x]", "'", "é \\n", "~"])
def test_any_folder_name_is_text(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """--output-dir takes a name, not YAML; and names it again as it was given."""
    (Path.cwd() / name).mkdir()
    (Path.cwd() / name / "run.json").touch()
    monkeypatch.setenv("HOME", str(Path.cwd() / "~"))
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/qlora"])
    assert refused(recipe, "--output-dir", name).startswith("output_dir: ")
    again = train_command._resume_command(Path("r.yaml"), ["lora.rank=4"], name, rehearse=True)
    assert shlex.split(again) == [
        "qlora", "train", "r.yaml", "--set", "lora.rank=4", "--output-dir", name, "--resume"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("started_as", "processes", "words"),
    [
        ("/usr/bin/qlora", "1", ["qlora"]),
        ("/site-packages/qlora_cli/__main__.py", "1", [sys.executable, "-m", "qlora_cli"]),
        (
            "/site-packages/qlora_cli/__main__.py",
            "4",
            ["accelerate", "launch", "--num_processes", "4", "-m", "qlora_cli"],
        ),
    ],
)
def test_what_is_told_to_type_is_what_was_typed(
    started_as: str, processes: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of four processes is gone on with by four; one started as a module, as a module."""
    monkeypatch.setattr("sys.argv", [started_as])
    monkeypatch.setenv("WORLD_SIZE", processes)
    for rehearse, option in ((True, []), (False, ["--no-rehearsal"])):
        again = train_command._resume_command(Path("r.yaml"), [], None, rehearse=rehearse)
        assert shlex.split(again) == [*words, "train", "r.yaml", *option, "--resume"]
    # What one process does is told so: no launcher.
    alone = ["qlora"] if words[0] == "qlora" else [sys.executable, "-m", "qlora_cli"]
    monkeypatch.chdir("/tmp")
    merge = shlex.split(train_command._merge_command(Path()))
    assert merge == [*alone, "merge", ".", "--output", "tmp-merged"]


def test_an_empty_folder_name_is_none(recipe: str) -> None:
    """An unset shell variable must not scatter a run over the current folder."""
    message = refused(recipe, "--output-dir", "")
    assert "output_dir: " in message
    assert not Path("run.json").exists()


def test_resume_where_no_run_is(recipe: str) -> None:
    """A mistyped folder does not begin a run in it."""
    message = refused(recipe, "--output-dir", "other", "--resume")
    assert message.startswith(f"--resume: {Path.cwd() / 'other'} holds no run. output_dir is relative to the folder ")
    assert not Path("other").exists()


def test_a_stop_at_once(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C where no step is at hand, as in the first evaluation: 130, and the command to go on if there is a run."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qlora_cli.training.loading.load_base", interrupted)
        early = invoke(recipe)
    assert (early.exit_code, early.stderr) == (130, "error: stopped; nothing was written\n")
    assert "Go on with" not in early.stdout
    monkeypatch.setattr("qlora_cli.training.loop.evaluate", interrupted)
    late = invoke(recipe)
    told = "error: stopped at once; nothing was saved yet, and --resume begins again\n"
    assert (late.exit_code, late.stderr) == (130, told)
    assert late.stdout.splitlines()[-1].startswith("Go on with: ")
    record = json.loads(Path("run/run.json").read_text())
    assert (record["status"], record["error"]) == ("interrupted", "stopped at once")


def test_a_failed_run_tells_how_to_go_on(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after the checkpoint of step 2, as that of step 3 is written: the message, and the command that
    goes on from there, as it does. Where nothing was saved there is no such command."""
    full = OSError(28, "No space left on device")
    write = checkpoint_module.write_bytes

    def no_room(path: Path, *arguments: Any) -> None:
        if path.parent.name == f".step-{last:06d}.writing":
            raise full
        write(path, *arguments)

    monkeypatch.setattr(checkpoint_module, "write_bytes", no_room)
    last = 1
    each = settings("training.save_steps=1", "output_dir=first")
    first = invoke(recipe, *each)
    assert (first.exit_code, "the run goes on with" in first.stdout) == (1, False)
    assert first.stderr == "error: first/checkpoints/step-000001: could not be written: No space left on device\n"
    last = 3
    third = invoke(recipe, *settings("training.save_steps=1"), "--no-rehearsal")
    assert third.exit_code == 1
    assert third.stderr == "error: run/checkpoints/step-000003: could not be written: No space left on device\n"
    told, again = third.stdout.splitlines()[-1].split(": ")
    assert told == "The newest checkpoint is step-000002. Once it can, the run goes on with"
    last = 0
    words = shlex.split(again)
    assert words[-2:] == ["--no-rehearsal", "--resume"]
    done = CliRunner().invoke(app, words[words.index("train") :])
    assert (done.exit_code, "going on from step-000002" in done.stdout) == (0, True)


# ------------------------------------------------------------------------------------------- Whole runs


def test_a_whole_run_in_a_log(recipe: str, shared: Path, tmp_path: Path) -> None:
    """stdout piped: plain lines from the data to the adapter, then a command that goes on; it does."""
    done = process("train", recipe, "--output-dir", "my run", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        f"         reading the tokenizer of {shared}/llama …",
        "         reading and encoding the rows …",
    ]
    assert lines[2].startswith("data     train: 32 rows, ")
    assert lines[3].startswith("data     validation: 8 rows, ")
    assert lines[4] == f"         loading {shared}/llama …"
    assert lines[5] == f"model    {shared}/llama (LlamaForCausalLM) on cpu"
    assert "train    3 steps of 4 rows, 0.375 epochs, into my run" in lines
    labels = [line[:8].strip() for line in lines if line[:8].strip()]
    after_start = labels[labels.index("train") + 1 :]
    assert after_start.index("saved") > 2  # of step 2, told once it is on disk
    told = [label for label in after_start[:9] if label != "saved"]
    assert told == ["eval", "step", "step", "step", "eval", "done", "adapter"]
    assert after_start[6] == "saved"
    assert lines[-5:-1] == [
        f"adapter  my run/adapter{os.sep}  (PEFT format)",
        "Load it over the same base with PEFT, transformers or vLLM, or fold it into the base's weights:",
        f"  {sys.executable} -m qlora_cli merge 'my run' --output 'my run-merged'",
        "To train on, for longer:",
    ]
    assert (
        lines[-1]
        == f"  {sys.executable} -m qlora_cli train {recipe} --output-dir 'my run' --resume --set training.max_steps=6"
    )
    assert (tmp_path / "my run" / "adapter" / "adapter_model.safetensors").is_file()

    result = CliRunner().invoke(app, shlex.split(lines[-1])[3:])
    assert result.exit_code == 0, result.output
    assert [record["step"] for record in read_metrics(tmp_path / "my run", "train")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_stopped_early_goes_on_with_more_patience(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps would not: what is named is the setting that does."""

    def stop(*_: object, **__: object) -> Finished:
        return Finished(Path("run/adapter"), 2, 1.0, 9, 9, None, None, stopped_early="no lower held-out loss")

    monkeypatch.setattr("qlora_cli.training.run.train", stop)
    result = invoke(recipe, *settings("training.early_stopping_patience=3", "training.eval_steps=1"))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith(" --resume --set training.early_stopping_patience=6")


def test_a_reader_that_leaves_does_not_end_the_run(recipe: str, tmp_path: Path) -> None:
    """`qlora train … | head -1`: the run goes on in silence and completes."""
    command = shlex.join([sys.executable, "-m", "qlora_cli", "train", recipe, "--output-dir", str(tmp_path / "run")])
    piped = ["bash", "-o", "pipefail", "-c", f"{command} | head -1"]
    done = subprocess.run(piped, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "completed"


@pytest.fixture
def endless(recipe: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run with no end in sight, in a process group of its own as a shell would start it."""
    words = [sys.executable, "-m", "qlora_cli", "train", recipe, *settings("training.max_steps=1000000")]
    with subprocess.Popen(
        words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as running:  # fmt: skip
        try:
            yield running
        finally:
            running.kill()


def wait_for(condition: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupted_run(endless: subprocess.Popen[str], recipe: str, tmp_path: Path) -> None:
    """Ctrl-C in training: exit code 130, the state saved, no traceback, and the command that goes on, which does."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"event": "train"' in metrics.read_text(), endless)
    endless.send_signal(signal.SIGINT)
    out, err = endless.communicate(timeout=60)
    assert endless.returncode == 130, err
    step = json.loads((tmp_path / "run" / "run.json").read_text())["last_checkpoint"].removeprefix("step-")
    assert err == (
        "\nSIGINT: finishing this step, then saving; again to stop at once\n"
        f"error: SIGINT: stopped after step {int(step)}, state saved\n"
    )
    command = f"{sys.executable} -m qlora_cli train {recipe} --set training.max_steps=1000000 --resume"
    assert out.splitlines()[-1] == f"Go on with: {command}"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"

    end = int(step) + 2
    result = CliRunner().invoke(app, [*shlex.split(command)[3:], "--set", f"training.max_steps={end}"])
    assert result.exit_code == 0, result.output
    assert f"note     going on from step-{step}" in result.stdout
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == list(range(1, end + 1))
