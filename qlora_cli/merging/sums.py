"""The merged tensors, made block by block: the base's values in float32, what the adapter does to them, one rounding.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), section 4.1: W = W0 + (alpha / r) B A.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qlora_cli.errors import MergeError, ModelError
from qlora_cli.merging.adapters.changes import LowRank
from qlora_cli.merging.adapters.tensors import AdapterTensors
from qlora_cli.merging.base.packed import PackedTensor
from qlora_cli.merging.base.rounding import Rounded, read_rounded, round_weight
from qlora_cli.merging.pairing import Target
from qlora_cli.merging.request import MergeBase
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader, row_blocks
from qlora_cli.merging.tensors.writer import Output
from qlora_cli.model.storage import compute_dtype
from qlora_cli.recipe.schema import QuantizationSection

_Rows = Callable[[int, int], Tensor]


class Sums:
    """Makes every tensor of one merged model, and notes which were not changed by what should change them.

    Args:
        onto: `original` adds to the base's own values; `dequantized` to what training had of them, for the weights
            that were in 4 bits then.
        quantization: how the base was stored in training.
        dtype: of the model's floating-point tensors, but for those that transformers keeps in float32 then; None leaves
            each as the base has it.
        device: where weights are rounded to 4 bits; the sums are made on the CPU.
    """

    def __init__(
        self,
        reader: TensorReader,
        adapter: AdapterTensors,
        onto: MergeBase,
        quantization: QuantizationSection,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self._reader = reader
        self._adapter = adapter
        self._onto = onto
        self._quantization = quantization
        self._dtype = dtype
        self._device = device
        self.unchanged: list[str] = []

    def output(self, target: Target) -> Output:
        """What is written for a target; its values are made when they are asked for.

        Making them raises MergeError if one is not finite.
        """
        dtype, base = self._dtype_of(target), target.base
        as_it_is = target.change is None and not self._rounds(target)
        if as_it_is and isinstance(base, StoredTensor) and base.dtype == dtype:
            return Output(target.name, dtype, target.shape, base)
        return Output(target.name, dtype, target.shape, lambda: self._blocks(target, dtype))

    def _dtype_of(self, target: Target) -> torch.dtype:
        # Where nothing in the base's files says: as the model computed.
        stored = compute_dtype(self._quantization) if target.base is None else target.base.dtype
        # What the loader passes over is no weight of the model, whoever else reads it.
        if self._dtype is None or not stored.is_floating_point or target.parameter is None:
            return stored
        return torch.float32 if self._dtype in target.float32_under else self._dtype

    def _rounds(self, target: Target) -> bool:
        return target.quantized and self._onto == "dequantized"

    def _blocks(self, target: Target, dtype: torch.dtype) -> Iterator[Tensor]:
        before: deque[Tensor] = deque()
        change = target.change
        # What was trained is to be seen in the weight; a bias, or rows of a vocabulary, may well have stayed.
        telling = isinstance(change, LowRank)
        differs = not telling
        for rows in self._merged(target, before if telling else None):
            block = rows.to(dtype)
            if not _is_finite(block):
                raise MergeError(self._not_finite(target, rows, dtype))
            if not differs:
                differs = not before or not torch.equal(block, before.popleft().to(dtype))
            if differs:
                before.clear()  # no more is compared, and the whole of the base's weight would gather here
            yield block
        if not differs:
            self.unchanged.append(target.name)

    def _merged(self, target: Target, before: deque[Tensor] | None) -> Iterator[Tensor]:
        """Consecutive rows of the result in float32; puts what the base has there into `before`, in its own type."""

        def base() -> Iterator[Tensor]:
            rows, shape = self._base_rows(target)
            for start, stop in row_blocks(shape):
                block = rows(start, stop)
                if before is not None:
                    before.append(block)
                yield block.to(torch.float32, copy=True)

        return base() if target.change is None else target.change.merged(self._adapter, base)

    def _base_rows(self, target: Target) -> tuple[_Rows, tuple[int, ...]]:
        base = target.base
        if isinstance(base, PackedTensor):
            parts = {part: self._reader.whole(tensor) for part, tensor in base.parts.items()}
            turned = target.kind == "conv1d"
            try:
                rounded = read_rounded(parts, self._quantization, self._device, transposed=turned)
            except ModelError as error:
                raise ModelError(f"{target.name}: {error}") from None
            return rounded.rows, rounded.shape
        if base is None:
            raise MergeError(f"{target.name}: the base has no values for it")
        if self._rounds(target):
            rounded = self._round(target, base)
            return rounded.rows, rounded.shape
        return lambda start, stop: self._reader.rows(base, start, stop), base.shape

    def _round(self, target: Target, base: StoredTensor) -> Rounded:
        blocks = (self._reader.rows(base, start, stop) for start, stop in row_blocks(base.shape))
        return round_weight(blocks, base.shape, self._quantization, self._device, transposed=target.kind == "conv1d")

    def _not_finite(self, target: Target, rows: Tensor, dtype: torch.dtype) -> str:
        if not torch.isfinite(rows).all():
            return f"{target.name}: the merged weight has values that are NaN or infinite. Look at the base's weights"
        largest = rows.abs().max().item()
        return (
            f"{target.name}: a merged value of {largest:.4g} is more than {str(dtype).removeprefix('torch.')} holds. "
            "Choose --dtype bfloat16 or float32"
        )


def _is_finite(block: Tensor) -> bool:
    """Whether every value is; the extremes tell, in a twentieth of the time that looking at each takes."""
    return block.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(block))
