"""Prompts are read before they are answered: what they begin with alike, once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.memory import planned_tokens, within_memory
from qlora_cli.evaluation.answering.prefix_tree import Ints, PrefixTree
from qlora_cli.evaluation.answering.row_cache import BLOCK, RowCache
from qlora_cli.evaluation.answering.rows import Row
from qlora_cli.evaluation.answering.tree_walk import Kept, TreeWalk

# Fewer tokens than these in a forward pass free nothing: fewer rows do.
_FEWEST = 16


class PromptReader:
    """Reads the prompts of many rows, batch by batch.

    The prompts are one prefix tree. A batch is the next rows in its order, and what the batch after it shares with
    it is kept, so that no token after the same beginning is read twice.

    Args:
        model: one whose prompts can be read as a tree.
        rows: all that will be read.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        self._walk = TreeWalk(model)
        self._tree = PrefixTree.of([row.prompt.tokens for row in rows])
        self._last = {id(row): int(node) for row, node in zip(rows, self._tree.last, strict=True)}
        self._stretch = planned_tokens(model)
        self._begin = 0
        self._kept = Kept.none()  # the ancestors of node `_begin`
        self.rows = sorted(rows, key=lambda row: self._last[id(row)])  # the order to be read in

    def read(self, batch: Sequence[Row]) -> tuple[RowCache, Tensor]:
        """Keys and values of the next rows, and the logits after them, [rows, vocabulary], in the model's dtype.

        Args:
            batch: rows in the order of `rows`; rows that were read before can be read again.

        Raises:
            MemoryError, RuntimeError: memory does not suffice for this batch.
        """
        last = np.array([self._last[id(row)] for row in batch], np.int64)
        nodes = self._unread(int(last[0]), int(last[-1]) + 1)
        asked = np.unique(last)
        logits, seen, parts = self._read(nodes, asked)
        cache = self._as_rows(batch, parts)  # which takes the parts apart
        self._begin = int(last[-1]) + 1
        self._kept = seen.only(self._tree.ancestors(self._begin))
        return cache, logits[torch.from_numpy(np.searchsorted(asked, last)).to(logits.device)]

    def _unread(self, first: int, end: int) -> Ints:
        """The nodes to be computed, ascending, for rows whose last nodes go from `first` to before `end`."""
        if first >= self._begin:
            return np.arange(self._begin, end)
        # Memory did not suffice the last time, or the row before had the same tokens.
        self._kept = Kept.none()
        return np.concatenate([self._tree.path(first), np.arange(first + 1, end)])

    def _read(self, nodes: Ints, asked: Ints) -> tuple[Tensor, Kept, list[Kept]]:
        """Logits after the asked nodes; what the last pass saw and computed; and all of it, in parts."""
        seen, parts, logits = self._kept, [self._kept], []
        most = self._stretch
        while len(nodes):
            stretch = _next_stretch(nodes, most)
            begin, end = int(stretch[0]), int(stretch[-1]) + 1
            seen = seen.only(self._tree.ancestors(begin))
            here = asked[(asked >= begin) & (asked < end)]
            found = within_memory(self._walk.forward, self._tree, begin, end, seen, here)
            if found is None:
                most = _lowered(len(stretch))
                continue
            said, after = found
            logits.append(said)
            parts.append(_newest(after, len(stretch)))
            seen, nodes = after, nodes[len(stretch) :]
        self._stretch = most  # not where fewer rows are the remedy: they are read as fast as planned
        return torch.cat(logits), seen, parts

    def _as_rows(self, batch: Sequence[Row], parts: list[Kept]) -> RowCache:
        """Keys and values of each row's tokens, padded on the left, with room for the first tokens of the answer.

        The parts are taken apart, layer by layer: both forms of all layers would be more than memory is planned for.
        """
        columns = max(row.length for row in batch)
        nodes = np.concatenate([part.nodes for part in parts])
        paths = np.full((len(batch), columns + BLOCK), nodes[0])  # padding is of any node: it is never seen
        for place, row in enumerate(batch):
            paths[place, columns - row.length : columns] = self._tree.path(self._last[id(row)])
        places = torch.from_numpy(np.searchsorted(nodes, paths))
        waiting = [list(reversed(part.layers)) for part in parts if part.layers]
        parts.clear()
        layers = []
        while waiting[0]:
            pairs = [part.pop() for part in waiting]
            keys, values = (torch.cat([pair[side] for pair in pairs], dim=-2) for side in (0, 1))
            layers.append((_gathered(keys, places), _gathered(values, places)))
        return RowCache(layers, columns)


def _next_stretch(nodes: Ints, most: int) -> Ints:
    """The first of these nodes, ascending, that follow each other without a gap."""
    ahead = nodes[:most]
    gaps = np.flatnonzero(np.diff(ahead) != 1)
    return ahead[: gaps[0] + 1] if len(gaps) else ahead


def _lowered(tokens: int) -> int:
    """How many tokens are read at once where so many were too many. Raises MemoryError if they are few already."""
    if tokens <= _FEWEST:
        raise MemoryError(f"{tokens} tokens do not fit beside what the batch has read")
    return tokens // 2


def _newest(kept: Kept, count: int) -> Kept:
    """The last `count` nodes alone, in memory of their own."""
    if count == len(kept.nodes):
        return kept
    layers = tuple((keys[..., -count:, :].clone(), values[..., -count:, :].clone()) for keys, values in kept.layers)
    return Kept(kept.nodes[-count:], layers)


def _gathered(states: Tensor, places: Tensor) -> Tensor:
    """States [1, heads, nodes, width] at places [rows, columns] as [rows, heads, columns, width]."""
    _, heads, _, width = states.shape
    chosen = states[0].index_select(1, places.flatten().to(states.device))
    return chosen.view(heads, *places.shape, width).transpose(0, 1)
