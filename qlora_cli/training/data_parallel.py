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


@torch.no_grad()
def share_weights(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the main one's `parameters`."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)


@torch.no_grad()
def sum_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the sum of the gradients of all; where none has one, there is none afterwards."""
    if accelerator.num_processes == 1:
        return
    here = torch.tensor([parameter.grad is not None for parameter in parameters], device=accelerator.device)
    anywhere = accelerator.reduce(here.int(), reduction="sum").tolist()
    for piece in _pieces([p for p, count in zip(parameters, anywhere, strict=True) if count]):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in piece]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(total)
        for parameter, summed in zip(piece, torch.split(total, [p.numel() for p in piece]), strict=True):
            parameter.grad = _copied(summed, parameter)


def _copied(summed: Tensor, parameter: nn.Parameter) -> Tensor:
    """Into the gradient that is there, if it is: its memory is what was planned with."""
    if parameter.grad is None:
        return summed.view_as(parameter).clone()
    return parameter.grad.copy_(summed.view_as(parameter))


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In their order, so many at a time, of one dtype each."""
    piece: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(p.numel() for p in piece)
        if piece and (size + parameter.numel() > _PIECE or parameter.dtype != piece[0].dtype):
            yield piece
            piece = []
        piece.append(parameter)
    if piece:
        yield piece
