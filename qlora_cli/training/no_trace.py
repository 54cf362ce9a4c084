"""Steps that leave no trace: afterwards all that they changed is what it was before them, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_cli.model.rotary import rewind_rotary
from qlora_cli.training.random_states import random_states, set_random_states

_CONSTANT = "qmap"  # what bitsandbytes calls the values that 8 bits stand for: the same at every step


@contextmanager
def no_trace(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Inside, the model may be trained and evaluated; afterwards, also after an error, it was not.

    Trained weights, the optimizer's state and learning rates, the random generators of this process, buffers and the
    training mode of every module are as they were; there are no gradients, as there must be none before. What is kept
    of them meanwhile is on the CPU.

    Where a parameter had no state yet, that which the optimizer made stays, as it is before a first step: the driver
    never takes back the pages of paged state, so that another in its place would be held beside it.

    Args:
        model: wrapped for data parallelism or not.
        device: the one whose random generator is drawn from.
    """
    weights = [(p, p.detach().to("cpu", copy=True)) for p in model.parameters() if p.requires_grad]
    state = _KeptState.of(optimizer)
    random = random_states(device)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().to("cpu", copy=True))
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # paged state is written from the CPU below
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
            rewind_rotary(model)
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
            state.put_back(optimizer)
        for module, mode in modes:
            module.training = mode
        set_random_states(*random, device)


@dataclass(frozen=True)
class _KeptState:
    """What an optimizer knew: of the parameters that had a state, and its settings by group."""

    of_parameters: Mapping[Tensor, Mapping[str, Any]]
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer) -> _KeptState:
        known = {
            parameter: {name: _copied(value) for name, value in state.items() if not name.startswith(_CONSTANT)}
            for parameter, state in optimizer.state.items()
        }
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return cls(known, groups)

    def put_back(self, optimizer: Optimizer) -> None:
        for group, before in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(before)
        for parameter, state in optimizer.state.items():
            kept = self.of_parameters.get(parameter)
            for name, value in state.items():
                if name.startswith(_CONSTANT):
                    continue
                if not isinstance(value, Tensor):
                    state[name] = kept[name] if kept else type(value)(0)
                elif kept:
                    value.copy_(kept[name])
                else:
                    value.zero_()


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
