"""Which layers get a LoRA update, and putting it there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.model.lora import LoRALinear
from qlora_cli.model.quantization import linear_shape
from qlora_cli.recipe.schema import ALL_LINEAR, LoraSection


def find_targets(model: PreTrainedModel, target_modules: str | Iterable[str]) -> list[str]:
    """Paths of the linear layers that `lora.target_modules` names, in the model's order.

    `all-linear` is every linear layer of the language model but the output head: in a model that also sees or hears,
    not those of its other towers, which text alone does not train. A list names modules by their whole path or its last
    parts, as PEFT does; any other string is a regular expression that must match the whole path.

    Raises:
        ModelError: if nothing matches, or one name of a list matches nothing.
    """
    linear = _linear_layers(model)
    if target_modules == ALL_LINEAR:
        decoder = model if model.config.is_encoder_decoder else model.get_decoder()
        inside = {id(module) for module in decoder.modules()} - {id(model.get_output_embeddings())}
        targets = [path for path, module in linear.items() if id(module) in inside]
    elif isinstance(target_modules, str):
        targets = [path for path in linear if re.fullmatch(target_modules, path)]
    else:
        names = list(target_modules)
        targets = [path for path in linear if any(_ends_with(path, name) for name in names)]
        unused = [name for name in names if not any(_ends_with(path, name) for path in targets)]
        if unused:
            raise ModelError(_nothing_matched(", ".join(unused), linear, model))
    if not targets:
        raise ModelError(_nothing_matched(str(target_modules), linear, model))
    return targets


def inject(model: PreTrainedModel, section: LoraSection, *, compute_dtype: torch.dtype, seed: int) -> list[str]:
    """Freeze the model and wrap every target in a `LoRALinear`; returns the paths wrapped.

    The starting point depends on `seed` and the targets' order alone.
    """
    targets = find_targets(model, section.target_modules)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path in targets:
        layer = LoRALinear(
            model.get_submodule(path),
            rank=section.rank,
            alpha=section.alpha,
            dropout=section.dropout,
            compute_dtype=compute_dtype,
        )
        layer.initialize(generator)
        model.set_submodule(path, layer)
    return targets


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if path and linear_shape(module) is not None}


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _nothing_matched(wanted: str, linear: dict[str, nn.Module], model: nn.Module) -> str:
    """What was asked for beside what there is, layers of one name counted together."""
    there = Counter((path.rsplit(".", 1)[-1], linear_shape(module)) for path, module in linear.items())
    lines = [f"  {name:<24} {shape[0]} -> {shape[1]}, {n} of them" for (name, shape), n in there.items() if shape]
    example = next(iter(linear), "none")
    if any(_ends_with(path, wanted) for path in linear):
        lines.append(f"A text is a regular expression for whole paths: write [{wanted}] or .*\\.{wanted}")
    return (
        f"lora.target_modules: {wanted}: no linear layer of {type(model).__name__} has that name. There are:\n"
        + "\n".join(lines)
        + f"\nA list takes these names; a regular expression must match whole paths such as {example}"
    )
