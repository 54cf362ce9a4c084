"""Means over tokens and how certain they are, where the rows are what was drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_cli.merging.fidelity.divergence import Move


def standard_error(differences: Sequence[float], weights: Sequence[float]) -> float:
    """Of the quotient Σ differences / Σ weights, each pair of them being one of a row, or of whatever was drawn.

    The tokens of a row are not independent, so that a row counts as one draw. Infinite for a single one.
    """
    number, total = len(differences), math.fsum(weights)
    if number < 2 or total == 0:
        return math.inf
    mean = math.fsum(differences) / total
    squares = math.fsum((d - mean * w) ** 2 for d, w in zip(differences, weights, strict=True))
    return math.sqrt(squares * number / (number - 1)) / total


class RowMove(NamedTuple):
    """Of one row, summed over what was compared: how long the trained change is, and what another has along it."""

    length: float
    along: float


def row_move(found: Move, noise: float) -> RowMove:
    """What is left of a row's move without what rounding alone puts into it.

    Args:
        noise: the squared distance of the trained model from itself, rounded otherwise. Half of it is the share of the
            base's own outputs, which both changes are measured from, so that they agree in it.
    """
    return RowMove(float(found.length.sum()) - noise, float(found.along.sum()) - noise / 2)


def share_kept(moves: Sequence[RowMove], others: Sequence[RowMove] | None = None) -> tuple[float | None, float | None]:
    """How much of the trained change is there, and its standard error, the rows being what was drawn.

    None where nothing was changed; the error, too, where there is only one row.

    Args:
        others: of another model on the same rows; then it is how much more is there.
    """
    length, along = [move.length for move in moves], [move.along for move in moves]
    if others is not None:
        along = [own - other.along for own, other in zip(along, others, strict=True)]
    if math.fsum(length) <= 0:
        return None, None
    error = standard_error(along, length)
    return math.fsum(along) / math.fsum(length), error if math.isfinite(error) else None


def paired_difference(
    trained: Sequence[Tensor | None], other: Sequence[Tensor | None]
) -> tuple[float | None, float | None]:
    """The mean difference of the losses of each row's tokens, and its standard error, None for a single row."""
    pairs = [
        (float((o - t).sum()), len(t)) for t, o in zip(trained, other, strict=True) if t is not None and o is not None
    ]
    if not pairs:
        return None, None
    sums, tokens = zip(*pairs, strict=True)
    error = standard_error(sums, tokens)
    return math.fsum(sums) / sum(tokens), error if math.isfinite(error) else None


def mean_of(rows: Sequence[Tensor | None]) -> float | None:
    """Over the tokens of all rows that have any; None if none has."""
    there = [row for row in rows if row is not None]
    return float(torch.cat(there).mean()) if there else None
