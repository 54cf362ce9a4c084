"""Rotary position embeddings that remember, put back to their start: a forward pass depends on its rows alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def rewind_rotary(model: nn.Module) -> None:
    """Let a model with dynamic NTK scaling forget the longest row that it has seen.

    transformers stretches the frequencies when a row is longer than any before it, and keeps them so for shorter ones:
    what a step computes would depend on the steps before it, and a run that goes on would not be the one that was
    never stopped. Other models stay as they are.

    Args:
        model: wrapped for data parallelism or not.
    """
    for module in model.modules():
        for prefix in _dynamic(module):
            _rewind(module, prefix)


def _dynamic(module: Any) -> Iterator[str]:
    """What the names of a module's dynamic frequencies begin with: of one set nothing, of several the layer type."""
    kind = getattr(module, "rope_type", None)
    if kind is None or not hasattr(module, "original_max_seq_len"):
        return
    kinds = {f"{layer}_": one for layer, one in kind.items()} if isinstance(kind, dict) else {"": kind}
    yield from (prefix for prefix, one in kinds.items() if "dynamic" in one)


def _rewind(module: Any, prefix: str) -> None:
    start = module.original_max_seq_len
    longest = getattr(module, f"{prefix}max_seq_len_cached", start)
    if isinstance(longest, int) and longest == start:  # a row that was longer has left a tensor
        return
    setattr(module, f"{prefix}max_seq_len_cached", start)
    stretched = getattr(module, f"{prefix}inv_freq")
    original = getattr(module, f"{prefix}original_inv_freq").to(stretched.device)
    # A copy: two names of one tensor would change together.
    module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
