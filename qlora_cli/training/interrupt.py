"""Ctrl-C and SIGTERM as a request to stop after the step at hand."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signal_name` and says so; a second stops at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
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
        # Straight to the descriptor: the interrupted code may be in the middle of a buffered write of its own.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.signal_name}: finishing this step, then saving; again to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # None: it was set from outside Python, which cannot put it back
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
