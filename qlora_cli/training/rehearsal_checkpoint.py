"""A checkpoint for the rehearsal: written where those of the run will be, read again as a resumed run does, removed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from qlora_cli.disk import json_text, size_text
from qlora_cli.errors import CheckpointError, RunError
from qlora_cli.model.adapter import copy_adapter_tensors, read_adapter_tensors
from qlora_cli.model.lora import lora_layers
from qlora_cli.training.checkpoint import (
    ADAPTER,
    RandomStates,
    SavedState,
    list_checkpoints,
    read_optimizer,
    read_state,
    restore_random,
    write_checkpoint,
)
from qlora_cli.training.devices import by_main_process
from qlora_cli.training.events import Notice
from qlora_cli.training.loop import Loop
from qlora_cli.training.optimizer_state import flatten_state, leaves
from qlora_cli.training.schedule import data_position

_SCRATCH = ".rehearsal.writing"  # a name that `disk.tidy` removes after a kill


def rehearse_checkpoint(loop: Loop) -> tuple[int, float]:
    """Write the state as it is, and read it again; tell of a disk without room for what the run will write.

    Returns:
        The bytes of a checkpoint, and the seconds that it took.

    Raises:
        RunError: if it could not be written, or if there is too little room for those that are to come.
        CheckpointError: if it is not read again as it was written.
    """
    random = gather_object([RandomStates.here(loop.accelerator.device)])

    def tried() -> tuple[int, float]:
        scratch = loop.output.checkpoints / _SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        started = time.monotonic()
        try:
            size = _write_and_read(loop, scratch, random)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _look_for_room(loop, size)
        return size, time.monotonic() - started

    return by_main_process(loop.accelerator, tried)


def _write_and_read(loop: Loop, scratch: Path, random: Sequence[RandomStates]) -> int:
    """Returns the bytes of what was written."""
    position, run = data_position(loop.plan, loop.progress.step), loop.output.run
    snapshot = loop.saver.snapshot(loop.progress, random)
    with _telling(loop, snapshot.bytes):
        path = write_checkpoint(scratch, snapshot, durable=loop.output.durable)
    saved = read_state(path)
    scalars = flatten_state(loop.optimizer)[1]
    wanted = SavedState(loop.progress, scalars, position, run, [states.numbers for states in random])
    found = {
        "the trained weights": _same_weights(loop, path / ADAPTER),
        "the optimizer's state": _same_optimizer(loop, path, saved),
        "the random states": _same_random(loop, path, saved, random),
        "the position": json_text(asdict(saved)) == json_text(asdict(wanted)),
    }
    if changed := [name for name, same in found.items() if not same]:
        raise CheckpointError(
            f"{path}: was written, and read again {' and '.join(changed)} are others: look at the disk and its file "
            "system"
        )
    return snapshot.bytes


@contextmanager
def _telling(loop: Loop, size: int) -> Iterator[None]:
    """Say of a checkpoint that could not be written that it was a trial, and not by the name that it had for that."""
    try:
        yield
    except CheckpointError:
        raise
    except RunError as error:
        kept = "what was saved before is whole" if loop.progress.step else "nothing was trained yet"
        raise RunError(
            f"rehearsal: a checkpoint, of {size_text(size)}, in {loop.output.checkpoints}: "
            f"{str(error).split(': ', 1)[-1]}; {kept}. Mend that, or train into another folder with --output-dir"
        ) from None


def _same_weights(loop: Loop, adapter: Path) -> bool:
    before = [parameter.detach().to("cpu", copy=True) for parameter in loop.parallel.parameters]
    layers = lora_layers(loop.model)
    copy_adapter_tensors(layers, read_adapter_tensors(adapter), adapter)
    return all(_equal(p.detach().cpu(), old) for p, old in zip(loop.parallel.parameters, before, strict=True))


def _same_optimizer(loop: Loop, checkpoint: Path, saved: SavedState) -> bool:
    """Compared without being loaded: a second state beside the first might not fit."""
    read = dict(leaves(read_optimizer(checkpoint, saved, loop.optimizer)["state"]))
    tensors, scalars = flatten_state(loop.optimizer)
    return _all_equal(read, {**tensors, **scalars})


def _same_random(loop: Loop, checkpoint: Path, saved: SavedState, random: Sequence[RandomStates]) -> bool:
    process, device = loop.accelerator.process_index, loop.accelerator.device
    restore_random(checkpoint, saved, process, device)
    now, before = RandomStates.here(device), random[process]
    return _all_equal(now.tensors, before.tensors) and now.numbers == before.numbers


def _all_equal(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(_equal(found[name], wanted[name]) for name in wanted)


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, Tensor) and isinstance(wanted, Tensor):
        # As bytes: what is NaN is the same if its bits are.
        return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(_bits(found), _bits(wanted))
    return bool(found == wanted)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _look_for_room(loop: Loop, size: int) -> None:
    """Refuse a disk that has less room than the checkpoints take that there will be at a time.

    A run that may stop early may well have room enough: of that, it is said.
    """
    doubt = _too_little_room(loop, size)
    if doubt is None:
        return
    if loop.section.early_stopping_patience is None:
        raise RunError(f"rehearsal: {doubt}; --no-rehearsal begins all the same")
    loop.output.emit(Notice(doubt))


def _too_little_room(loop: Loop, size: int) -> str | None:
    """What to say of a disk that has less room than the checkpoints take that there will be at a time."""
    section, done, folder = loop.section, loop.progress.step, loop.output.checkpoints
    steps = {loop.total_steps}
    if section.save_steps is not None:
        steps |= set(range((done // section.save_steps + 1) * section.save_steps, loop.total_steps, section.save_steps))
    coming, limit = len(steps), section.save_total_limit
    if limit is not None:
        kept = limit + len(loop.chosen)  # one of each that is the best of something stays beside the newest
        coming = min(coming, max(kept + 1 - len(list_checkpoints(folder)), 1))  # old ones go when the new one is whole
    try:
        room = shutil.disk_usage(folder).free
    except OSError:  # not every file system tells
        return None
    if room >= coming * size:
        return None
    needed = f"{coming:,} more checkpoint{'s' * (coming != 1)} of {size_text(size)}"
    way_out = "set training.save_total_limit" if limit is None else "lower training.save_total_limit"
    return (
        f"the disk of {folder} has {size_text(room)} of room, and the run will hold {needed}: make room, or {way_out}"
    )
