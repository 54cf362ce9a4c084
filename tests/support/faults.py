"""Losses that go wrong at chosen calls, and the recipe of a run again with other settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.events import Event, Listener, StepDone
from qlora_cli.training.loss import supervised_loss

CLOCKS = ("seconds", "tokens_per_second")


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.nan


def out_of_memory(loss: torch.Tensor) -> torch.Tensor:
    """In the CPU allocator's words."""
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 99 bytes")


# What makes a loss, or its gradient alone, NaN.
FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "loss": lambda loss: loss * torch.nan,
    "gradient": _NaNGradient.apply,
}


def broken_at(calls: Collection[int], fault: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A `supervised_loss` on which `fault` is at work in these calls, counted from 1."""
    count = 0

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        good = supervised_loss(model, batch)
        return fault(good) if count in calls else good

    return loss


def at_step(step: int, action: Callable[[], object]) -> Listener:
    """A listener that acts after a step of training."""

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            action()

    return listen


def crash() -> None:
    """End a run with an error that it knows nothing of."""
    raise ZeroDivisionError("as good as a kill: nothing is saved")


def with_training(recipe: Recipe, output: Path | None = None, **training: Any) -> Recipe:
    """The recipe with other training settings, into another folder."""
    data = recipe.model_dump(exclude_unset=True)
    data["training"] |= training
    data["output_dir"] = str(output or recipe.output_dir)
    return Recipe.model_validate(data)


def digest(run: Path) -> str:
    """Of the adapter that a run has made."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl, but for what clocks say."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in record.items() if name not in CLOCKS} for record in records]


def run_record(run: Path) -> dict[str, Any]:
    """What run.json says."""
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def checkpoint_names(run: Path) -> list[str]:
    """The checkpoints of a run."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())
