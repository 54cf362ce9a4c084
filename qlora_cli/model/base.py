"""The frozen base model, from a folder or the hub, through transformers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_cli.errors import DeviceError, ModelError
from qlora_cli.model.quantization import bitsandbytes_config, keep_layout, misread_layers
from qlora_cli.model.source import ModelSource, load_config, reading
from qlora_cli.model.storage import StorageForm, check_stored_quantization, compute_dtype


def choose_device(wanted: str, asked_with: str = "training.device") -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; `auto` takes a GPU where there is one.

    Args:
        asked_with: the setting or option that it was asked for with, for messages.

    Raises:
        DeviceError: if CUDA was asked for and this torch sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        raise DeviceError(
            f"{asked_with}: cuda was asked for, but torch {torch.__version__} ({built}) sees no GPU. "
            f"Set {asked_with} to auto or cpu, or install a CUDA build of torch and check nvidia-smi"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")  # of several, each process is given its own by Accelerate


def load_base(
    base: ModelSource,
    quantization: StorageForm,
    device: torch.device,
    *,
    model_class: Any = AutoModelForCausalLM,
    supplied: Collection[str] = (),
) -> PreTrainedModel:
    """The base model on `device`: linear layers in 4 or 8 bits, the rest in the compute dtype, all of it frozen.

    The output head, embeddings and norm layers stay unquantised (transformers skips the head; the others are not
    linear). `bits: 16` quantises nothing. One whole copy per process: a device map of one entry.

    Args:
        model_class: whose `from_pretrained` is called: what the model was made to do.
        supplied: names of weights that the caller brings. Those of them that the base lacks are 0.

    Raises:
        ModelError: if the model cannot be found or read, or bitsandbytes misreads its 4-bit weights on this machine.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    stored = getattr(load_config(base), "quantization_config", None)
    check_stored_quantization(stored, quantization)
    config = bitsandbytes_config(quantization)
    # What is stored speaks for itself; and an explicit None would hide it from transformers.
    quantize = {} if stored or config is None else {"quantization_config": config}
    model: PreTrainedModel
    with reading("model", base, lambda: _memory_left(device)):
        model, found = model_class.from_pretrained(
            **base.arguments(),
            dtype=compute_dtype(quantization),
            device_map={"": device},
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **quantize,
        )
    # transformers would go on with random weights in place of those that are missing.
    if lacking := sorted(set(found["missing_keys"]) - set(supplied)):
        raise ModelError(
            f"{base.asked_with}: {base.name} lacks {len(lacking)} of the model's weights: {', '.join(lacking[:5])}"
        )
    if misread := misread_layers(model):
        raise ModelError(
            f"quantization.bits: bitsandbytes reads 4-bit weights wrongly on this CPU where rows are no multiple of 64 "
            f"values, as in {len(misread)} layers of {base.name}, {misread[0]} the first. Set quantization.bits to 16, "
            "or use a GPU"
        )
    keep_layout(model)
    model.requires_grad_(False)
    for name in found["missing_keys"]:
        model.get_parameter(name).zero_()
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them.

    The non-reentrant kind: it needs no gradient on the embeddings' output, and draws the same dropout both times.

    Raises:
        ModelError: if the architecture cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"training.gradient_checkpointing: {type(model).__name__} cannot; set it to false")
    # transformers 5.2x renames the method and warns about the old name; older releases have only that.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _memory_left(device: torch.device) -> str:
    """Running out of memory while weights are quantised comes out of transformers as a conversion error."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" (memory free on the GPU: {free / 1e9:.1f} of {total / 1e9:.1f} GB; does the model fit?)"
