"""How far questions have come, told now and then."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from qlora_cli.evaluation.events import Asking, Kind, Report

_EVERY = 0.1  # seconds


class Tally:
    """Counts the answers to one kind of questions.

    A question may have several parts, as a long text is scored in pieces; it is answered when all of them are.

    Attributes:
        questions: how many there are, `kept` of them answered by an earlier start.
    """

    def __init__(self, kind: Kind, owners: Sequence[int], questions: int, report: Report) -> None:
        """Begin to count.

        Args:
            owners: of each part, the question it belongs to, [0, questions).
            questions: how many there are; those without a part are answered.
        """
        self._kind = kind
        self._owners = owners
        self.questions = questions
        self._report = report
        self._open = Counter(owners)
        self._answered = questions - len(self._open)
        self.kept = 0
        self._tokens = self._all_tokens = 0
        self._started = time.monotonic()
        self._told_at = 0.0

    def answered(self, parts: Iterable[int], *, kept: bool = False) -> None:
        """Some parts have their answer; `kept` from an earlier start."""
        for part in parts:
            owner = self._owners[part]
            self._open[owner] -= 1
            if not self._open[owner]:
                self._answered += 1
                self.kept += kept
        if not kept:
            self._tell()

    def computed(self, tokens: int, all_tokens: int) -> None:
        """So many tokens were computed, of so many."""
        self._tokens, self._all_tokens = tokens, all_tokens
        self._tell()

    def tell(self) -> None:
        """Tell how far it is, whenever that was told last."""
        self._told_at = time.monotonic()
        seconds = self._told_at - self._started
        counts = self._answered, self.questions, self.kept, self._tokens, self._all_tokens
        self._report(Asking(self._kind, *counts, seconds))

    def _tell(self) -> None:
        if time.monotonic() - self._told_at > _EVERY:
            self.tell()
