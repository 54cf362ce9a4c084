"""What every test needs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Whether other workers of pytest-xdist run tests beside this process.
SHARES = "PYTEST_XDIST_WORKER" in os.environ
# Two torches with a thread for every core spend their time in waiting for each other: where there are workers, each has
# one thread, and so has what its tests start. This stands before torch is imported, which reads it once.
if SHARES:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from accelerate.state import AcceleratorState  # noqa: E402

# Files that take a minute or more, which one worker must not begin with when the others have nothing left to do.
LONGEST = (
    "tests/real/",
    "tests/training/test_distributed.py",
    "tests/test_stopping_train.py",
    "tests/training/test_kills.py",
    "tests/training/test_resume_exactness.py",
    "tests/training/test_three_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where workers share the files, the longest come first; else all keep their order."""
    if SHARES:
        items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def hears_signals() -> None:
    """Tests that a shell runs in the background begin with SIGINT ignored, under nohup with SIGHUP; so would what they
    start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has encoded, or leaves anything in a home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def no_accelerator_left_behind() -> Iterator[None]:
    """Accelerate keeps its device for the process: a test on a GPU must not decide where the next one runs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
