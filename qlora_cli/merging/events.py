"""What a merge tells those who listen: facts, in the order in which they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.merging.report import MergeReport
from qlora_cli.training.events import Notice, Stage

if TYPE_CHECKING:  # it brings along what reads rows and runs models
    from qlora_cli.merging.fidelity.measures import Fidelity


@dataclass(frozen=True)
class Planned:
    """What is known before the first byte is written.

    Attributes:
        adapter: where it is from, in words.
        changes: how many weights it changes, by the kind of change.
        base: the model it was trained over.
        stored: how that was stored in training, and who says so.
        onto: the bases that a merged model is made on.
    """

    adapter: str
    changes: str
    base: str
    stored: str
    onto: tuple[str, ...]


@dataclass(frozen=True)
class Writing:
    """The weights of one model begin to be written.

    Attributes:
        what: the base that it is merged onto, or the form that a merged model is now stored in.
    """

    what: str
    total_bytes: int


@dataclass(frozen=True)
class Written:
    """So many more bytes of them are."""

    bytes: int


@dataclass(frozen=True)
class Comparing:
    """A model begins to read the rows that are looked at.

    Attributes:
        what: `trained`, the base that it was merged onto, the form it is stored in, or another in words.
    """

    what: str
    total_rows: int


@dataclass(frozen=True)
class Compared:
    """So many of them it has read."""

    rows: int


@dataclass(frozen=True)
class Measured:
    """How near one model is to the trained one."""

    what: str
    fidelity: Fidelity


@dataclass(frozen=True)
class Merged:
    """The merged model is in its place."""

    output: Path
    files: int
    bytes: int
    seconds: float
    report: MergeReport


Event = Stage | Notice | Planned | Writing | Written | Comparing | Compared | Measured | Merged
Listener = Callable[[Event], None]


class Emit:
    """Tells every listener of every event."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = tuple(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)
