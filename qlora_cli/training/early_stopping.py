"""When a run stops early: after so many evaluations in a row of which none was better than the best before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_cli.evaluation.answering.memory import counted
from qlora_cli.training.best_checkpoint import Measured
from qlora_cli.training.checkpoint import Progress


def judged(progress: Progress, step: int, loss: float) -> Progress:
    """Take in the held-out loss after `step` steps; the first of equal ones is the best.

    What was measured before the first step counts for nothing: there is no adapter yet.
    """
    progress = replace(progress, evaluated_step=step)
    if step == 0:
        return progress
    if progress.best_eval_loss is None or loss < progress.best_eval_loss:
        return replace(progress, best_eval_loss=loss, best_eval_step=step, evaluations_without_improvement=0)
    return replace(progress, evaluations_without_improvement=progress.evaluations_without_improvement + 1)


def measured_losses(progress: Progress, recorded: Sequence[tuple[int, float]]) -> list[Measured]:
    """The held-out losses that a run has, which stands where `progress` says: of those that were recorded, the ones
    that it will not measure again, and the best of all, which it knows without a record.

    A recorded one that is lower than that is not what was measured: nothing guards `metrics.jsonl` against damage.
    """
    best_step, best = progress.best_eval_step, progress.best_eval_loss
    if best_step is None or best is None:
        return []
    losses = {step: loss for step, loss in recorded if step <= (progress.evaluated_step or 0) and loss >= best}
    losses[best_step] = best
    return [Measured(step, loss) for step, loss in sorted(losses.items())]


def reason_to_stop(progress: Progress, patience: int | None) -> str | None:
    """Why a run that waits for `patience` evaluations in a row stops here; None if it goes on, as it always does where
    `patience` is None."""
    waited, best = progress.evaluations_without_improvement, progress.best_eval_loss
    if patience is None or best is None or waited < patience:
        return None
    return f"no lower held-out loss than {best:.4f}, after step {progress.best_eval_step}, in {_in_a_row(waited)}"


def _in_a_row(evaluations: int) -> str:
    return counted(evaluations, "evaluation") + (" in a row" if evaluations > 1 else "")
