"""When memory did not suffice."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that a tensor did not fit, on a GPU or in main memory."""
    # On a CPU, torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
