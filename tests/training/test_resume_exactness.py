"""A run that fails twice and is resumed ends as the run that never failed, whatever it is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.schema import OptimizerName, Recipe
from qlora_cli.training.checkpoint import list_checkpoints
from qlora_cli.training.events import EvaluationProgress, Event, Started, StepDone
from qlora_cli.training.run import train
from qlora_cli.training.run_folder import RunFolder
from tests.support.cli import ENVIRONMENT
from tests.support.finished_runs import FinishedRun
from tests.support.runs import tiny_recipe
from tests.support.sockets import free_port

_SETTINGS = {
    "num_train_epochs": 3,
    "max_steps": None,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}
_SETTINGS |= {
    "save_steps": 2,
    "save_total_limit": 2,
    "gradient_checkpointing": True,
    "eval_steps": 4,
    "logging_steps": 3,
}
_SETTINGS |= {"lr_scheduler_type": "cosine", "warmup_steps": 2}


class _FailureError(Exception):
    """Of whatever: nothing of ours."""


def _into(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"output_dir": str(Path(recipe.output_dir).with_name(name))})


def _failing(at: Event | type[Event], step: int) -> Any:
    """A listener that fails at the event of that kind after so many steps."""
    done = 0

    def listen(event: Event) -> None:
        nonlocal done
        done = {Started: lambda: event.first_step, StepDone: lambda: event.step}.get(type(event), lambda: done)()
        if isinstance(event, at) and done == step:
            raise _FailureError

    return listen


@pytest.mark.parametrize(
    ("optimizer", "packing"), [*((name, False) for name in OptimizerName.__args__), ("paged_adamw_8bit", True)]
)
def test_failed_twice_it_ends_the_same(optimizer: str, packing: bool, tmp_path: Path) -> None:
    """In the middle of the second epoch, and in the middle of an evaluation after the step of a checkpoint: with
    dropout, accumulation, gradient checkpointing, and a window of losses that is open at the checkpoint."""
    recipe = tiny_recipe(
        tmp_path,
        rows=24 if packing else 7,
        validation_rows=3,
        lora={"dropout": 0.1, "rank": 64},
        dataset={"packing": packing, "max_length": 64},
        training=_SETTINGS | {"optimizer": optimizer},
    )
    whole, failed = _into(recipe, "whole"), _into(recipe, "failed")
    steps = train(whole).steps
    assert steps > 9
    first: list[int] = []
    for resume, failure in ((False, _failing(StepDone, 5)), (True, _failing(EvaluationProgress, 8))):
        with pytest.raises(_FailureError):
            train(failed, resume=resume, listeners=[failure])
        assert json.loads((tmp_path / "failed" / "run.json").read_text())["status"] == "failed"
    train(failed, resume=True, listeners=[lambda e: first.append(e.first_step) if isinstance(e, Started) else None])
    assert first == [6]
    assert FinishedRun.of(RunFolder(tmp_path / "whole")).differences(RunFolder(tmp_path / "failed")) == []


def test_two_processes_that_are_killed_end_the_same(tmp_path: Path) -> None:
    """torchrun, with dropout: both are killed once a checkpoint is there, and resumed. No bit and no record
    differs from those of two that were left alone."""
    recipe = tiny_recipe(
        tmp_path,
        rows=9,
        validation_rows=5,
        lora={"dropout": 0.1},
        training={"max_steps": 12, "eval_steps": 4, "save_steps": 2, "save_total_limit": 2}
        | {"optimizer": "adamw_torch", "per_device_train_batch_size": 1},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    killed = _launch(tmp_path, "killed")
    while not list_checkpoints(tmp_path / "killed" / "checkpoints") and killed.poll() is None:
        time.sleep(0.01)
    started = psutil.Process(killed.pid)
    for process in [started, *started.children(recursive=True)]:
        process.kill()
    killed.communicate()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["status"] == "running"
    for name, options in (("killed", ["--resume"]), ("whole", [])):
        launched = _launch(tmp_path, name, *options)
        _, told = launched.communicate(timeout=240)
        assert launched.returncode == 0, told
    assert FinishedRun.of(RunFolder(tmp_path / "whole")).differences(RunFolder(tmp_path / "killed")) == []


def _launch(folder: Path, name: str, *options: str) -> subprocess.Popen[str]:
    """Two processes on the recipe in `folder`."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "qlora_cli"]
    return subprocess.Popen(
        [sys.executable, *launch, "train", str(folder / "recipe.yaml"), "--output-dir", str(folder / name), *options],
        env=ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
