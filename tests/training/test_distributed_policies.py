"""Two processes, of which one alone has a fault or gets a signal: both take the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from qlora_cli.recipe.dump import dump_recipe
from tests.support.faults import checkpoint_names
from tests.support.runs import read_metrics, tiny_recipe
from tests.support.sockets import free_port

# Runs that raise come first: at the end of one that does not, the processes part.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path

from qlora_cli.errors import QloraError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.training import evaluation, gradients
from qlora_cli.training.run import train
from tests.support.faults import FAULTS, broken_at, out_of_memory, with_training

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
recipe, usual = load_recipe(folder / "recipe.yaml"), evaluation.supervised_loss
told = {}


def stopped(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


for name, fault in (("memory", out_of_memory), ("signal", stopped)):
    evaluation.supervised_loss = broken_at({2}, fault) if rank == 1 else usual
    try:
        train(with_training(recipe, folder / name))
    except QloraError as error:
        told[name] = f"{type(error).__name__}: {error}"
evaluation.supervised_loss = usual
gradients.supervised_loss = broken_at({3}, FAULTS["loss"]) if rank == 1 else usual
finished = train(with_training(recipe, folder / "skip"), rehearse=False)
told["skip"] = [finished.steps, finished.skipped_steps, finished.adapter_step, finished.stopped_early]
(folder / f"told-{rank}.json").write_text(json.dumps(told))
"""


def test_one_of_two(tmp_path: Path) -> None:
    """In the second batch of an evaluation after step 2, process 1 runs out of memory, or is sent a signal: both save
    step 2 and say so. Its loss of step 3 is NaN: both skip that step, and each record is there once."""
    recipe = tiny_recipe(
        tmp_path,
        validation_rows=9,
        training={"max_steps": 4, "eval_steps": 2, "eval_on_start": False, "per_device_eval_batch_size": 1}
        | {"optimizer": "adamw_torch", "on_nonfinite": "skip_step", "load_best": True, "early_stopping_patience": 5},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "script.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first["memory"] == second["memory"] == (
        "OutOfMemoryError: evaluation after step 2 ran out of memory on cpu:0; the state after step 2 is saved. "
        "training.per_device_eval_batch_size is 1 already: go on with --resume where there is more memory"
    )  # fmt: skip
    assert second["signal"] == "Interrupted: SIGTERM: stopped after step 2, state saved"
    assert first["signal"] == "Interrupted: a signal to another process: stopped after step 2, state saved"
    assert checkpoint_names(tmp_path / "memory") == checkpoint_names(tmp_path / "signal") == ["step-000002"]
    assert first["skip"] == second["skip"] == [4, 1, 4, None]
    lines = map(json.loads, (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines())
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 1), ("train", 2), ("eval", 2), ("skipped", 3), ("train", 4), ("eval", 4)
    ]  # fmt: skip
    (skipped,) = read_metrics(tmp_path / "skip", "skipped")
    assert len(skipped["rows"].split(": line ")[1].split(", ")) == 4  # of process 1 alone
