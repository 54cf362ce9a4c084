"""lm-eval kept quiet: its bars and prints go nowhere, what it warns of becomes a remark."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

# lm-eval asks for it in place of a switch: a pool of processes, forked out of a program with threads and a GPU.
_NO_POOL = "DISABLE_MULTIPROC"

_LONGEST = 300  # letters of a warning that are told
_BEGINNING = 80  # of one that was told before


class _Nowhere(io.TextIOBase):
    """Takes what is printed and forgets it. A console that shows progress meanwhile writes to what was there."""

    def __init__(self, instead_of: TextIO) -> None:
        self.rich_proxied_file = getattr(instead_of, "rich_proxied_file", instead_of)

    def write(self, text: str) -> int:
        return len(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False


class _Warnings(logging.Handler):
    """Tells of each line of code that warns the first that it says, at once, and in the end how much more it said.

    Some warn of each document, and hold it whole: of two thousand such, one says what the others do.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell
        self._said: dict[tuple[str, int], tuple[str, int]] = {}  # the first text, and how many there were

    def emit(self, record: logging.LogRecord) -> None:
        place = (record.pathname, record.lineno)
        if place in self._said:
            first, count = self._said[place]
            self._said[place] = (first, count + 1)
            return
        text = _shortened(" ".join(record.getMessage().split()), _LONGEST)
        self._said[place] = (text, 1)
        self._tell(f"lm-eval: {text}")

    def tell_the_rest(self) -> None:
        for first, count in self._said.values():
            if count > 1:
                self._tell(f"lm-eval: {count - 1:,} more like this one: {_shortened(first, _BEGINNING)}")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length].rstrip()} …"


class Hush:
    """Silence for a while, which may be lifted in between."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """`tell` is called with what lm-eval warns of, once for each kind, and in the end with how often it did."""
        self._tell = tell
        self._before: tuple[TextIO, TextIO] | None = None

    @contextlib.contextmanager
    def fallen(self) -> Iterator[None]:
        """What is printed goes nowhere, lm-eval's warnings to us alone, and it forks no processes."""
        with contextlib.ExitStack() as stack:
            self._before = sys.stdout, sys.stderr
            stack.enter_context(contextlib.redirect_stdout(_Nowhere(sys.stdout)))
            stack.enter_context(contextlib.redirect_stderr(_Nowhere(sys.stderr)))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            warned = _Warnings(self._tell)
            stack.enter_context(_logger_telling("lm_eval", warned))
            stack.enter_context(_environment(_NO_POOL, "1"))
            try:
                yield
            finally:
                warned.tell_the_rest()
                self._before = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """What is printed goes where it went before."""
        out, err = self._before or (sys.stdout, sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield


@contextlib.contextmanager
def _logger_telling(name: str, handler: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger(name)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
