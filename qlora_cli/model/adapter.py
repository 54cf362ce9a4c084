"""The adapter on disk: PEFT 0.21's format to the letter, so that everything that reads PEFT reads ours.

`adapter_model.safetensors` holds `base_model.model.<path>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank];
`adapter_config.json` says how to scale and where to put them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.disk import write_bytes
from qlora_cli.errors import ModelError
from qlora_cli.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE, alpha_of, rank_of, read_adapter_config
from qlora_cli.model.lora import LoRALinear, lora_layers
from qlora_cli.model.source import ModelSource

# The version whose format this is; PEFT itself is not needed to write or to read it.
PEFT_VERSION = "0.21.2"


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every LoRA layer under PEFT's names, float32, on the CPU."""
    tensors = {}
    for path, layer in lora_layers(model).items():
        key_a, key_b = _keys(path)
        tensors[key_a] = layer.lora_A.detach().cpu().contiguous()
        tensors[key_b] = layer.lora_B.detach().cpu().contiguous()
    return tensors


def adapter_files(model: PreTrainedModel, base: ModelSource) -> dict[str, bytes]:
    """The two adapter files, by name, as they are now: what is trained later leaves them as they are."""
    config = adapter_config(model, lora_layers(model), base)
    return {
        WEIGHTS_FILE: save(adapter_tensors(model), metadata={"format": "pt"}),
        CONFIG_FILE: _config_text(config).encode(),
    }


def save_adapter(model: PreTrainedModel, folder: Path, base: ModelSource) -> None:
    """Write the two adapter files into an existing folder."""
    for name, data in adapter_files(model, base).items():
        write_bytes(folder / name, data)


def write_adapter_config(config: dict[str, Any], folder: Path) -> None:
    """Write `adapter_config.json` into an existing folder."""
    (folder / CONFIG_FILE).write_text(_config_text(config), encoding="utf-8")


def _config_text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def adapter_config(model: nn.Module, layers: dict[str, LoRALinear], base: ModelSource) -> dict[str, Any]:
    """What PEFT needs to rebuild the layers."""
    first = next(iter(layers.values()))
    return lora_config(
        base,
        task_type="CAUSAL_LM",
        rank=first.rank,
        alpha=first.alpha,
        dropout=first.dropout,
        target_modules=_shortest_names(model, layers),
        fan_in_fan_out=any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        rank_pattern={path: layer.rank for path, layer in layers.items() if layer.rank != first.rank},
        alpha_pattern={path: layer.alpha for path, layer in layers.items() if layer.alpha != first.alpha},
    )


def lora_config(
    base: ModelSource,
    *,
    task_type: str | None,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    fan_in_fan_out: bool,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> dict[str, Any]:
    """`adapter_config.json` of a plain LoRA adapter. Every field that changes the result is written, defaults too:
    PEFT would otherwise fill in its own of the day."""
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": task_type,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        "target_modules": target_modules,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_bias": False,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": {name: _number(value) for name, value in alpha_pattern.items()},
        "modules_to_save": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }


def load_adapter(model: PreTrainedModel, folder: Path, *, compute_dtype: torch.dtype) -> list[str]:
    """Put the adapter in `folder`, ours or PEFT's, on a base model without LoRA layers; returns the paths wrapped.

    Raises:
        ModelError: if the folder is no LoRA adapter, uses something this version does not know, or does not fit.
    """
    config = read_adapter_config(folder)
    tensors = read_adapter_tensors(folder)
    layers: dict[str, LoRALinear] = {}
    for path in dict.fromkeys(_path_of(key, folder) for key in tensors):
        rank, alpha = rank_of(config, path), alpha_of(config, path)
        try:
            layers[path] = LoRALinear(
                model.get_submodule(path),
                rank=rank,
                # The rank-stabilised scale is alpha / sqrt(rank).
                alpha=alpha * rank**0.5 if config.get("use_rslora") else alpha,
                dropout=float(config.get("lora_dropout") or 0.0),
                compute_dtype=compute_dtype,
            )
        except (AttributeError, TypeError):
            raise ModelError(
                f"{folder}: the adapter has weights for {path}, but {type(model).__name__} has no linear layer there: "
                "it was trained on another base model"
            ) from None
    copy_adapter_tensors(layers, tensors, folder)
    # Only now that all of it fits: a model is never left with half an adapter.
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return list(layers)


def copy_adapter_tensors(layers: dict[str, LoRALinear], tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill LoRA layers, by path, from PEFT-named tensors; each tensor used, each layer filled, all shapes equal.

    Raises:
        ModelError: listing every name that is missing, left over or mis-shaped.
    """
    wanted = {}
    for path, layer in layers.items():
        key_a, key_b = _keys(path)
        wanted[key_a], wanted[key_b] = layer.lora_A, layer.lora_B
    problems = [f"  missing: {key}" for key in wanted if key not in tensors]
    problems += [f"  left over: {key}" for key in tensors if key not in wanted]
    problems += [
        f"  shape of {key}: expected {list(wanted[key].shape)}, got {list(tensor.shape)}"
        for key, tensor in tensors.items()
        if key in wanted and wanted[key].shape != tensor.shape
    ]
    if problems:
        raise ModelError(f"{folder}: the adapter does not fit the model:\n" + "\n".join(problems))
    with torch.no_grad():
        for key, tensor in tensors.items():
            wanted[key].copy_(tensor)


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors`, on the CPU."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ModelError(f"{folder}: no {WEIGHTS_FILE}; expected an adapter folder")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None


_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def _keys(path: str) -> tuple[str, str]:
    return _PREFIX + path + _SUFFIXES[0], _PREFIX + path + _SUFFIXES[1]


def _path_of(key: str, folder: Path) -> str:
    for suffix in _SUFFIXES:
        if key.startswith(_PREFIX) and key.endswith(suffix):
            return key[len(_PREFIX) : -len(suffix)]
    raise ModelError(f"{folder}: unknown tensor {key}; expected {_PREFIX}<path>{_SUFFIXES[0]} or {_SUFFIXES[1]}")


def _shortest_names(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Names that select exactly these layers when PEFT matches them as suffixes of module paths.

    The last part of the path where every module of that name is adapted (`q_proj`), else the whole path.
    """
    last = {path: path.rsplit(".", 1)[-1] for path in layers}
    adapted = Counter(last.values())
    # A wrapped layer's own parts (`….q_proj.base`) are no modules of the plain base model.
    inner = {f"{path}.base" for path in layers}
    present = Counter(path.rsplit(".", 1)[-1] for path, _ in model.named_modules() if path not in inner)
    return sorted({name if adapted[name] == present[name] else path for path, name in last.items()})


def _number(value: float) -> float:
    """PEFT declares alpha an integer: 32 is written as 32, not 32.0."""
    return int(value) if value == int(value) else value
