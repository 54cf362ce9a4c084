"""What is put in 4 bits comes back as near as 4 bits are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_cli.model.quantization import frozen_weight
from qlora_cli.selftest.differences import largest
from qlora_cli.selftest.events import Measured
from qlora_cli.selftest.workbench import Workbench

import bitsandbytes as bnb  # isort: skip (model.quantization sets its logger before)

_SHAPE = (1024, 1024)  # of standard normal values, in blocks of 64
_BLOCK = 64
# bitsandbytes' own tests of 1024 x 1024 such values (tests/test_functional.py, test_4bit_quant) allow 1e-3 more than
# these. Of that, drawing other values makes 1e-4; double quantisation makes it 8e-5 more.
_SLACK = 1e-3
# Double quantisation keeps a block's constant in 8 bits: a value may be off by so much more, as a share of the
# largest one in its block. Measured: 0.009.
_DOUBLE_SLACK = 0.02


@dataclass(frozen=True)
class _Known:
    """Of one way to 4 bits: the mean absolute error over standard normal values in blocks of 64, and half the widest
    gap between neighbours among the 16 values, as a share of the largest one. The farthest any value may be off."""

    mean: float
    most: float


_KNOWN = {
    "nf4": _Known(0.072792, (1 - 0.6961928) / 2),  # the table of QLoRA, appendix E
    "fp4": _Known(0.096545, (1 - 2 / 3) / 2),
}


def check_four_bits(bench: Workbench) -> Measured:
    """Compare the mean absolute error of a round trip with the known one, and the largest with half a gap."""
    values = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    figure: dict[str, float | str] = {}
    bound: dict[str, float | str] = {}
    excesses, faults = [], []
    for kind, known in _KNOWN.items():
        for double in (False, True):
            name = f"{kind.upper()}{' double' if double else ''}"
            mean, most = _errors(values, _round_trip(values, kind, double, bench.device))
            limit = known.most + (_DOUBLE_SLACK if double else 1e-5)
            figure[name], bound[name] = mean, f"{known.mean:.4f} ± {_SLACK:g}"
            excesses.append(most - limit)
            if not abs(mean - known.mean) <= _SLACK:
                faults.append(f"{name} is off by {mean:.4f} on average where {known.mean:.4f} is known")
            if not most <= limit:
                faults.append(f"{name} is off by {most:.3f} of a block's largest value where {limit:.3f} is the most")
    return Measured(
        not faults and largest(excesses) <= 0,
        figure=figure,
        bound=bound,
        detail="; ".join(faults)
        or "mean absolute errors over standard normal values in blocks of 64 are the known ones, and no value is "
        "farther from what it was than half the widest gap among the 16 values",
    )


def _round_trip(values: Tensor, kind: str, double: bool, device: torch.device) -> Tensor:
    """The values as a 4-bit layer on the device gives them back, float32 on the CPU."""
    layer = bnb.nn.Linear4bit(
        values.shape[1], values.shape[0], bias=False, quant_type=kind, compress_statistics=double,
        compute_dtype=torch.float32,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        values, requires_grad=False, quant_type=kind, compress_statistics=double, blocksize=_BLOCK
    )
    on_device: nn.Module = layer.to(device)  # which is what quantises
    return frozen_weight(on_device, torch.float32).cpu()


def _errors(values: Tensor, got: Tensor) -> tuple[float, float]:
    """The mean absolute error, and the largest as a share of the largest value in its block."""
    off = (got - values).abs()
    scale = values.reshape(-1, _BLOCK).abs().amax(1, keepdim=True)
    return float(off.mean()), float((off.reshape(-1, _BLOCK) / scale).max())
