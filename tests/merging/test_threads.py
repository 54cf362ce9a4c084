"""How many threads the arithmetic of a merge takes."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.merging.tensors.threads import one_thread


def test_one_thread_is_for_the_block_alone() -> None:
    """Torch has as many as before afterwards, also where the block fails."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 / 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
