"""Likelihoods row by row: the plain path gives what each row gives alone, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, PreTrainedModel

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.questions import Continuation
from qlora_cli.evaluation.answering.row_scorer import RowScorer
from tests.support.continuations import answered, assert_alike, assert_as_alone, continuations, memory_for, passes
from tests.support.models import FAMILIES, tiny_model

_MANY = 10**6


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


class _AllLogits(LlamaForCausalLM):
    """Knows nothing of positions to keep, as remote code may."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def _of_lengths(*lengths: int) -> list[Continuation]:
    """Continuations of one token, each different from the first token on."""
    return [Continuation((number, *range(100, 99 + length), 7), 1) for number, length in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(asked=continuations(), tokens=st.integers(1, 64), rows=st.integers(1, 20), most=st.none() | st.integers(1, 4))
def test_as_one_by_one(
    llama: PreTrainedModel, asked: list[Continuation], tokens: int, rows: int, most: int | None
) -> None:
    """However rows are batched and padded, each answer is that of its row alone."""
    assert_as_alone(llama, RowScorer(llama, tokens=tokens, rows=rows, sequences=most), asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """Each family's padded rows give what the rows give alone."""
    model = tiny_model(family)
    asked = [Continuation(tuple(range(10 + i, 20 + 3 * i)), 1 + i % 3) for i in range(5)]
    assert_as_alone(model, RowScorer(model, tokens=64, rows=_MANY), asked)


def test_batches_are_the_longest_first_and_keep_to_all_limits(llama: PreTrainedModel) -> None:
    """Rows go by length, as many at once as tokens (padding counted), rows of logits and sequences allow."""
    asked = _of_lengths(3, 9, 4, 30, 8, 5)
    batches = {}
    for name, limits in {
        "tokens": {"tokens": 18, "rows": _MANY},
        "rows": {"tokens": 100, "rows": 2},
        "sequences": {"tokens": 100, "rows": _MANY, "sequences": 2},
    }.items():
        with passes(llama) as seen:
            answered(RowScorer(llama, **limits), asked)
        batches[name] = [tuple(ids.shape) for ids in seen]
    assert batches == {
        "tokens": [(1, 30), (2, 9), (3, 5)],
        # Rows of 9 and 8 have two positions between them after which something is asked for.
        "rows": [(1, 30), (1, 9), (1, 8), (1, 5), (1, 4), (1, 3)],
        "sequences": [(2, 30), (2, 8), (2, 4)],
    }


def test_equal_rows_are_computed_once(llama: PreTrainedModel) -> None:
    """Choices of one token, and questions asked again, share a row, however many tokens of it each scores."""
    asked = [Continuation((5, 6, 7, choice), 1) for choice in (8, 9)] + [Continuation((5, 6, 7, 8), 3)] * 2
    with passes(llama) as seen:
        answered(scorer := RowScorer(llama, tokens=64, rows=_MANY), asked)
    assert [ids.tolist() for ids in seen] == [[[5, 6, 7]]]
    assert scorer.tokens(asked) == 3
    assert_as_alone(llama, scorer, asked)


def test_less_memory_halves_the_batch(llama: PreTrainedModel) -> None:
    """Batches that run out of memory are computed again in smaller ones, and no answer is lost or told twice."""
    asked = _of_lengths(*[10] * 16)
    with memory_for(llama, 50) as refused:
        found = answered(RowScorer(llama, tokens=160, rows=_MANY), asked)
    assert refused == [160, 80]
    assert_alike(found, answered(RowScorer(llama, tokens=160, rows=_MANY), asked))


def test_a_row_too_long_for_the_memory_ends_with_what_to_do(llama: PreTrainedModel) -> None:
    """A row cannot be cut: the message says how long it is."""
    with memory_for(llama, 20), pytest.raises(EvaluationError, match=r"in a forward pass of 30 tokens, which cannot"):
        answered(RowScorer(llama, tokens=20, rows=_MANY), _of_lengths(30))


def test_few_rows_of_logits_are_held_in_float32(llama: PreTrainedModel) -> None:
    """Of a long row whose every token is scored, the softmax is taken of a few rows at a time."""
    widths: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._log_softmax.default:
                widths.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    asked = [Continuation(tuple(range(100, 150)), 49), Continuation(tuple(range(100, 140)), 3)]
    with Watching():
        found = answered(RowScorer(llama, tokens=64, rows=8), asked)
    assert max(widths) == 8
    assert sum(widths) == 49 + 3
    assert_alike(found, answered(RowScorer(llama, tokens=64, rows=_MANY), asked))
    assert_as_alone(llama, RowScorer(llama, tokens=64, rows=8), asked)


@pytest.mark.parametrize(
    ("alike", "shapes"), [(0, [(2, 9), (1, 5), (1, 4), (2, 3)]), (4, [(2, 9), (1, 5), (3, 4)]), (9, [(6, 9)])]
)
def test_rows_of_one_length_alone(llama: PreTrainedModel, alike: int, shapes: list[tuple[int, int]]) -> None:
    """For a model that padding confuses no row is padded, for one whose positions are turned by the longest row none
    that would be turned otherwise."""
    asked = _of_lengths(3, 9, 4, 9, 3, 5)
    with passes(llama) as seen:
        answered(RowScorer(llama, tokens=100, rows=_MANY, alike=alike), asked)
    assert [tuple(ids.shape) for ids in seen] == shapes


def test_progress_counts_tokens_without_padding(llama: PreTrainedModel) -> None:
    """Progress runs from 0 to the tokens of all different rows."""
    told: list[tuple[int, int]] = []
    asked = _of_lengths(3, 9, 4)
    answered(RowScorer(llama, tokens=18, rows=_MANY), [*asked, asked[1]], lambda *both: told.append(both))
    assert told == [(0, 16), (13, 16), (16, 16)]


def test_a_model_that_gives_all_logits_anyway() -> None:
    """Where the architecture does not take positions to keep, they are cut out of all of them."""
    model = tiny_model("llama")
    made = _AllLogits(model.config).eval()
    made.load_state_dict(model.state_dict())
    asked = _of_lengths(3, 9, 4)
    found = answered(RowScorer(made, tokens=64, rows=_MANY), asked)
    assert_alike(found, answered(RowScorer(model, tokens=64, rows=_MANY), asked))
