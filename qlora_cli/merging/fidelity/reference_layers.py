"""Layers with what an adapter does beside them, one and the other to be asked: slow and plain, to measure merges by.

Plain LoRA has the layer that it was trained with; these are for the rest: DoRA, biases that came with B, embeddings,
parameters that were saved whole.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_cli.model.quantization import frozen_weight


class Beside(nn.Module):
    """A module of the base and what training made of it: `enabled` says which of them answers."""

    def __init__(self, base: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        self.base, self.trained = base, trained
        self.enabled = True

    @property
    def answering(self) -> nn.Module:
        """The one that is asked."""
        return self.trained if self.enabled else self.base

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.answering(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        # A model may look at its layers' weights, dtypes or padding.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.answering, name)


class LinearUpdate(nn.Module):
    """y = f · (W x + s B A x) + b, where f is m / ‖W + s B A‖ for a magnitude m (DoRA), and 1 without.

    Source of f: DoRA (Liu et al. 2024, arXiv 2402.09353), equation 5.

    Args:
        base: `Linear`, `Linear4bit` or `Conv1D`; its weight is W, unless `weight` is given.
        a, b: float32 [rank, in] and [out, rank].
        scale: s.
        compute_dtype: of all products.
        magnitude: m, float32 [out].
        weight: W [out, in], in place of the base's.
        bias: b, whole; None is the base's own.
    """

    def __init__(
        self,
        base: nn.Module,
        a: Tensor,
        b: Tensor,
        scale: float,
        compute_dtype: torch.dtype,
        *,
        magnitude: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base, self.compute_dtype = base, compute_dtype
        self.a, self.b, self.scale = a.to(compute_dtype), b.to(compute_dtype), scale
        self.given = weight
        self.factor: Tensor | None = None
        if magnitude is not None:
            whole = self._weight(torch.float32) + scale * (b @ a)
            self.factor = (magnitude / torch.linalg.vector_norm(whole, dim=1)).to(compute_dtype)
        own = base.bias
        self.bias = bias if bias is not None else own if isinstance(own, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        given = x.to(self.compute_dtype)
        y = F.linear(given, self._weight(self.compute_dtype))
        y = y + self.scale * F.linear(F.linear(given, self.a), self.b)
        if self.factor is not None:
            y = y * self.factor
        if self.bias is not None:
            y = y + self.bias.to(self.compute_dtype)
        return y.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """W as it is stored, for code that looks at a layer's dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """W, [out, in]."""
        given: Tensor | None = self.given
        return frozen_weight(self.base, dtype) if given is None else given.to(dtype)


class EmbeddingUpdate(nn.Module):
    """f · (E[x] + s (B A)ᵀ[x]), where f is m / ‖E + s (B A)ᵀ‖, down the columns, for a magnitude m, and 1 without.

    Args:
        base: an embedding; its rows are E. What it multiplies them by, the update is multiplied by, too.
        a, b: float32 [rank, rows] and [width, rank].
        scale: s.
        magnitude: m, float32 [width].
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float, *, magnitude: Tensor | None = None) -> None:
        super().__init__()
        self.base = base
        self.a, self.b, self.scale = a, b, scale
        self.factor: Tensor | None = None
        if magnitude is not None:
            whole = self.weight.float() + scale * (b @ a).t()
            self.factor = magnitude / torch.linalg.vector_norm(whole, dim=0)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] to [..., width], in the base's dtype."""
        rows = self.base(ids)
        update = self.scale * (F.embedding(ids, self.a.t()) @ self.b.t())
        multiplier = getattr(self.base, "embed_scale", 1.0)
        whole: Tensor = rows.float() + update * multiplier
        return (whole if self.factor is None else whole * self.factor).to(rows.dtype)

    @property
    def weight(self) -> Tensor:
        """E as it is stored."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight


def with_parameters(base: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """The module with other values in some of its own parameters; it shares all else with `base`, which is unchanged.

    Args:
        parameters: by name, shaped as the module without quantisation holds them.
    """
    if isinstance(base, nn.Linear) and "weight" in parameters:
        return _linear(parameters["weight"], parameters.get("bias", base.bias))  # what is in 4 bits takes no other
    other = copy.copy(base)
    # A shallow copy has the very same dictionaries.
    other.__dict__["_parameters"] = dict(base._parameters)
    for name, value in parameters.items():
        other._parameters[name] = nn.Parameter(value, requires_grad=False)
    return other


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
