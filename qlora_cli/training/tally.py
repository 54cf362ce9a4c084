"""What a run has done, counted: where it stands after a step, and what is told of the steps since the last record."""

from __future__ import annotations

from dataclasses import replace

from qlora_cli.training.checkpoint import Progress
from qlora_cli.training.events import TrainRecord
from qlora_cli.training.gradients import StepSums


def count_step(progress: Progress, step: StepSums, seconds: float) -> Progress:
    """One step was trained."""
    return replace(
        _spend(progress, step, seconds),
        window_loss=progress.window_loss + step.loss,
        window_supervised=progress.window_supervised + step.supervised,
        window_norm=step.norm,
    )


def count_skipped(progress: Progress, step: StepSums, seconds: float) -> Progress:
    """One step was computed and not taken: its tokens and its time are spent, its loss is no part of any mean."""
    return replace(_spend(progress, step, seconds), skipped_steps=progress.skipped_steps + 1)


def _spend(progress: Progress, step: StepSums, seconds: float) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + step.tokens,
        seconds=progress.seconds + seconds,
        window_tokens=progress.window_tokens + step.tokens,
        window_seconds=progress.window_seconds + seconds,
    )


def train_record(progress: Progress, *, learning_rate: float, steps_per_epoch: int) -> TrainRecord | None:
    """What is told of the steps since the last record; None if none of them was taken."""
    if not progress.window_supervised:
        return None
    return TrainRecord(
        step=progress.step,
        epoch=progress.step / steps_per_epoch,
        loss=progress.window_loss / progress.window_supervised,
        learning_rate=learning_rate,
        grad_norm=progress.window_norm,
        tokens=progress.tokens,
        tokens_per_second=progress.window_tokens / progress.window_seconds,
        seconds=progress.seconds,
    )


def new_window(progress: Progress) -> Progress:
    """The steps so far are told of."""
    return replace(progress, window_loss=0.0, window_supervised=0, window_tokens=0, window_seconds=0.0, window_norm=0.0)
