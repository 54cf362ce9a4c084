"""SmolLM2-135M-Instruct, killed ten times on its way, ends in the bits of the run that was never killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.load import load_recipe
from qlora_cli.selftest.child import last_step
from qlora_cli.training.run_folder import RunFolder
from tests.support.cli import ENVIRONMENT
from tests.support.finished_runs import FinishedRun, newest_whole

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
KILLS = 10
STEPS = KILLS + 2

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").exists(),
        reason=f"no demo model: python scripts/get_demo_model.py {MODEL.relative_to(ROOT)}",
    ),
]


def _command(recipe: Path, output: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "qlora_cli", "train", str(recipe), "--output-dir", str(output)]
    return [*program, "--no-rehearsal", *options]


def _train(recipe: Path, output: Path, *options: str) -> None:
    command = _command(recipe, output, *options)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _kill_at(step: int, delay: float, recipe: Path, output: Path, *options: str) -> None:
    """Start it, and kill it so many seconds after it told of that step."""
    started = subprocess.Popen(_command(recipe, output, *options), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while last_step(RunFolder(output)) < step:
        assert started.poll() is None, "it ended by itself"
        time.sleep(0.005)
    time.sleep(delay)
    started.kill()
    started.wait()


def test_killed_ten_times(tmp_path: Path) -> None:
    """At a random moment within each of ten steps, with checkpoints every second one written meanwhile: the adapter,
    the optimizer's state and every record are those of an unbroken run."""
    changes = [
        "quantization.compute_dtype=float32",  # which any processor is quick with
        "lora.dropout=0.1",
        "dataset.validation=null",
        "dataset.max_length=160",
        "dataset.overlong=drop",
        f"training.max_steps={STEPS}",
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=2",
        "training.warmup_steps=2",
        "training.save_steps=2",
        "training.logging_steps=1",
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(load_recipe(ROOT / "recipes/smollm2-gsm8k.yaml", changes)), encoding="utf-8")
    began = time.monotonic()
    _train(recipe, tmp_path / "whole")
    a_step = (time.monotonic() - began) / STEPS
    draw, killed, lost = random.Random(7), tmp_path / "killed", []
    for kill in range(KILLS):
        resume = ["--resume"] if killed.exists() else []
        _kill_at(kill + 1, draw.uniform(0, a_step), recipe, killed, *resume)
        lost.append(last_step(RunFolder(killed)) - newest_whole(RunFolder(killed)))
    _train(recipe, killed, "--resume")
    sys.stdout.write(f"{KILLS} kills; steps lost: {lost}; {a_step:.1f} s a step with everything around it\n")
    assert FinishedRun.of(RunFolder(tmp_path / "whole")).differences(RunFolder(killed)) == []
