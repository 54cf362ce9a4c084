"""What can go wrong, and the exit code that says so.

QloraError                     1
├── RequestError               2   the request was wrong: nothing was started
│   ├── RecipeError                the recipe, or a --set
│   ├── DataError                  the dataset: file and row are named
│   ├── ModelError                 the base model or an adapter cannot be had
│   ├── HubUnreachableError        a model or a dataset is on the hub, and that gives no answer
│   ├── TaskError                  a benchmark is unknown, or its data is not there
│   ├── OutputError                the output folder is in the way
│   └── DeviceError                a device was asked for that is not there
├── RunError                   1   the run started and failed
│   ├── NonFiniteError             loss or gradients are NaN or infinite
│   ├── OutOfMemoryError           memory did not suffice
│   │   └── OutOfMemoryElsewhereError  on another process
│   ├── CheckpointError            a checkpoint could not be written or read
│   ├── MergeError                 the merged model would not be the trained one
│   ├── EvaluationError            the model could not be scored
│   └── SelftestError              a promise is not kept on this device, or that could not be found out
└── Interrupted              130   stopped from outside, state saved

A message says what was expected, what was got, where, and what to do. Commands print it without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Position(NamedTuple):
    """Where a value stands: file as the user named it, line and column from 1; line 0 for what is not in a file."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong in a recipe or in an override.

    `key` is the dotted name of the field, empty for the file as a whole. `suggestion` is the word or the dotted name
    that was probably meant; `allowed`, what may stand here where the message does not say it already.
    """

    position: Position
    key: str
    message: str
    suggestion: str | None = None
    allowed: str = ""

    def __str__(self) -> str:
        return printable(f"{self.position}: {self.key + ': ' if self.key else ''}{self.message}")


def printable(text: str) -> str:
    """The text with what would steer a terminal, or begin another line, written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class QloraError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class RequestError(QloraError):
    """The request cannot be carried out as written."""

    exit_code = 2


class RecipeError(RequestError):
    """The recipe or a command-line override is wrong; every mistake that was found, in the order to read them."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        lines: list[str] = []
        for mistake in mistakes:
            lines.append(str(mistake))
            # The same list of keys need not be read twice.
            if mistake.allowed and (allowed := f"    {mistake.allowed}") not in lines:
                lines.append(allowed)
        super().__init__("\n".join(lines))


class DataError(RequestError):
    """The dataset is missing, malformed, or teaches nothing."""


class ModelError(RequestError):
    """A model or adapter is missing or unsuitable."""


class HubUnreachableError(RequestError):
    """A model or a dataset has to come from the hub, and the hub cannot be reached: nothing is known against it."""


class TaskError(RequestError):
    """A benchmark task is unknown, cannot be run here, or its data is missing or malformed."""


class OutputError(RequestError):
    """The output folder holds something that must not be overwritten, or is in use."""


class DeviceError(RequestError):
    """The requested device is not available."""


class RunError(QloraError):
    """The run began and could not be finished."""


class NonFiniteError(RunError):
    """The loss or the gradient norm became NaN or infinite."""


class OutOfMemoryError(RunError):
    """The device has less memory than is needed; what was saved before is whole."""


class OutOfMemoryElsewhereError(OutOfMemoryError):
    """Memory sufficed here, and not on another process of the run."""


class CheckpointError(RunError):
    """A checkpoint could not be written, or none can be read."""


class MergeError(RunError):
    """The merge was carried out, and what came out is not the model that was trained."""


class EvaluationError(RunError):
    """The evaluation began and could not be finished; the answers that were given are kept."""


class SelftestError(RunError):
    """A check of `qlora selftest` failed, or could not be carried out."""


class Interrupted(QloraError):
    """The run was stopped from outside after its state was saved."""

    exit_code = 130
