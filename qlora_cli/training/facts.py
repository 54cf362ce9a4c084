"""What a check finds out about a recipe's data, in plain numbers and texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from qlora_cli.training.events import DataReady

if TYPE_CHECKING:  # or a wrong recipe would wait for numpy, to be told so
    from qlora_cli.data.end_of_turn import EndOfTurn


@dataclass(frozen=True)
class Lengths:
    """Tokens per row before anything is cut: of p90, 90% of the rows have that many or fewer."""

    min: int
    p50: int
    p90: int
    p95: int
    p99: int
    max: int


@dataclass(frozen=True)
class Overlong:
    """Rows longer than `max_length`, what becomes of them, and what is not learned for that."""

    rows: int
    fate: Literal["refused", "dropped", "truncated"]
    rows_losing_labels: int
    rows_losing_answers: int
    lost_supervised_tokens: int


@dataclass(frozen=True)
class SomeRows:
    """How many rows, the numbers of the first five in their files, and those as a message has them."""

    rows: int
    first: tuple[int, ...]
    named: str


@dataclass(frozen=True)
class SplitFacts:
    """One split. `data` is what training tells of it, after cutting.

    Rows `without_labels` have nothing to learn, once they are cut; `silent` ones, before that, only the end of an
    empty answer.
    """

    data: DataReady
    lengths: Lengths
    max_length: int
    overlong: Overlong
    without_labels: SomeRows
    silent: SomeRows
    end_of_turn: EndOfTurn


@dataclass(frozen=True)
class Steps:
    """How long the run is, for one process; several share an epoch's rows, and take fewer steps.

    A step is of `sequences_per_step`, of which an epoch has `sequences`: rows or, `packed`, packs of rows, which are so
    full on average (`fill`, from 0 to 1). `padding` is the share of padding among the tokens of its batches.
    """

    total: int
    sequences_per_step: int
    epochs: float
    warmup: int
    packed: bool
    sequences: int
    padding: float
    fill: float | None


class Piece(NamedTuple):
    """A stretch of an example's text, all of it learned or none of it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Example:
    """A training row as the model sees it. `labels` are -100 where nothing is learned, and unshifted.

    `where` is its file and number. The pieces' texts, one after another, are the whole row decoded, with its special
    tokens.
    """

    row: int
    where: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class BenchmarkFacts:
    """What the model is scored on: the tasks and groups asked for, how many tasks those are, and how many documents
    they ask about each time, of `times`; the number of times is None where that of the steps is not known."""

    names: tuple[str, ...]
    tasks: int
    documents: int
    times: int | None


@dataclass(frozen=True)
class Facts:
    """What was found. `checked` is "recipe" if tokens or rows of either split are not known.

    `problems` is everything for which training would be refused, `notices` what may be meant so but is more often a
    mistake, and what could not be looked at.
    """

    checked: Literal["recipe", "recipe and data"]
    context_length: int | None
    train: SplitFacts | None
    validation: SplitFacts | None
    steps: Steps | None
    notices: tuple[str, ...]
    problems: tuple[str, ...]
    examples: tuple[Example, ...]
    benchmarks: BenchmarkFacts | None = None
