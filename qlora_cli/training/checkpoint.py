"""Checkpoints: everything a run needs to go on, whole or not there, and nothing that needs unpickling.

    step-000050/  adapter/  optimizer.safetensors  random.safetensors  state.json  manifest.json

The data order, the learning rate and every random draw of a step are functions of the seed and the step, so that its
number is all there is to say about them. `state.json` says more, to compare with: which rows come next, and what the
run is made of. The manifest holds the size and SHA-256 of every other file; a checkpoint whose files do not match it is
not one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from qlora_cli.disk import json_text, remove_folder, replacing_folder, sync, telling_disk_errors, write_bytes
from qlora_cli.errors import CheckpointError
from qlora_cli.training.manifest import MANIFEST, Fault, FaultKind, find_fault, manifest_text
from qlora_cli.training.optimizer_state import flatten_state, unflatten_state
from qlora_cli.training.random_states import random_states, set_random_states

ADAPTER = "adapter"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
_STATE = "state.json"


@dataclass
class Progress:
    """Where a run stands after `step` optimizer steps.

    `evaluated_step` is the last step after which there was an evaluation, None before any. `tokens` and `seconds` count
    training alone. The window is what has been trained since the last record: the loss summed over its supervised
    tokens, their number, all its tokens, its time, and the gradient norm of the last step in it that was taken.
    `skipped_steps` are those that were not, as their loss or gradient was NaN or infinite. The best evaluation is that
    of the lowest held-out loss after any step; `evaluations_without_improvement` are those that came after it.
    """

    step: int = 0
    evaluated_step: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_supervised: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_norm: float = 0.0
    skipped_steps: int = 0
    best_eval_loss: float | None = None
    best_eval_step: int | None = None
    evaluations_without_improvement: int = 0


@dataclass(frozen=True)
class RandomStates:
    """Of one process: its generators' states, as tensors and plain numbers."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    @classmethod
    def here(cls, device: torch.device) -> RandomStates:
        """Those of this process now."""
        return cls(*random_states(device))


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory: the bytes of its files, by their names. What is trained after it leaves it as it is."""

    step: int
    files: Mapping[str, bytes]

    @property
    def bytes(self) -> int:
        """How large it is."""
        return sum(len(data) for data in self.files.values())


@dataclass(frozen=True)
class SavedState:
    """What `state.json` says.

    Attributes:
        position: where the run stands in its data: see `schedule.data_position`.
        run: what the run is made of: see `identity.run_identity`.
        random: the plain numbers of every process's random states.
    """

    progress: Progress
    optimizer: Mapping[str, Any]
    position: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    random: Sequence[Mapping[str, Any]] = ()


def take_snapshot(
    progress: Progress,
    optimizer: Optimizer,
    adapter: Mapping[str, bytes],
    *,
    position: Mapping[str, Any],
    run: Mapping[str, Any],
    random: Sequence[RandomStates],
) -> Snapshot:
    """The state as it is now: `adapter` holds the files of the trained weights, `random` is of every process."""
    tensors, scalars = flatten_state(optimizer)
    state = SavedState(progress, scalars, position, run, [states.numbers for states in random])
    drawn = {f"{process}/{name}": t for process, states in enumerate(random) for name, t in states.tensors.items()}
    files = {f"{ADAPTER}/{name}": data for name, data in adapter.items()}
    files |= {_OPTIMIZER: save(tensors), _RANDOM: save(drawn), _STATE: json_text(asdict(state)).encode()}
    return Snapshot(progress.step, files)


def write_checkpoint(
    folder: Path, snapshot: Snapshot, *, durable: Sequence[Path] = (), go_on: Callable[[], None] = lambda: None
) -> Path:
    """Write `folder/step-NNNNNN`; it appears under that name only when all of it is on disk.

    Args:
        durable: files that have to be on disk before it, such as what was recorded of the steps up to it.
        go_on: called now and then; what it raises ends the writing.

    Raises:
        RunError: if it could not be written.
        CheckpointError: if what is there afterwards is not what was written.
    """
    target = checkpoint_path(folder, snapshot.step)
    with replacing_folder(target, go_on) as staging:
        for name, data in snapshot.files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            write_bytes(staging / name, data, go_on)
        write_bytes(staging / MANIFEST, manifest_text(snapshot.files).encode(), go_on)
        for path in durable:
            if path.exists():
                sync(path)
                sync(path.parent)  # its name, which may be new
    if fault := find_fault(target):
        raise CheckpointError(f"{target}: was written, and read again {fault}: look at the disk and its file system")
    return target


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:06d}"


def rotate(folder: Path, limit: int | None, *, keep: Collection[int] = ()) -> None:
    """Delete all but the newest `limit` checkpoints that look whole, and those of the steps in `keep`.

    What another version wrote, or what cannot be read now, stays: it may be all that there is.
    """
    if limit is None:
        return
    whole = 0
    for path in list_checkpoints(folder):
        fault = find_fault(path, hashes=False)
        if whole < limit:
            whole += fault is None
        elif checkpoint_step(path) not in keep and (fault is None or fault.kind is FaultKind.DAMAGED):
            remove_folder(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, valid or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name) and not path.is_file()]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, Fault]]:
    """The newest checkpoint whose files match its manifest, and what is wrong with each newer one."""
    faults: dict[Path, Fault] = {}
    for path in list_checkpoints(folder):
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults[path] = fault
    return None, faults


def check_readable(checkpoint: Path, fault: Fault | None) -> None:
    """Refuse to take what cannot be read now for lost.

    Raises:
        CheckpointError: if that is the fault.
    """
    if fault is not None and fault.kind is FaultKind.UNREADABLE:
        raise CheckpointError(
            f"{checkpoint} {fault}. It may be whole: see to it that it can be read and resume again, or move it "
            "somewhere else to go on without it"
        )


def set_aside(checkpoint: Path, fault: Fault) -> Path:
    """Take a checkpoint that was passed over out of the way of the one that will have its name; nothing is deleted."""
    kind = "other-version" if fault.kind is FaultKind.OTHER_VERSION else "damaged"
    aside, number = checkpoint.with_name(f"{kind}-{checkpoint.name}"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{kind}-{checkpoint.name}-{number}")
    with telling_disk_errors(aside):
        checkpoint.rename(aside)
    return aside


def read_state(checkpoint: Path) -> SavedState:
    """What a whole checkpoint says of itself.

    Raises:
        CheckpointError: if it does not say it as this version does.
    """
    try:
        data = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        return SavedState(**{**data, "progress": Progress(**data["progress"])})
    except OSError as error:
        raise CheckpointError(f"{checkpoint / _STATE}: cannot be read: {error.strerror}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / _STATE}: not what this version writes: {error}") from None


def restore_optimizer(checkpoint: Path, state: SavedState, optimizer: Optimizer) -> None:
    """Load the optimizer's state; the adapter is the caller's to load.

    Raises:
        CheckpointError: if the state does not belong to this optimizer.
    """
    with _fitting_optimizer(checkpoint):
        optimizer.load_state_dict(read_optimizer(checkpoint, state, optimizer))


def read_optimizer(checkpoint: Path, state: SavedState, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, on the CPU.

    Raises:
        CheckpointError: if it is not one of this optimizer.
    """
    with _fitting_optimizer(checkpoint):
        mapped = load_file(checkpoint / _OPTIMIZER)
        # Copies: an optimizer keeps what it is given, and would have its state in a file that is rotated away.
        tensors = {name: tensor.clone() for name, tensor in mapped.items()}
        return unflatten_state(optimizer, tensors, state.optimizer)


@contextmanager
def _fitting_optimizer(checkpoint: Path) -> Iterator[None]:
    """Turn what keeps an optimizer's state from being loaded into a message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: does not fit this run's optimizer: {error}") from None


def restore_random(checkpoint: Path, state: SavedState, process: int, device: torch.device) -> None:
    """Put the random generators of this process where they were.

    Raises:
        CheckpointError: if there are no such states.
    """
    try:
        prefix = f"{process}/"
        drawn = {k.removeprefix(prefix): t for k, t in load_file(checkpoint / _RANDOM).items() if k.startswith(prefix)}
        set_random_states(drawn, state.random[process], device)
    except (OSError, SafetensorError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint}: its random states cannot be taken over: {error}") from None
