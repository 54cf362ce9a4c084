"""Sizes out of a model's configuration, for plans of memory: no model's own way of writing them may end a run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def size(config: Any, name: str, otherwise: int) -> int:
    """What a text model's configuration has under this name: the largest where layers differ, `otherwise` where it has
    none or nothing that can be read."""
    # Where layers differ, transformers raises an error of its own for the whole, and may for what is no layer.
    with suppress(Exception):
        if numbers := _numbers(getattr(config, name, None)):
            return max(numbers)
    with suppress(Exception):
        if numbers := _numbers([getattr(layer, name, None) for layer in config.per_layer_config]):
            return max(numbers)
    return otherwise


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool) and each > 0]
