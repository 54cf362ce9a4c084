"""What a person sees of a merge: what goes onto what, how far it is, and how near the result is to what was trained."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from qlora_cli.console import plural, show_line, show_paragraph
from qlora_cli.merging.events import Compared, Comparing, Event, Merged, Planned, Writing, Written
from qlora_cli.merging.folder.model_card import CARD_FILE
from qlora_cli.merging.report import REPORT_FILE, MergeReport, Verification
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.training.events import Notice, Stage

if TYPE_CHECKING:
    from qlora_cli.merging.combine import Combined
    from qlora_cli.merging.fidelity.measures import Fidelity

# What a client reads, and what is written, by what the events call it.
_ONTO = {
    "original": "the base's original weights + adapter",
    "dequantized": "the 4-bit weights of training, dequantised, + adapter",
}
# Where there are six models to tell of, and 80 letters.
_SHORT = {"dequantized": "dequant."}
_READ = {
    "trained": "the trained model: the base as it was in training, the adapter beside it",
    "original without the adapter": "the base's original weights without the adapter",
}


class MergeView:
    """Listens to a merge and shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None

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
                # Of what is rounded again, the bytes that are gone through are not those that are left.
                size = "" if event.what not in _ONTO else f": {_size(event.total_bytes)}"
                what = f"{_told(event.what)}{size}"
                self._begin("write", what, event.total_bytes, DownloadColumn())
            case Comparing():
                what = _READ.get(event.what) or f"what was written, {_told(event.what)}"
                self._begin("compare", what, event.total_rows, TextColumn("{task.completed:.0f}/{task.total:.0f} rows"))
            case Written():
                self._advance(by=event.bytes)
            case Compared():
                self._advance(to=event.rows)
            case Merged():
                self._finish(event)

    def _line(self, label: str, text: str, style: str = "") -> None:
        self._stop()
        show_paragraph(self._console, label, text, style)

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
        if report.verification is None:
            self._line("compared", "with nothing, as --no-verify says: whether it is the trained model is not known")
        else:
            self._compared(report, report.verification)
        self._line("done", f"{plural(event.files, 'file')}, {_size(event.bytes)}, in {event.seconds:,.0f} s")
        stored = "" if report.quantized is None else f", stored in {report.quantized}"
        self._line(
            "model", f"{shown_path(event.output)}{os.sep}  (merged onto the {report.merged_onto} weights{stored})"
        )
        self._line("", f"how it was made and measured is told there, in {CARD_FILE} and {REPORT_FILE}")

    def _compared(self, report: MergeReport, found: Verification) -> None:
        first = next(iter(found.merges.values()))
        self._line("compared", f"with the trained model, on {found.rows}: {plural(first.tokens, 'token')}")
        columns = [_Column("trained", loss=found.reference.trained_loss), _of_base(found)]
        short = _SHORT if len(found.merges) + len(found.quantized) > 3 else {}
        form = (report.quantized or "").partition(" ")[0]
        for name, fidelity in found.merges.items():
            columns.append(_of(short.get(name, name), fidelity, name == report.merged_onto and not found.quantized))
        for name, fidelity in found.quantized.items():
            columns.append(_of(f"{short.get(name, name)} in {form}", fidelity, name == report.merged_onto))
        columns = [column for column in columns if (column.loss, column.mean) != (None, None)]
        for line in _table(columns, exact=first.measure == "kl"):
            self._console.print(line)
        for text in _legend(columns, exact=first.measure == "kl"):
            self._line("", text, style="dim")
        self._line("verdict", found.reason)
        if finding := found.findings.get(report.merged_onto):
            self._line("", finding)


def _told(what: str) -> str:
    """What is written, by what the events call it."""
    onto, in_4_bits, _ = what.partition(" in 4 bits")
    return _ONTO.get(onto, onto) + (", in 4 bits" if in_4_bits else "")


def show_combined(console: Console, combined: Combined) -> None:
    """Show what adding adapters up gave."""
    for remark in combined.remarks:
        show_line(console, "note", remark)
    show_line(
        console,
        "adapter",
        f"{shown_path(combined.folder)}{os.sep}  (PEFT format): rank {combined.rank} on "
        f"{plural(combined.modules, 'layer')}, {combined.parameters:,} parameters, over "
        f"{shown_path(Path(combined.base.name))}",
    )


