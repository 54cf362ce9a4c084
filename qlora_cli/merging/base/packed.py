"""Weights that a model's files hold in 4 bits, as bitsandbytes stores them: several tensors that belong together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader

# What is stored beside a 4-bit weight, under that weight's name.
STATE = re.compile(
    r"(?P<weight>.+\.weight)\.(?P<part>(nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__(nf4|fp4))"
)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class PackedTensor:
    """A weight in 4 bits.

    Attributes:
        parts: what is stored of it, by what stands after the module's path: `weight`, `weight.absmax`, ….
        dtype: of the values that it stands for.
        shape: [out, in], a Conv1D's too.
    """

    name: str
    parts: Mapping[str, StoredTensor]
    dtype: torch.dtype
    shape: tuple[int, ...]


Stored = StoredTensor | PackedTensor


def gather(stored: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """The tensors of a model by the names of its weights: what belongs to a 4-bit weight is put together.

    Raises:
        ModelError: listing the 4-bit weights that are not described, or not as bitsandbytes does it.
    """
    states: dict[str, dict[str, StoredTensor]] = {}
    inner = set()
    for name, tensor in stored.items():
        if (state := STATE.fullmatch(name)) and state["weight"] in stored:
            states.setdefault(state["weight"], {})[f"weight.{state['part']}"] = tensor
            inner.add(name)
    gathered: dict[str, Stored] = {}
    problems = []
    with TensorReader() as reader:
        for name, tensor in stored.items():
            if name in states:
                try:
                    form = _form(states[name], reader)
                    gathered[name] = PackedTensor(name, {"weight": tensor, **states[name]}, *form)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    problems.append(f"  {name}: {error}")
            elif name not in inner:
                gathered[name] = tensor
    if problems:
        raise ModelError("the base's weights in 4 bits are not as bitsandbytes stores them:\n" + "\n".join(problems))
    return gathered


def _form(state: Mapping[str, StoredTensor], reader: TensorReader) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of the plain weight, by the text that is stored with it."""
    text = next((tensor for part, tensor in state.items() if part.startswith("weight.quant_state.")), None)
    if text is None:
        raise ValueError("expected a quant_state beside it")
    told: Any = json.loads(reader.whole(text).view(torch.uint8).numpy().tobytes())
    shape = told["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"its quant_state has the shape {shape}")
    return _DTYPES[told["dtype"]], tuple(shape)
