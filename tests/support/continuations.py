"""Continuations to be scored, and what a model says of them when each is computed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.questions import Continuation, Likelihood, Progress
from qlora_cli.evaluation.answering.scorer import Scorer


def silent(_done: int, _total: int) -> None:
    """Progress that nobody wants to hear of."""


@st.composite
def continuations(draw: st.DrawFn, longest: int = 20) -> list[Continuation]:
    """Continuations that begin alike, are equal, or begin one another; some score one token, some all but the first."""
    # Three tokens meet often; others come from all over the vocabulary.
    tokens = st.one_of(st.integers(300, 302), st.integers(0, 511))
    stems = draw(st.lists(st.lists(tokens, max_size=longest // 2), min_size=1, max_size=3))
    asked = []
    for _ in range(draw(st.integers(1, 12))):
        stem = draw(st.sampled_from(stems))
        text = stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(tokens, min_size=2, max_size=longest // 2))
        asked.append(Continuation(tuple(text), draw(st.integers(1, len(text) - 1))))
    repeated = draw(st.lists(st.sampled_from(asked), max_size=3))
    return asked + repeated


@torch.no_grad()
def alone(model: PreTrainedModel, continuation: Continuation) -> Likelihood:
    """The continuation computed with nothing around it, in one row without a cache."""
    logits = model(input_ids=torch.tensor([continuation.tokens[:-1]]), use_cache=False).logits[
        0, -continuation.scored :
    ]
    targets = torch.tensor(continuation.tokens[-continuation.scored :])
    found = logits.float().log_softmax(-1).gather(1, targets[:, None]).double().sum()
    return Likelihood(float(found), bool((logits.argmax(-1) == targets).all()))


def answered(scorer: Scorer, asked: Sequence[Continuation], progress: Progress = silent) -> list[Likelihood]:
    """The answers in the order of the questions; each of them must come, and once."""
    found: dict[int, Likelihood] = {}
    for index, likelihood in scorer.score(asked, progress):
        assert index not in found
        found[index] = likelihood
    assert sorted(found) == list(range(len(asked)))
    return [found[index] for index in range(len(asked))]


def assert_as_alone(
    model: PreTrainedModel, scorer: Scorer, asked: Sequence[Continuation], tolerance: float = 1e-5
) -> None:
    """Every answer is what the model says of the continuation alone."""
    for continuation, got in zip(asked, answered(scorer, asked), strict=True):
        wanted = alone(model, continuation)
        assert got.log_probability == pytest.approx(wanted.log_probability, abs=tolerance), continuation
        assert got.greedy == wanted.greedy, continuation


def assert_alike(found: Sequence[Likelihood], wanted: Sequence[Likelihood], tolerance: float = 1e-5) -> None:
    """The same likelihoods within rounding, and the same choices."""
    assert [x.log_probability for x in found] == pytest.approx([x.log_probability for x in wanted], abs=tolerance)
    assert [x.greedy for x in found] == [x.greedy for x in wanted]


@contextmanager
def passes(model: nn.Module, *, of_trees: bool = False) -> Iterator[list[torch.Tensor]]:
    """The `input_ids` of every forward pass inside, [batch, seq]; or only of those with a tree's mask."""
    seen: list[torch.Tensor] = []

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if not of_trees or kwargs["attention_mask"].ndim == 4:
            seen.append(kwargs["input_ids"])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def memory_for(
    model: PreTrainedModel, tokens: int, error: type[RuntimeError] = torch.OutOfMemoryError
) -> Iterator[list[int]]:
    """Inside, more tokens than these run out of memory in the last layer; what was tried in vain is noted."""
    refused: list[int] = []
    last = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[-1]

    def limit(_module: nn.Module, args: tuple[torch.Tensor, ...], _kwargs: Any, _output: Any) -> None:
        number = args[0].shape[0] * args[0].shape[1]
        if number > tokens:
            refused.append(number)
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12")

    hook = last.register_forward_hook(limit, with_kwargs=True)
    try:
        yield refused
    finally:
        hook.remove()
