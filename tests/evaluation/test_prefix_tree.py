"""The prefix tree: every different beginning once, in an order that a walk can rely on."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.evaluation.answering.prefix_tree import PrefixTree

_SEQUENCES = st.lists(st.lists(st.one_of(st.integers(0, 2), st.integers(0, 2**31 - 1)), min_size=1, max_size=12))


@given(_SEQUENCES)
def test_each_different_beginning_is_one_node(sequences: list[list[int]]) -> None:
    """As many nodes as there are different non-empty beginnings, and each sequence's path reads that sequence."""
    tree = PrefixTree.of(sequences)
    assert len(tree) == len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})
    for sequence, last in zip(sequences, tree.last.tolist(), strict=True):
        path = tree.path(last)
        assert tree.token[path].tolist() == sequence
        assert tree.depth[path].tolist() == list(range(len(sequence)))


@given(_SEQUENCES)
def test_what_a_node_sees_is_told_by_order_and_end(sequences: list[list[int]]) -> None:
    """k <= q < end[k] holds for the nodes of q's path and for no others."""
    tree = PrefixTree.of(sequences)
    every = np.arange(len(tree))
    for node in every:
        assert every[(every <= node) & (node < tree.end)].tolist() == tree.path(node).tolist()
        assert tree.ancestors(node).tolist() == tree.path(node)[:-1].tolist()


@given(_SEQUENCES)
def test_the_longest_branch_comes_first(sequences: list[list[int]]) -> None:
    """Wherever sequences part, no later branch has a longer sequence than an earlier one."""
    tree = PrefixTree.of(sequences)
    parents = [tree.ancestors(node)[-1:].tolist() for node in range(len(tree))]
    for node, parent in enumerate(parents):
        later = [other for other in range(node + 1, len(tree)) if parents[other] == parent]
        heights = [int(tree.depth[at : tree.end[at]].max()) for at in [node, *later]]
        assert max(heights) == heights[0]


@given(_SEQUENCES, st.integers(1, 9), st.integers(1, 4))
def test_stretches_keep_to_both_limits(sequences: list[list[int]], nodes: int, most: int) -> None:
    """A stretch is never empty, and holds the own nodes of at most so many sequences; together they are the tree."""
    tree = PrefixTree.of(sequences)
    begin, runs = 0, np.flatnonzero(np.diff(tree.depth, prepend=-2) != 1)
    # A first child goes on where its parent is: only what is not one deeper begins another sequence's nodes.
    while begin < len(tree):
        end = tree.stretch(begin, nodes, most)
        assert begin < end <= begin + nodes
        assert np.count_nonzero((runs > begin) & (runs < end)) < most
        begin = end
    assert begin == len(tree)
    assert tree.ancestors(begin).tolist() == []


def test_only_so_many_of_a_path() -> None:
    """A path can be cut at the front, across the places where sequences part."""
    tree = PrefixTree.of([[1, 2, 3, 4], [1, 2, 5, 6], [1, 9]])
    last = int(tree.last[1])
    assert [tree.token[tree.path(last, length)].tolist() for length in (0, 1, 2, 3, 9)] == [
        [],
        [6],
        [5, 6],
        [2, 5, 6],
        [1, 2, 5, 6],
    ]
    assert tree.path(-1).tolist() == []


@pytest.mark.timeout(60)
def test_many_long_sequences_take_a_moment() -> None:
    """3,500 different prompts of 900 tokens, four times each, are laid out in a fraction of what they cost a model."""
    draw = np.random.default_rng(0)
    stems = [draw.integers(0, 49_000, 700).tolist() for _ in range(14)]
    prompts = [[*stems[i % 14], 49_000 + i, *draw.integers(0, 49_000, 199).tolist()] for i in range(3_500)]
    started = time.monotonic()
    tree = PrefixTree.of([prompt for prompt in prompts for _ in range(4)])
    assert len(tree) == 14 * 700 + 3_500 * 200
    assert time.monotonic() - started < 10  # a third of a second on an idle machine
