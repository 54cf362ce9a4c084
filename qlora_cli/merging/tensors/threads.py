"""How many threads the arithmetic of a merge takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations on one thread within the block.

    Sums and conversions of blocks of rows are as fast on one: memory is the limit. On a machine with other work to do
    they are ten times as fast, for at the end of each torch's threads wait for one another.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
