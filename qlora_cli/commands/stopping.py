"""Doing what a command does, to its exit code; being ended from outside is one of the ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qlora_cli.errors import Interrupted, QloraError
from qlora_cli.training.interrupt import StopAtOnce, handling


def exit_code(
    work: Callable[[], None], stopped: Callable[[], str], told: Callable[[QloraError], None] = lambda error: None
) -> int:
    """Do it; what goes wrong is told as every command tells it.

    Args:
        stopped: says what there is if it is ended midway.
        told: called with what went wrong once that is told.
    """
    from qlora_cli.console import show_error

    with stopping() as end:
        try:
            work()
        except BaseException as problem:
            end.pass_over_all()
            # An import that is broken off may fail in a way of its own, and Rust in one that is no Exception.
            ended = bool(end.signals) or isinstance(problem, KeyboardInterrupt)
            error = Interrupted(stopped()) if ended and not isinstance(problem, Interrupted) else problem
            if not isinstance(error, QloraError):
                raise
            show_error(error)
            told(error)
            return error.exit_code
    return 0


@contextmanager
def stopping() -> Iterator[StopAtOnce]:
    """Inside, being ended is what Ctrl-C is, so that what was half written is taken away."""
    end = StopAtOnce()
    with handling(end):
        yield end
