"""Adapters made by PEFT over tiny models, and what PEFT makes of them: what merging is held against."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.merging.adapters.changes import Kind
from qlora_cli.merging.adapters.reading import AdapterChanges, read_changes

WEIGHTS = "adapter_model.safetensors"

# Layers of each family that read and that write the residual stream; of GPT-2's, Conv1D both.
LAYERS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["v_proj", "up_proj"],
    "gemma": ["k_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "opt": ["q_proj", "fc1"],
    "bert": ["query", "dense"],
    "roberta": ["value", "dense"],
    "t5": ["q", "wo"],
}


def module_kinds(model: nn.Module) -> dict[str, Kind]:
    """What each module is, by its path."""
    kinds: tuple[tuple[type, Kind], ...] = ((nn.Linear, "linear"), (Conv1D, "conv1d"), (nn.Embedding, "embedding"))
    return {
        path: next((kind for made, kind in kinds if isinstance(module, made)), "other")
        for path, module in model.named_modules()
    }


def save_peft_adapter(model: PreTrainedModel, folder: Path, config: peft.LoraConfig, *, seed: int = 1) -> Path:
    """A PEFT folder of an adapter over a copy of `model`, all that is trained moved off its start at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it saves along, and of ties
        adapted.save_pretrained(folder)
    return folder


def peft_merged(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Every parameter after PEFT has merged the adapter into a copy of `model`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return parameters(merged)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, tied ones under each of theirs."""
    return {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}


def read(model: PreTrainedModel, folder: Path) -> AdapterChanges:
    """The adapter's changes to this model."""
    return read_changes(folder, module_kinds(model), parameters=parameters(model))


def merged(model: PreTrainedModel, folder: Path, *, rows: int = 7) -> dict[str, Tensor]:
    """What the adapter makes of each parameter that it changes, fed `rows` rows at a time."""
    before, read_in = parameters(model), read(model, folder)

    def base(name: str) -> Iterator[Tensor]:
        return (block.clone() for block in before[name].split(rows))

    results = {}
    for name, change in read_in.changes.items():
        shape = tuple(before[name].shape) if name in before else None
        assert change.problem(shape) is None
        results[name] = torch.cat(list(change.merged(read_in.tensors, lambda name=name: base(name))))
        assert tuple(results[name].shape) == change.shape(shape)
    return results


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of the adapter by name, without PEFT's prefix and with dots as they are; None takes one away."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(f"base_model.model.{name}", None)
        if tensor is not None:
            tensors[f"base_model.model.{name}"] = tensor
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of `adapter_config.json`."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
