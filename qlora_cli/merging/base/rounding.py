"""Weights rounded to 4 bits, as bitsandbytes holds them in training, and made plain again by blocks of rows.

bitsandbytes does both. It is given a weight in pieces of whole blocks, as its kernel for the CPU needs about eight
times the memory of what it is given; a block is rounded by itself, so that this changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import ceil, prod

import torch
from torch import Tensor

from qlora_cli.errors import MergeError, ModelError
from qlora_cli.model.storage import compute_dtype
from qlora_cli.recipe.schema import QuantizationSection

import bitsandbytes as bnb  # isort: skip (model.quantization sets its logger before)

# bitsandbytes' own: values to a block constant, and block constants to a constant of theirs where they are quantised.
_BLOCK = 64
_OUTER_BLOCK = 256
# Values given to it at a time: whole blocks, also of what a checkpoint may have been stored with.
_PIECE = 1 << 20


class Rounded:
    """One weight in 4 bits, held packed (about 0.6 bytes a value).

    Attributes:
        shape: of the weight as the model has it, [out, in]; a Conv1D's is [in, out].
        dtype: of what `rows` gives.
    """

    def __init__(
        self, packed: Tensor, state: bnb.functional.QuantState, *, dtype: torch.dtype, transposed: bool
    ) -> None:
        """
        Args:
            packed: uint8, two values each; at least as many bytes as whole blocks take.
            state: bitsandbytes' own; its shape is [out, in].
            dtype: of what `rows` gives.
            transposed: the model has the weight as [in, out].
        """
        out_features, in_features = state.shape
        self.shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.dtype = dtype
        self._transposed = transposed
        self._packed = packed
        self._state = state
        self._absmax = _plain_absmax(state)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the weight as the model has it, [stop - start, columns], on the CPU.

        What the packed values stand for: code times block constant in float32, rounded to the dtype once. Bit-equal to
        `dequantize_4bit` of the whole weight, except where that is wrong (see `_plain`).
        """
        out_features, in_features = self._state.shape
        size = self._state.blocksize
        if not self._transposed:
            first, last = start * in_features // size, ceil(stop * in_features / size)
            plain = self._plain(self._packed[first * size // 2 : last * size // 2], self._absmax[first:last])
            offset = start * in_features - first * size
            return plain[offset : offset + (stop - start) * in_features].view(stop - start, in_features)
        if in_features % size:  # some block goes over the end of a row, so that no columns can be taken out
            plain = self._plain(self._packed, self._absmax)[: out_features * in_features]
            return plain.view(out_features, in_features)[:, start:stop].t().contiguous()
        first, last = start // size, ceil(stop / size)
        packed = self._packed.view(out_features, -1, size // 2)[:, first:last].reshape(-1)
        absmax = self._absmax.view(out_features, -1)[:, first:last].reshape(-1)
        plain = self._plain(packed, absmax).view(out_features, -1)
        return plain[:, start - first * size : stop - first * size].t().contiguous()

    def state_tensors(self) -> dict[str, Tensor]:
        """What a bitsandbytes checkpoint stores of it, by what stands after the module's path, on the CPU."""
        values = prod(self._state.shape)
        tensors = {"weight": self._packed[: ceil(values / 2)].unsqueeze(1)}
        tensors |= {f"weight.{part}": tensor for part, tensor in self._state.as_dict(packed=True).items()}
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _plain(self, packed: Tensor, absmax: Tensor) -> Tensor:
        """The values of whole blocks, flat, on the CPU."""
        # A block to a row, whatever the weight's rows are: with AVX-512 bitsandbytes 0.50 takes wrong block constants
        # for rows that are 16, 32 or 48 values longer than whole blocks.
        part = bnb.functional.QuantState(
            absmax=absmax.contiguous(),  # its kernels read on from the first
            shape=torch.Size((absmax.numel(), self._state.blocksize)),
            dtype=self._state.dtype,
            blocksize=self._state.blocksize,
            quant_type=self._state.quant_type,
        )
        plain: Tensor = bnb.functional.dequantize_4bit(packed.contiguous(), part)
        return plain.flatten().to("cpu", self.dtype)


def round_weight(
    blocks: Iterable[Tensor],
    shape: tuple[int, ...],
    quantization: QuantizationSection,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> Rounded:
    """Round a weight to 4 bits as bitsandbytes does it when a model is loaded on `device`.

    Args:
        blocks: consecutive rows of the weight, any number at a time, together all of it.
        shape: of the weight as the model has it: two dimensions.
        quantization: data type, and whether block constants are quantised again.
        dtype: in which the weight is when it is rounded, and that of what comes back; None is the compute dtype.
        transposed: the weight is a Conv1D's, [in, out]. It is rounded as [out, in], and held whole meanwhile.

    Raises:
        MergeError: if the blocks are not the whole weight.
    """
    dtype = dtype or compute_dtype(quantization)
    values = prod(shape)
    packed = torch.zeros(ceil(values / _BLOCK) * _BLOCK // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(ceil(values / _BLOCK), dtype=torch.float32, device=device)
    done = 0
    for piece in _pieces(_transposed(blocks, shape, dtype) if transposed else blocks, dtype):
        if done + piece.numel() <= values:
            quantized, state = bnb.functional.quantize_4bit(
                piece.to(device), blocksize=_BLOCK, quant_type=quantization.quant_type
            )
            packed[done // 2 : done // 2 + quantized.numel()] = quantized.flatten()
            absmax[done // _BLOCK : done // _BLOCK + state.absmax.numel()] = state.absmax
        done += piece.numel()
    if done != values:
        raise MergeError(f"rounding to 4 bits: expected {values:,} values ({list(shape)}), got {done:,}")
    whole = torch.Size(reversed(shape)) if transposed else torch.Size(shape)
    return Rounded(packed, _state(absmax, whole, dtype, quantization), dtype=dtype, transposed=transposed)


def read_rounded(
    tensors: Mapping[str, Tensor],
    quantization: QuantizationSection,
    device: torch.device,
    *,
    transposed: bool = False,
) -> Rounded:
    """A weight that is stored in 4 bits.

    Args:
        tensors: what a checkpoint stores of it, by what stands after the module's path: `weight`, `weight.absmax`, ….
        quantization: of training, whose compute dtype is that of `rows`.
        transposed: the model has the weight as [in, out], as a Conv1D does. It is stored as [out, in] all the same.

    Raises:
        ModelError: if these are not the parts of a 4-bit weight.
    """
    parts = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
    try:
        state = bnb.functional.QuantState.from_dict(parts, device=device)
        stored = tensors["weight"].contiguous().flatten().view(torch.uint8)
        blocks = ceil(prod(state.shape) / state.blocksize)
        complete = len(state.shape) == 2 and stored.numel() * 2 - prod(state.shape) in (0, 1)
        complete = complete and state.absmax.numel() == blocks
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{sorted(tensors)}: not the parts of a 4-bit weight: {error}") from None
    if not complete:
        raise ModelError(
            f"a 4-bit weight of shape {list(state.shape)} in blocks of {state.blocksize}: expected "
            f"{ceil(prod(state.shape) / 2):,} bytes and {blocks:,} block constants, got {stored.numel():,} and "
            f"{state.absmax.numel():,}"
        )
    packed = torch.zeros(blocks * state.blocksize // 2, dtype=torch.uint8, device=device)
    packed[: stored.numel()] = stored
    return Rounded(packed, state, dtype=compute_dtype(quantization), transposed=transposed)


def state_shapes(
    shape: tuple[int, ...],
    quantization: QuantizationSection,
    *,
    dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of what `state_tensors` will give, in its order, before any value is known.

    Of a weight with double quantisation the last, `weight.quant_state.bitsandbytes__…`, is left out: it is a text that
    has the mean of the block constants in it, digit by digit, so that its length is known with the values.
    """
    dtype = dtype or compute_dtype(quantization)
    whole = torch.Size(reversed(shape)) if transposed else torch.Size(shape)
    blocks = ceil(prod(shape) / _BLOCK)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (torch.uint8, (ceil(prod(shape) / 2), 1))}
    if quantization.double_quant:
        shapes["weight.absmax"] = (torch.uint8, (blocks,))
        shapes["weight.quant_map"] = (torch.float32, (16,))
        shapes["weight.nested_absmax"] = (torch.float32, (ceil(blocks / _OUTER_BLOCK),))
        shapes["weight.nested_quant_map"] = (torch.float32, (256,))
        return shapes
    state = _state(torch.empty(blocks), whole, dtype, quantization)
    return shapes | {
        f"weight.{part}": (tensor.dtype, tuple(tensor.shape)) for part, tensor in state.as_dict(packed=True).items()
    }


def _pieces(blocks: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The values of consecutive blocks, flat, in pieces of whole 4-bit blocks; only the last may be short."""
    rest = torch.empty(0, dtype=dtype)
    for block in blocks:
        values = block.reshape(-1)
        if rest.numel():
            missing = _BLOCK - rest.numel()
            rest, values = torch.cat([rest, values[:missing].to(dtype)]), values[missing:]
            if rest.numel() < _BLOCK:
                continue
            yield rest
        whole = values.numel() // _BLOCK * _BLOCK
        for piece in torch.split(values[:whole], _PIECE):
            if piece.numel():
                yield piece.to(dtype)
        rest = values[whole:].to(dtype, copy=True)
    if rest.numel():
        yield rest


def _transposed(blocks: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of the transpose, a few at a time."""
    whole = torch.cat([block.to(dtype) for block in blocks])
    step = max(1, _PIECE // max(1, whole.shape[0]))
    for first in range(0, whole.shape[1], step):
        yield whole[:, first : first + step].t()


def _state(
    absmax: Tensor, shape: torch.Size, dtype: torch.dtype, quantization: QuantizationSection
) -> bnb.functional.QuantState:
    """bitsandbytes' state of a weight, block constants quantised again where the section says so.

    Over the whole weight at once: their mean is taken off first. torch sums it in as many parts as it has threads, so
    that its last bit can be another one with another number of threads, or on a GPU, there as here.
    """
    offset = inner = None
    if quantization.double_quant:
        offset = absmax.mean()
        absmax, inner = bnb.functional.quantize_blockwise(absmax - offset, blocksize=_OUTER_BLOCK)
    return bnb.functional.QuantState(
        absmax=absmax,
        shape=shape,
        code=bnb.functional.get_4bit_type(quantization.quant_type, device=absmax.device),
        blocksize=_BLOCK,
        quant_type=quantization.quant_type,
        dtype=dtype,
        offset=offset,
        state2=inner,
    )


def _plain_absmax(state: bnb.functional.QuantState) -> Tensor:
    """The block constants, float32, as bitsandbytes makes them plain."""
    absmax: Tensor = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
        absmax += state.offset
    return absmax.float()
