"""Two processes train what one trains: nothing stands in the way of many GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.training.lock import RunLock
from qlora_cli.training.run_folder import RunFolder
from tests.support.runs import read_metrics, tiny_recipe
from tests.support.scored_runs import scored_recipe
from tests.support.sockets import free_port


@pytest.mark.parametrize("batch_size", [4, 1])
def test_two_processes_are_one_that_accumulates(batch_size: int, tmp_path: Path) -> None:
    """torchrun with two CPU processes against one with two micro-batches a step, nine rows an epoch in fours, or in
    five packs one by one, so that a process runs out: the same losses, gradient norms, held-out losses and adapter to
    float32 noise, every record once."""
    recipe = tiny_recipe(
        tmp_path,
        rows=9,
        validation_rows=5,
        dataset={"packing": batch_size == 1, "max_length": 64},
        training={"max_steps": 4, "eval_steps": 2, "save_steps": 2, "optimizer": "adamw_torch"}
        | {"per_device_train_batch_size": batch_size},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = ["-m", "qlora_cli", "train", str(file), "--output-dir"]
    changes = {"two": [], "one": ["--set", "training.gradient_accumulation_steps=2"]}
    for name, start in (("two", launch), ("one", [sys.executable])):
        _run([*start, *command, str(tmp_path / name), *changes[name]])

    for event, fields in (("train", ("step", "loss", "grad_norm", "tokens")), ("eval", ("step", "eval_loss"))):
        two, one = (
            [[record[field] for field in fields] for record in read_metrics(tmp_path / name, event)]
            for name in ("two", "one")
        )
        assert len(two) == len(one)
        for got, wanted in zip(two, one, strict=True):
            assert got == pytest.approx(wanted, rel=1e-4)
    two_adapter, one_adapter = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one")
    )
    for key, tensor in one_adapter.items():
        torch.testing.assert_close(two_adapter[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_rehearse_without_a_trace(tmp_path: Path) -> None:
    """Five packs on two processes, with dropout and accumulation, an evaluation of two batches: told once, and the
    adapter is that of a run without a rehearsal, byte for byte."""
    recipe = tiny_recipe(
        tmp_path,
        rows=9,
        validation_rows=3,
        lora={"dropout": 0.2},
        dataset={"packing": True, "max_length": 64},
        training={"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += ["-m", "qlora_cli", "train", str(file), "--output-dir"]
    told = [
        _run([sys.executable, *command, str(tmp_path / name), *options]).count("tried    the longest batch (1 pack of ")
        for name, options in (("rehearsed", []), ("plain", ["--no-rehearsal"]))
    ]
    assert told == [1, 0]
    rehearsed, plain = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("rehearsed", "plain")
    )
    assert rehearsed == plain


@pytest.mark.usefixtures("indexed")
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """Documents are shared between them, the scores are those of one process, each is recorded once, and both take the
    same checkpoint for the best."""
    recipe = scored_recipe(
        tmp_path,
        validation_rows=0,
        training={"max_steps": 4, "save_steps": 1, "save_total_limit": 1, "optimizer": "adamw_torch"},
        evaluation={"every_steps": 2, "keep_best": "words/bits_per_byte"},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    twice = ["--set", "training.gradient_accumulation_steps=2"]
    for name, start, changes in (("two", launch, []), ("one", [], twice)):
        command = ["-m", "qlora_cli", "train", str(file), "--output-dir", str(tmp_path / name), *changes]
        _run([sys.executable, *start, *command])
    two, one = (read_metrics(tmp_path / name, "benchmark") for name in ("two", "one"))
    assert [record["step"] for record in two] == [record["step"] for record in one] == [0, 2, 4]
    for got, wanted in zip(two, one, strict=True):
        assert got["scores"] == pytest.approx(wanted["scores"], rel=1e-3)
    assert _best(tmp_path / "two") == _best(tmp_path / "one")
    assert not (tmp_path / "two" / "answers").exists()


# Each writes its line at once: print, which torchrun leaves without a buffer, writes the end of a line by itself, and
# the other process gets in between.
PATIENCE = """
import sys, torch
from qlora_cli.training.devices import make_accelerator
accelerator = make_accelerator("cpu")
group = torch.distributed.distributed_c10d._get_default_group()
sys.stdout.write(f'{group._get_backend(torch.device("cpu")).options._timeout.days}\\n')
accelerator.end_training()
"""


def test_processes_wait_for_each_other(tmp_path: Path) -> None:
    """One may write to a slow disk, or have hours more to answer than the other: torch's 10 or 30 minutes are not the
    end of it."""
    script = tmp_path / "patience.py"
    script.write_text(PATIENCE)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", str(script)]
    assert [int(days) >= 30 for days in _run([sys.executable, *launch]).split()] == [True, True]


SUMS = """
import sys, torch
from torch import nn
from qlora_cli.training import data_parallel
from qlora_cli.training.devices import make_accelerator

