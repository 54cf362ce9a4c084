"""The frozen base model and its tokenizer, from a folder or the hub, through transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_cli.errors import DeviceError, HubUnreachableError, ModelError
from qlora_cli.hub import is_unreachable
from qlora_cli.model.quantization import (
    bitsandbytes_config,
    check_stored_quantization,
    compute_dtype,
    keep_layout,
)
from qlora_cli.recipe.paths import model_problem
from qlora_cli.recipe.schema import QuantizationSection

# What the hub's client and the readers below it raise for an absent, unreachable or damaged file.
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ModelSource:
    """Which model: a hub name or a local folder, a revision, and whether its own code may run."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """As every `from_pretrained` takes them."""
        return {
            "pretrained_model_name_or_path": self.name,
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; `auto` takes a GPU where there is one.

    Raises:
        DeviceError: if CUDA was asked for and this torch sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
        raise DeviceError(
            f"training.device: cuda was asked for, but torch {torch.__version__} ({built}) sees no GPU. "
            "Set training.device to auto or cpu, or install a CUDA build of torch and check nvidia-smi"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")  # of several, each process is given its own by Accelerate


def load_tokenizer(base: ModelSource) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token.

    Raises:
        ModelError: if it cannot be found or read.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    tokenizer: PreTrainedTokenizerBase
    with _reading("tokenizer", base):
        tokenizer = AutoTokenizer.from_pretrained(**base.arguments())
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by token, so any token serves; eos is in every vocabulary.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_base(base: ModelSource, quantization: QuantizationSection, device: torch.device) -> PreTrainedModel:
    """The base model on `device`: linear layers in 4 bits, the rest in the compute dtype, all of it frozen.

    The output head, embeddings and norm layers stay unquantised (transformers skips the head; the others are not
    linear). `bits: 16` quantises nothing. One whole copy per process: a device map of one entry.

    Raises:
        ModelError: if the model cannot be found or read.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    stored = getattr(load_config(base), "quantization_config", None)
    check_stored_quantization(stored, quantization)
    config = bitsandbytes_config(quantization)
    # What is stored speaks for itself; and an explicit None would hide it from transformers.
    quantize = {} if stored or config is None else {"quantization_config": config}
    model: PreTrainedModel
    with _reading("model", base, device):
        model, found = AutoModelForCausalLM.from_pretrained(
            **base.arguments(),
            dtype=compute_dtype(quantization),
            device_map={"": device},
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **quantize,
        )
    if found["missing_keys"]:
        # transformers would go on with random weights in their place.
        missing = ", ".join(sorted(found["missing_keys"])[:5])
        raise ModelError(
            f"base_model: {base.name} lacks {len(found['missing_keys'])} of the model's weights: {missing}"
        )
    keep_layout(model)
    model.requires_grad_(False)
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


def load_config(base: ModelSource) -> PreTrainedConfig:
    """The model's configuration, without its weights: what it can read is known before it is loaded.

    Raises:
        ModelError: if it cannot be found or read.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    config: PreTrainedConfig
    with _reading("configuration", base):
        config = AutoConfig.from_pretrained(**base.arguments())
    return config


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions the model was built for, where its configuration says."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def embedding_rows(config: PreTrainedConfig) -> int:
    """Rows of the input embedding: one more than the largest token id it can look up."""
    return int(config.get_text_config().vocab_size)


@contextmanager
def _reading(part: str, base: ModelSource, device: torch.device = _CPU) -> Iterator[None]:
    """Turn whatever keeps `part` of the base from being read onto `device` into an error of ours."""
    _check_folder(base)
    try:
        yield
    except _LOAD_ERRORS as error:
        kind = HubUnreachableError if _no_answer(part, base, error) else ModelError
        raise kind(_cannot_load(part, base, error) + _memory_left(device)) from None


def _no_answer(part: str, base: ModelSource, error: Exception) -> bool:
    """Whether this is the hub's silence, and nothing against the model."""
    if Path(base.name).is_absolute():
        return False
    if part == "tokenizer" and is_offline_mode():
        # transformers takes one that is not in the cache for one that is broken.
        with suppress(ValueError):  # not a name that a hub would have
            return try_to_load_from_cache(base.name, "tokenizer.json", revision=base.revision) is None
    return is_unreachable(error)


def _check_folder(base: ModelSource) -> None:
    """Tell a mistyped path from a hub name before the hub is asked."""
    path = Path(base.name)
    if not path.is_absolute():
        return
    if problem := model_problem(path, str(path)):
        raise ModelError(f"base_model: {problem}")
    if list(path.glob("*.bin")) and not list(path.glob("model*.safetensors")):
        raise ModelError(f"base_model: {path} {_ONLY_PICKLE}")


def _memory_left(device: torch.device) -> str:
    """Running out of memory while weights are quantised comes out of transformers as a conversion error."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" (memory free on the GPU: {free / 1e9:.1f} of {total / 1e9:.1f} GB; does the model fit?)"


_ONLY_PICKLE = "has its weights only as pickle (.bin), which can run code when read. Convert it to safetensors first"


def _cannot_load(part: str, base: ModelSource, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "use_safetensors=True" in reason:  # transformers' advice there is to allow pickle
        return f"base_model: {base.name} {_ONLY_PICKLE}"
    if Path(base.name).is_absolute():
        return f"base_model: the {part} in {base.name} cannot be read: {reason}"
    return (
        f"base_model: the {part} of {base.name} (revision {base.revision or 'main'}) cannot be had from the hub, and "
        f"there is no such folder here. Check the name and the network (a private or gated model needs `hf auth "
        f"login`), or give a local folder. The hub client said: {reason[:400]}"
    )
