"""A run that goes on with what another part of it left in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.optim import Optimizer
from transformers import PreTrainedModel

from qlora_cli.recipe.schema import TrainingSection
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.best_checkpoint import BestCheckpoint
from qlora_cli.training.checkpoint import Progress, set_aside
from qlora_cli.training.context import RunContext
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
    check_position(resumed, section, plan)
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
    resumed, device = run.resumed, run.accelerator.device
    for path, fault in run.passed_over.items():
        run.emit(Notice(f"passed over checkpoint {path.name}: {fault}"))
    if resumed is None:
        run.emit(Notice("no checkpoint to go on from: starting from the beginning"))
        progress = None
    else:
        progress = restore(resumed, model, optimizer, run.accelerator.process_index, device)
        run.emit(Notice(f"going on from {resumed.checkpoint.name}"))
    before = MetricsFile(run.folder.metrics)
    found = [(before.benchmarks(), before.held_out_losses()) if run.accelerator.is_main_process else ([], [])]
    # No process may rename or write before all have read.
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        for checkpoint in run.passed_over:
            set_aside(checkpoint)
        metrics = MetricsFile(run.folder.metrics)
        if progress is None:
            run.record.start_over()
            metrics.clear()
        else:
            metrics.keep_until(progress.step, progress.evaluated_step)
    broadcast_object_list(found)
    scored, losses = found[0]
    if benchmarks is not None:
        benchmarks.go_on(scored, -1 if progress is None else progress.step, run.folder.checkpoints)
    progress = progress or Progress()
    if best is not None:
        best.go_on(measured_losses(progress, losses), run.folder.checkpoints, run.emit)
    chosen = (best, None if benchmarks is None else benchmarks.best)
    kept = {each.name for each in chosen if each is not None and each.kept is not None}
    run.record.go_on(skipped_steps=progress.skipped_steps, kept=kept)
    return progress
