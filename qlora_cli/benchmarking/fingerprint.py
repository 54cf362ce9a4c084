"""What makes two models the same for the answers they give, in one hash."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from qlora_cli import __version__
from qlora_cli.errors import QloraError
from qlora_cli.merging.adapters.source import adapter_sha256, read_adapter_json
from qlora_cli.model.files import CONFIG_FILE, commit_of
from qlora_cli.model.source import ModelSource, reading

# What decides the digits of an answer.
_PACKAGES = ("torch", "transformers", "bitsandbytes")
# What an adapter says of itself that changes nothing it does to its base.
_OF_NO_EFFECT = {
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "auto_mapping",
}
# What decides which text token ids are.
_VOCABULARIES = (
    "tokenizer.json",
    "*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)


def fingerprint(**facts: Any) -> str:
    """SHA-256, in hex, of facts that JSON can hold; the same whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the same weights may give other digits on: the device's kind, and the versions of what computes there."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = {name: metadata.version(name) for name in _PACKAGES}
    # Ours, too: what it answered wrongly before it was mended is no answer any more.
    return {"device": [device.type, where], "versions": versions | {"qlora-cli": __version__}}


def adapter_facts(folder: Path) -> dict[str, Any]:
    """Which adapter this is: its weights, and how they are applied: the same ones at another alpha are another.

    Raises:
        ModelError: if it cannot be read.
    """
    applied = {name: value for name, value in read_adapter_json(folder).items() if name not in _OF_NO_EFFECT}
    return {"weights": adapter_sha256(folder), "applied": applied}


def base_facts(base: ModelSource) -> dict[str, Any]:
    """Which weights these are: the hub's commit, or a folder's configuration, its code if it brings any, and the names,
    sizes and times of its weight files, which are not read.

    Raises:
        ModelError: if there is no such model.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    folder = Path(base.name)
    if not folder.is_absolute():
        with reading("configuration", base):
            file = Path(hf_hub_download(base.name, CONFIG_FILE, revision=base.revision))
        return {"hub": base.name, "commit": commit_of(file.parent) or _digest(file)}
    weights = [
        [file.name, (told := file.stat()).st_size, told.st_mtime_ns] for file in sorted(folder.glob("*.safetensors"))
    ]
    read = {file.name: _digest(file) for file in (folder / CONFIG_FILE, *sorted(folder.glob("*.py")))}
    return {"folder": str(folder.resolve()), "read": read, "weights": weights}


def vocabulary_facts(base: ModelSource, beside: Path | None) -> Any:
    """What decides which text a model's tokens are: the files of the tokenizer beside the adapter, or of the base's."""
    with suppress(OSError, QloraError):
        folder = beside or (Path(base.name) if Path(base.name).is_absolute() else None)
        if folder is not None:
            files = {file for pattern in _VOCABULARIES for file in folder.glob(pattern)}
            return {file.name: _digest(file) for file in sorted(files)}
    return "the base's"


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
