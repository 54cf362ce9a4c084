"""Several processes that train one model, each with a whole copy of it: the same weights, and the sum of the gradients.

What `DistributedDataParallel` would do, in an order of additions that is the same in every step. It sorts its buckets
anew after the first backward pass, so that with three processes or more a run that goes on from a checkpoint would
round otherwise than the one that was never stopped (measured: docs/log.md, 2026-12-01). LoRA's gradients are so few
that exchanging them after the backward pass, and not during it, costs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

_PIECE = 1 << 25  # elements exchanged at a time: what a copy of them takes is bounded


class DataParallel:
    """The trained parameters of all processes, kept equal. Of one process alone, nothing here does anything.

    Attributes:
        parameters: of this process, on its device, in the order in which they are exchanged.
    """

    def __init__(self, accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the main one's parameters."""
        self.parameters = parameters
        self._accelerator = accelerator
        self._buffers: dict[torch.dtype, Tensor] = {}
        if accelerator.num_processes == 1:
            return
        self._pieces = list(_pieces(parameters))
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)
        # Taken now: after a backward pass, when memory is fullest, one process alone might not have it.
        for piece in self._pieces:
            size, like = sum(p.numel() for p in piece), piece[0]
            if like.dtype not in self._buffers or self._buffers[like.dtype].numel() < size:
                self._buffers[like.dtype] = torch.empty(size, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every process the sum of the gradients of all; where none has one, there is none afterwards."""
        if self._accelerator.num_processes == 1:
            return
        here = torch.tensor([p.grad is not None for p in self.parameters], device=self._accelerator.device)
        anywhere = self._accelerator.reduce(here.int(), reduction="sum").tolist()
        has_one = {parameter for parameter, count in zip(self.parameters, anywhere, strict=True) if count}
        for piece in self._pieces:
            # Always all of it, so that each number has its place: where it is decides in which order it is added up.
            sizes = [parameter.numel() for parameter in piece]
            total = self._buffers[piece[0].dtype][: sum(sizes)]
            parts = torch.split(total, sizes)
            for parameter, part in zip(piece, parts, strict=True):
                if parameter.grad is None:
                    part.zero_()
                else:
                    part.copy_(parameter.grad.flatten())
            torch.distributed.all_reduce(total)
            for parameter, part in zip(piece, parts, strict=True):
                if parameter not in has_one:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part.view_as(parameter))


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In their order, so many at a time, of one dtype each."""
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if piece and (size + parameter.numel() > _PIECE or parameter.dtype != piece[0].dtype):
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel()
    if piece:
        yield piece
