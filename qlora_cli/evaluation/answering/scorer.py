"""Which way a model's likelihoods are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.memory import ExhaustedError, counted, planned_rows, planned_tokens
from qlora_cli.evaluation.answering.questions import Continuation, Likelihood, Progress
from qlora_cli.evaluation.answering.row_scorer import RowScorer
from qlora_cli.evaluation.answering.together import Together, read_together
from qlora_cli.evaluation.answering.tree_scorer import TreeScorer
from qlora_cli.evaluation.answering.trial import examine, rope_reach


class Scorer(Protocol):
    """Says how likely continuations are.

    Attributes:
        name: "prefix tree" or "row by row".
        why: why it is row by row; None where it is not.
    """

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str | None: ...

    def score(self, continuations: Sequence[Continuation], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        """The number of each continuation, once, and its likelihood, as soon as that is known.

        Args:
            progress: called with the tokens computed and those to be computed, which shared ones count in once.

        Raises:
            EvaluationError: if memory does not suffice however little is computed at once, or the model gives NaN.
        """
        ...


def choose_scorer(model: PreTrainedModel, *, batch_size: int | None, remark: Callable[[str], None]) -> Scorer:
    """The fastest way that gives this model's answers: found by looking at it, and proved by a trial on it.

    Args:
        model: a causal language model in eval mode, not wrapped for data parallelism.
        batch_size: of how many sequences a forward pass computes tokens at most; None leaves it to the memory.
        remark: told in a sentence what a person should know.
    """
    tokens, rows = planned_tokens(model), planned_rows(model)
    verdict = examine(model)
    together: Together = "any" if verdict.fault is None else read_together(model)
    by_row = RowScorer(
        model,
        tokens=tokens,
        rows=rows,
        sequences=1 if together == "none" else batch_size,
        alike=0 if together == "one length" else rope_reach(model),
        why=verdict.fault,
    )
    if verdict.fault is not None:
        remark(
            f"{type(model).__name__} is scored row by row, what rows begin with alike computed again for each: "
            f"{verdict.fault}"
        )
        if together != "any":
            remark(
                f"{type(model).__name__} is asked about {_COMPANY[together]}: in a trial it did not answer rows of "
                "several lengths together as it does alone"
            )
        return by_row
    tree = TreeScorer(model, tokens=tokens, rows=rows, sequences=batch_size)
    return _TreeFirst(tree, by_row, verdict.reach, remark)


_COMPANY: dict[Together, str] = {"one length": "only rows of one length at a time", "none": "one row at a time"}


class _TreeFirst:
    """The tree for what all layers look back on as a whole; rows for what is longer, and for what is left where memory
    does not hold the keys and values that the tree keeps."""

    name = TreeScorer.name
    why: str | None = None

    def __init__(self, tree: TreeScorer, by_row: RowScorer, reach: int | None, remark: Callable[[str], None]) -> None:
        self._tree = tree
        self._by_row = by_row
        self._reach = reach
        self._remark = remark

    def score(self, continuations: Sequence[Continuation], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        short, long = self._parted(continuations)
        rest = self._by_row.tokens([continuations[index] for index in long])
        nodes = 0

        def in_tree(done: int, total: int) -> None:
            nonlocal nodes
            nodes = done
            progress(done, total + rest)

        def by_row(done: int, total: int) -> None:
            progress(nodes + done, nodes + total)

        # The tree first: how large the other part is can be said before it begins.
        left = dict.fromkeys(short)
        # Outside the handler, whose traceback keeps alive what was computed.
        with suppress(ExhaustedError):
            for index, likelihood in self._tree.score([continuations[index] for index in short], in_tree):
                del left[short[index]]
                yield short[index], likelihood
        if left:
            self._remark(
                f"memory does not hold the keys and values that shared prefixes take: "
                f"{counted(len(left), 'continuation')} of {len(continuations):,} are scored row by row"
            )
        by_rows = [*long, *left]
        for index, likelihood in self._by_row.score([continuations[index] for index in by_rows], by_row):
            yield by_rows[index], likelihood

    def _parted(self, continuations: Sequence[Continuation]) -> tuple[list[int], list[int]]:
        """Which of them are for the tree, and which are too long for it."""
        if self._reach is None:
            return list(range(len(continuations))), []
        short = [index for index, c in enumerate(continuations) if len(c.tokens) - 1 <= self._reach]
        long = [index for index, c in enumerate(continuations) if len(c.tokens) - 1 > self._reach]
        if long:
            self._remark(
                f"{counted(len(long), 'continuation')} of {len(continuations):,} are scored row by row: they are "
                f"longer than the {self._reach:,} tokens that every layer of the model looks back on"
            )
        return short, long
