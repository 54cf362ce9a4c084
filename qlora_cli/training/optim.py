"""The optimizer that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn
from torch.optim import Optimizer

from qlora_cli.recipe.schema import TrainingSection

_PAGED = "paged_"


def build_optimizer(section: TrainingSection, parameters: Sequence[nn.Parameter], device: torch.device) -> Optimizer:
    """The optimizer over `parameters`; its learning rate is set before every step, by `schedule.learning_rate`.

    A paged optimizer keeps its state in memory that the driver moves between GPU and CPU (QLoRA, section 3). There is
    nothing to page on a CPU, where it runs as its plain twin; `runs_unpaged` tells.
    """
    name: str = section.optimizer
    if runs_unpaged(section, device):
        name = name.removeprefix(_PAGED)
    common: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "weight_decay": section.weight_decay,
    }
    paged = name.startswith(_PAGED)
    optimizer: Optimizer
    match name:
        case "adamw_torch":
            optimizer = torch.optim.AdamW(parameters, fused=True, **common)
        case "adamw_8bit" | "paged_adamw_8bit":
            optimizer = bnb.optim.AdamW(parameters, optim_bits=8, is_paged=paged, **common)
        case "adamw_32bit" | "paged_adamw_32bit":
            optimizer = bnb.optim.AdamW(parameters, optim_bits=32, is_paged=paged, **common)
        case "lion_8bit" | "paged_lion_8bit":
            optimizer = bnb.optim.Lion(parameters, optim_bits=8, is_paged=paged, **common)
        case _:
            raise ValueError(f"no such optimizer: {name}")
    return optimizer


def runs_unpaged(section: TrainingSection, device: torch.device) -> bool:
    """Whether a paged optimizer was asked for where there is nothing to page."""
    return section.optimizer.startswith(_PAGED) and device.type == "cpu"


def page_again(optimizer: Optimizer) -> None:
    """Move restored state back into pageable memory.

    bitsandbytes loads a state dict into plain GPU tensors, so that a resumed run would hold on the GPU what the first
    run had paged out. Does nothing to an optimizer that is not paged.
    """
    if not (isinstance(optimizer, Optimizer8bit) and optimizer.is_paged):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                # The optimizer's own allocator decides what is large enough to page.
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = buffer.copy_(state[name])
