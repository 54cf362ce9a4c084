"""From logits to the likelihoods of continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.prefix_tree import Ints, PrefixTree
from qlora_cli.evaluation.answering.questions import Continuation, Likelihood

Answers: TypeAlias = tuple[NDArray[np.float64], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Asked:
    """After which nodes of a tree the next token is asked for, and which token that is.

    Attributes:
        node, target, owner: int64 [asked], the node, the token id, and the number of the continuation; by node.
        final: bool [asked], whether it is the last that its continuation needs.
        nodes: int64 [different nodes], ascending.
        row: int64 [asked], the place of `node` in `nodes`.
    """

    node: Ints
    target: Ints
    owner: Ints
    final: NDArray[np.bool_]
    nodes: Ints
    row: Ints

    @classmethod
    def of(cls, tree: PrefixTree, continuations: Sequence[Continuation]) -> Asked:
        """What continuations ask of the tree of all their tokens but the last."""
        none = [np.empty(0, np.int64)]
        last = tree.last.tolist()
        node = np.concatenate(none + [tree.path(at, c.scored) for at, c in zip(last, continuations, strict=True)])
        target = np.array([token for c in continuations for token in c.tokens[-c.scored :]], np.int64)
        scored = np.array([c.scored for c in continuations], np.int64)
        owner = np.repeat(np.arange(len(continuations)), scored)
        order = np.argsort(node, kind="stable")
        node, target, owner = node[order], target[order], owner[order]
        nodes, row = np.unique(node, return_inverse=True)
        return cls(node, target, owner, node == tree.last[owner], nodes, row)

    def between(self, begin: int, end: int) -> tuple[slice, slice]:
        """Which of `nodes`, and which of the others, belong to nodes from `begin` to `end`."""
        return _slice(self.nodes, begin, end), _slice(self.node, begin, end)


def _slice(ascending: Ints, begin: int, end: int) -> slice:
    first, last = np.searchsorted(ascending, (begin, end))
    return slice(int(first), int(last))


@torch.no_grad()
def token_answers(logits: Tensor, row: Ints, target: Ints, at_once: int | None = None) -> Answers:
    """The logarithms of tokens' probabilities, and whether each is the likeliest.

    Args:
        logits: [rows, vocabulary], of any floating dtype; the softmax is float32.
        row, target: int64 [asked], the row that a token is looked up in, and its id.
        at_once: so many rows at most are copied and held in float32 at a time; None is all of them.

    Raises:
        EvaluationError: if logits are NaN.
    """
    order = np.argsort(row, kind="stable")
    needed, place = np.unique(row[order], return_inverse=True)
    step = at_once or max(len(needed), 1)
    parts = []
    for begin in range(0, len(needed), step):
        some = needed[begin : begin + step]
        first, last = np.searchsorted(place, (begin, begin + step))
        whole = len(some) == len(logits)  # and in order: no copy
        picked = logits if whole else logits[torch.from_numpy(some).to(logits.device)]
        rows = torch.from_numpy(place[first:last] - begin).to(logits.device)
        targets = torch.from_numpy(target[order[first:last]]).to(logits.device)
        found = F.log_softmax(picked, dim=-1, dtype=torch.float32)[rows, targets]
        parts.append((found, picked.argmax(dim=-1)[rows] == targets))
    values, likeliest = np.empty(len(row), np.float64), np.empty(len(row), np.bool_)
    if parts:
        values[order] = torch.cat([found for found, _ in parts]).double().cpu().numpy()
        likeliest[order] = torch.cat([is_highest for _, is_highest in parts]).cpu().numpy()
    if np.isnan(values).any():
        raise EvaluationError(
            "the model's logits are NaN, so that nothing can be said about likelihoods. Look at its weights, or try "
            "another --bits; answers that were given are kept"
        )
    return values, likeliest


class Tally:
    """Adds up what is found, token by token, for so many continuations."""

    def __init__(self, continuations: int) -> None:
        self._sums = np.zeros(continuations, np.float64)
        self._greedy = np.ones(continuations, np.bool_)

    def add(self, owner: Ints, final: NDArray[np.bool_], answers: Answers) -> Iterator[tuple[int, Likelihood]]:
        """Take answers to the tokens of continuations; those that are complete come out.

        Args:
            owner, final: [answers], as in `Asked`.
        """
        values, likeliest = answers
        np.add.at(self._sums, owner, values)
        self._greedy[owner[~likeliest]] = False
        for index in owner[final].tolist():
            yield index, Likelihood(float(self._sums[index]), bool(self._greedy[index]))
