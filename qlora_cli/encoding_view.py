"""How far encoding has come, as a person sees it."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from qlora_cli.console import plural, show_line
from qlora_cli.training.events import EncodingProgress

# Seconds of encoding before anything is shown, and between two lines where there is no terminal.
_PATIENCE = 2.0
_BETWEEN_LINES = 30.0


class EncodingView:
    """Shows how far encoding has come, once it has taken a while: as a bar, or now and then as a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._source = ""
        self._next = 0.0

    def __enter__(self) -> EncodingView:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, event: EncodingProgress) -> None:
        now = time.monotonic()
        if event.source != self._source:
            self.stop()
            self._source, self._next = event.source, now + _PATIENCE
        if now < self._next:
            return
        if not self._console.is_terminal:
            share = "" if event.share is None else f" ({event.share:.0%})"
            show_line(self._console, "", f"encoding {event.source}: {plural(event.rows, 'row')}{share}", "dim")
            self._next = now + _BETWEEN_LINES
            return
        if self._progress is None:
            self._progress = _encoding_bar(self._console)
            self._task = self._progress.add_task("encode", total=None if event.share is None else 1.0, rows="")
        if self._task is not None:
            self._progress.update(self._task, completed=event.share or 0, rows=plural(event.rows, "row"))
        self._progress.start()  # once; it does nothing after that

    def stop(self) -> None:
        """Take the bar away."""
        self._source = ""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _encoding_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<8}[/]"),
        BarColumn(bar_width=24),
        TaskProgressColumn("{task.percentage:>3.0f}%"),  # nothing, where the size is not known
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
