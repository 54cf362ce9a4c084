"""What every test needs."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


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
