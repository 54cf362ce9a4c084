"""How far numbers are from what they should be."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


def largest(differences: Iterable[float]) -> float:
    """The largest of them; NaN if one is, which is larger than any bound."""
    found = list(differences)
    return math.nan if any(map(math.isnan, found)) else max(found)


def relative_to_largest(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors of one shape, as a share of the largest entry wanted; 0 where both are 0.

    Infinite if what should be 0 everywhere is not.
    """
    off = float((got - wanted).abs().max())
    scale = float(wanted.abs().max())
    if scale:
        return off / scale
    return off and math.inf
