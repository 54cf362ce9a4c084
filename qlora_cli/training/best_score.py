"""The checkpoint with the best score: which it is, in a run that may be stopped anywhere and gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_cli.training.checkpoint import checkpoint_path
from qlora_cli.training.events import BenchmarkRecord, BestKept, Emitter, Notice
from qlora_cli.training.manifest import find_fault


class BestScore:
    """Compares a run's scores by one of them, `wanted`: TASK/METRIC.

    What was scored before the first step counts for nothing: there is no adapter yet.

    Attributes:
        kept: the checkpoint that is the best so far, and stays; None before there is one.
    """

    def __init__(self, wanted: str, *, higher_is_better: bool) -> None:
        self.kept: BestKept | None = None
        self._wanted = wanted
        self._sign = 1 if higher_is_better else -1

    @property
    def step(self) -> int | None:
        """The step whose checkpoint is to stay."""
        return None if self.kept is None else self.kept.step

    def is_better(self, record: BenchmarkRecord) -> bool:
        """Whether this record's checkpoint is to be kept in place of the present one; the first of equal ones stays."""
        value = self._value(record)
        return value is not None and (self.kept is None or self._sign * value > self._sign * self.kept.value)

    def keep(self, record: BenchmarkRecord, path: Path, emit: Emitter) -> None:
        """The record's checkpoint is on disk, and is the best so far."""
        value = self._value(record)
        if value is not None:
            self.kept = BestKept(record.step, self._wanted, value, path)
            emit(self.kept)

    def go_on(self, records: Sequence[BenchmarkRecord], checkpoints: Path, emit: Emitter) -> None:
        """Take the best of the records of a run's first part whose checkpoint is there and whole."""
        ranked = sorted(
            (record for record in records if self._value(record) is not None),
            key=lambda record: (-self._sign * (self._value(record) or 0.0), record.step),
        )
        for record in ranked:
            path = checkpoint_path(checkpoints, record.step)
            if find_fault(path) is None:
                self.keep(record, path, emit)
                break
        if ranked and self.step != ranked[0].step:
            emit(
                Notice(
                    f"{self._wanted} was best after step {ranked[0].step}, whose checkpoint is not there any more: "
                    "the best of the others is kept"
                )
            )

    def _value(self, record: BenchmarkRecord) -> float | None:
        if record.step == 0:
            return None
        return {**record.members, **record.scores}.get(self._wanted)
