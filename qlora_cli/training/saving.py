"""Saving the state that a loop is in: all its processes take part, the main one writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from qlora_cli.data.batches import StepPlan
from qlora_cli.errors import NonFiniteError
from qlora_cli.training.checkpoint import Progress, RandomStates, Snapshot, take_snapshot
from qlora_cli.training.devices import by_every_process, by_main_process
from qlora_cli.training.keeping import CheckpointKeeper
from qlora_cli.training.loop_parts import LoopOutput
from qlora_cli.training.schedule import data_position


class StateSaver:
    """Saves a run's state after a step, once for each step, and deletes old checkpoints.

    Everything here but `snapshot` is called by every process at the same place, and raises on all of them or on none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        plan: StepPlan,
        output: LoopOutput,
        *,
        limit: int | None,
        kept: Callable[[], Collection[int]],
        saved_step: int,
    ) -> None:
        """Nothing is saved yet.

        Args:
            limit, kept: see `CheckpointKeeper`.
            saved_step: the last step whose checkpoint is there; 0 if there is none.
        """
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._parameters = parameters
        self._plan = plan
        self._output = output
        self._saved_step = saved_step
        self._keeper = CheckpointKeeper(output.checkpoints, limit, output.emit, durable=output.durable, kept=kept)

    def keeping(self) -> AbstractContextManager[None]:
        """See `CheckpointKeeper.keeping`."""
        return self._keeper.keeping()

    def rotate(self) -> None:
        """Delete old checkpoints.

        Raises:
            RunError: if one could not be deleted.
        """
        by_main_process(self._accelerator, self._keeper.rotate)

    def settle(self) -> None:
        """Tell of the checkpoint that is being written, if it is whole by now.

        Raises:
            RunError: if it could not be written.
        """
        by_every_process(self._accelerator, self._keeper.settle)

    def save(self, progress: Progress, *, rotating: bool, wait: bool = True) -> None:
        """Save the state, unless this step's is saved; then, if `rotating`, delete old ones.

        With `wait` it is on disk afterwards.

        Raises:
            NonFiniteError: if it cannot be gone on from; it is not saved, as it would push out one that can.
            RunError: if this or the one before could not be written.
        """
        if not self._is_finite():
            raise NonFiniteError(
                f"step {progress.step}: its update made a trained weight NaN or infinite, so training stopped; "
                "it is not saved, and the checkpoints before it are as they were. Try a lower learning_rate"
            )
        random = gather_object([RandomStates.here(self._accelerator.device)])

        def written() -> None:
            if self._saved_step != progress.step:
                self._keeper.save(self.snapshot(progress, random), wait=wait, rotating=rotating)
                return
            self._keeper.settle(wait=wait)
            if rotating:
                self._keeper.rotate()

        by_main_process(self._accelerator, written)
        self._saved_step = progress.step

    def save_what_is_good(self, progress: Progress) -> str:
        """Save the state before a fault, if it is good; says what there is to go on from."""
        if progress.step == 0:
            return "nothing was trained yet"
        if not self._is_finite():
            return "what the last step trained is not finite either, and not saved"
        self.save(progress, rotating=False)
        return f"the state after step {progress.step} is saved"

    def snapshot(self, progress: Progress, random: Sequence[RandomStates]) -> Snapshot:
        """The state as it is now; `random` is of every process."""
        return take_snapshot(
            progress,
            self._optimizer,
            self._output.adapter(),
            position=data_position(self._plan, progress.step),
            run=self._output.run,
            random=random,
        )

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters)
