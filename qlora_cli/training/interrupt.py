"""Being stopped from outside: a request to stop after the step at hand, or the end of what is being done at once.

One wish to stop may arrive several times. Ctrl-C reaches every process of the terminal, and a launcher may send it on;
SLURM signals every process of a job step, and `srun` or a batch script passes on what it gets. So a signal within a
second of one that was heeded is taken for the same wish.

Nor is every later signal a person's impatience. A scheduler warns (SIGUSR1), asks (SIGTERM) and then kills; a terminal
that closes sends SIGHUP after whatever was typed. Stopping at once would only lose the step that is being finished. It
is what the same signal again asks for, Ctrl-C after any of them, and SIGTERM after Ctrl-C, which is how torchrun tells
its processes of a second one.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C, the end of a job, that of the terminal, and SLURM's notice of an end (--signal=USR1@120). Windows has not all.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_ONE_WISH = 1.0  # seconds in which a signal is a repeat of the one before
# What asks for a stop at once, after which first signal, beside the same again.
_IMPATIENT = {"SIGINT": ("SIGTERM",), "SIGTERM": ("SIGINT",), "SIGHUP": ("SIGINT",), "SIGUSR1": ("SIGINT",)}

_Handler = Callable[[int, FrameType | None], Any]


def _numbers() -> list[int]:
    """Those of them that this system has."""
    return [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]


@contextmanager
def handling(handler: _Handler) -> Iterator[dict[int, _Handler | int]]:
    """Inside, `handler` gets what would stop this process; yields what each signal meant before.

    A signal that is ignored stays so: nohup asks for that, and a shell for what it starts in the background. So does
    one whose handler was set from outside Python, which cannot put it back. Outside the main thread Python allows no
    handlers: there, the embedding program decides when to stop.
    """
    before: dict[int, _Handler | int] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                meant = signal.getsignal(number)
                if meant is not None and meant != signal.SIG_IGN:
                    before[number] = meant
                    signal.signal(number, handler)
        yield before
    finally:
        for number, meant in before.items():
            signal.signal(number, meant)


def ignore_to_the_end() -> None:
    """Nothing but SIGKILL and SIGQUIT ends this process any more: all is done, and its exit code tells how it went.

    Taking down torch takes seconds, in which a signal would put its own code in place of that.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _numbers():
            if signal.getsignal(number) is not None:
                signal.signal(number, signal.SIG_IGN)


class StopAtOnce:
    """A handler to which every signal is what Ctrl-C is: KeyboardInterrupt, so that what is half written is taken away.

    `signals` holds what was heeded.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._deaf_until = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() < self._deaf_until:
            return
        self.signals.append(number)
        self.pass_over_repeats()
        raise KeyboardInterrupt

    def pass_over_repeats(self) -> None:
        """A signal was heeded just now, here or by another handler."""
        self._deaf_until = time.monotonic() + _ONE_WISH

    def pass_over_all(self) -> None:
        """From now on it ends anyway, and how is being told."""
        self._deaf_until = math.inf


class StopRequest:
    """While entered, the first signal only sets `signal_name` and says so; a second wish to stop does it at once.

    That second one means what it meant before, if that was anything but the death of the process: then, it is
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._heeded = -math.inf
        self._before: dict[int, _Handler | int] = {}
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self._before = self._exits.enter_context(handling(self._handle))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._heeded = name, now
            for before in self._before.values():  # repeats may come when it has the signals back
                if isinstance(before, StopAtOnce):
                    before.pass_over_repeats()
            # Straight to the descriptor: the interrupted code may be in the middle of a buffered write of its own.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: finishing this step, then saving; again to stop at once\n".encode())
        elif name in (self.signal_name, *_IMPATIENT[self.signal_name]) and now >= self._heeded + _ONE_WISH:
            self._heeded = now
            before = self._before[number]
            if not callable(before):
                raise KeyboardInterrupt
            before(number, frame)
