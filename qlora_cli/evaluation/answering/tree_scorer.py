"""Likelihoods from a prefix tree: what questions begin with alike is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.likelihoods import Answers, Asked, Tally, token_answers
from qlora_cli.evaluation.answering.memory import Budget, within_memory
from qlora_cli.evaluation.answering.prefix_tree import PrefixTree
from qlora_cli.evaluation.answering.questions import Continuation, Likelihood, Progress
from qlora_cli.evaluation.answering.tree_walk import Kept, TreeWalk


class TreeScorer:
    """Computes every node of the tree of all that is asked exactly once.

    Args:
        model: one that `TreeWalk` can walk with, in eval mode.
        tokens: how many nodes a forward pass computes at most.
        rows: how many rows of logits it gives at most.
        sequences: how many sequences' own nodes it computes at most; None is no limit.
    """

    name = "prefix tree"
    why: str | None = None

    def __init__(self, model: PreTrainedModel, *, tokens: int, rows: int, sequences: int | None = None) -> None:
        self._walk = TreeWalk(model)
        self._budget = Budget(tokens)
        self._rows = rows
        self._sequences = sequences

    def score(self, continuations: Sequence[Continuation], progress: Progress) -> Iterator[tuple[int, Likelihood]]:
        """Each continuation's number and likelihood, as soon as it is known; the longest branches come first.

        Raises:
            ExhaustedError: if memory runs out however little is computed at once.
            EvaluationError: if logits are NaN.
        """
        tree = PrefixTree.of([c.tokens[:-1] for c in continuations])
        asked = Asked.of(tree, continuations)
        tally = Tally(len(continuations))
        kept = Kept.none()
        begin = 0
        progress(0, len(tree))
        while begin < len(tree):
            end = self._end(tree, asked, begin)
            found = within_memory(self._stretch, tree, asked, begin, end, kept)
            if found is None:
                self._budget.halve(end - begin)
                continue
            answers, kept = found
            _, which = asked.between(begin, end)
            begin = end
            progress(begin, len(tree))
            yield from tally.add(asked.owner[which], asked.final[which], answers)

    def _end(self, tree: PrefixTree, asked: Asked, begin: int) -> int:
        end = tree.stretch(begin, self._budget.tokens, self._sequences)
        rows, _ = asked.between(begin, end)
        if rows.stop - rows.start > self._rows:
            end = int(asked.nodes[rows.start + self._rows])
        return end

    def _stretch(self, tree: PrefixTree, asked: Asked, begin: int, end: int, kept: Kept) -> tuple[Answers, Kept]:
        """What is asked after nodes `begin` to `end`, and what the next of them still see."""
        rows, which = asked.between(begin, end)
        logits, after = self._walk.forward(tree, begin, end, kept, asked.nodes[rows])
        answers = token_answers(logits, asked.row[which] - rows.start, asked.target[which])
        return answers, after.only(tree.ancestors(end))
