"""A merged model loaded as any client would: by plain transformers, from its folder alone."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import get_max_memory
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_cli.errors import MergeError
from qlora_cli.model.quantization import keep_layout
from qlora_cli.model.source import ModelSource, load_config, reading

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
)

# Of the free memory, what weights may take: the rest is for activations, and for what else runs.
_SHARE_OF_MEMORY = 0.8
_NAMED = 10


@contextmanager
def load_client(
    folder: Path,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    ignorable: Collection[str] = (),
    memory: int | None = None,
) -> Iterator[PreTrainedModel]:
    """The model in `folder` as `AutoModelFor….from_pretrained(folder, dtype="auto")` gives it, in eval mode.

    If free memory does not hold the weights, those that it does not hold (of a GPU's, those that the CPU's does not
    either) are read from the folder's files whenever they are needed; no second copy of them is written. On leaving,
    give up every reference to the model.

    Args:
        folder: weights as safetensors, and a configuration.
        device: where it computes.
        trust_remote_code: whether code that comes with the model may run.
        ignorable: names of stored tensors that may be left unread, because the base's are too: none that was changed.
        memory: bytes that the weights may take on `device`; by default four fifths of what is free.

    Raises:
        MergeError: if a weight of the model is missing in the files, or one there is of no use to it, or misshaped:
            all of them are named.
        ModelError: if the folder cannot be read as a model.
    """
    source = ModelSource(str(folder), trust_remote_code=trust_remote_code)
    room = int(_SHARE_OF_MEMORY * free_memory(device)) if memory is None else memory
    with tempfile.TemporaryDirectory(prefix="qlora-offload-") as offload:
        placement: dict[str, Any] = {"device_map": {"": device}}
        if _stored_bytes(folder) > room:
            limits: dict[int | str, int] = {"cpu": room}
            if device.type == "cuda":
                limits = {device.index or 0: room, "cpu": int(_SHARE_OF_MEMORY * free_memory(torch.device("cpu")))}
            placement = {"device_map": "auto", "max_memory": limits, "offload_folder": offload}
        with reading("model", source):
            model, found = _auto_class(load_config(source)).from_pretrained(
                **source.arguments(), dtype="auto", use_safetensors=True, output_loading_info=True, **placement
            )
        _check(folder, found, ignorable)
        # What is measured is what is stored, not what one CPU's kernel makes of it.
        keep_layout(model)
        model.requires_grad_(False)
        yield model.eval()


def release_memory(device: torch.device) -> None:
    """Have what models that are gone took be free again; torch keeps a GPU's memory for itself otherwise."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(get_max_memory()["cpu"])


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _auto_class(config: PreTrainedConfig) -> Any:
    """The class that a client loads such a model with: the automatic one for what `architectures` names."""
    architecture = next(iter(config.architectures or ()), "")
    remote: dict[str, str] = getattr(config, "auto_map", None) or {}
    for name in _AUTO_CLASSES:
        automatic = getattr(transformers, name)
        classes = automatic._model_mapping.get(type(config), ())
        classes = classes if isinstance(classes, tuple | list) else (classes,)
        names = {remote.get(name, "").rpartition(".")[2], *(known.__name__ for known in classes)}
        if architecture and architecture in names:
            return automatic
    return getattr(transformers, architecture, transformers.AutoModelForCausalLM)


def _check(folder: Path, found: dict[str, Any], ignorable: Collection[str]) -> None:
    """Refuse a model that transformers would have filled up with random weights, or passed weights over for."""
    problems = [f"  missing: {name}" for name in sorted(found["missing_keys"])]
    problems += [f"  of no use: {name}" for name in sorted(set(found["unexpected_keys"]) - set(ignorable))]
    # Name, shape in the files, shape in the model.
    problems += [
        f"  shape of {name}: expected {list(model)}, got {list(stored)}"
        for name, stored, model in sorted(found["mismatched_keys"])
    ]
    problems += [f"  {message}" for message in found.get("error_msgs") or ()]
    if problems:
        more = [f"  … and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        raise MergeError(
            f"{folder}: plain transformers does not load all of the merged model:\n"
            + "\n".join([*problems[:_NAMED], *more])
        )
