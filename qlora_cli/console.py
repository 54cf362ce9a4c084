"""A console, and how every command puts facts and failures on it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import textwrap
import unicodedata

from rich.console import Console
from rich.text import Text

from qlora_cli.errors import QloraError
from qlora_cli.training.events import DataReady, SourceReady

# Control characters, halves of surrogate pairs, and what turns the direction of writing round.
_STEERING = ("Cc", "Cs")
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

_LABEL = 9  # letters that a label takes, the blank behind it among them
_NARROWEST = 20  # letters of a line beside it, however narrow the terminal


class _PatientConsole(Console):
    """Falls silent when its reader goes away (`qlora train … | head`, a terminal that is closed), where Rich would end
    the run."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:  # which is what Linux says of a terminal that is gone
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # what stands in for a file may have no descriptor
            # Or the interpreter fails at exit, flushing into the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def make_console(*, stderr: bool = False) -> Console:
    """A console that leaves numbers uncoloured and never wraps lines where nobody reads a screen.

    Of several processes of one run, only the first has something to show; all of them may tell errors.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is written out, and ends no run
            stream.reconfigure(errors="backslashreplace")
    quiet = not stderr and int(os.environ.get("RANK", "0")) > 0
    return _PatientConsole(stderr=stderr, quiet=quiet, highlight=False, soft_wrap=True, emoji=False)


def show_error(error: QloraError) -> None:
    """Print a failure the way every command does: what is wrong, no traceback."""
    console = make_console(stderr=True)
    # In one write: several processes may tell theirs on one stream.
    console.print(Text.assemble(("error:", "bold red"), " ", visible(str(error))))


def show_line(console: Console, label: str, text: str | Text, style: str = "") -> None:
    """Print one line of facts under a label of at most eight letters; an empty one goes on with what is above."""
    # Not as markup: brackets are part of file names.
    shown = (visible(text), style) if isinstance(text, str) else text
    console.print(Text.assemble((f"{label:<8}", "bold"), " ", shown))


def show_paragraph(console: Console, label: str, text: str, style: str = "") -> None:
    """The same of text of any length: broken between words on a terminal; a log has every line whole."""
    lines = [text]
    if console.is_terminal:
        room = max(_NARROWEST, console.width - _LABEL)
        cut = [textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")]
        lines = [part for parts in cut for part in parts or [""]]
    for line in lines:
        show_line(console, label, line, style)
        label = ""


def visible(text: str) -> str:
    """The text with what steers a terminal, or the direction of writing, written out; line breaks and tabs stay.

    Names and rows come from elsewhere.
    """
    return "".join(c.encode("unicode_escape").decode() if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return character in _TURNING or (unicodedata.category(character) in _STEERING and character not in "\n\t")


def describe_rows(event: DataReady) -> str:
    """What one split holds, in a line."""
    lost = [f"{event.skipped:,} skipped"] * bool(event.skipped)
    lost += [f"{event.dropped:,} dropped"] * bool(event.dropped)
    lost += [f"{event.truncated:,} truncated"] * bool(event.truncated)
    tokens = f"{event.tokens:,} tokens, {event.supervised_tokens:,} of them supervised"
    rows = plural(event.rows, "row")
    if event.sequences != event.rows:
        rows += f" as {plural(event.sequences, 'sequence')}"
    counts = ", ".join([rows, tokens, *lost])
    if len(event.sources) == 1:
        (only,) = event.sources
        return f"{event.split}: {counts} ({only.format}, {only.source})"
    each = [
        f"{source.source} ({source.format}): {plural(source.rows, 'row')}{_times(source)}" for source in event.sources
    ]
    return "\n         ".join([f"{event.split}: {counts}, from {len(each)} sources", *each])


def epochs(number: float) -> str:
    """How many epochs, without powers of ten."""
    return "less than 0.001 epochs" if 0 < number < 0.001 else plural(number, "epoch", ".3g")


def _times(source: SourceReady) -> str:
    return f", {plural(source.weight, 'time', '.4g')} an epoch" if source.weight != 1 else ""


def plural(number: float, word: str, form: str = ",") -> str:
    """A number and what it counts."""
    return f"{number:{form}} {word}{'' if number == 1 else 's'}"
