"""How far apart what two models say is, position by position, in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK_VALUES = 2_000_000  # of one tensor in double precision: 16 MB


class Move(NamedTuple):
    """Where the trained model went from its base, and where another one did, each float64 [positions].

    With d the change of what is said from the base to the trained model and e that to the other one, `length` is ⟨d, d⟩
    and `along` ⟨d, e⟩: their sums' quotient is the share of the trained change that the other model has.
    """

    length: Tensor
    along: Tensor


def divergence(trained: Tensor, other: Tensor, *, are_logits: bool) -> Tensor:
    """KL(trained ‖ other) in nats for each position; of what are no logits, ‖trained - other‖² / ‖trained‖².

    Args:
        trained, other: [positions, classes], on one device.
        are_logits: whether they are.

    Returns:
        float64 [positions].
    """
    parts = []
    for t, o in _chunks(trained, other):
        if are_logits:
            log_t, log_o = F.log_softmax(t, dim=-1), F.log_softmax(o, dim=-1)
            # What both rule out (a logit of minus infinity) is no difference.
            parts.append(torch.where(log_t > -torch.inf, log_t.exp() * (log_t - log_o), 0.0).sum(-1))
        else:
            parts.append((t - o).square().sum(-1) / t.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny))
    return torch.cat(parts)


def move(trained: Tensor, base: Tensor, other: Tensor, *, are_logits: bool) -> Move:
    """What the trained model changed about its base, and how much of that the other model has.

    The changes of log-probabilities are weighed by what the trained model holds probable: for small changes the inner
    product is Fisher's, and half of `length` is KL(trained ‖ base).

    Args:
        trained, base, other: [positions, classes], on one device.
        are_logits: whether they are; else they are compared as vectors.
    """
    lengths, alongs = [], []
    for t, b, o in _chunks(trained, base, other):
        if are_logits:
            log_t, log_b, log_o = (F.log_softmax(x, dim=-1) for x in (t, b, o))
            weight = log_t.exp()
            d, e = (torch.where(weight > 0, x - log_b, 0.0) for x in (log_t, log_o))
            d = d - (weight * d).sum(-1, keepdim=True)
            weighted = weight * d
        else:
            d, e = t - b, o - b
            weighted = d
        lengths.append((weighted * d).sum(-1))
        alongs.append((weighted * e).sum(-1))
    return Move(torch.cat(lengths), torch.cat(alongs))


def _chunks(*scores: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few positions of each, in double precision."""
    size = max(1, _CHUNK_VALUES // scores[0].shape[-1])
    for parts in zip(*(torch.split(x, size) for x in scores), strict=True):
        yield tuple(part.double() for part in parts)
