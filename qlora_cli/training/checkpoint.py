"""Checkpoints: everything a run needs to go on, whole or not there, and nothing that needs unpickling.

    step-000050/  adapter/  optimizer.safetensors  state.json  manifest.json

The data order, the learning rate and every random draw are functions of the seed and the step, so that the step is
all there is to say about them. The manifest holds the size and SHA-256 of every other file; a checkpoint whose files
do not match it is not one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from qlora_cli.disk import replacing_folder
from qlora_cli.errors import CheckpointError

FORMAT_VERSION = 1
ADAPTER = "adapter"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_MANIFEST = "manifest.json"


@dataclass
class Progress:
    """Where a run stands after `step` optimizer steps.

    `evaluated_step` is the last step after which there was an evaluation, None before any. `tokens` and `seconds` count
    training alone. The window is what has been trained since the last record: the loss summed over its supervised
    tokens, their number, all its tokens, and its time.
    """

    step: int = 0
    evaluated_step: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_supervised: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0


def save_checkpoint(
    folder: Path, progress: Progress, optimizer: Optimizer, write_adapter: Callable[[Path], None]
) -> Path:
    """Write `folder/step-NNNNNN`; it appears under that name only when all of it is on disk."""
    target = checkpoint_path(folder, progress.step)
    with replacing_folder(target) as staging:
        (staging / ADAPTER).mkdir()
        write_adapter(staging / ADAPTER)
        tensors, scalars = _flatten(optimizer)
        save_file(tensors, staging / _OPTIMIZER)
        _write(staging / _STATE, {"progress": asdict(progress), "optimizer": scalars})
        _write(staging / _MANIFEST, {"format_version": FORMAT_VERSION, "files": _digests(staging)})
    return target


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:06d}"


def rotate(folder: Path, limit: int | None, *, keep: int | None = None) -> None:
    """Delete all but the newest `limit` checkpoints, and that of the step `keep`."""
    if limit is None:
        return
    for old in list_checkpoints(folder)[limit:]:
        if checkpoint_step(old) != keep:
            shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, valid or not."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files match its manifest, and what is wrong with each newer one."""
    damaged: dict[Path, str] = {}
    for path in list_checkpoints(folder):
        fault = find_fault(path)
        if fault is None:
            return path, damaged
        damaged[path] = fault
    return None, damaged


def set_aside(damaged: Path) -> Path:
    """Take a damaged checkpoint out of the count, or rotation would keep it and delete whole ones."""
    aside = damaged.with_name(f"damaged-{damaged.name}")
    shutil.rmtree(aside, ignore_errors=True)
    damaged.rename(aside)
    return aside


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        version, expected = manifest["format_version"], dict(manifest["files"])
    except OSError:
        return f"has no {_MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"{_MANIFEST} is damaged"
    if version != FORMAT_VERSION:
        return f"has format version {version}, this is {FORMAT_VERSION}"
    try:
        found = _digests(checkpoint)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong there"
        if found[name] != expected[name]:
            return f"{name} is not what was written"
    return None


def restore_optimizer(checkpoint: Path, optimizer: Optimizer) -> Progress:
    """Load optimizer state and progress; the adapter is the caller's to load.

    Raises:
        CheckpointError: if the state does not belong to this optimizer.
    """
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / _OPTIMIZER)
        optimizer.load_state_dict(_unflatten(optimizer, tensors, state["optimizer"]))
        return Progress(**state["progress"])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: does not fit this run's optimizer: {error}") from None


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaves(state: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Per-parameter state as tensors and plain numbers, keyed `index/name` (bitsandbytes nests one level more)."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in _leaves(optimizer.state_dict()["state"], ""):
        if isinstance(value, Tensor):
            # A copy, because 8-bit states share one quantisation map and safetensors refuses shared memory.
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        else:
            scalars[key] = value
    return tensors, scalars


def _unflatten(optimizer: Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    """A state dict for `load_state_dict`: the saved state under the present param groups."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        index, *path, name = key.split("/")
        inner = state.setdefault(int(index), {})
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = value
    groups = optimizer.state_dict()["param_groups"]
    expected = {index for group in groups for index in group["params"]}
    if set(state) - expected:
        raise ValueError(f"it has state for {len(state)} parameters, the run trains {len(expected)}")
    return {"state": state, "param_groups": groups}
