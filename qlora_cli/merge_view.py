"""What a person sees of a merge: what goes onto what, how far it is, and how near the result is to what was trained."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from qlora_cli.console import plural, show_line
from qlora_cli.merging.events import Compared, Comparing, Event, Merged, Notice, Planned, Stage, Writing, Written
from qlora_cli.merging.report import MergeReport, Verification

if TYPE_CHECKING:
    from qlora_cli.merging.combine import Combined
    from qlora_cli.merging.fidelity import Fidelity

_HEADS = ("", "loss", "difference", "mean KL", "max KL", "same top token", "effect kept", "farthest layer")


class MergeView:
    """Listens to a merge and shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> MergeView:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Stage(text):
                self._line("", f"{text} …", style="dim")
            case Notice(text):
                self._line("note", text)
            case Planned():
                self._plan(event)
            case Writing():
                self._begin("write", event.what, event.total_bytes, DownloadColumn())
            case Comparing():
                self._begin("compare", event.what, event.total_rows, TextColumn("{task.completed}/{task.total} rows"))
            case Written():
                self._advance(by=event.bytes)
            case Compared():
                self._advance(to=event.rows)
            case Merged():
                self._finish(event)

    def _line(self, label: str, text: str, style: str = "") -> None:
        self._stop()
        show_line(self._console, label, text, style)

    def _plan(self, event: Planned) -> None:
        self._line("adapter", f"{event.adapter}: {event.changes}")
        self._line("base", f"{event.base}; in training {event.stored}")

    def _begin(self, label: str, what: str, total: int, column: DownloadColumn | TextColumn) -> None:
        self._line(label, what)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("        "),
                BarColumn(bar_width=24),
                column,
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task(label, total=total)
            self._progress.start()

    def _advance(self, *, by: int | None = None, to: int | None = None) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=by, completed=to)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _finish(self, event: Merged) -> None:
        report = event.report
        if report.verification is not None:
            self._line(
                "compared", f"{report.verification.rows}; against the base as it was in training with the adapter"
            )
            self._console.print(_table(report, report.verification))
            self._line("verdict", report.verification.reason)
            if finding := report.verification.findings.get(report.merged_onto):
                self._line("", finding)
        size = f"{event.bytes / 1e9:.2f} GB" if event.bytes >= 1e9 else f"{event.bytes / 1e6:.1f} MB"
        self._line("done", f"{plural(event.files, 'file')}, {size}, in {event.seconds:,.0f} s")
        self._line("model", f"{event.output}{os.sep}  (merged onto the {report.merged_onto} weights)")


def show_combined(console: Console, combined: Combined) -> None:
    """Show what adding adapters up gave."""
    for remark in combined.remarks:
        show_line(console, "note", remark)
    show_line(
        console,
        "adapter",
        f"{combined.folder}{os.sep}  (PEFT format): rank {combined.rank} on {plural(combined.modules, 'layer')}, "
        f"{combined.parameters:,} parameters, over {combined.base.name}",
    )


def _table(report: MergeReport, found: Verification) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in _HEADS:
        table.add_column(head, justify="left" if head in ("", "farthest layer") else "right", no_wrap=True)
    reference = found.reference
    table.add_row("trained model", _number(reference.trained_loss, ".4f"))
    table.add_row(
        "its base", _number(reference.base_loss, ".4f"), "", f"{reference.effect:.2g}", f"{reference.max_effect:.2g}"
    )
    for name, fidelity in found.merges.items():
        _row(table, f"onto {name}", fidelity, bold=name == report.merged_onto and not found.quantized)
    for name, fidelity in found.quantized.items():
        _row(table, f"{name} in 4 bits", fidelity, bold=name == report.merged_onto)
    return table


def _row(table: Table, name: str, fidelity: Fidelity, *, bold: bool) -> None:
    difference = _number(fidelity.loss_difference, "+.4f")
    if fidelity.loss_difference_error is not None:
        difference += f" ± {fidelity.loss_difference_error:.4f}"
    layer = (
        "" if fidelity.worst_layer is None else f"{fidelity.worst_layer} {_number(fidelity.worst_layer_error, '.2%')}"
    )
    table.add_row(
        name,
        _number(fidelity.loss, ".4f"),
        difference,
        f"{fidelity.mean_kl:.2g}",
        f"{fidelity.max_kl:.2g}",
        _number(fidelity.top1_agreement, ".2%"),
        _number(fidelity.effect_kept, ".1%"),
        layer,
        style="bold" if bold else "",
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
