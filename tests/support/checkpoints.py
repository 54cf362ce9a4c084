"""Checkpoints that no run has made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_cli.training.checkpoint import Progress, RandomStates, Snapshot, take_snapshot, write_checkpoint
from qlora_cli.training.manifest import MANIFEST


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


def rewrite_state(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint says of itself, as another version might have written it: it is whole afterwards."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    contents = {name: path.read_bytes() for name, path in files.items() if name != MANIFEST}
    state = json.loads(contents["state.json"])
    change(state)
    step = int(checkpoint.name.removeprefix("step-"))
    contents["state.json"] = json.dumps(state).encode()
    write_checkpoint(checkpoint.parent, Snapshot(step, contents))
