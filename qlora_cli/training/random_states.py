"""The states of every random generator that a run may draw from, as tensors: a file can hold them without pickling.

A step seeds them all from its number, so that what is drawn in it needs none of this. It is for whatever draws between
two steps: a model's own code, or a library's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain numbers of this process: Python's generator, NumPy's, torch's, and that of a GPU."""
    version, words, python_gauss = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    numbers = {
        "python": [version, python_gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(gauss)],
    }
    return tensors, numbers


def set_random_states(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators where `random_states` found them. A GPU's is left as it is if there was none.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: if these are no such states.
    """
    version, python_gauss = numbers["python"]
    name, position, has_gauss, gauss = numbers["numpy"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
