"""The seeds of lm-eval, and the states of everybody else's generators put back after it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A block in which Python's, numpy's and torch's generators begin as lm-eval begins them.

    Tasks draw when they are built, too: whoever builds them does so in such a block. Afterwards every generator is
    where it was: training that is scored in between goes on as if it had not been.

    Args:
        seed: of all of them; None: lm-eval's own.
    """
    python, legacy = random.getstate(), np.random.get_state()
    other = other_seed(seed)
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if initialized else 0)
    try:
        with torch.random.fork_rng(devices):
            random.seed(python_seed(seed))
            np.random.seed(other % 2**32)
            torch.manual_seed(other)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def bookmark() -> Callable[[], None]:
    """What puts Python's, numpy's and torch's generators back to where they are now, as often as it is called."""
    python, legacy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def back() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(of_torch)

    return back


def other_seed(seed: int | None) -> int:
    """The seed of all but Python's generator: numpy's, torch's, and that which draws examples for prompts."""
    return DEFAULT_OTHER_SEED if seed is None else seed


def python_seed(seed: int | None) -> int:
    """The seed of Python's own generator."""
    return DEFAULT_RANDOM_SEED if seed is None else seed
