"""Three processes: gradients are added in one order always, and what one of them alone finds or lacks, all hear of."""

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

# All of these runs raise: at the end of one that does not, the processes part.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path

from qlora_cli.errors import RunError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.training import going_on, gradients, identity, keeping, resume
from qlora_cli.training.run import train
from tests.support.faults import at_step, broken_at, out_of_memory, with_training

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
recipe, loss, write, look = (
    load_recipe(folder / "recipe.yaml"), gradients.supervised_loss, keeping.write_checkpoint, resume.newest_valid
)
told = {}


def run(name, place, stop=None, recipe=recipe, **options):
    terminated = lambda: os.kill(os.getpid(), signal.SIGTERM)
    listeners = [] if stop is None else [at_step(stop, terminated)]
    try:
        train(with_training(recipe, folder / place), listeners=listeners, rehearse=False, **options)
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"


def no_room(*args, **rest):
    raise RunError("no room for it")


def another(checkpoints):
    raise ZeroDivisionError("a process looks for itself")


def not_here(*args):
    raise ZeroDivisionError("only here")


run("whole", "whole", stop=6)
run("stopped", "resumed", stop=3)
resume.newest_valid = look if rank == 0 else another
run("resumed", "resumed", stop=6, resume=True)
resume.newest_valid = look
gradients.supervised_loss = broken_at({3}, out_of_memory) if rank == 2 else loss
run("memory", "memory")
gradients.supervised_loss = loss
keeping.write_checkpoint = no_room
run("disk", "disk")
resume.newest_valid = another
run("fault", "whole", resume=True)
resume.newest_valid, restore = look, going_on.restore
going_on.restore = not_here if rank == 1 else restore
run("damage", "whole", resume=True)
going_on.restore = restore
run("settings", "settings", recipe=with_training(recipe, learning_rate=0.5) if rank == 1 else recipe)
identity.base_fingerprint = lambda source: f"another for {rank}"
run("base", "base")
(folder / f"told-{rank}.json").write_text(json.dumps(told))
"""


def test_three_processes(tmp_path: Path) -> None:
    """Six steps whole, and six of which three are resumed, without a rehearsal to even them out: the same bits, from
    the checkpoint that the first process found. The third runs out of memory in step 3: all of them stop, step 2 is
    saved. A checkpoint that is written in the background cannot be, what the first looks for fails in an unforeseen
    way, the second cannot restore what the others can, has another recipe, or each another base model: all stop."""
    recipe = tiny_recipe(
        tmp_path,
        rows=24,
        validation_rows=0,
        lora={"dropout": 0.1},
        training={"max_steps": 7, "per_device_train_batch_size": 2, "optimizer": "adamw_torch", "save_steps": 4},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=3", f"--master_port={free_port()}"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "script.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(3)]
    short = "; the state after step 2 is saved. To need less: halve per_device_train_batch_size and double "
    short += "gradient_accumulation_steps; lower dataset.max_length"
    elsewhere = f"OutOfMemoryError: step 3 ran out of memory on another process{short}"
    failed = "RunError: another process failed: what it tells is the reason"
    assert told[0] == {
        "whole": "Interrupted: SIGTERM: stopped after step 6, state saved",
        "stopped": "Interrupted: SIGTERM: stopped after step 3, state saved",
        "resumed": "Interrupted: SIGTERM: stopped after step 6, state saved",
        "memory": elsewhere,
        "disk": "RunError: no room for it",
        "fault": "ZeroDivisionError: a process looks for itself",
        "damage": failed,
        "settings": "ModelError: process 1 of 3 has not the training.learning_rate that process 0 has. Give all of "
        "them the same recipe and files",
        "base": "ModelError: process 1 of 3 has not the base model that process 0 has. Give all of them the same "
        "recipe and files",
    }
    from_others = {"disk": failed, "fault": "RunError: the main process failed: " + told[0]["fault"]}
    for name in ("whole", "stopped", "resumed"):
        from_others[name] = told[0][name].replace("SIGTERM", "a signal to another process")
    assert told[1] == told[0] | from_others | {"damage": "ZeroDivisionError: only here"}
    assert told[2] == told[0] | from_others | {"memory": elsewhere.replace("another process", "cpu:0")}
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "settings").exists()
    assert checkpoint_names(tmp_path / "memory") == ["step-000002"]
    whole, resumed = (tmp_path / name / "checkpoints" / "step-000006" for name in ("whole", "resumed"))
    for file in ("adapter/adapter_model.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file
    losses = [[line["loss"] for line in read_metrics(tmp_path / name, "train")] for name in ("whole", "resumed")]
    assert losses[0] == losses[1]
