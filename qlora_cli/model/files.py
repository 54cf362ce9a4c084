"""The files of a base model: its folder here, or the hub's snapshot of it, fetched as far as it is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from qlora_cli.errors import HubUnreachableError, ModelError
from qlora_cli.model.source import ModelSource, reading

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What may belong to a model beside its weights. Weights in any other form match none of these.
_BESIDE = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.model.v[0-9]*",
    "*.spm",
    "*.tiktoken",
    "bpe.codes",
    "*.py",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
# Other forms of the same weights that hubs keep in folders of their own, with configurations beside them.
_ELSEWHERE = ("onnx/*", "original/*", "openvino/*", "coreml/*", "flax/*", "tf/*", "gguf/*")


def model_folder(base: ModelSource) -> Path:
    """The folder that holds the base's files: safetensors, configuration, tokenizer, its own code and its licence.

    For a hub name it is the snapshot in the hub's cache, and everything in it is of one commit. With the hub out of
    reach, what was fetched before has to do; what is not needed to read the model may then be absent.

    Raises:
        ModelError: if there is no such model, or its weights are not in safetensors.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    if Path(base.name).is_absolute():
        with reading("model", base):
            return Path(base.name)
    with reading("model", base):
        # The commit that the branch is at now; everything else is asked of that.
        folder = Path(hf_hub_download(base.name, CONFIG_FILE, revision=base.revision)).parent
        if not is_offline_mode():
            snapshot_download(
                base.name, revision=folder.name, allow_patterns=list(_BESIDE), ignore_patterns=list(_ELSEWHERE)
            )
        _fetch_weights(base, folder)
    return folder


def commit_of(folder: Path) -> str | None:
    """The hub's commit that a snapshot is of, 40 hex digits; None for any other folder."""
    name = folder.name
    is_commit = len(name) == 40 and all(c in "0123456789abcdef" for c in name)
    return name if is_commit and folder.parent.name == "snapshots" else None


def read_config(base: ModelSource) -> dict[str, Any]:
    """The base's `config.json` as it is written, read through no class; of a hub model, nothing else is fetched.

    Raises:
        ModelError: if it cannot be found, or is no JSON object.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    with reading("configuration", base):
        local = Path(base.name).is_absolute()
        file = (
            Path(base.name) / CONFIG_FILE if local else hf_hub_download(base.name, CONFIG_FILE, revision=base.revision)
        )
        return read_json_object(Path(file))


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ModelError: if it holds something else; OSError passes through.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8; brackets without end
        raise ModelError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def _fetch_weights(base: ModelSource, folder: Path) -> None:
    """`model.safetensors`, or else the shards that the index names: what transformers would load, and no more."""
    try:
        hf_hub_download(base.name, WEIGHTS_FILE, revision=folder.name)
        return
    except LocalEntryNotFoundError:
        if not (folder / INDEX_FILE).is_file():
            raise
    except EntryNotFoundError:
        if not (folder / INDEX_FILE).is_file():
            raise ModelError(
                f"{base.asked_with}: {base.name} (revision {base.revision or 'main'}) has no weights in safetensors "
                f"({WEIGHTS_FILE} or {INDEX_FILE}). Pickle (.bin) can run code when read, and is refused: convert it "
                "to safetensors first, or name another revision or repository that has them"
            ) from None
    shards = _shards(folder / INDEX_FILE)
    if not is_offline_mode():
        snapshot_download(base.name, revision=folder.name, allow_patterns=shards)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing and is_offline_mode():
        raise HubUnreachableError(
            f"{base.asked_with}: of the weights of {base.name}, {len(missing)} of {len(shards)} files are not in the "
            f"hub's cache ({missing[0]} is the first), and the hub cannot be reached. Try again with the network, or "
            "give a local folder"
        )
    if missing:
        named = ", ".join(missing[:5])
        raise ModelError(f"{base.asked_with}: {base.name} lacks files that its {INDEX_FILE} names: {named}")


def _shards(index: Path) -> list[str]:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index}: expected a weight_map that names the file of every tensor")
    return sorted({str(name) for name in names.values()})
