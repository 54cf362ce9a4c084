"""Ctrl-C and SIGTERM as a request to stop after the step at hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `signal_name` and calls `on_request`; a second stops at once."""

    def __init__(self, on_request: Callable[[str], None]) -> None:
        self.signal_name: str | None = None
        self._on_request = on_request
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere the embedding program decides when to stop.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()
        self._on_request(self.signal_name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
