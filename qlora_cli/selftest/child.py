"""A training process of its own, to be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import qlora_cli
from qlora_cli.disk import write_text
from qlora_cli.errors import RunError
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.selftest.workbench import Workbench
from qlora_cli.training.run_folder import RunFolder

_PATIENCE = 90.0  # seconds until it has done what it is killed after: most of them go to importing the libraries
_PAUSE = 0.005
_TOLD = 2000  # characters of what a process said before it ended by itself


def train_and_kill(bench: Workbench, recipe: Recipe, *, after_step: int) -> int:
    """Start `qlora train`, and kill it once it has done that step and saved a checkpoint; returns its last step.

    It gets no chance to do anything about it: SIGKILL, on Windows TerminateProcess.

    Raises:
        RunError: if it ended by itself, or took too long.
    """
    folder = RunFolder(Path(recipe.output_dir))
    output = bench.folder / "child.txt"
    deadline = time.monotonic() + _PATIENCE
    with _training(bench, recipe, output) as process:
        while last_step(folder) < after_step or not any(folder.checkpoints.glob("step-*")):
            if process.poll() is not None:
                raise RunError(
                    f"the training process ended by itself with exit code {process.returncode}: {_end_of(output)}"
                )
            if time.monotonic() > deadline:
                raise RunError(
                    f"the training process had not done {after_step} steps after {_PATIENCE:.0f} s: {_end_of(output)}"
                )
            time.sleep(_PAUSE)
        process.kill()
        process.wait()
    return last_step(folder)


def last_step(folder: RunFolder) -> int:
    """The last step in `metrics.jsonl`; 0 if there is none."""
    return max((step for step, _ in losses(folder)), default=0)


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    """Steps and their losses, as `metrics.jsonl` has them, but for a line that is not whole."""
    found = []
    for line in folder.metrics.read_text(encoding="utf-8").splitlines() if folder.metrics.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["event"] == "train":
            found.append((record["step"], record["loss"]))
    return found


@contextmanager
def _training(bench: Workbench, recipe: Recipe, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    file = bench.folder / "child.yaml"
    write_text(file, dump_recipe(recipe))
    # The package that this process has, however Python came to it.
    paths = [str(Path(qlora_cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | bench.environment() | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with output.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_cli", "train", str(file)],
            cwd=bench.folder, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()  # nothing to one that has ended
            process.wait()


def _end_of(output: Path) -> str:
    return output.read_text(encoding="utf-8", errors="replace")[-_TOLD:].strip() or "it said nothing"
