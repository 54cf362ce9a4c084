"""`qlora train` in processes of their own: stopped by each signal, at every moment; and two of them on one folder.

A process takes seconds to begin, so that each is asked several things.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.cli import app
from qlora_cli.recipe.dump import dump_recipe
from tests.support.cli import ENVIRONMENT, offline_libraries, process, settings
from tests.support.runs import read_metrics, tiny_recipe

ENDLESS = settings("training.max_steps=1000000")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe whose model and rows are there; nobody writes beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    made = tiny_recipe(folder, training={"max_steps": 3}).model_copy(update={"output_dir": "run"})
    (folder / "recipe.yaml").write_text(dump_recipe(made), encoding="utf-8")
    return str(folder / "recipe.yaml")


@contextmanager
def training(
    recipe: str, *arguments: str, folder: Path, script: str | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """The command, in a session of its own; or a script that ends in it."""
    start = ["-m", "qlora_cli"] if script is None else ["-c", script]
    words = [sys.executable, *start, "train", recipe, *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    with subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, start_new_session=True, **streams) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for(condition: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trains(run: Path) -> Callable[[], bool]:
    """Whether steps are being done in a run folder."""
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and '"event": "train"' in metrics.read_text()


def record(run: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((run / "run.json").read_text())
    return data


def last_saved(run: Path) -> int:
    """The step of the last checkpoint, by the record."""
    return int(record(run)["last_checkpoint"].removeprefix("step-"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_the_end_of_a_job(number: signal.Signals, recipe: str, tmp_path: Path) -> None:
    """In training, and repeated at once as SLURM and torchrun do: the step is finished, the state saved, and the last
    line is the command that goes on."""
    run = tmp_path / "run"
    with training(recipe, *ENDLESS, folder=tmp_path) as running:
        wait_for(trains(run), running)
        for _ in range(2):
            running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (
        130,
        f"\n{number.name}: finishing this step, then saving; again to stop at once\n"
        f"error: {number.name}: stopped after step {last_saved(run)}, state saved\n",
    )
    again = f"{sys.executable} -m qlora_cli train {recipe} --set training.max_steps=1000000 --resume"
    assert out.splitlines()[-1] == f"Go on with: {again}"
    assert record(run)["status"] == "interrupted"
    assert read_metrics(run, "train")[-1]["step"] == last_saved(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_before_the_first_step(number: signal.Signals, recipe: str, tmp_path: Path) -> None:
    """While the libraries are imported, or rows read: a line, 130, no run folder, and no command to go on with one."""
    with training(recipe, folder=tmp_path) as running:
        assert running.stdout is not None
        if number != signal.SIGUSR1:  # that one comes while libraries are imported
            assert running.stdout.readline().startswith("         reading the tokenizer of ")
        else:
            time.sleep(2)
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "error: stopped; nothing was written\n")
    assert "Go on with" not in out
    assert not (tmp_path / "run").exists()


# Waits in its second step until it is stopped, telling on stdout that it is there.
SLOW = """
import sys, time
from qlora_cli.cli import app
from qlora_cli.training.loop import Loop
step = Loop._train_step
def slow(self):
    step(self)
    if self.progress.step == 2:
        print("WAITING", flush=True)
        while time.sleep(0.05) is None:
            pass
Loop._train_step = slow
app(sys.argv[1:])
"""


def test_a_second_ctrl_c(recipe: str, tmp_path: Path) -> None:
    """In a step that takes long, with SIGHUP ignored as under nohup: that passes, Ctrl-C waits for the step, and once
    more does not; the checkpoint before is whole and the command goes on from it, as it does after a kill."""
    run = tmp_path / "run"

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    each = settings("training.save_steps=1")
    with training(recipe, *each, folder=tmp_path, script=SLOW, preexec_fn=ignore) as running:
        assert running.stdout is not None
        assert any(line == "WAITING\n" for line in running.stdout)
        running.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        for _ in range(2):  # one Ctrl-C: the terminal's, and the launcher's
            running.send_signal(signal.SIGINT)
            time.sleep(0.2)
        time.sleep(1)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (
        130,
        "\nSIGINT: finishing this step, then saving; again to stop at once\n"
        "error: stopped at once; what was saved before is whole\n",
    )
    assert out.splitlines()[-1].startswith("Go on with: ")
    assert out.splitlines()[-1].endswith(f"train {recipe} --set training.save_steps=1 --resume")
    ended = record(run)
    told = (ended["status"], ended["error"], ended["last_checkpoint"])
    assert told == ("interrupted", "stopped at once", "step-000001")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001"]


LEAVING = """
import atexit, sys, time
from qlora_cli.__main__ import main
def leave():
    print("LEAVING", flush=True)
    time.sleep(1.5)
