"""Sequences of tokens as a forest in which what they begin with alike is there once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
_Tokens: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Every token after every different beginning, in depth-first order: a node.

    A node's ancestors are the tokens before it: k is q or an ancestor of q exactly where k <= q < end[k]. Of branches,
    the one with the longest sequence comes first, so that memory runs out at the beginning or not at all.

    Attributes:
        token: int32 [nodes], ids.
        depth: int32 [nodes], the position in the sequence, from 0.
        end: int32 [nodes], the node after the last one below it.
        last: int64 [sequences], the node of each sequence's last token, in the order they were given in.
    """

    token: _Tokens
    depth: _Tokens
    end: _Tokens
    last: Ints
    # Runs of nodes each of which is the parent of the next: where each starts, and the parent of that node or -1.
    _starts: Ints = field(repr=False)
    _parents: Ints = field(repr=False)

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> PrefixTree:
        """The tree of sequences of at least one token each; there may be none of them, and equal ones."""
        # Any order that keeps equal beginnings together does, and comparing bytes is the fastest.
        keys = [array("i", tokens).tobytes() for tokens in sequences]
        different = sorted(set(keys))
        rows = [np.frombuffer(key, dtype=np.int32) for key in different]
        laid = _Layout(rows)
        number = {key: index for index, key in enumerate(different)}
        last = laid.last[np.fromiter((number[key] for key in keys), np.int64, len(keys))]
        return cls(laid.token, laid.depth, laid.end, last, laid.starts, laid.parents)

    def __len__(self) -> int:
        return len(self.token)

    def stretch(self, begin: int, nodes: int, sequences: int | None = None) -> int:
        """Where a stretch from `begin` ends that has at most so many nodes, of at most so many sequences' own."""
        end = min(begin + nodes, len(self))
        if sequences is not None:
            run = int(np.searchsorted(self._starts, begin, side="right")) - 1 + sequences
            end = min(end, int(self._starts[run])) if run < len(self._starts) else end
        return end

    def path(self, node: int, length: int | None = None) -> Ints:
        """The node and its ancestors, from the root on: all of them, or the last `length`. -1 has none."""
        parts: list[Ints] = []
        wanted = length if length is not None else len(self.token)
        while node >= 0 and wanted > 0:
            run = int(np.searchsorted(self._starts, node, side="right")) - 1
            first = max(int(self._starts[run]), node + 1 - wanted)
            parts.append(np.arange(first, node + 1))
            wanted -= len(parts[-1])
            node = int(self._parents[run])
        return np.concatenate(parts[::-1]) if parts else np.empty(0, np.int64)

    def ancestors(self, node: int) -> Ints:
        """The node's ancestors without itself, from the root on; of the number of nodes, none."""
        return self.path(node)[:-1] if node < len(self) else np.empty(0, np.int64)


class _Layout:
    """Lays sorted, different sequences out in depth-first order."""

    def __init__(self, rows: Sequence[_Tokens]) -> None:
        order, shared = _longest_first(rows)
        self.last = np.empty(len(rows), np.int64)
        starts: list[int] = []
        parents: list[int] = []
        total = sum(len(rows[row]) - kept for row, kept in zip(order, shared, strict=True))
        self.depth: _Tokens = np.empty(total, np.int32)
        self.end: _Tokens = np.full(total, total, np.int32)
        path = np.empty(max(map(len, rows), default=0), np.int64)  # by depth, of the sequence that is being laid
        nodes, before = 0, 0
        for row, kept in zip(order, shared, strict=True):
            length = len(rows[row])
            self.end[path[kept:before]] = nodes
            if kept < length:
                starts.append(nodes)
                parents.append(int(path[kept - 1]) if kept else -1)
                path[kept:length] = np.arange(nodes, nodes + length - kept)
                self.depth[nodes : nodes + length - kept] = np.arange(kept, length)
                nodes += length - kept
            self.last[row] = path[length - 1]
            before = length
        new = [rows[row][kept:] for row, kept in zip(order, shared, strict=True)]
        self.token: _Tokens = np.concatenate(new) if new else np.empty(0, np.int32)
        self.starts = np.array(starts, np.int64)
        self.parents = np.array(parents, np.int64)


class _Branch:
    """Where sequences part: after how many tokens, into what, and the length of the longest of them."""

    __slots__ = ("children", "depth", "longest")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.longest = depth
        self.children: list[tuple[int, _Branch | int]] = []  # the longest in it, and the branch or the sequence

    def add(self, longest: int, child: _Branch | int) -> None:
        self.longest = max(self.longest, longest)
        self.children.append((longest, child))


def _longest_first(rows: Sequence[_Tokens]) -> tuple[list[int], list[int]]:
    """An order of sorted sequences, and how many tokens each has in common with the one before it there."""
    root = _branches(rows)
    order: list[int] = []
    shared: list[int] = []
    left: list[tuple[_Branch | int, int]] = [(root, 0)]
    while left:
        at, kept = left.pop()
        if isinstance(at, int):
            order.append(at)
            shared.append(kept)
            continue
        at.children.sort(key=lambda child: -child[0])
        left.extend((child, at.depth) for _, child in reversed(at.children[1:]))
        left.extend((child, kept) for _, child in at.children[:1])
    return order, shared


def _branches(rows: Sequence[_Tokens]) -> _Branch:
    """Where sorted sequences part, from the root down."""
    open_branches = [_Branch(0)]
    for index, row in enumerate(rows):
        kept = _common(row, rows[index + 1]) if index + 1 < len(rows) else 0
        longest: int = len(row)
        child: _Branch | int = index
        while open_branches[-1].depth > kept:
            done = open_branches.pop()
            done.add(longest, child)
            longest, child = done.longest, done
        if open_branches[-1].depth < kept:
            open_branches.append(_Branch(kept))
        open_branches[-1].add(longest, child)
    return open_branches[0]


def _common(one: _Tokens, other: _Tokens) -> int:
    """How many tokens two different sequences begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
