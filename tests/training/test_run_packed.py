"""Whole runs on packs of rows: they learn what rows by themselves do, and leave on disk what those do."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import Optimizer
from transformers import MambaConfig, MambaForCausalLM

from qlora_cli.commands.train import train as train_command
from qlora_cli.errors import Interrupted, ModelError
from qlora_cli.model.packing import VARIABLE_LENGTH
from qlora_cli.model.varlen import VARLEN
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training import run as run_module
from qlora_cli.training.events import DataReady, EvaluationProgress, Event, ModelReady, Started, StepDone
from qlora_cli.training.optim import build_optimizer
from qlora_cli.training.run import train
from tests.support.runs import read_metrics, tiny_recipe, write_rows
from tests.support.tokenizers import tiny_tokenizer

_PACKED = {"packing": True}


def _with(recipe: Recipe, output: Path, *, dataset: dict[str, Any] | None = None, **training: Any) -> Recipe:
    data = recipe.model_dump(exclude_unset=True)
    data["dataset"] |= dataset or {}
    data["training"] |= training
    data["output_dir"] = str(output)
    return Recipe.model_validate(data)


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def _bits(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def _numbers(run: Path, event: str) -> list[dict[str, Any]]:
    """The records of a run without what the clock says."""
    clocks = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in clocks} for record in read_metrics(run, event)]


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The gradients of every step of every run, in order, of all trained parameters."""
    steps: list[list[torch.Tensor]] = []

    def keep(optimizer: Optimizer, *_: Any) -> None:
        steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    def spy(*args: Any) -> Optimizer:
        optimizer = build_optimizer(*args)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    monkeypatch.setattr(run_module, "build_optimizer", spy)
    return steps


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_packed_step_is_the_unpacked_one(family: str, tmp_path: Path, gradients: list[list[torch.Tensor]]) -> None:
    """All rows in one step, in packs and by themselves: the same loss, gradients and held-out loss to float32 noise,
    and the same count of tokens; two steps, so that B is away from zero and A has a gradient too."""
    recipe = tiny_recipe(
        tmp_path,
        family,
        rows=24,
        validation_rows=7,
        training={"max_steps": 2, "max_grad_norm": None, "optimizer": "adamw_torch", "gradient_accumulation_steps": 8},
    )
    if family == "gpt2":
        _drop_nothing(Path(recipe.base_model))
    train(_with(recipe, tmp_path / "rows"), rehearse=False)
    events: list[Event] = []
    train(_with(recipe, tmp_path / "packs", dataset=_PACKED), rehearse=False, listeners=[events.append])
    model = next(event for event in events if isinstance(event, ModelReady))
    started = next(event for event in events if isinstance(event, Started))
    assert model.packing == VARIABLE_LENGTH
    assert started.packed
    assert {event.total for event in events if isinstance(event, EvaluationProgress)} == {1}  # in two packs
    assert started.epochs == 2  # a step of up to 32 packs holds all 24 rows

    rows, packs = _numbers(tmp_path / "rows", "train"), _numbers(tmp_path / "packs", "train")
    assert [record["tokens"] for record in packs] == [record["tokens"] for record in rows]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in packs] == pytest.approx([record[key] for record in rows], rel=1e-5)
    held_out = [[record["eval_loss"] for record in _numbers(tmp_path / name, "eval")] for name in ("packs", "rows")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert len(held_out[0]) == 2
    assert len(gradients) == 4
    for unpacked, packed in zip(gradients[:2], gradients[2:], strict=True):
        assert any(gradient.any() for gradient in packed)
        for wanted, got in zip(unpacked, packed, strict=True):
            # AdamW's first step, which is all sign, blows up what the second has of the first one's noise.
            assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def _drop_nothing(base: Path) -> None:
    """GPT-2's own dropout draws for each token in turn, so that packs would draw otherwise."""
    file = base / "config.json"
    config = json.loads(file.read_text()) | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    file.write_text(json.dumps(config))


def test_a_packed_run_learns_and_leaves_no_trace_of_packing(tmp_path: Path) -> None:
    """NF4, bfloat16, checkpointing and dropout: the held-out loss falls, no file names the attention, and the adapter
    loads for a run without packing, which goes as if there had been none before it in the process."""
    recipe = tiny_recipe(
        tmp_path,
        quantization={"compute_dtype": "bfloat16"},
        lora={"dropout": 0.1},
        dataset={"max_length": 64},
        training={"max_steps": 24, "max_grad_norm": 1.0, "save_steps": 12},
    )
    train(_with(recipe, tmp_path / "before", max_steps=3))
    finished = train(_with(recipe, tmp_path / "packed", dataset=_PACKED))
    assert finished.first_eval_loss is not None
    assert finished.last_eval_loss is not None
    assert finished.last_eval_loss < finished.first_eval_loss - 0.25
    train(_with(recipe, tmp_path / "after", max_steps=3))
    assert _bits(tmp_path / "after") == _bits(tmp_path / "before")

    files = [path for path in (tmp_path / "packed").rglob("*") if path.is_file()]
    assert not [path for path in files if VARLEN.encode() in path.read_bytes()]
    record = json.loads((tmp_path / "packed" / "run.json").read_text())
    assert record["model"]["packing"] == VARIABLE_LENGTH
    assert json.loads((tmp_path / "after" / "run.json").read_text())["model"]["packing"] is None
    assert load_recipe(tmp_path / "packed" / "recipe.yaml").dataset.packing


def test_a_resumed_packed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Stopped in the middle of the second epoch, with dropout, accumulation, held-out rows of a share and sources of
    unequal weight: the adapter and every metric are those of the run that was never stopped."""
    more = write_rows(tmp_path / "more.jsonl", 10, start=77)
    recipe = tiny_recipe(
        tmp_path,
        rows=60,
        validation_rows=0,
        lora={"dropout": 0.1},
        dataset={
            "train": [{"path": str(tmp_path / "train-60.jsonl"), "weight": 0.5}, {"path": str(more), "weight": 3.0}],
            "validation_fraction": 0.2,
            "max_length": 100,
            **_PACKED,
        },
        training={"max_steps": 9, "gradient_accumulation_steps": 2, "eval_steps": 4, "save_steps": 7}
        | {"per_device_train_batch_size": 2},
    )
    events: list[Event] = []
    train(_with(recipe, tmp_path / "whole"), listeners=[events.append])
    started = next(event for event in events if isinstance(event, Started))
    assert 5 <= started.total_steps / started.epochs < 7  # so that step 7 is in the second epoch

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = _with(recipe, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(stopped, listeners=[stop])
    train(stopped, resume=True)
    assert _bits(tmp_path / "whole") == _bits(tmp_path / "stopped")
    for event in ("train", "eval"):
        assert _numbers(tmp_path / "whole", event) == _numbers(tmp_path / "stopped", event)


def test_rows_too_long_are_dropped_or_cut_before_they_are_packed(tmp_path: Path) -> None:
    """max_length shorter than some rows: dropped ones are not packed, cut ones are, and no pack is longer."""
    recipe = tiny_recipe(tmp_path, validation_rows=0, training={"max_steps": 2})
    ready: dict[str, DataReady] = {}
    for overlong in ("drop", "truncate"):
        events: list[Event] = []
        changed = {"max_length": 33, "overlong": overlong, **_PACKED}
        train(_with(recipe, tmp_path / overlong, dataset=changed, num_train_epochs=1), listeners=[events.append])
        ready[overlong] = next(event for event in events if isinstance(event, DataReady))
        assert all(event.tokens <= 4 * 33 for event in events if isinstance(event, StepDone))
    assert 0 < ready["drop"].rows < ready["truncate"].rows == 32
    assert ready["drop"].dropped == ready["truncate"].truncated > 0


def test_a_model_whose_rows_would_see_each_other_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mamba's state runs on from row to row: exit 2 before the first step, nothing on disk, and without packing it
    trains."""
    tokenizer = tiny_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    recipe = tiny_recipe(
        tmp_path,
        "mamba",
        quantization={"bits": 16, "compute_dtype": "float32"},
        lora={"target_modules": ["in_proj", "out_proj"]},
        dataset=_PACKED,
        training={"max_steps": 1},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert train_command(file, overrides=[], output_dir=None, resume=False, rehearse=True) == ModelError.exit_code == 2
    assert (
        "error: dataset.packing: rows in one pack would see each other in MambaForCausalLM; set packing: false\n"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    assert train_command(file, overrides=["dataset.packing=false"], output_dir=None, resume=False, rehearse=True) == 0


def test_packing_is_not_changed_on_the_way(tmp_path: Path) -> None:
    """What is learned in a step is another: a run is not gone on with under it."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 1})
    train(recipe)
    with pytest.raises(Exception, match=r"dataset\.packing: was False, is True"):
        train(_with(recipe, tmp_path / "run", dataset=_PACKED, max_steps=2), resume=True)


def test_mixed_sources_are_on_record(tmp_path: Path) -> None:
    """run.json names every source, and an epoch is as long as the weights say."""
    more = write_rows(tmp_path / "more.jsonl", 10, start=77)
    train_file = write_rows(tmp_path / "train-32.jsonl", 32)
    sources = [{"path": str(train_file), "weight": 0.25}, {"path": str(more), "weight": 2.0}]
    recipe = tiny_recipe(
        tmp_path, validation_rows=0, dataset={"train": sources}, training={"max_steps": None, "num_train_epochs": 2}
    )
    events: list[Event] = []
    train(recipe, listeners=[events.append])
    started = next(event for event in events if isinstance(event, Started))
    assert started.total_steps == 2 * 7  # 8 + 20 rows in fours
    assert started.epochs == 2
    assert [record["epoch"] for record in read_metrics(tmp_path / "run", "train")][6::7] == [1.0, 2.0]
    record = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["train"]
    assert [source["source"] for source in record["sources"]] == [str(train_file), str(more)]
    assert record["rows"] == 42
