"""The tensors of an adapter's file, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qlora_cli.merging.tensors.files import StoredTensor, TensorReader, read_tensor_file, row_blocks


class AdapterTensors:
    """An adapter's tensors, in float32 and in memory of the caller's own; nothing that was read is kept.

    Not for several threads at once.

    Raises:
        ModelError: if the file cannot be read or is not whole; when reading too, if it has changed since.
    """

    def __init__(self, file: Path) -> None:
        self._stored = read_tensor_file(file)
        self._spare = torch.empty(0, dtype=torch.float32)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the file."""
        return tuple(self._stored)

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies and of what type it is there."""
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def whole(self, name: str) -> Tensor:
        """All of a tensor."""
        with TensorReader() as reader:
            return reader.whole(self._stored[name]).to(torch.float32)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Consecutive rows of a tensor, a few MB at a time."""
        with TensorReader() as reader:
            for start, stop in row_blocks(self.shape(name)):
                yield reader.rows(self._stored[name], start, stop).to(torch.float32)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and hold the same values."""
        return self.shape(one) == self.shape(other) and all(
            torch.equal(rows, same) for rows, same in zip(self.blocks(one), self.blocks(other), strict=True)
        )

    @contextmanager
    def memory(self, values: int) -> Iterator[Tensor]:
        """Room for this many float32 values, whatever stands in it, until the block ends.

        The largest is kept for the next: the system clears new memory before it gives it out, which takes several times
        as long as multiplying a low-rank B and A into it.
        """
        room, self._spare = self._spare, torch.empty(0, dtype=torch.float32)
        if len(room) < values:
            room = torch.empty(values, dtype=torch.float32)
        try:
            yield room[:values]
        finally:
            if len(room) > len(self._spare):
                self._spare = room
