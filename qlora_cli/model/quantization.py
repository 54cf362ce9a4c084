"""What the quantised base is: the bitsandbytes configuration, and its weights made plain when a product needs them.

Source: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section 3: NF4 in blocks of 64, block constants quantised
again to 8 bits in blocks of 256. bitsandbytes does the quantising; nothing of it is written again here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from qlora_cli.model.storage import StorageForm, compute_dtype

# bitsandbytes tells everyone with AVX-512 that an optional inference kernel is not installed; training never uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# And at every product with 8-bit weights, that LLM.int8() rounds its inputs by way of float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

import bitsandbytes as bnb  # noqa: E402 (after its logger is set)


def bitsandbytes_config(section: StorageForm) -> BitsAndBytesConfig | None:
    """The section as transformers takes it; None where nothing is quantised, or the files say how."""
    if section.bits is None or section.bits == 16:
        return None
    if section.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quant_type,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(section),
    )


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place.

    On a CPU with AVX-512 bf16, the first forward in eval mode rewrites a `Linear4bit`'s bytes for its inference
    kernel (and rounds its block constants to bf16). An evaluation would then change the frozen base under the
    training that follows.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def misread_layers(model: nn.Module) -> list[str]:
    """Paths of 4-bit layers whose weights bitsandbytes does not give back as it stored them on this machine.

    Its kernel for CPUs with AVX-512 (0.50) takes the constants of other blocks where a row is a multiple of 16 values
    and not of a whole block: every product with such a layer would be wrong. Only such shapes are looked at.
    """
    layers = (
        (path, module)
        for path, module in model.named_modules()
        # What a base lacks was never put in 4 bits.
        if isinstance(module, bnb.nn.Linear4bit) and isinstance(module.weight, bnb.nn.Params4bit)
    )
    odd = ((path, layer) for path, layer in layers if layer.in_features % layer.weight.quant_state.blocksize)
    return [path for path, layer in odd if not torch.equal(*_read_twice(layer.weight))]


def _read_twice(weight: bnb.nn.Params4bit) -> tuple[Tensor, Tensor]:
    """A weight's values, flat, as far as its last whole block: read as it is, and with a row for every block."""
    state, size = weight.quant_state, weight.quant_state.blocksize
    blocks = state.shape.numel() // size
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    by_blocks = bnb.functional.QuantState(
        absmax=absmax[:blocks].float(),
        shape=torch.Size((blocks, size)),
        dtype=state.dtype,
        blocksize=size,
        quant_type=state.quant_type,
    )
    packed = weight.data.reshape(-1)[: blocks * size // 2]
    whole = bnb.functional.dequantize_4bit(weight.data, state).reshape(-1)[: blocks * size]
    return whole, bnb.functional.dequantize_4bit(packed, by_blocks).reshape(-1)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer that LoRA can wrap; None for anything else."""
    # By exact type: what else derives from nn.Linear stores its weight another way (fp8), or is read past
    # its forward (the projection of nn.MultiheadAttention).
    if type(module) in (nn.Linear, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if type(module) is Conv1D:
        in_features, out_features = module.weight.shape  # type: ignore[misc]
        return int(in_features), int(out_features)
    return None


def frozen_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a frozen linear layer as [out, in] in `dtype`.

    For `Linear4bit` and `Linear8bitLt` this is a new tensor of out × in values: use it and drop it. For `Linear` and
    `Conv1D` it is the stored weight or a view of it where the dtype already fits.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(weight, bnb.nn.Params4bit):
        plain: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return plain.to(dtype)
    if isinstance(module, bnb.nn.Linear8bitLt):
        values, scales = _int8_parts(module)
        whole: Tensor = bnb.functional.int8_vectorwise_dequant(values, scales)
        return whole.to(dtype)
    if isinstance(module, Conv1D):
        weight = weight.t()  # stored [in, out]
    return weight.detach().to(dtype)


def frozen_product(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with the weight of a frozen linear layer, [..., in] to [..., out], in x's dtype.

    For `Linear8bitLt` it is bitsandbytes' own product, which rounds x to 8 bits as well, but for outliers, and has the
    layer's own bias in it.
    """
    if isinstance(module, bnb.nn.Linear8bitLt):
        product: Tensor = module(x)
        return product
    return F.linear(x, frozen_weight(module, x.dtype), bias)


def _int8_parts(module: bnb.nn.Linear8bitLt) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and the scale of each row, float32 [out]: the weight has them until the layer's first product."""
    weight, state = module.weight, module.state
    if state.CB is not None:
        return state.CB, state.SCB
    return weight.data, weight.SCB


@dataclass(frozen=True)
class Storage:
    """How a model's parameters are stored; a tensor shared by two modules counts once.

    Attributes:
        parameters: weights, a 4-bit one counting as one.
        bytes: what they occupy, 4-bit block constants included.
        quantized_parameters: how many of them are in 4 bits.
        quantized_bytes: what those occupy, block constants included.
    """

    parameters: int
    bytes: int
    quantized_parameters: int
    quantized_bytes: int

    @property
    def bits_per_quantized_parameter(self) -> float:
        """4 and the share of a block constant: 0.5 bits, or 0.127 when those are quantised again; 0 without any."""
        return 8 * self.quantized_bytes / self.quantized_parameters if self.quantized_parameters else 0.0


def measure_storage(model: nn.Module) -> Storage:
    """Count a model's parameters and the bytes they are stored in."""
    plain = plain_bytes = quantized = quantized_bytes = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        if isinstance(parameter, bnb.nn.Params4bit) and parameter.quant_state is not None:
            quantized += torch.Size(parameter.quant_state.shape).numel()
            quantized_bytes += size + _constants_bytes(parameter.quant_state)
        else:
            plain += parameter.numel()
            plain_bytes += size
    return Storage(plain + quantized, plain_bytes + quantized_bytes, quantized, quantized_bytes)


def _constants_bytes(state: bnb.functional.QuantState) -> int:
    total = int(state.absmax.numel() * state.absmax.element_size())
    if state.nested:
        nested = state.state2.absmax
        total += int(nested.numel() * nested.element_size()) + 4  # and the float32 offset
    return total
