"""A model on stretches of a prefix tree: each node computed once, seeing its ancestors and nothing else.

A walk goes over stretches from 0 to len(tree), in order, beginning with `Kept.none()`. After each of them
`kept.only(tree.ancestors(end))` is what the next one still sees; who needs all paths at the end keeps everything.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from qlora_cli.evaluation.answering.prefix_tree import Ints, PrefixTree


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys and values of nodes that have been computed.

    Attributes:
        nodes: int64 [kept], ascending.
        layers: of each layer the keys and the values, [1, key heads, kept, dim] each; empty where nothing is kept.
    """

    nodes: Ints
    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def none(cls) -> Kept:
        """What is kept before anything is computed."""
        return cls(np.empty(0, np.int64), ())

    def only(self, nodes: Ints) -> Kept:
        """Those of the kept nodes that are given: ascending, and all of them kept. The rest of the memory is free."""
        if not len(nodes):
            return Kept.none()
        if len(nodes) == len(self.nodes):
            return self
        places = torch.from_numpy(np.searchsorted(self.nodes, nodes))
        return Kept(nodes, tuple((_select(k, places), _select(v, places)) for k, v in self.layers))


class TreeWalk:
    """Computes stretches of prefix trees with one model.

    The model must keep plain keys and values in every layer, take `position_ids` and a 4-D mask, and look back as far
    as the tree is deep: `scorer.py` finds out. It is to be in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._slices = "logits_to_keep" in inspect.signature(model.forward).parameters
        # Eager attention adds the mask to the scores; the others are told what may be seen.
        self._adds = model.config.get_text_config(decoder=True)._attn_implementation == "eager"
        weight = model.get_input_embeddings().weight
        self._device = weight.device
        self._dtype = weight.dtype

    @torch.no_grad()
    def forward(self, tree: PrefixTree, begin: int, end: int, kept: Kept, asked: Ints) -> tuple[Tensor, Kept]:
        """Compute nodes `begin` to `end` in one forward pass of batch size 1. Nothing that was given is changed.

        Args:
            begin, end: the stretch, of at least one node.
            kept: all ancestors of `begin` at least; others are not seen, and cost.
            asked: int64 [asked], ascending, nodes of the stretch after which the next token is asked for.

        Returns:
            Logits [asked, vocabulary] in the model's dtype, and what was kept with the stretch's own nodes after it.

        Raises:
            ValueError: if the model does not keep keys and values of every token in every layer.
        """
        nodes = np.concatenate([kept.nodes, np.arange(begin, end)])
        inputs: dict[str, Any] = {
            "input_ids": self._put(tree.token[begin:end]),
            "position_ids": self._put(tree.depth[begin:end]),
            "attention_mask": self._mask(tree, begin, end, nodes),
        }
        # Never none of them: a matrix without rows is not for every kernel.
        places = torch.from_numpy(asked - begin if len(asked) else np.zeros(1, np.int64)).to(self._device)
        if self._slices:
            inputs["logits_to_keep"] = places
        # With no config it holds plain layers, and no window drops what a later branch may need.
        cache = DynamicCache()
        cache.layers = [_KeptLayer(keys, values) for keys, values in kept.layers]
        logits = self._model(**inputs, past_key_values=cache, use_cache=True).logits[0]
        if len(logits) != len(places):
            logits = logits[places]
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        if not layers or any(x is None or x.shape[-2] != len(nodes) for pair in layers for x in pair):
            raise ValueError(f"{type(self._model).__name__} does not keep keys and values of every token")
        return logits[: len(asked)], Kept(nodes, layers)

    def _put(self, ids: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64))[None].to(self._device)

    def _mask(self, tree: PrefixTree, begin: int, end: int, nodes: Ints) -> Tensor:
        """What each node of the stretch sees, [1, 1, end - begin, nodes]: true, or added to the scores, 0."""
        seen = torch.from_numpy(nodes).to(self._device)
        until = torch.from_numpy(tree.end[nodes]).to(self._device)
        asking = torch.arange(begin, end, device=self._device)[:, None]
        mask = (seen <= asking) & (asking < until)
        if self._adds:
            low = torch.finfo(self._dtype).min
            mask = torch.zeros(mask.shape, dtype=self._dtype, device=self._device).masked_fill_(~mask, low)
        return mask[None, None]


class _KeptLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that holds given keys and values themselves: put in by `update`, they would be copied."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True


def _select(states: Tensor, places: Tensor) -> Tensor:
    return states.index_select(-2, places.to(states.device))
