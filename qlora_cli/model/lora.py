"""The LoRA layer: h = W0 x + (alpha / r) B A x over a frozen, possibly 4-bit, W0.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), section 4.1; QLoRA (Dettmers et al. 2023, arXiv 2305.14314),
equation 5. The backward pass is written by hand: autograd would keep a dequantised copy of every weight, or a cast
copy of every input, alive from the forward pass to the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_cli.model.quantization import frozen_product, frozen_weight, linear_shape


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update beside it.

    Wraps `nn.Linear`, bitsandbytes' `Linear4bit` or `Linear8bitLt`, or GPT-2's `Conv1D`. `lora_A` [rank, in] and
    `lora_B` [out, rank] are float32 master weights, cast to `compute_dtype` for the products.

    Raises:
        TypeError: if `base` is none of these.
    """

    def __init__(self, base: nn.Module, *, rank: int, alpha: float, dropout: float, compute_dtype: torch.dtype) -> None:
        super().__init__()
        shape = linear_shape(base)
        if shape is None:
            raise TypeError(f"expected Linear, Linear4bit, Linear8bitLt or Conv1D, got {type(base).__name__}")
        device = next(base.parameters()).device
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = shape
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.dropout = dropout
        self.compute_dtype = compute_dtype
        self.enabled = True
        self.train(base.training)  # or an adapter put on a model in eval mode would drop inputs
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))

    def initialize(self, generator: torch.Generator) -> None:
        """Kaiming-uniform A and zero B, so that training starts at the base model.

        Drawn on the CPU in float32: the same seed gives the same start on every device.
        """
        start = torch.empty(self.lora_A.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(start)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        if not self.enabled:
            # The same product that the update is added to, so that on and off differ by the update alone.
            return frozen_product(self.base, x.to(self.compute_dtype), self._bias()).to(x.dtype)
        keep = None
        if self.training and self.dropout > 0:
            keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.dropout)
        x_compute = x.to(self.compute_dtype)
        output: Tensor = _LoRAProduct.apply(x_compute, self.lora_A, self.lora_B, keep, self)  # type: ignore[no-untyped-call]
        return output.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The frozen weight as it is stored, for code that looks at a layer's dtype or device.

        A model that multiplies with it instead of calling the layer goes past the update; `bypassed_layers` finds it.
        """
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias as it is stored, if there is one."""
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None

    def update(self) -> Tensor:
        """(alpha / r) B A as [out, in], float32: what the adapter adds to the frozen weight."""
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())

    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.to(self.compute_dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}, compute_dtype={self.compute_dtype}"


class _LoRAProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, keeping only x, drop(x) Aᵀ [tokens, rank], A, B and the dropout mask.

    With g the gradient of y:  dB = s · gᵀ (drop(x) Aᵀ),  dA = s · (g B)ᵀ drop(x),  dx = g W + s · drop'((g B) A).

    Products are in x's dtype: with bfloat16, dA and dB are rounded to it once for each micro-batch, and summed over
    micro-batches in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, keep: Tensor | None, layer: LoRALinear) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        output = frozen_product(layer.base, flat, layer._bias())
        reduced = _drop(flat, keep, layer.dropout) @ lora_A.to(x.dtype).t()
        output.addmm_(reduced, lora_B.to(x.dtype).t(), alpha=layer.scale)
        ctx.save_for_backward(x, reduced, lora_A, lora_B, keep)
        ctx.layer = layer
        return output.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, reduced, lora_A, lora_B, keep = ctx.saved_tensors
        layer: LoRALinear = ctx.layer
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        grad = grad_output.reshape(-1, layer.out_features)
        grad_reduced = layer.scale * (grad @ lora_B.to(grad.dtype)) if need_x or need_a else None
        grad_b = (layer.scale * (grad.t() @ reduced)).to(lora_B.dtype) if need_b else None
        grad_a = grad_x = None
        if need_a and grad_reduced is not None:
            flat = _drop(x.reshape(-1, layer.in_features), keep, layer.dropout)
            grad_a = (grad_reduced.t() @ flat).to(lora_A.dtype)
        if need_x and grad_reduced is not None:
            weight = frozen_weight(layer.base, grad.dtype)
            low_rank = lora_A.to(grad.dtype)
            if keep is None:
                grad_x = torch.mm(grad, weight).addmm_(grad_reduced, low_rank)
            else:
                grad_x = torch.mm(grad, weight).add_(_drop(grad_reduced @ low_rank, keep, layer.dropout))
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_a, grad_b, None, None


def _drop(flat: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    """Zero what `keep` is false for and scale the rest up; its own transpose, so it serves both passes."""
    return flat if keep is None else flat * keep.reshape(flat.shape) * (1 / (1 - probability))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by module path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: A and B of every LoRA layer, in the model's order."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def bypassed_layers(model: nn.Module) -> list[str]:
    """After a backward pass: paths of LoRA layers that took no part in it, because nothing called them."""
    return [path for path, layer in lora_layers(model).items() if layer.lora_B.grad is None]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its frozen base."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
