"""What to say when a step's loss or gradient is NaN or infinite."""

from __future__ import annotations

from qlora_cli.evaluation.answering.memory import counted
from qlora_cli.recipe.schema import TrainingSection
from qlora_cli.training.checkpoint import Progress
from qlora_cli.training.gradients import StepSums

_WAYS_OUT = "Look at them; else try a lower learning_rate, more warmup_steps, or compute_dtype: float32"


def may_skip(section: TrainingSection, progress: Progress) -> bool:
    """Whether the next step may be passed over, if it has to be."""
    return section.on_nonfinite == "skip_step" and progress.skipped_steps < section.max_skipped_steps


def why_it_stops(section: TrainingSection, progress: Progress, step: StepSums, kept: str) -> str:
    """That training stopped before the next step, and why; `kept` says what there is to go on from."""
    skipped = ""
    if section.on_nonfinite == "skip_step":
        before = counted(progress.skipped_steps, "step")
        skipped = f" after {before} that had to be skipped, as many as training.max_skipped_steps allows"
    fault = f"step {progress.step + 1}: the {step.fault}{skipped}, so training stopped"
    return f"{fault}; {kept}. {step.suspects}. {_WAYS_OUT}"
