"""Rows laid end to end in packs of a given capacity, by best fit decreasing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Packs(NamedTuple):
    """Pack i holds rows[offsets[i]:offsets[i + 1]]; both int64."""

    rows: Ints
    offsets: Ints


def best_fit(lengths: Ints, capacity: int, generator: np.random.Generator) -> Packs:
    """Put every row into exactly one pack, the lengths of a pack adding up to at most `capacity`.

    The longest row comes first, and each goes where it leaves the least space. Which rows of equal length go together
    is drawn from `generator`; nothing else is. A row longer than `capacity` gets a pack of its own.
    """
    # An empty row takes a token's place: it would fit anywhere, endlessly.
    sizes = np.clip(lengths, 1, capacity)
    order = generator.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    distinct, counts = np.unique(sizes, return_counts=True)
    runs = dict(zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True))
    firsts = dict(zip(runs, np.cumsum([0, *runs.values()]).tolist(), strict=False))
    blocks = [_take(order, firsts, *bins) for bins in _fill(runs, capacity)]
    held = np.concatenate([np.full(len(block), block.shape[1]) for block in blocks])
    return Packs(np.concatenate([block.ravel() for block in blocks]), np.concatenate([[0], np.cumsum(held)]))


class _Content(NamedTuple):
    """What a bin holds: `each` rows of `length`, on top of what is `below` them."""

    length: int
    each: int
    below: _Content | None


class _Bins(NamedTuple):
    """So many bins with the same content: equal rows are placed a whole run at a time, not one by one."""

    number: int
    content: _Content | None


def _fill(runs: dict[int, int], capacity: int) -> Iterator[_Bins]:
    """The full bins for `runs`: how many rows there are of each length, the longest first."""
    bins: defaultdict[int, list[_Bins]] = defaultdict(list)  # by the space that is left
    spaces = bytearray(capacity + 1)  # 1 where there are such bins: the tightest is found at the speed of memchr
    for length, count in runs.items():
        while count:
            space = spaces.find(1, length)
            if space == -1:
                space = capacity
                bins[space].append(_Bins(-(-count // (capacity // length)), None))
            number, content = bins[space].pop()
            # A bin that has taken one has less space than the others, so it is filled up before the next.
            each = space // length
            filled = min(number, count // each)
            parts = [(filled, each)]
            if filled < number:
                parts += [(1, count - filled * each), (number - filled - 1, 0)]
            for some, rows in parts:
                if some:
                    top = _Content(length, rows, content) if rows else content
                    bins[space - rows * length].append(_Bins(some, top))
                    spaces[space - rows * length] = 1
                    count -= some * rows
            spaces[space] = bool(bins[space])
    for left in bins.values():
        yield from left


def _take(order: Ints, firsts: dict[int, int], number: int, content: _Content | None) -> Ints:
    """Rows for `number` bins of one content, [number, rows in each], from where `firsts` stands in `order`."""
    columns = []
    while content is not None:
        first = firsts[content.length]
        firsts[content.length] = last = first + number * content.each
        columns.append(order[first:last].reshape(number, content.each))
        content = content.below
    return np.concatenate(columns[::-1], axis=1)
