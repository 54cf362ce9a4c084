"""A function over a stream of chunks, in as many processes as there are cores, results in the order of the chunks."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from qlora_cli.errors import QloraError, RunError

A = TypeVar("A")
B = TypeVar("B")

# A process that is forked has everything at once; elsewhere it imports the libraries anew, which takes seconds and is
# worth it for more. Chunks are of some hundred rows.
_WORTH_FORKING = 8
_WORTH_SPAWNING = 60

# What goes to every process of a terminal or of a job step, where the one that started the others decides.
_LEFT_TO_IT = [getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
_SIGNALS = (*_LEFT_TO_IT, signal.SIGTERM)


def cores(*, shared: bool = True) -> int:
    """How many this process may use: its part, if it shares them with those that `torchrun` started beside it."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1") if shared else "1"
    return max(1, usable // int(beside) if beside.isdecimal() and int(beside) else usable)


def map_in_order(
    function: Callable[[A], B], chunks: Iterable[A], *, processes: int | None = None
) -> Generator[B, None, None]:
    """`function` of each chunk, in order; the first few here, and if there are more, the others in processes.

    An exception in `function` is raised here. At most two chunks per process are held at a time.

    Raises:
        RunError: if a process was killed, as by the system when memory is short.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    processes = cores() if processes is None else processes
    stream = iter(chunks)
    alone = _WORTH_FORKING if method == "fork" else _WORTH_SPAWNING
    for chunk in itertools.islice(stream, alone if processes > 1 else None):
        yield function(chunk)
    first = list(itertools.islice(stream, 1))
    if first:
        yield from _in_processes(function, itertools.chain(first, stream), processes, method)


def _in_processes(function: Callable[[A], B], chunks: Iterator[A], processes: int, method: str) -> Iterator[B]:
    context = multiprocessing.get_context(method)
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(_worker(context, function)) for _ in range(processes)]
        # Dealt in turn, and collected in turn: a process has one chunk at a time, so that neither side ever waits to
        # send while the other does.
        busy: list[Connection] = []
        turns = itertools.cycle(pipes)
        for pipe, chunk in zip(turns, chunks, strict=False):
            if len(busy) == processes:
                yield _receive(busy.pop(0))
            with _told_if_killed():
                pipe.send(chunk)
            busy.append(pipe)
        for pipe in busy:
            yield _receive(pipe)


def _receive(pipe: Connection) -> Any:
    with _told_if_killed():
        result, error = pipe.recv()
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def _told_if_killed() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise RunError(
            "a process that encodes rows was killed, as by the system when memory is short. Free some, or keep to "
            "fewer cores with `taskset`"
        ) from None


@contextlib.contextmanager
def _worker(context: Any, function: Callable[[A], B]) -> Iterator[Connection]:
    """A process that answers chunks with results, until it is no longer wanted."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs, ours), daemon=True)
    _start(process)
    theirs.close()
    try:
        yield ours
    finally:
        process.terminate()  # before the pipe is closed, or it would complain
        process.join()
        ours.close()


def _start(process: Any) -> None:
    # The warning is of forking beside threads, of which the child uses none.
    quiet = warnings.catch_warnings(action="ignore", category=DeprecationWarning)
    try:
        with _single_threaded_tokenizers(), _held_back_signals(), quiet:
            process.start()
    except OSError as error:  # which would be taken for one of the disk
        raise RunError(f"a process to encode rows cannot be started: {error.strerror or error}") from error


@contextlib.contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """What a process begins with: threads of its own would make more than there are cores."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _held_back_signals() -> Iterator[None]:
    """Ctrl-C and the like wait, in a process that is started meanwhile until it has its own way with them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(function: Callable[[Any], Any], pipe: Connection, other_end: Connection) -> None:
    for number in _LEFT_TO_IT:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    other_end.close()  # or this end would never see that the other is gone
    while True:
        try:
            chunk = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (function(chunk), None)
        except BaseException as error:  # what goes wrong in Rust is no Exception
            answer = (None, _sendable(error))
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it any more
            return


def _sendable(error: BaseException) -> Exception:
    """The error if it is one of ours; others may not come through, and would lose where they came from."""
    if isinstance(error, QloraError):
        return error
    return RuntimeError(f"encoding rows failed:\n{''.join(traceback.format_exception(error))}")
