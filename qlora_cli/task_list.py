"""The names of tasks, as a person looks through them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from qlora_cli.console import plural, show_line, visible
from qlora_cli.evaluation.tasks.names import Listing

_WIDEST = 40  # letters of a name that the next column waits for: of thousands, some are longer than a line


def show_tasks(console: Console, listed: Sequence[Listing]) -> None:
    """Print a line for each name: what it is, how many tasks it stands for, what these ask of a model."""
    rows = [(visible(one.name), one.kind, _asks(one)) for one in listed]
    names, kinds = (min(_WIDEST, max(len(row[column]) for row in rows)) for column in (0, 1))
    # At once: there are thousands.
    console.out("\n".join(f"{name:<{names}}  {kind:<{kinds}}  {asks}".rstrip() for name, kind, asks in rows))
    if console.is_terminal:  # elsewhere, a line is a name
        show_line(console, "", plural(len(rows), "name"), "dim")


def _asks(one: Listing) -> str:
    return plural(one.tasks, "task") if one.kind in ("group", "tag") else one.output_type or ""
