"""What to say when memory runs out: where it was, what is saved, and what needs less."""

from __future__ import annotations

from qlora_cli.recipe.schema import EvaluationSection, TrainingSection


def in_training(section: TrainingSection, device: str) -> str:
    """In an update of the weights, or before training."""
    return f"out of memory on {device}. What was saved before is whole. {how_to_need_less(section)}"


def in_a_step(section: TrainingSection, device: str, step: int, saved: str) -> str:
    """In the forward or backward pass of a step; `saved` says what there is to go on from."""
    return f"step {step} ran out of memory on {device}; {saved}. {how_to_need_less(section)}"


def how_to_need_less(section: TrainingSection) -> str:
    """What to change in the recipe, so that a step fits."""
    advice = [] if section.gradient_checkpointing else ["set gradient_checkpointing: true"]
    if section.per_device_train_batch_size > 1:
        advice.append("halve per_device_train_batch_size and double gradient_accumulation_steps")
    return f"To need less: {'; '.join([*advice, 'lower dataset.max_length'])}"


def how_to_evaluate_in_less(section: TrainingSection) -> str:
    """What to change in the recipe, so that an evaluation fits."""
    size = eval_batch_size(section)
    advice = [f"set per_device_eval_batch_size to less than {size}"] if size > 1 else []
    return f"To need less: {'; '.join([*advice, 'lower dataset.max_length'])}"


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