@dataclass(frozen=True)
class _Column:
    """One model in the table; None for what was not or cannot be measured of it."""

    name: str
    bold: bool = False
    loss: float | None = None
    difference: float | None = None
    error: float | None = None
    mean: float | None = None
    most: float | None = None
    agreement: float | None = None
    effect: float | None = None
    layer: str | None = None
    layer_error: float | None = None


def _of_base(found: Verification) -> _Column:
    reference = found.reference
    difference = None
    if reference.base_loss is not None and reference.trained_loss is not None:
        difference = reference.base_loss - reference.trained_loss
    return _Column(
        "base",
        loss=reference.base_loss,
        difference=difference,
        mean=reference.effect,
        most=reference.max_effect,
        effect=0.0 if reference.effect else None,
    )


def _of(name: str, fidelity: Fidelity, bold: bool) -> _Column:
    return _Column(
        name,
        bold=bold,
        loss=fidelity.loss,
        difference=fidelity.loss_difference,
        error=fidelity.loss_difference_error,
        mean=fidelity.mean_kl,
        most=fidelity.max_kl,
        agreement=fidelity.top1_agreement,
        effect=fidelity.effect_kept,
        layer=fidelity.worst_layer,
        layer_error=fidelity.worst_layer_error,
    )


def _table(columns: Sequence[_Column], *, exact: bool) -> list[Text]:
    """A line for each measure and a column for each model: narrow enough for 80 letters, and never cut."""
    distance = "KL divergence" if exact else "distance"
    rows = [
        ("", [column.name.partition(" ")[0] for column in columns]),
        ("", [column.name.partition(" ")[2] for column in columns]),
        ("loss per token", [_number(column.loss, ".4f") for column in columns]),
        ("loss difference", [_number(column.difference, "+.4f").replace("-0.0000", "+0.0000") for column in columns]),
        ("  standard error", [_number(column.error, ".4f") for column in columns]),
        (f"{distance}, mean", [_small(column.mean) for column in columns]),
        (f"{distance}, most", [_small(column.most) for column in columns]),
        ("same likeliest token", [_number(column.agreement, ".1%") for column in columns]),
        ("effect of training", [_number(column.effect, ".1%") for column in columns]),
        ("farthest layer off by", [_number(column.layer_error, ".2%") for column in columns]),
    ]
    rows = [(label, cells) for label, cells in rows if any(cells)]
    labels = max(len(label) for label, _ in rows)
    widths = [max(len(cells[index]) for _, cells in rows) for index in range(len(columns))]
    lines = []
    for label, cells in rows:
        line = Text(f"{label:<{labels}}", style="dim")
        for cell, width, column in zip(cells, widths, columns, strict=True):
            line.append(f"  {cell:>{width}}", style="bold not dim" if column.bold else "not dim")
        line.rstrip()
        lines.append(line)
    return lines


def _legend(columns: Sequence[_Column], *, exact: bool) -> Iterator[str]:
    """What the table's words mean, where they are not plain."""
    if exact:
        yield (
            "KL divergence: how far a model's probabilities for the next token are from the trained model's, in nats; "
            "0 is no difference, and the base's is what training has changed"
        )
    else:
        yield (
            "distance: how far what a model gives for a token is from what the trained one gives, squared and relative "
            "to that; 0 is no difference, and the base's is what training has changed"
        )
    layers: dict[str, list[str]] = {}
    for column in columns:
        if column.layer is not None:
            layers.setdefault(column.layer, []).append(column.name)
    if layers:
        told = (f"{layer} ({', '.join(names)})" if len(layers) > 1 else layer for layer, names in layers.items())
        yield f"farthest layer: {', '.join(told)}; off by a share of what it gives"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _small(value: float | None) -> str:
    """Three digits that count, without powers of ten down to where there is nothing to see."""
    if value is None:
        return ""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    digits = 2 - math.floor(math.log10(value))
    return f"{value:.{digits}f}" if digits <= 6 else f"{value:.1e}"


def _size(number: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number / 1e3:.1f} kB"
