"""An optimizer's state as tensors and plain numbers, and back: what a file can hold without pickling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def flatten_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Per-parameter state, keyed `index/name`: tensors, copied to the CPU, and everything else.

    bitsandbytes nests one level more, and its 8-bit states share one quantisation map.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in leaves(optimizer.state_dict()["state"]):
        if isinstance(value, Tensor):
            # A copy, because safetensors refuses shared memory.
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        else:
            scalars[key] = value
    return tensors, scalars


def unflatten_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for `load_state_dict`: the saved state under the present param groups.

    Raises:
        ValueError: if it is of other parameters than the optimizer's.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        index, *path, name = key.split("/")
        inner = state.setdefault(int(index), {})
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = value
    groups = optimizer.state_dict()["param_groups"]
    expected = {index for group in groups for index in group["params"]}
    if set(state) - expected:
        raise ValueError(f"it has state for {len(state)} parameters, the run trains {len(expected)}")
    return {"state": state, "param_groups": groups}


def leaves(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in the state of a state dict, keyed `index/name`, or longer where it is nested."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
