"""The model as it was trained: the base stored as it was then, and the adapter beside it, not merged into anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.merging.adapter_source import AdapterSource
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.lora import adapters_disabled
from qlora_cli.model.storage import compute_dtype


def trained_model(adapter: AdapterSource, device: torch.device) -> PreTrainedModel:
    """The base as it was stored in training, with the adapter on it, in eval mode.

    Raises:
        ModelError: if the base or the adapter cannot be read, or they do not fit each other.
        HubUnreachableError: if the base is on the hub and that gives no answer.
    """
    model = load_base(adapter.base, adapter.quantization, device)
    load_adapter(model, adapter.folder, compute_dtype=compute_dtype(adapter.quantization))
    return model.eval()


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base without the adapter."""
    with adapters_disabled(model):
        yield
