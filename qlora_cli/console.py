"""What a person sees of a run: facts before the first step, a progress bar, records, and where the result is.

On a terminal a live bar; elsewhere (a file, CI, a log collector) plain lines, each whole when it is written.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import unicodedata

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from qlora_cli.errors import QloraError
from qlora_cli.training.events import (
    CheckpointSaved,
    DataReady,
    EncodingProgress,
    EvalRecord,
    EvaluationProgress,
    Event,
    Finished,
    ModelReady,
    Notice,
    SourceReady,
    Stage,
    Started,
    StepDone,
    TrainRecord,
)

# Control characters, halves of surrogate pairs, and what turns the direction of writing round.
_STEERING = ("Cc", "Cs")
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# How much of the present speed the shown speed takes over at each step.
_SMOOTHING = 0.2
# Seconds of steps that the time left is judged by: a step may take a minute, and Rich's own 30 would hold none.
_SPEED_PERIOD = 600
# Seconds of encoding before anything is shown, and between two lines where there is no terminal.
_PATIENCE = 2.0
_BETWEEN_LINES = 30.0


class _PatientConsole(Console):
    """Falls silent when its reader goes away (`qlora train … | head`), where Rich would end the run."""

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
    console.print("[bold red]error:[/] ", end="")
    console.print(visible(str(error)), markup=False)


def show_line(console: Console, label: str, text: str | Text, style: str = "") -> None:
    """Print one line of facts under a label of at most eight letters; an empty one goes on with what is above."""
    # Not as markup: brackets are part of file names.
    shown = (visible(text), style) if isinstance(text, str) else text
    console.print(Text.assemble((f"{label:<8}", "bold"), " ", shown))


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


def _times(source: SourceReady) -> str:
    return f", {plural(source.weight, 'time', '.4g')} an epoch" if source.weight != 1 else ""


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
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, completed=event.share or 0, rows=f"{event.rows:,} rows")

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
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class TrainView:
    """Listens to a training run and shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._steps: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._speed = 0.0
        self._encoding = EncodingView(console)

    def __enter__(self) -> TrainView:
        return self

    def __exit__(self, *_: object) -> None:
        self._encoding.stop()
        self._stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Stage(text):
                self._line("", f"{text} …", style="dim")
            case Notice(text):
                self._line("note", text)
            case EncodingProgress():
                self._encoding(event)
            case DataReady():
                self._encoding.stop()
                self._line("data", describe_rows(event))
            case ModelReady():
                self._model(event)
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case TrainRecord() if self._progress is None:
                self._record(event)
            case EvaluationProgress():
                self._evaluating(event)
            case EvalRecord():
                self._evaluated(event)
            case CheckpointSaved():
                self._line("saved", str(event.path))
            case Finished():
                self._finish(event)

    def _line(self, label: str, text: str, style: str = "") -> None:
        show_line(self._console, label, text, style)

    def _model(self, event: ModelReady) -> None:
        share = event.trainable_parameters / (event.total_parameters + event.trainable_parameters)
        self._line("model", f"{event.name} ({event.architecture}) on {event.device}")
        stored = event.storage
        if event.quantized_parameters:
            bits = f"{event.bits_per_quantized_parameter:.3f} bits per parameter"
            stored += f": {bits} for {_count(event.quantized_parameters)} of {_count(event.total_parameters)}"
        else:
            stored += f": {_count(event.total_parameters)} parameters"
        self._line("", f"{stored}, {_bytes(event.base_bytes)} in all")
        layers = f"LoRA on {event.adapted_layers} layers"
        self._line("", f"{layers}: {event.trainable_parameters:,} trainable parameters, {share:.2%}")
        if event.packing is not None:
            self._line("", f"the rows of a pack do not see each other: {event.packing}")

    def _start(self, event: Started) -> None:
        steps = event.total_steps - event.first_step
        if steps == 0:
            self._line("train", f"nothing left to do: all {event.total_steps:,} steps are done")
            return
        epochs = plural(event.epochs, "epoch", ".3g")
        self._line(
            "train",
            f"{plural(steps, 'step')} of {plural(event.sequences_per_step, 'pack' if event.packed else 'row')}, "
            f"{epochs}, into {event.output_dir}",
        )
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description:<8}[/]"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=_SPEED_PERIOD,
            )
            self._steps = self._progress.add_task("step", total=event.total_steps, completed=event.first_step, facts="")
            self._progress.start()

    def _step(self, event: StepDone) -> None:
        speed = event.tokens / event.seconds
        self._speed = speed if not self._speed else self._speed + _SMOOTHING * (speed - self._speed)
        if self._progress is not None and self._steps is not None:
            facts = f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {self._speed:,.0f} tokens/s"
            self._progress.update(self._steps, completed=event.step, facts=facts)

    def _record(self, event: TrainRecord) -> None:
        self._line(
            "step",
            f"{event.step}  epoch {event.epoch:.2f}  loss {event.loss:.4f}  lr {event.learning_rate:.2e}  "
            f"grad norm {event.grad_norm:.3f}  {event.tokens_per_second:,.0f} tokens/s  {event.seconds:,.0f} s",
        )

    def _evaluating(self, event: EvaluationProgress) -> None:
        if self._progress is None:
            return
        if self._evaluation is None:
            self._evaluation = self._progress.add_task("evaluate", total=event.total, facts="")
        self._progress.update(self._evaluation, completed=event.done)

    def _evaluated(self, event: EvalRecord) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None
        perplexity = "" if event.perplexity is None else f"  perplexity {event.perplexity:.3f}"
        self._line("eval", f"step {event.step}  held-out loss {event.eval_loss:.4f}{perplexity}")

    def _finish(self, event: Finished) -> None:
        self._stop()
        speed = event.tokens / event.seconds if event.seconds else 0.0
        self._line(
            "done",
            f"{plural(event.steps, 'step')}, {event.tokens:,} tokens in {event.seconds:,.0f} s "
            f"({speed:,.0f} tokens/s), "
            f"peak memory {_bytes(event.peak_memory_bytes)}",
        )
        if event.first_eval_loss is not None and event.last_eval_loss is not None:
            self._line("", f"held-out loss {event.first_eval_loss:.4f} before, {event.last_eval_loss:.4f} after")
        self._line("adapter", f"{event.adapter}{os.sep}  (PEFT format)")

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def plural(number: float, word: str, form: str = ",") -> str:
    """A number and what it counts."""
    return f"{number:{form}} {word}{'' if number == 1 else 's'}"


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number} bytes"
