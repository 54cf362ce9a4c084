"""What a person sees of an evaluation: what is asked, how far it is and how long it will take, and the scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from qlora_cli.benchmarking.events import Evaluated, Event, Prepared, Turn, Written
from qlora_cli.console import plural, show_paragraph
from qlora_cli.encoding_view import EncodingView
from qlora_cli.evaluation.events import Asking
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.score_table import as_scores, legend, shown_losses, shown_scores, verdict
from qlora_cli.training.events import EncodingProgress, EvaluationProgress, Notice, Stage

# Where there is no terminal: seconds before the first line on how far it is, and between two of them.
_PATIENCE = 5.0
_BETWEEN_LINES = 30.0
# Letters of a terminal in which the speed has a place beside the time left.
_WIDE = 100
# What one question of a kind is about.
_QUESTIONS = {"loglikelihood": "continuation", "loglikelihood_rolling": "text", "generate_until": "answer"}
_WAYS = {"prefix tree": "shared prefixes computed once", "row by row": "every question by itself"}
_MANY_FILES = 3  # that a line names
_TURNS = {"target": "the target", "base": "the base, without the adapter"}


class EvalView:
    """Listens to an evaluation and shows it."""

    def __init__(self, console: Console, *, baseline: bool) -> None:
        """`baseline`: whether there are two models to tell apart."""
        self._console = console
        self._baseline = baseline
        self._encoding = EncodingView(console)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._at = ""  # what progress is shown of
        self._told: set[str] = set()  # the kinds of questions that all have their answers, and it is said
        self._noted: set[str] = set()
        self._since = self._next = 0.0

    def __enter__(self) -> EvalView:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):  # above what is under way
                if text not in self._noted:  # what is so of the target is most often so of the base
                    self._noted.add(text)
                    self._line("note", text)
            case EncodingProgress():
                self._stop_bar()
                self._encoding(event)
            case Asking():
                self._ask(event)
            case EvaluationProgress(done, total):
                self._read(done, total)
            case _:
                self._stop()
                self._tell(event)

    def _tell(self, event: Stage | Prepared | Turn | Evaluated | Written) -> None:
        match event:
            case Stage(text):
                self._line("", f"{text} …", style="dim")
            case Prepared():
                self._prepare(event)
            case Turn(who):
                self._told.clear()
                if self._baseline:
                    self._line("ask", _TURNS[who])
            case Evaluated():
                self._finish(event)
            case Written():
                self._written(event)

    def _line(self, label: str, text: str, style: str = "") -> None:
        show_paragraph(self._console, label, text, style)

    def _prepare(self, event: Prepared) -> None:
        self._line("target", f"{event.target}; weights: {event.storage}")
        if event.base is not None:
            self._line("base", event.base)
        if event.tasks:
            self._line("tasks", f"{plural(event.tasks, 'task')}, {plural(event.documents, 'document')}")

    def _ask(self, event: Asking) -> None:
        """How far it is while it is under way; at its end what it took."""
        self._encoding.stop()
        if event.answered < event.questions:
            self._told.discard(event.kind)
            facts = [f"{event.answered:,} of {plural(event.questions, _QUESTIONS[event.kind])}"]
            if event.tokens and event.seconds and not self._is_narrow():
                facts.append(f"{event.tokens / event.seconds:,.0f} tokens/s")
            self._show(event.kind, "ask", facts, event.seconds, *_work(event))
        elif event.kind not in self._told:
            self._told.add(event.kind)
            self._stop()
            self._line("answered", _answered(event))

    def _read(self, done: int, total: int) -> None:
        """The tokens of a dataset's rows."""
        self._encoding.stop()
        now = time.monotonic()
        if self._at != "rows":
            self._since = now
        if done < total:
            self._show("rows", "read", [f"{done:,} of {total:,} tokens"], now - self._since, done, total)
        else:
            self._stop()

    def _is_narrow(self) -> bool:
        return self._console.is_terminal and self._console.width < _WIDE

    def _show(self, what: str, label: str, facts: Sequence[str], seconds: float, done: int, total: int) -> None:
        """A bar on a terminal, elsewhere now and then a line; `done` of `total` took so many seconds."""
        now = time.monotonic()
        if self._at != what:
            self._stop()
            self._at, self._next = what, now + _PATIENCE
        shown = ", ".join([*facts, f"{_left(seconds, done, total)} left"])
        if not self._console.is_terminal:
            if now >= self._next:
                self._line("", shown, style="dim")
                self._next = now + _BETWEEN_LINES
            return
        if self._progress is None:
            self._progress = _bar(self._console)
            self._task = self._progress.add_task(label, total=total, facts=shown)
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, facts=shown)

    def _stop(self) -> None:
        self._encoding.stop()
        self._stop_bar()

    def _stop_bar(self) -> None:
        self._at = ""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _finish(self, event: Evaluated) -> None:
        self._scores(event)
        self._line("asked", _how(event))
        kept = _kept(event.kept, event.answers)
        answers = f"{plural(event.answers, 'answer')}{kept}, " if event.answers else ""
        self._line("done", f"{answers}in {_seconds(event.seconds)}")

    def _written(self, event: Written) -> None:
        told = ["in lm-eval's format"] * (event.what == "results" and event.is_lm_evals)
        if event.instead_of is not None:
            told.append(f"{shown_path(event.instead_of)} has come to be there, and is not written over")
        self._line(event.what, _files(event.files) + (f"  ({'; '.join(told)})" if told else ""))

    def _scores(self, event: Evaluated) -> None:
        width = self._console.width if self._console.is_terminal else None
        for line in (*shown_scores(event.scores, width), *shown_losses(event.losses, width)):
            self._console.print(line)
        rows = [*event.scores, *(row for loss in event.losses for row in as_scores(loss))]
        for text in legend(rows):
            self._line("", text, style="dim")
        if (said := verdict(rows)) is not None:
            self._line("verdict", said)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<8}[/]"),
        BarColumn(bar_width=min(24, max(4, console.width - 66))),
        TextColumn("{task.fields[facts]}", markup=False),
        console=console,
        transient=True,
    )


