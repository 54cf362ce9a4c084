"""Sums made block by block: what is held of a weight meanwhile."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_cli.merging.adapters.changes import LowRank
from qlora_cli.merging.adapters.tensors import AdapterTensors
from qlora_cli.merging.pairing import Target
from qlora_cli.merging.sums import Sums
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader, read_tensor_file
from qlora_cli.recipe.schema import QuantizationSection


class _WatchedReader(TensorReader):
    """Knows which of the blocks that it gave out are still held by someone."""

    def __init__(self) -> None:
        super().__init__()
        self._given: list[weakref.ref[Tensor]] = []

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        block = super().rows(tensor, start, stop)
        self._given.append(weakref.ref(block))
        return block

    @property
    def held(self) -> int:
        return sum(given() is not None for given in self._given)


def test_the_base_is_held_a_block_at_a_time(tmp_path: Path) -> None:
    """Of a weight of many blocks, only the one that is compared with what became of it."""
    save_file({"w.weight": torch.randn(4096, 512, dtype=torch.bfloat16)}, tmp_path / "base.safetensors")
    save_file({"a": torch.randn(1, 512), "b": torch.randn(4096, 1)}, tmp_path / "adapter.safetensors")
    base = read_tensor_file(tmp_path / "base.safetensors")["w.weight"]
    change = LowRank("w.weight", "a", "b", 1.0, "linear", (4096, 512))
    target = Target("w.weight", "w.weight", base, (4096, 512), change, "linear")
    section = QuantizationSection(bits=16)
    with _WatchedReader() as reader:
        adapter = AdapterTensors(tmp_path / "adapter.safetensors")
        sums = Sums(reader, adapter, "original", section, dtype=None, device=torch.device("cpu"))
        source = sums.output(target).source
        assert callable(source)
        held = [reader.held for _ in source()]
    assert len(held) > 3
    assert max(held) <= 1
