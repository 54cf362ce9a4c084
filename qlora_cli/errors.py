"""What can go wrong, and the exit code that says so.

QloraError                     1
├── RequestError               2   the request was wrong: nothing was started
│   ├── RecipeError                the recipe, or a --set
│   ├── DataError                  the dataset: file and row are named
│   ├── ModelError                 the base model or an adapter cannot be had
│   ├── HubUnreachableError        a model or a dataset is on the hub, and that gives no answer
│   ├── OutputError                the output folder is in the way
│   └── DeviceError                a device was asked for that is not there
├── RunError                   1   the run started and failed
│   ├── NonFiniteError             loss or gradients are NaN or infinite
│   └── CheckpointError            a checkpoint could not be written or read
└── Interrupted              130   stopped from outside, state saved

A message says what was expected, what was got, where, and what to do. Commands print it without a traceback.
"""

from __future__ import annotations


class QloraError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class RequestError(QloraError):
    """The request cannot be carried out as written."""

    exit_code = 2


class RecipeError(RequestError):
    """The recipe or a command-line override is wrong."""


class DataError(RequestError):
    """The dataset is missing, malformed, or teaches nothing."""


class ModelError(RequestError):
    """A model or adapter is missing or unsuitable."""


class HubUnreachableError(RequestError):
    """A model or a dataset has to come from the hub, and the hub cannot be reached: nothing is known against it."""


class OutputError(RequestError):
    """The output folder holds something that must not be overwritten."""


class DeviceError(RequestError):
    """The requested device is not available."""


class RunError(QloraError):
    """The run began and could not be finished."""


class NonFiniteError(RunError):
    """The loss or the gradient norm became NaN or infinite."""


class CheckpointError(RunError):
    """A checkpoint could not be written, or none can be read."""


class Interrupted(QloraError):
    """The run was stopped from outside after its state was saved."""

    exit_code = 130
