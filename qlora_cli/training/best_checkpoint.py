"""The checkpoint with the best value of something, in a run that may be stopped anywhere and gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_cli.training.checkpoint import check_readable, checkpoint_path
from qlora_cli.training.events import BestKept, Emitter, Notice
from qlora_cli.training.manifest import find_fault


class Measured(NamedTuple):
    """What was measured after `step` steps; None is no number."""

    step: int
    value: float | None


class BestCheckpoint:
    """Compares what a run measures by one number, `name`: a score, TASK/METRIC, or `events.EVAL_LOSS`.

    What was measured before the first step counts for nothing: there is no adapter yet.

    Attributes:
        kept: the checkpoint that is the best so far, and stays; None before there is one.
    """

    def __init__(self, name: str, *, higher_is_better: bool) -> None:
        self.kept: BestKept | None = None
        self.name = name
        self._sign = 1 if higher_is_better else -1

    @property
    def step(self) -> int | None:
        """The step whose checkpoint is to stay."""
        return None if self.kept is None else self.kept.step

    def is_better(self, measured: Measured) -> bool:
        """Whether the checkpoint is to be kept in place of the present one; the first of equal ones stays."""
        step, value = measured
        if step == 0 or value is None:
            return False
        return self.kept is None or self._sign * value > self._sign * self.kept.value

    def keep(self, measured: Measured, path: Path, emit: Emitter) -> None:
        """The checkpoint is on disk, and is the best so far."""
        if measured.value is not None:
            self.kept = BestKept(measured.step, self.name, measured.value, path)
            emit(self.kept)

    def go_on(self, measured: Sequence[Measured], checkpoints: Path, emit: Emitter) -> BestKept | None:
        """Take the best of what a run's first part measured whose checkpoint is there and whole; returns it.

        Raises:
            CheckpointError: if one cannot be read, which may be whole.
        """
        ranked = sorted(
            (each for each in measured if each.step > 0 and each.value is not None),
            key=lambda each: (-self._sign * (each.value or 0.0), each.step),
        )
        for each in ranked:
            path = checkpoint_path(checkpoints, each.step)
            fault = find_fault(path)
            check_readable(path, fault)
            if fault is None:
                self.keep(each, path, emit)
                break
        if ranked and self.step != ranked[0].step:
            emit(Notice(self._lost(ranked[0].step, checkpoints)))
        return self.kept

    def _lost(self, step: int, checkpoints: Path) -> str:
        path = checkpoint_path(checkpoints, step)
        gone = f"cannot be taken ({find_fault(path)})" if path.exists() else "is not there any more"
        instead = "the best from here on" if self.kept is None else "the best of the others"
        return f"{self.name} was best after step {step}, whose checkpoint {gone}: {instead} is kept"
