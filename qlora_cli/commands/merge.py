"""`qlora merge`."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qlora_cli.errors import Interrupted, QloraError, RequestError
from qlora_cli.merging.request import MergeRequest

_INTERRUPTED = "stopped; nothing was written"


def merge(request: MergeRequest) -> int:
    """Merge an adapter into its base, showing how it goes; returns the exit code."""
    from qlora_cli.console import make_console, show_error
    from qlora_cli.merge_view import MergeView

    console = make_console()
    try:
        _set_up([request.adapter], request.base_model, progress=console.is_terminal)
        from qlora_cli.merging.merge import merge as run

        with _stopping(), MergeView(console) as view:
            run(request, listeners=[view])
    except QloraError as error:
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        show_error(Interrupted(_INTERRUPTED))
        return Interrupted.exit_code
    return 0


def combine(adapters: Sequence[Path], weights: str | None, output: Path, *, unused: Mapping[str, object]) -> int:
    """Add adapters up into one; returns the exit code.

    Args:
        weights: numbers with commas between them, one for each adapter; None is 1 for each.
        unused: what else was given, by the names of the options; None is what was not.
    """
    from qlora_cli.console import make_console, show_error
    from qlora_cli.merge_view import show_combined

    console = make_console()
    try:
        if given := [name for name, value in unused.items() if value is not None]:
            raise RequestError(f"{', '.join(given)}: --into-adapter adds adapters up, and has no use for this")
        numbers = _numbers(weights, len(adapters))
        _set_up(adapters, None, progress=console.is_terminal)
        from qlora_cli.merging.combine import combine as run

        with _stopping():
            show_combined(console, run(adapters, numbers, output))
    except QloraError as error:
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        show_error(Interrupted(_INTERRUPTED))
        return Interrupted.exit_code
    return 0


def _numbers(weights: str | None, count: int) -> list[float]:
    """What `--weights` says, one for each adapter."""
    if weights is None:
        return [1.0] * count
    try:
        numbers = [float(word) for word in weights.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise RequestError(f"--weights: expected numbers with commas between them, as in 0.6,0.4, got {weights!r}")
    if len(numbers) != count:
        raise RequestError(f"--weights: expected {count} numbers, one for each --into-adapter, got {len(numbers)}")
    return numbers


def _set_up(adapters: Sequence[Path], base_model: str | None, *, progress: bool) -> None:
    from qlora_cli.commands.libraries import set_up_libraries
    from qlora_cli.merging.peek import named_sources

    names = [name for adapter in adapters for name in named_sources(adapter)]
    set_up_libraries([*names, *([base_model] if base_model else [])], progress=progress)


@contextmanager
def _stopping() -> Iterator[None]:
    """Inside, SIGTERM is what Ctrl-C is, so that what was half written is taken away."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