accelerator = make_accelerator("cpu")
rank = accelerator.process_index
data_parallel._PIECE = 10
torch.manual_seed(rank)
shapes = [(2, 3), (7,), (4,), (5,), (3,), (1, 1), (7,)]
kinds = [torch.float32] * 4 + [torch.bfloat16] * 2 + [torch.float32]
parameters = [nn.Parameter(torch.randn(s, dtype=k)) for s, k in zip(shapes, kinds)]
parallel = data_parallel.DataParallel(accelerator, parameters)
torch.manual_seed(0)
first = [torch.randn(s, dtype=k) for s, k in zip(shapes, kinds)]
assert all(torch.equal(p, wanted) for p, wanted in zip(parameters, first))
for nowhere, only_first in (((), ()), ((1,), (0,)), ((2, 4, 5), (3, 6)), (range(7), ())):
    each = list(zip(range(7), shapes, kinds))
    grads = [[torch.full(s, 2.0 ** (3 * r + i % 3), dtype=k) for i, s, k in each] for r in (0, 1)]
    for i, parameter in enumerate(parameters):
        absent = i in nowhere or (i in only_first and rank == 1)
        parameter.grad = None if absent else grads[rank][i].clone()
    parallel.sum_gradients()
    for i, parameter in enumerate(parameters):
        wanted = grads[0][i] if i in only_first else grads[0][i] + grads[1][i]
        assert (parameter.grad is None) if i in nowhere else torch.equal(parameter.grad, wanted), i
sys.stdout.write(f"{rank} all summed\\n")
accelerator.end_training()
"""


def test_gradients_of_any_parameters_are_summed(tmp_path: Path) -> None:
    """Of other sizes and dtypes than a piece that is exchanged has room for, some with no gradient anywhere, as of
    layers that a batch does not reach, or on one process alone; all begin with the first process's weights."""
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", str(script)]
    assert sorted(_run([sys.executable, *launch]).splitlines()) == ["0 all summed", "1 all summed"]


def _endless(folder: Path) -> list[str]:
    """Two processes that train with no end in sight, into `folder / "run"`."""
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(tiny_recipe(folder, training={"max_steps": 1_000_000})), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return [sys.executable, *launch, "-m", "qlora_cli", "train", str(file)]


def test_two_processes_hear_one_ctrl_c(tmp_path: Path) -> None:
    """torchrun sends it on to both: they finish the same step, and the first saves."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        _endless(tmp_path), env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as running:  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not (metrics.exists() and '"event": "train"' in metrics.read_text()):
                assert running.poll() is None, running.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(running.pid, signal.SIGINT)
            out, err = running.communicate(timeout=60)
        finally:
            running.terminate()  # and it ends those that it started
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    step = int(record["last_checkpoint"].removeprefix("step-"))
    assert (record["status"], record["error"]) == ("interrupted", f"SIGINT: stopped after step {step}, state saved")
    assert err.count(f"SIGINT: stopped after step {step}, state saved\n") == 2
    assert out.count("Go on with: accelerate launch --num_processes 2 -m qlora_cli train ") == 1


def test_all_processes_hear_of_a_lock(tmp_path: Path) -> None:
    """The first asks for it; the others do not wait for one that has gone."""
    port = free_port()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with RunLock(RunFolder(tmp_path / "run")) as lock:
        lock.take(Accelerator(cpu=True), resume=True)
        started = [_of_two(rank, port, [*_endless(tmp_path)[-4:], "--resume"]) for rank in range(2)]
        try:
            ended = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
        finally:
            for process in started:
                process.kill()
    for err, code in ended:
        assert f"error: output_dir: {tmp_path}/run is in use by another run: process {os.getpid()} on " in err
        assert code == 2


def _of_two(rank: int, port: int, arguments: list[str]) -> subprocess.Popen[str]:
    """One of two processes, without a launcher, which would end the other when one has ended."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, *arguments], env=_environment() | place | meeting, stderr=subprocess.PIPE, text=True
    )


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def _run(command: list[str]) -> str:
    """What a command that succeeds prints."""
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _best(run: Path) -> tuple[int, list[str]]:
    step = json.loads((run / "run.json").read_text())["best"]["step"]
    return step, sorted(path.name for path in (run / "checkpoints").iterdir())
