"""Whether a prefix tree may be walked with a model: what its configuration says, and a trial on the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qlora_cli.evaluation.answering.likeness import BRANCHES, difference, fault_in, logits_alone, made_up_rows, rounding
from qlora_cli.evaluation.answering.prefix_tree import PrefixTree
from qlora_cli.evaluation.answering.tree_walk import Kept, TreeWalk

# Odd, so that stretches end within branches.
_STRETCH = 7

# Names of settings that say how far back a layer looks, and those that sound like it.
_WINDOWS = ("window", "chunk_size")
_NO_WINDOWS = ("layers", "pattern", "feed_forward", "audio", "vision", "mamba", "ssm")


class Verdict(NamedTuple):
    """Whether a model can share what rows begin with alike.

    Attributes:
        fault: why it cannot, to follow upon "row by row: "; None if it can.
        reach: the longest row that it can do so for; None is any.
    """

    fault: str | None
    reach: int | None = None


def examine(model: PreTrainedModel) -> Verdict:
    """Look at the model, then try it: a small tree in stretches against its rows alone, some 200 tokens.

    Weights and random state stay as they are. The model is to be in eval mode.
    """
    fault = _fault_of_layers(model) or _fault_of_masks(model)
    if fault is not None:
        return Verdict(fault)
    reach = _reach(model)
    if reach is not None and reach < max(length for _, length in BRANCHES):
        return Verdict(f"its attention looks back {reach} tokens only")
    return Verdict(_fault_in_trial(model), reach)


def _fault_of_layers(model: PreTrainedModel) -> str | None:
    """Layers that keep anything but keys and values of every token, as transformers would set up their cache."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:  # configurations of remote code may lack what it asks for
        return f"its layers cannot be told: {error}"
    kinds = sorted({type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"})
    if kinds or getattr(model, "_is_stateful", False):
        return f"its layers keep more than keys and values ({', '.join(kinds) or 'a state'})"
    return None


def _fault_of_masks(model: PreTrainedModel) -> str | None:
    """Square masks that a module brings itself: it finds its place in them by counting keys, not by positions."""
    for name, buffer in model.named_buffers():
        square = buffer.ndim >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1
        if square and buffer.dtype in (torch.bool, torch.uint8):
            return f"its attention has a mask of its own ({name})"
    # So does ALiBi, and no other trace of it is as plain; half precision may hide it from the trial.
    return "its attention counts distances from key to key (ALiBi)" if _alibi(model.config.to_dict()) else None


def _alibi(settings: dict[str, Any]) -> bool:
    inner = [value for value in settings.values() if isinstance(value, dict)]
    return bool(settings.get("alibi")) or any(_alibi(values) for values in inner)


def _reach(model: PreTrainedModel) -> int | None:
    """The longest row in which every token sees all before it, at positions that mean the same in any row."""
    config = model.config.get_text_config(decoder=True)
    limits = [layer.sliding_window for layer in DynamicCache(config=config).layers if hasattr(layer, "sliding_window")]
    for name, value in config.to_dict().items():
        window = any(part in name for part in _WINDOWS) and not any(part in name for part in _NO_WINDOWS)
        if window and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            limits.append(value)
    if (turned := rope_reach(model)) is not None:
        limits.append(turned)
    return min(map(int, limits), default=None)


def rope_reach(model: PreTrainedModel) -> int | None:
    """The longest row that turns all others in its batch as they turn alone; None is any.

    Some rotary frequencies change where the longest row is longer than what the model was first made for.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
        for rope in _ropes(getattr(config, "rope_parameters", None))
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(map(int, limits), default=None)


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """Settings of rotary positions: one set of them, or one for each type of layer."""
    if isinstance(parameters, dict):
        yield parameters
        for inner in parameters.values():
            yield from _ropes(inner)


def _fault_in_trial(model: PreTrainedModel) -> str | None:
    rows = made_up_rows(model)

    def trial() -> tuple[float, float]:
        alone = [logits_alone(model, row) for row in rows]
        most = rounding(model, rows, alone)
        return difference(_in_tree(model, rows), alone), most

    return fault_in(trial)


def _in_tree(model: PreTrainedModel, rows: list[list[int]]) -> list[Tensor]:
    """The logits of each row, [length, vocabulary], from the tree of them all."""
    tree = PrefixTree.of(rows)
    walk = TreeWalk(model)
    kept = Kept.none()
    found: list[Tensor] = []
    for begin in range(0, len(tree), _STRETCH):
        end = min(begin + _STRETCH, len(tree))
        logits, kept = walk.forward(tree, begin, end, kept, np.arange(begin, end))
        found.append(logits)
        kept = kept.only(tree.ancestors(end))
    every = torch.cat(found)
    return [every[torch.from_numpy(tree.path(last)).to(every.device)] for last in tree.last.tolist()]
