"""What a person, or with `--json` a program, sees of a check."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_cli.console import describe_rows, epochs, plural, show_error, show_line, visible
from qlora_cli.errors import Mistake, RecipeError, RequestError
from qlora_cli.training.facts import BenchmarkFacts, Example, Facts, Overlong, SomeRows, SplitFacts, Steps

# Around what is learned, so that it is told apart without colours, too.
_OPEN, _CLOSE = "«", "»"


def show_check(console: Console, recipe: Path, facts: Facts) -> None:
    """Print what was found, the examples, and in the last line what it comes to; problems go to stderr as errors."""
    show_line(console, "recipe", f"{recipe}: every field is right")
    if facts.context_length is not None:
        show_line(console, "model", f"has positions for {facts.context_length:,} tokens")
    for split in (facts.train, facts.validation):
        if split is not None:
            _show_split(console, split)
    if facts.steps is not None:
        show_line(console, "steps", _steps(facts.steps))
        if facts.train is not None:
            show_line(console, "", _sequences(facts.steps, facts.train.max_length))
    if facts.benchmarks is not None:
        show_line(console, "scores", _benchmarks(facts.benchmarks))
    for notice in facts.notices:
        show_line(console, "note", notice)
    for example in facts.examples:
        _show_example(console, example)
    show_problems(facts)
    show_line(console, "result", _result(facts))


def show_problems(facts: Facts) -> None:
    """Print every problem to stderr, as any command does."""
    for problem in facts.problems:
        show_error(RequestError(problem))


def facts_json(recipe: Path, facts: Facts) -> str:
    """The same facts as one JSON object in one line of ASCII."""
    return _json(
        recipe,
        ok=not facts.problems,
        checked=facts.checked,
        problems=list(facts.problems),
        notices=list(facts.notices),
        context_length=facts.context_length,
        train=_split_fields(facts.train),
        validation=_split_fields(facts.validation),
        steps=None if facts.steps is None else asdict(facts.steps) | {"processes": 1},
        examples=[_example_fields(example) for example in facts.examples],
        benchmarks=None if facts.benchmarks is None else asdict(facts.benchmarks),
    )


def mistakes_json(recipe: Path, error: RecipeError) -> str:
    """As `facts_json`, for a recipe that is wrong itself: its mistakes, and nothing of its data."""
    return _json(recipe, ok=False, mistakes=[_mistake_fields(mistake) for mistake in error.mistakes])


def _mistake_fields(mistake: Mistake) -> dict[str, Any]:
    """A mistake of a recipe for a program to read; `suggestion` is None where there is none."""
    return {
        "file": mistake.position.file,
        "line": mistake.position.line,
        "column": mistake.position.column,
        "key": mistake.key,
        "message": mistake.message,
        "suggestion": mistake.suggestion,
        "allowed": mistake.allowed,
    }


def _json(recipe: Path, *, ok: bool, **found: Any) -> str:
    document = {
        "ok": ok,
        "checked": "recipe",
        "recipe": str(recipe),
        "mistakes": [],
        "problems": [],
        "notices": [],
        "context_length": None,
        "train": None,
        "validation": None,
        "steps": None,
        "examples": [],
        "benchmarks": None,
    }
    return json.dumps(document | found)


def _split_fields(split: SplitFacts | None) -> dict[str, Any] | None:
    if split is None:
        return None
    fields = asdict(split)
    data = fields.pop("data")
    del data["split"]  # the name it stands under
    return {**data, **fields}


def _example_fields(example: Example) -> dict[str, Any]:
    fields = asdict(example)
    del fields["pieces"]  # for people
    return fields


def _show_split(console: Console, split: SplitFacts) -> None:
    show_line(console, "data", describe_rows(split.data))
    at = split.lengths
    quantiles = f"half of the rows have up to {at.p50:,}, 90% {at.p90:,}, 95% {at.p95:,}, 99% {at.p99:,}"
    show_line(console, "length", f"{at.min:,} to {at.max:,} tokens: {quantiles}")
    show_line(console, "", _overlong(split.overlong, split.max_length))
    labels = f"rows with no label: {_some(split.without_labels)}"
    if split.silent.rows:
        labels += f"; with an empty answer: {_some(split.silent)}"
    show_line(console, "labels", labels)
    show_line(console, "end", _end(split))


def _overlong(overlong: Overlong, max_length: int) -> str:
    if not overlong.rows:
        return f"no row is longer than max_length ({max_length:,})"
    verb = "is" if overlong.rows == 1 else "are"
    text = f"{plural(overlong.rows, 'row')} {verb} longer than max_length ({max_length:,}) and {overlong.fate}"
    if overlong.fate == "refused":
        return text
    lost = plural(overlong.lost_supervised_tokens, "supervised token")
    if overlong.fate == "dropped":
        return f"{text}, with {lost}"
    whole = f" ({overlong.rows_losing_answers:,} a whole one)" if overlong.rows_losing_answers else ""
    return f"{text}; {overlong.rows_losing_labels:,} of them lose part of an answer{whole}, {lost} in all"


def _some(rows: SomeRows) -> str:
    return f"{rows.rows:,} ({rows.named})" if rows.rows else "none"


def _end(split: SplitFacts) -> str:
    end, rows = split.end_of_turn, split.data.rows
    if end.token is None:
        return "no token ends an answer"
    among = "every row" if end.rows == rows else f"{end.rows:,} of {plural(rows, 'row')}"
    return f"{end.text} (token {end.token}) is supervised at the end of {among}"


def _steps(steps: Steps) -> str:
    warmup = f"; warmup over the first {steps.warmup:,}" if steps.warmup else ""
    return (
        f"{plural(steps.total, 'step')} of {plural(steps.sequences_per_step, 'pack' if steps.packed else 'row')}, "
        f"{epochs(steps.epochs)}, on one process{warmup}"
    )


def _sequences(steps: Steps, max_length: int) -> str:
    padding = f"{steps.padding:.1%} of the tokens in a batch are padding"
    if steps.fill is None:
        return padding
    return f"{plural(steps.sequences, 'pack')} of up to {max_length:,} tokens, {steps.fill:.1%} full; {padding}"


def _benchmarks(facts: BenchmarkFacts) -> str:
    tasks = "" if facts.tasks == len(facts.names) else f"{plural(facts.tasks, 'task')}, "
    times = "" if facts.times is None else f", {plural(facts.times, 'time')}"
    return f"{', '.join(facts.names)}: {tasks}{plural(facts.documents, 'document')}{times}"


def _show_example(console: Console, example: Example) -> None:
    supervised = sum(label >= 0 for label in example.labels)
    counts = f"{plural(len(example.input_ids), 'token')}, {supervised:,} of them supervised"
    show_line(console, "example", f"{example.where}: {counts}, marked {_OPEN}so{_CLOSE}")
    text = Text()
    for piece in example.pieces:
        if piece.supervised:
            text.append(_OPEN + visible(piece.text) + _CLOSE, "green")
        else:
            text.append(visible(piece.text), "dim")
    console.print(text)


def _result(facts: Facts) -> Text:
    if facts.problems:
        return Text(f"training would be refused: {plural(len(facts.problems), 'problem')}", "red")
    if facts.checked == "recipe":
        return Text("the recipe is right; not all of what is on the hub could be looked at", "yellow")
    if facts.notices:
        return Text(f"no mistake was found; see {plural(len(facts.notices), 'note')} above", "yellow")
    return Text("nothing found that would stop or spoil training", "green")
