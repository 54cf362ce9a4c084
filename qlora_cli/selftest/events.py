"""What a self-test tells as it goes, and what a check found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from qlora_cli.selftest.workbench import Workbench

Number: TypeAlias = float | str
# An error is a check that was not carried out: nothing is known of its promise.
Outcome: TypeAlias = Literal["passed", "failed", "error"]


@dataclass(frozen=True)
class Measured:
    """What a check measured.

    Attributes:
        figure: what came out, by name: a number, or a digest or a count of steps as text.
        bound: what it has to be or the most it may be, for those of the figures that have one.
        detail: what was done and found, in words.
    """

    passed: bool
    figure: Mapping[str, Number]
    bound: Mapping[str, Number]
    detail: str


@dataclass(frozen=True)
class Check:
    """One promise: what it is called by programs and by people, how it is measured, and what it means if it fails."""

    name: str
    title: str
    meaning: str
    measure: Callable[[Workbench], Measured]


@dataclass(frozen=True)
class Begun:
    """The checks are about to begin, on this machine with these versions."""

    device: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Checking:
    """A check begins."""

    title: str


@dataclass(frozen=True)
class Result:
    """How a check ended. `meaning` says what that means for the user; None for a check that passed."""

    name: str
    title: str
    status: Outcome
    figure: Mapping[str, Number]
    bound: Mapping[str, Number]
    seconds: float
    detail: str
    meaning: str | None

    @property
    def passed(self) -> bool:
        """Whether its promise is known to be kept."""
        return self.status == "passed"


@dataclass(frozen=True)
class Report:
    """All of it."""

    begun: Begun
    results: tuple[Result, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(result.passed for result in self.results)

    def titles(self, status: Outcome) -> list[str]:
        """What the checks are called that ended so."""
        return [result.title for result in self.results if result.status == status]


Event: TypeAlias = Begun | Checking | Result
Listener: TypeAlias = Callable[[Event], None]
