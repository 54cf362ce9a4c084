"""What a run tells as it goes. Whoever wants to know subscribes: the screen, `metrics.jsonl`, a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from qlora_cli.evaluation.events import Asking

# What the best checkpoint may be chosen by, beside scores, whose names have a slash.
EVAL_LOSS = "eval_loss"


@dataclass(frozen=True)
class Notice:
    """Something a person should know that is neither progress nor an error."""

    text: str


@dataclass(frozen=True)
class Stage:
    """What is being done before the first step, such as loading the model."""

    text: str


@dataclass(frozen=True)
class EncodingProgress:
    """So many rows of a source are encoded: a share of it from 0 to 1, None if its size is not known."""

    source: str
    rows: int
    share: float | None


@dataclass(frozen=True)
class SourceReady:
    """One source of a split: its rows that training sees, how they are laid out, and how often an epoch sees them."""

    source: str
    format: str
    rows: int
    weight: float


@dataclass(frozen=True)
class DataReady:
    """The rows are encoded. `sequences` is how many they became, more than `rows` where a chat template renders
    earlier turns differently once others follow; `skipped` ones could not be read."""

    split: str
    sources: tuple[SourceReady, ...]
    fingerprint: str
    rows: int
    sequences: int
    tokens: int
    supervised_tokens: int
    dropped: int
    truncated: int
    skipped: int


@dataclass(frozen=True)
class ModelReady:
    """The base is loaded and the LoRA layers are on it. Bytes are those of the frozen base.

    `packing` says what keeps the rows of a pack apart; None where rows are not packed.
    """

    name: str
    architecture: str
    device: str
    total_parameters: int
    trainable_parameters: int
    quantized_parameters: int
    base_bytes: int
    bits_per_quantized_parameter: float
    storage: str
    adapted_layers: int
    packing: str | None = None


@dataclass(frozen=True)
class Rehearsed:
    """What a run will ask for was tried before its first step, and fits; nothing is left of it.

    Attributes:
        rows: of the longest batch: rows or, `packed`, packs of rows.
        tokens: of the longest of them.
        step_seconds: what a step of that batch takes.
        evaluation_seconds: what the longest held-out batch takes; None where nothing is held out.
        checkpoint_bytes: how large a checkpoint is.
        checkpoint_seconds: what it takes to write one and read it again.
        peak_memory_bytes: the most that was held so far.
    """

    rows: int
    tokens: int
    step_seconds: float
    evaluation_seconds: float | None
    checkpoint_bytes: int
    checkpoint_seconds: float
    peak_memory_bytes: int
    packed: bool = False


@dataclass(frozen=True)
class Started:
    """The loop is about to begin. A step is of so many rows, or, `packed`, packs of rows."""

    output_dir: Path
    first_step: int
    total_steps: int
    epochs: float
    sequences_per_step: int
    packed: bool = False


@dataclass(frozen=True)
class StepDone:
    """One optimizer step. `loss` is the mean over its supervised tokens, `seconds` the time it took."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class StepSkipped:
    """A step that changed no weight and no optimizer state: `reason` says whether its loss or its gradient was NaN or
    infinite, `rows` names the rows in it."""

    step: int
    reason: str
    rows: str


@dataclass(frozen=True)
class TrainRecord:
    """Every `logging_steps`, if any step since the last record was taken. `loss` is the mean over their supervised
    tokens; `tokens` and `seconds` count from the start of the run, evaluations and checkpoints left out."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class EvaluationProgress:
    """`done` of `total` batches of an evaluation in training; of rows that are scored alone, tokens."""

    done: int
    total: int


@dataclass(frozen=True)
class EvalRecord:
    """The held-out loss after `step` steps: the mean over all supervised tokens of the validation rows."""

    step: int
    eval_loss: float
    perplexity: float | None
    supervised_tokens: int
    seconds: float


@dataclass(frozen=True)
class BenchmarkRecord:
    """What the model scores on benchmarks after `step` steps.

    Attributes:
        scores: of the tasks and groups asked for, by `TASK/METRIC`, with `TASK/METRIC_stderr` beside it where there is
            a standard error. A filter other than the usual follows the metric after a comma. None is no number.
        members: the same of the tasks and groups within those.
        weights: SHA-256 of the trained tensors that were scored.
        seconds: what it took.
        partial: of the tasks and groups whose score is not quite their own, what it is of: `5 of 57 tasks`,
            `validation split`.
    """

    step: int
    scores: Mapping[str, float | None]
    members: Mapping[str, float | None]
    weights: str
    seconds: float
    partial: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BestKept:
    """The checkpoint after `step` steps is the best so far, and stays: `score` is TASK/METRIC, or EVAL_LOSS."""

    step: int
    score: str
    value: float
    path: Path


@dataclass(frozen=True)
class CheckpointSaved:
    """A whole checkpoint is on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The run is done; `adapter` is what it made.

    `first_eval_loss` is the held-out loss before the first step, `last_eval_loss` the latest; None where there is none.
    `best` is the checkpoint with the best score, if one was asked for; `loaded`, the one with the lowest held-out loss,
    whose adapter this is; None where it is that of the last step. `stopped_early` says why there were no more steps.
    """

    adapter: Path
    steps: int
    seconds: float
    tokens: int
    peak_memory_bytes: int
    first_eval_loss: float | None
    last_eval_loss: float | None
    first_scores: Mapping[str, float | None] | None = None
    last_scores: Mapping[str, float | None] | None = None
    best: BestKept | None = None
    loaded: BestKept | None = None
    stopped_early: str | None = None
    skipped_steps: int = 0

    @property
    def adapter_step(self) -> int:
        """The step whose adapter it is."""
        return self.steps if self.loaded is None else self.loaded.step


Event: TypeAlias = (
    Notice
    | Stage
    | EncodingProgress
    | DataReady
    | ModelReady
    | Rehearsed
    | Started
    | StepDone
    | StepSkipped
    | TrainRecord
    | EvaluationProgress
    | EvalRecord
    | Asking
    | BenchmarkRecord
    | BestKept
    | CheckpointSaved
    | Finished
)
Listener: TypeAlias = Callable[[Event], None]


@dataclass
class Emitter:
    """Hands every event to every listener, in the order they subscribed."""

    listeners: list[Listener] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
