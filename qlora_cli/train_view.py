"""What a person sees of a run: facts before the first step, a progress bar, records, and where the result is.

On a terminal a live bar; elsewhere (a file, CI, a log collector) plain lines, each whole when it is written.
"""

from __future__ import annotations

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from qlora_cli.console import describe_rows, epochs, plural, show_line
from qlora_cli.disk import size_text
from qlora_cli.encoding_view import EncodingView
from qlora_cli.evaluation.events import Asking
from qlora_cli.score_lines import change_lines, score_lines
from qlora_cli.training.events import (
    BenchmarkRecord,
    BestKept,
    CheckpointSaved,
    DataReady,
    EncodingProgress,
    EvalRecord,
    EvaluationProgress,
    Event,
    Finished,
    ModelReady,
    Notice,
    Rehearsed,
    Stage,
    Started,
    StepDone,
    StepSkipped,
    TrainRecord,
)

# How much of the present speed the shown speed takes over at each step.
_SMOOTHING = 0.2
# Seconds of steps that the time left is judged by: a step may take a minute, and Rich's own 30 would hold none.
_SPEED_PERIOD = 600
# Seconds of scoring between two lines where there is no terminal, and lines of scores that fit a screen.
_BETWEEN_LINES = 30.0
_MANY_SCORES = 20


class TrainView:
    """Listens to a training run and shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._steps: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._questions: TaskID | None = None
        self._next_line = _BETWEEN_LINES
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
            case Rehearsed():
                self._rehearsed(event)
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case StepSkipped():
                self._skipped(event)
            case TrainRecord() if self._progress is None:
                self._record(event)
            case EvaluationProgress():
                self._evaluating(event)
            case EvalRecord():
                self._evaluated(event)
            case Asking():
                self._asking(event)
            case BenchmarkRecord():
                self._scored(event)
            case BestKept():
                self._line("best", f"{event.score} {event.value:.4f} after step {event.step}: {event.path} stays")
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
        self._line("", f"{stored}, {size_text(event.base_bytes)} in all")
        layers = f"LoRA on {event.adapted_layers} layers"
        self._line("", f"{layers}: {event.trainable_parameters:,} trainable parameters, {share:.2%}")
        if event.packing is not None:
            self._line("", f"the rows of a pack do not see each other: {event.packing}")

    def _rehearsed(self, event: Rehearsed) -> None:
        batch = f"{plural(event.rows, 'pack' if event.packed else 'row')} of {plural(event.tokens, 'token')}"
        parts = [f"the longest batch ({batch}) in {event.step_seconds:.1f} s"]
        if event.evaluation_seconds is not None:
            parts.append(f"an evaluation batch in {event.evaluation_seconds:.1f} s")
        size = size_text(event.checkpoint_bytes)
        parts.append(f"a checkpoint of {size} in {event.checkpoint_seconds:.1f} s")
        self._line("tried", f"{', '.join(parts)}; peak memory {size_text(event.peak_memory_bytes)}")

    def _start(self, event: Started) -> None:
        steps = event.total_steps - event.first_step
        if steps == 0:
            self._line("train", f"nothing left to do: all {event.total_steps:,} steps are done")
            return
        self._line(
            "train",
            f"{plural(steps, 'step')} of {plural(event.sequences_per_step, 'pack' if event.packed else 'row')}, "
            f"{epochs(event.epochs)}, into {event.output_dir}",
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

    def _skipped(self, event: StepSkipped) -> None:
        if self._progress is not None and self._steps is not None:
            self._progress.update(self._steps, completed=event.step)
        self._line("note", f"skipped step {event.step}, which changed nothing: its {event.reason}. {event.rows}")

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

    def _asking(self, event: Asking) -> None:
        """A bar under that of the steps; elsewhere a line now and then, as benchmarks may take longer than training."""
        if self._progress is not None:
            if self._questions is None:
                self._questions = self._progress.add_task("score", total=event.questions, facts="")
            self._progress.update(self._questions, total=event.questions, completed=event.answered)
        elif event.seconds > self._next_line:
            self._line("", f"scoring: {event.answered:,} of {plural(event.questions, 'question')}", style="dim")
            self._next_line = event.seconds + _BETWEEN_LINES
        if event.answered == event.questions:
            self._next_line = _BETWEEN_LINES

    def _scored(self, event: BenchmarkRecord) -> None:
        if self._progress is not None and self._questions is not None:
            self._progress.remove_task(self._questions)
            self._questions = None
        self._next_line = _BETWEEN_LINES
        for label, text in zip(("scores", *[""] * _MANY_SCORES), score_lines(event, _MANY_SCORES), strict=False):
            self._line(label, text)

    def _finish(self, event: Finished) -> None:
        self._stop()
        speed = event.tokens / event.seconds if event.seconds else 0.0
        self._line(
            "done",
            f"{plural(event.steps, 'step')}, {event.tokens:,} tokens in {event.seconds:,.0f} s "
            f"({speed:,.0f} tokens/s), "
            f"peak memory {size_text(event.peak_memory_bytes)}",
        )
        if event.stopped_early is not None:
            self._line("", f"stopped early: {event.stopped_early}")
        if event.skipped_steps:
            self._line("", f"{plural(event.skipped_steps, 'step')} skipped: the loss or the gradient was not finite")
        if event.last_eval_loss is not None:
            before = "" if event.first_eval_loss is None else f"{event.first_eval_loss:.4f} before, "
            when = "after" if event.loaded is None else "after the last step"
            self._line("", f"held-out loss {before}{event.last_eval_loss:.4f} {when}")
        for text in change_lines(event, _MANY_SCORES):
            self._line("", text)
        for best in (event.best, event.loaded):
            if best is None:
                continue
            self._line("best", f"{best.score} {best.value:.4f} after step {best.step}: {best.path}")
        of = "" if event.loaded is None else f", that of step {event.loaded.step}"
        self._line("adapter", f"{event.adapter}{os.sep}  (PEFT format{of})")

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)
