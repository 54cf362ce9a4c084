"""Too little memory for training: what to say of it."""

from __future__ import annotations

from qlora_cli.recipe.schema import TrainingSection


def how_to_need_less(section: TrainingSection) -> str:
    """What to change in the recipe, so that a step fits."""
    advice = [] if section.gradient_checkpointing else ["set gradient_checkpointing: true"]
    if section.per_device_train_batch_size > 1:
        advice.append("halve per_device_train_batch_size and double gradient_accumulation_steps")
    return f"To need less: {'; '.join([*advice, 'lower dataset.max_length'])}"


def how_to_evaluate_in_less(section: TrainingSection) -> str:
    """What to change in the recipe, so that an evaluation fits."""
    size = section.per_device_eval_batch_size or section.per_device_train_batch_size
    advice = [f"set per_device_eval_batch_size to less than {size}"] if size > 1 else []
    return f"To need less: {'; '.join([*advice, 'lower dataset.max_length'])}"
