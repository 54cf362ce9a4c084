"""The tiny base in 4 bits, with LoRA layers on it that do something."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_cli.model.base import load_base
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import lora_layers
from qlora_cli.model.source import ModelSource
from qlora_cli.model.storage import compute_dtype
from qlora_cli.recipe.schema import Recipe

_SPREAD = 0.05  # of B: the update is of the size of the base's own weights


def lora_model(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The recipe's base with LoRA layers whose B is random: at its usual zero, A has no effect and no gradient."""
    model = load_base(ModelSource(recipe.base_model), recipe.quantization, device)
    inject(model, recipe.lora, compute_dtype=compute_dtype(recipe.quantization), seed=recipe.training.seed)
    generator = torch.Generator().manual_seed(recipe.training.seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * _SPREAD)
    return model