def _work(event: Asking) -> tuple[int, int]:
    """What was done of what there was to do in this start: tokens, if they are counted, else questions."""
    if event.all_tokens:
        return event.tokens, event.all_tokens
    return event.answered - event.kept, event.questions - event.kept


def _left(seconds: float, done: int, total: int) -> str:
    """The time that the rest takes if it goes on like that."""
    if done <= 0 or seconds <= 0:
        return "-:--:--"
    return str(timedelta(seconds=round(seconds * max(0, total - done) / done)))


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"


def _answered(event: Asking) -> str:
    questions = f"{plural(event.questions, _QUESTIONS[event.kind])}{_kept(event.kept, event.questions)}"
    if event.kept >= event.questions:
        return questions
    tokens = f", {plural(event.tokens, 'token')}" if event.tokens else ""
    speed = f" ({event.tokens / event.seconds:,.0f} tokens/s)" if event.tokens and event.seconds else ""
    return f"{questions}{tokens}, in {_seconds(event.seconds)}{speed}"


def _kept(kept: int, answers: int) -> str:
    if not kept:
        return ""
    return f", {'all' if kept >= answers else f'{kept:,}'} of them kept from an earlier start"


def _how(event: Evaluated) -> str:
    """What one has to know to set the scores beside others."""
    told = []
    shots = sorted({row.num_fewshot for row in event.scores if row.num_fewshot is not None})
    if shots:
        told.append(f"{shots[0]}-shot" if len(shots) == 1 else f"{shots[0]}- to {shots[-1]}-shot")
    if event.scores:
        told.append("plain prompts" if event.template is None else f"prompts rendered with {event.template}")
        if event.system_instruction is not None:
            told.append("after a system instruction")
        if event.seed is not None:
            told.append(f"seed {event.seed}")
    if event.limit is not None:
        told.append(_limited(event.limit, "documents of each task" if event.scores else "rows"))
    told.append(f"weights: {event.prepared.storage}")
    if event.way is not None:
        told.append(_WAYS.get(event.way, event.way))
    return "; ".join(told)


def _limited(limit: int | float, what: str) -> str:
    return f"{100 * limit:g}% of the {what}" if limit < 1 else f"at most {limit:,} {what}"


def _files(files: Sequence[Path]) -> str:
    names = [shown_path(file) for file in files[:_MANY_FILES]]
    more = [f"… ({len(files)} files)"] if len(files) > _MANY_FILES else []
    return ", ".join([*names, *more])
