"""The tensors of an adapter's file, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class AdapterTensors:
    """`adapter_model.safetensors`, opened for each reading: what was read before is not kept."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with safe_open(file, framework="pt") as opened:
            self._shapes = {
                name: tuple(opened.get_slice(name).get_shape())
                for name in opened.keys()  # noqa: SIM118 (not a dict)
            }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def whole(self, name: str) -> Tensor:
        """All of a tensor, float32, in memory of its own."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor.to(torch.float32, copy=True)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Consecutive rows of a tensor, float32, in memory of their own."""
        yield self.whole(name)

    def finite(self, name: str) -> bool:
        """Whether a tensor holds neither NaN nor infinities."""
        return all(bool(rows.isfinite().all()) for rows in self.blocks(name))
