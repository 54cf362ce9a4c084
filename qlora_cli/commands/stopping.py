"""Doing what a command does, to its exit code; being ended from outside is one of the ways."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_cli.errors import Interrupted, QloraError

# What ends a command from outside: Ctrl-C, the end of its job, that of its terminal.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def exit_code(work: Callable[[], None], stopped: Callable[[], str]) -> int:
    """Do it; what goes wrong is told as every command tells it. `stopped` says what there is if it is ended midway."""
    from qlora_cli.console import show_error

    signals: list[int] = []
    try:
        with stopping(signals):
            work()
    except (Exception, KeyboardInterrupt) as error:
        # An import that is broken off may fail in a way of its own.
        if signals or isinstance(error, KeyboardInterrupt):
            error = Interrupted(stopped())
        if not isinstance(error, QloraError):
            raise
        show_error(error)
        return error.exit_code
    return 0


@contextmanager
def stopping(signals: list[int]) -> Iterator[None]:
    """Inside, being ended is what Ctrl-C is, so that what was half written is taken away; `signals` gets what came."""

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for name in _SIGNALS if (number := getattr(signal, name, None)) is not None]
    # One that is ignored stays so: nohup asks for that.
    previous = {number: signal.getsignal(number) for number in numbers}
    replaced = [number for number in numbers if previous[number] != signal.SIG_IGN]
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, previous[number] or signal.SIG_DFL)
