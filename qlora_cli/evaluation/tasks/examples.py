"""Where the examples in prompts come from, by the rules of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_USUAL = ("training_split", "validation_split", "test_split")


def split_by_config(config: Mapping[str, Any]) -> str | None:
    """The split that examples of a task will be drawn from, by its configuration; None if from none.

    What a class does in code of its own is not in there.
    """
    given = config.get("fewshot_config")
    given = given if isinstance(given, dict) else {}
    return _split(given.get("split", config.get("fewshot_split")), given.get("samples"), config.get)


def split_of(task: Any) -> str | None:
    """The split that examples of a task that was built are drawn from, as far as its configuration tells."""
    return _split(task.fewshot_cfg.split, task.fewshot_cfg.samples, lambda key: getattr(task.config, key))


def are_given(task: Any) -> bool:
    """Whether the configuration itself has the examples of a task."""
    return task.fewshot_cfg.split is None and task.fewshot_cfg.samples is not None


def could_be_drawn(task: Any, pool: Sequence[Any], count: int) -> Sequence[Any]:
    """Those of the rows in `pool` that may come to be examples, where up to `count` are drawn at a time."""
    from lm_eval.api.samplers import FirstNSampler

    return pool[:count] if type(task.sampler).sample is FirstNSampler.sample else pool


def _split(own: str | None, samples: object, config: Callable[[str], Any]) -> str | None:
    if own is not None or samples is not None:
        return own
    split: str | None = next((split for split in map(config, _USUAL) if split is not None), None)
    return split
