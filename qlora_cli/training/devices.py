"""The Accelerator that a run is made with: one process or several, each with a whole copy of the model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from qlora_cli.errors import DeviceError, QloraError, RunError
from qlora_cli.model.base import choose_device

_KNOWN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

Result = TypeVar("Result")

# The others wait while one writes to a disk that is slow or away, or answers its share of a benchmark's questions, for
# hours more than they did: torch waits 10 minutes on GPUs. One that dies is noticed by whoever launched them.
_PATIENCE = timedelta(weeks=52)  # as lm-eval's own


def make_accelerator(wanted: str, asked_with: str = "training.device") -> Accelerator:
    """An Accelerator on the device that `training.device` asks for.

    Precision and accumulation are the recipe's alone: what `accelerate config` or the environment say of them is
    overruled, as the loop does both itself.

    Args:
        asked_with: the setting or option that the device was asked for with, for messages.

    Raises:
        DeviceError: if the device is not there, if this process is already set up for another one, or if the
            environment asks for a way of sharding the model that this version does not know.
    """
    device = choose_device(wanted, asked_with)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except ValueError as error:  # another device was set up in this process
        raise DeviceError(f"{asked_with}: {wanted} cannot be used in this process any more: {error}") from None
    if accelerator.device.type != device.type:
        raise DeviceError(
            f"{asked_with}: {wanted} means {device.type} here, but Accelerate is set up for "
            f"{accelerator.device.type}. Look at ACCELERATE_USE_CPU and `accelerate config`"
        )
    if accelerator.distributed_type not in _KNOWN:
        raise DeviceError(
            f"the environment asks Accelerate for {accelerator.distributed_type.value}; expected one copy of the model "
            "in each process. Start with `accelerate launch --multi_gpu --num_processes N -m qlora_cli train …`"
        )
    return accelerator


def on_any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so on any process: all of them must take the same way, or wait for each other forever."""
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor(int(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def by_every_process(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What each process does for itself; if it fails on one, all of them fail.

    Raises:
        Exception: what `action` raises here; a RunError if it is on other processes alone that it fails.
    """
    failure: Exception | None = None
    results: list[Result] = []
    try:
        results.append(action())
    except Exception as error:
        failure = error
    if on_any_process(accelerator, failure is not None):
        raise failure or RunError("another process failed: what it tells is the reason")
    return results[0]


def by_main_process(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What the main process alone does, and what came of it, on every process; if it fails there, all of them fail.

    For whatever is read or written: two processes may find the same disk otherwise, and each would go its own way.

    Raises:
        QloraError: what `action` raises. Any other error is raised by the main process alone, by others a RunError.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            told = f"the main process failed: {type(error).__name__}: {error}"
            outcome[1] = error if isinstance(error, QloraError) else RunError(told)
    broadcast_object_list(outcome)
    if failure is not None or outcome[1] is not None:
        raise failure or outcome[1]
    result: Result = outcome[0]
    return result