atexit.register(leave)
main()
"""


@pytest.mark.parametrize(("arguments", "code"), [(["schema"], 0), (["check", "nowhere.yaml"], 2)])
def test_an_end_that_is_told_stays(arguments: list[str], code: int, tmp_path: Path) -> None:
    """Signals while the process is taken down, which takes torch seconds: the exit code is that of what was done, or a
    batch script would not know a run that was saved from one that was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", LEAVING, *arguments],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert any(line == "LEAVING\n" for line in running.stdout)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            running.send_signal(number)
        assert running.wait(30) == code


def test_a_terminal_that_is_closed(recipe: str, tmp_path: Path) -> None:
    """SIGHUP, and nobody to write to any more, in the midst of a live bar: the state is saved all the same."""
    run = tmp_path / "run"
    master, slave = pty.openpty()
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}

    def control() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with training(recipe, *ENDLESS, folder=tmp_path, preexec_fn=control, **streams) as running:
        os.close(slave)
        os.set_blocking(master, False)
        shown = bytearray()

        def reads() -> bool:
            with suppress(BlockingIOError):
                shown.extend(os.read(master, 65536))
            return trains(run)() and b"steps" in shown

        wait_for(reads, running)
        os.close(master)
        assert running.wait(60) == 130
    assert record(run)["status"] == "interrupted"
    assert record(run)["error"] == f"SIGHUP: stopped after step {last_saved(run)}, state saved"


# Has found the folder free, and begins with the weights when another run is there already.
LATE = """
import sys, time
from pathlib import Path
from qlora_cli.cli import app
from qlora_cli.training import run
load = run.load_model
def late(*arguments, **settings):
    print("LOADING", flush=True)
    Path("loading").touch()
    while not Path("run/metrics.jsonl").exists():
        time.sleep(0.02)
    return load(*arguments, **settings)
run.load_model = late
app(sys.argv[1:])
"""
# Begins once that one has found the folder free, however slow it was.
AFTER_LATE = """
import sys, time
from pathlib import Path
from qlora_cli.cli import app
from qlora_cli.training import run
while not Path("loading").exists():
    time.sleep(0.02)
app(sys.argv[1:])
"""


def test_two_on_one_folder(recipe: str, tmp_path: Path) -> None:
    """While one trains, another is refused and writes nothing, whether it found the folder free when it began or would
    go on with the run there; merging reads what is saved. Killed, its lock is free at once."""
    run = tmp_path / "run"
    with (
        training(recipe, *ENDLESS, *settings("training.save_steps=5"), folder=tmp_path, script=LATE) as loser,
        training(recipe, *ENDLESS, *settings("training.save_steps=5"), folder=tmp_path, script=AFTER_LATE) as winner,
    ):
        refusal = (
            rf"error: output_dir: run is in use by another run: process {winner.pid} on \S+, since [\d: -]+ UTC\. "
            r"Wait for it, stop it, or name another folder with --output-dir\n"
        )
        out, err = loser.communicate(timeout=120)
        assert "LOADING\n" in out
        assert (loser.returncode, re.fullmatch(refusal, err) is not None) == (2, True), err
        assert "Go on with" not in out
        wait_for(lambda: any((run / "checkpoints").glob("step-*")), winner)
        resumed = process("train", recipe, "--resume", *ENDLESS, folder=tmp_path)
        assert (resumed.returncode, re.fullmatch(refusal, resumed.stderr) is not None) == (2, True), resumed.stderr
        merged = invoke("merge", str(run), "--output", str(tmp_path / "out"), "--no-verify", folder=tmp_path)
        assert merged.exit_code == 0, merged.output
        assert winner.poll() is None
        winner.kill()
        winner.wait()
    saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    steps = settings(f"training.max_steps={saved + 2}")
    done = invoke("train", recipe, "--resume", *steps, folder=tmp_path)
    assert done.exit_code == 0, done.output
    assert "going on from step-" in done.stdout


def invoke(*arguments: str, folder: Path) -> Result:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch, offline_libraries(patch):
        patch.chdir(folder)
        return CliRunner().invoke(app, arguments)
