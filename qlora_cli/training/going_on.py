"""A run that goes on with what another part of it left in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel

from qlora_cli.recipe.schema import TrainingSection
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.best_checkpoint import BestCheckpoint
from qlora_cli.training.checkpoint import Progress, set_aside
from qlora_cli.training.context import RunContext
from qlora_cli.training.devices import by_every_process, by_main_process
from qlora_cli.training.early_stopping import measured_losses
from qlora_cli.training.events import Notice
from qlora_cli.training.loop_parts import LoopData
from qlora_cli.training.resume import (
    Resumed,
    check_position,
    check_same_material,
    doubts_about_the_rest,
    restore,
)
from qlora_cli.training.run_folder import MetricsFile
from qlora_cli.training.schedule import step_plan


def check_resumption(
    run: RunContext, resumed: Resumed, section: TrainingSection, data: LoopData, identity: Mapping[str, Any]
) -> None:
    """Refuse to go on with other rows, or for fewer steps; say what else makes it another run.

    Raises:
        OutputError: if this would not be the run that it was.
    """
    check_same_material(resumed, identity)
    plan = step_plan(section, data.train, run.accelerator.num_processes)
    by_main_process(run.accelerator, lambda: check_position(resumed, section, plan))
    for doubt in doubts_about_the_rest(resumed, section, plan, identity):
        run.emit(Notice(doubt))


def go_on(
    run: RunContext,
    model: PreTrainedModel,
    optimizer: Optimizer,
    benchmarks: Benchmarks | None,
    best: BestCheckpoint | None,
) -> Progress:
    """Put everything where the run's first part left it, and forget what that did later; returns where that is.

    Raises:
        ModelError, CheckpointError: if the checkpoint does not fit the model or the optimizer.
    """
    resumed, accelerator = run.resumed, run.accelerator
    for path, fault in run.passed_over.items():
        run.emit(Notice(f"passed over checkpoint {path.name}: {fault}"))
    if resumed is None:
        run.emit(Notice("no checkpoint to go on from: starting from the beginning"))
        progress = None
    else:
        progress = by_every_process(
            accelerator,
            lambda: restore(resumed, model, optimizer, accelerator.process_index, accelerator.device),
        )
        run.emit(Notice(f"going on from {resumed.checkpoint.name}"))
    metrics = MetricsFile(run.folder.metrics)
    # All of them have read before the main process renames and writes, and nothing is changed before all is read.
    scored, losses = by_main_process(accelerator, lambda: (metrics.benchmarks(), metrics.held_out_losses()))
    measured = [] if benchmarks is None else benchmarks.go_on(scored, -1 if progress is None else progress.step)
    stands = progress or Progress()
    by_score = None if benchmarks is None else benchmarks.best
    both = ((by_score, measured), (best, measured_losses(stands, losses)))
    chosen = [(each, before) for each, before in both if each is not None]
    for each, before in chosen:
        each.kept = by_main_process(accelerator, partial(each.go_on, before, run.folder.checkpoints, run.emit))
    kept = {each.name for each, _ in chosen if each.kept is not None}
    by_main_process(accelerator, lambda: _forget_what_comes_after(run, metrics, progress))
    run.record.go_on(skipped_steps=stands.skipped_steps, kept=kept)
    return stands


def _forget_what_comes_after(run: RunContext, metrics: MetricsFile, progress: Progress | None) -> None:
    """Take out of the folder what the run does again."""
    if progress is None:
        # First: a kill after this finds a run without a checkpoint, and not one whose checkpoints have gone.
        run.record.start_over()
        run.record.write()
        metrics.clear()
    else:
        metrics.keep_until(progress.step, progress.evaluated_step)
    for checkpoint, fault in run.passed_over.items():
        set_aside(checkpoint, fault)
