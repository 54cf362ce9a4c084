"""What to say when memory runs out: where it was, what is saved, and what needs less."""

from __future__ import annotations

from qlora_cli.recipe.schema import EvaluationSection, TrainingSection


def in_training(section: TrainingSection, device: str) -> str:
    """In a forward or backward pass of training, or before."""
    advice = ["halve per_device_train_batch_size and double gradient_accumulation_steps", "lower dataset.max_length"]
    if not section.gradient_checkpointing:
        advice.insert(0, "set gradient_checkpointing: true")
    return f"out of memory on {device}. What was saved before is whole. To need less: {'; '.join(advice)}"


def in_evaluation(section: TrainingSection) -> str:
    """What to do about an evaluation."""
    size = eval_batch_size(section)
    if size == 1:
        return "training.per_device_eval_batch_size is 1 already: go on with --resume where there is more memory"
    return f"Set training.per_device_eval_batch_size lower (it is {size}) and go on with --resume"


def in_scoring(section: EvaluationSection) -> str:
    """What to do about scoring on benchmarks."""
    size = section.per_device_batch_size
    if size == 1:
        return "evaluation.per_device_batch_size is 1 already: go on with --resume where there is more memory"
    now = "by default it is as many as it takes" if size is None else f"it is {size}"
    return f"Set evaluation.per_device_batch_size lower ({now}) and go on with --resume"


def eval_batch_size(section: TrainingSection) -> int:
    """Rows, or packs of rows, in one evaluation pass on one device."""
    return section.per_device_eval_batch_size or section.per_device_train_batch_size
