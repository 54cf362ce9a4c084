"""What an evaluation tells those who listen, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from qlora_cli.evaluation.events import Asking
from qlora_cli.evaluation.statistics import Comparison
from qlora_cli.training.events import EncodingProgress, EvaluationProgress, Notice, Stage

Who = Literal["target", "base"]


@dataclass(frozen=True)
class Prepared:
    """What is known before the first question.

    Attributes:
        target: what is scored, in words: `the run runs/x`, `the model models/y`.
        storage: how its weights are stored, in words.
        base: the model under the adapter; None for a target without one.
        tasks: how many tasks, groups counted as their members.
        documents: how many documents they ask about.
    """

    target: str
    storage: str
    base: str | None
    tasks: int
    documents: int


@dataclass(frozen=True)
class Turn:
    """Now the target is asked, or the base without the adapter."""

    who: Who


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one task or group.

    Attributes:
        task: lm-eval's name; `label` is what it is called in tables.
        depth: 0 for what stands alone or on top; 1 and more within groups.
        is_group: whether the value is aggregated over tasks.
        documents: how many documents it is the score of.
        metric: `acc`, `acc_norm`, `exact_match`, …; `filter` is how answers were read, `none` for the usual.
        value: the score; `error` is its standard error, None where there is none.
        higher_is_better: None where the task does not say.
        num_fewshot: examples in each prompt; None where the tasks of a group differ.
        partial: `5 of 57 tasks`, where a group was scored on a part of them, `validation split`, where a task was asked
            about another one than its own; else None.
        base, base_error: the same of the base; None without a baseline.
        comparison: None without a baseline, or where there is nothing to pair.
    """

    task: str
    label: str
    depth: int
    is_group: bool
    documents: int
    metric: str
    filter: str
    value: float
    error: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    partial: str | None = None
    base: float | None = None
    base_error: float | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class LossRow:
    """The loss on a dataset's rows: the mean over `tokens` supervised tokens, with its standard error by rows.

    `bits_per_byte` is of the text that these stand for, which models of other tokenizers share; None without any.
    """

    dataset: str
    rows: int
    tokens: int
    loss: float
    error: float | None
    perplexity: float | None
    bits_per_byte: float | None = None
    base: float | None = None
    base_error: float | None = None
    base_perplexity: float | None = None
    base_bits_per_byte: float | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation came to.

    Attributes:
        prepared: what was scored.
        scores: in the order to show them; `losses` likewise.
        template: which chat template the prompts were rendered with, in words; None for plain prompts.
        way: how it was asked: `prefix tree` or `row by row`; None where nothing was asked by log-likelihood.
        answers: questions that were answered, `kept` of them by an earlier start.
        seconds: all of it, loading included.
        output: the results file, and `samples`, the files of answers; empty while they are still to be written.
        limit, seed, system_instruction: as they were asked for; None where they were not.
    """

    prepared: Prepared
    scores: tuple[ScoreRow, ...]
    losses: tuple[LossRow, ...]
    template: str | None
    way: str | None
    answers: int
    kept: int
    seconds: float
    output: Path | None = None
    samples: tuple[Path, ...] = ()
    limit: int | float | None = None
    seed: int | None = None
    system_instruction: str | None = None


@dataclass(frozen=True)
class Written:
    """Files that are there now.

    Attributes:
        what: the results file, or the files of answers.
        files: where they are.
        instead_of: where the results were to be; None unless another file has come to be there.
        is_lm_evals: whether it is in lm-eval's format.
    """

    what: Literal["results", "samples"]
    files: tuple[Path, ...]
    instead_of: Path | None = None
    is_lm_evals: bool = True


Event: TypeAlias = (
    Stage | Notice | Prepared | Turn | Asking | EncodingProgress | EvaluationProgress | Evaluated | Written
)
Listener: TypeAlias = Callable[[Event], None]
