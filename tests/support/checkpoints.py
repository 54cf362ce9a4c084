"""Checkpoints that no run has made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from qlora_cli.training.checkpoint import Progress, RandomStates, Snapshot, take_snapshot, write_checkpoint


def some_snapshot(
    step: int | Progress, optimizer: torch.optim.Optimizer | None = None, adapter: Mapping[str, bytes] | None = None
) -> Snapshot:
    """A state with whatever is not given left empty."""
    return take_snapshot(
        step if isinstance(step, Progress) else Progress(step=step),
        optimizer or torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
        adapter or {},
        position={"epoch": 0},
        run={"seed": 1},
        random=[RandomStates.here(torch.device("cpu"))],
    )


def write_some(
    folder: Path,
    step: int | Progress,
    optimizer: torch.optim.Optimizer | None = None,
    adapter: Mapping[str, bytes] | None = None,
) -> Path:
    """The same, on disk."""
    return write_checkpoint(folder, some_snapshot(step, optimizer, adapter))
