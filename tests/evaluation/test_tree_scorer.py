"""Likelihoods from the prefix tree: what the model says of each continuation alone, each node computed once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.prefix_tree import PrefixTree
from qlora_cli.evaluation.answering.questions import Continuation
from qlora_cli.evaluation.answering.tree_scorer import TreeScorer
from tests.support.continuations import alone, answered, assert_as_alone, continuations, memory_for, passes
from tests.support.models import FAMILIES, tiny_model

_MANY = 10**6


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def _asked(seed: int = 0, number: int = 20) -> list[Continuation]:
    """Continuations of three stems, of one to four tokens."""
    draw = torch.Generator().manual_seed(seed)
    stems = torch.randint(0, 512, (3, 20), generator=draw).tolist()
    ends = torch.randint(0, 512, (number, 6), generator=draw).tolist()
    return [Continuation((*stems[i % 3][: 20 - i % 5], *end), 1 + i % 4) for i, end in enumerate(ends)]


@settings(max_examples=120, deadline=None)
@given(asked=continuations(), tokens=st.integers(1, 64), rows=st.integers(1, 20), most=st.none() | st.integers(1, 4))
def test_as_one_by_one(
    llama: PreTrainedModel, asked: list[Continuation], tokens: int, rows: int, most: int | None
) -> None:
    """However questions share beginnings and however the tree is cut, each answer is that of its row alone."""
    assert_as_alone(llama, TreeScorer(llama, tokens=tokens, rows=rows, sequences=most), asked)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, attention: str) -> None:
    """Each family's tree gives what its rows alone give, with either kind of attention and stretches of 7."""
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    assert_as_alone(model, TreeScorer(model, tokens=7, rows=_MANY), _asked())


@settings(max_examples=30, deadline=None)
@given(asked=continuations(), tokens=st.integers(1, 64))
def test_each_node_is_computed_once(llama: PreTrainedModel, asked: list[Continuation], tokens: int) -> None:
    """The model reads as many tokens as there are different beginnings, in passes of at most `tokens`."""
    with passes(llama) as seen:
        answered(TreeScorer(llama, tokens=tokens, rows=_MANY), asked)
    sizes = [ids.numel() for ids in seen]
    assert sum(sizes) == len(PrefixTree.of([c.tokens[:-1] for c in asked]))
    assert max(sizes) <= tokens
    assert {ids.shape[0] for ids in seen} == {1}


def test_only_ancestors_are_kept(llama: PreTrainedModel) -> None:
    """Attention looks at the nodes of a stretch and at the path to it, however much was computed before."""
    widths: list[int] = []
    hook = llama.register_forward_pre_hook(
        lambda _module, _args, given: widths.append(given["attention_mask"].shape[-1]), with_kwargs=True
    )
    asked = _asked(number=40)
    try:
        answered(TreeScorer(llama, tokens=8, rows=_MANY), asked)
    finally:
        hook.remove()
    assert len(widths) > 20
    assert max(widths) <= 8 + max(len(c.tokens) for c in asked)


def test_choices_of_one_token_are_one_pass(llama: PreTrainedModel) -> None:
    """Four answers of one token to one question are read from one row of logits, and the model reads it once."""
    asked = [Continuation((5, 6, 7, 8, choice), 1) for choice in (9, 10, 11, 12)]
    with passes(llama) as seen:
        assert_as_alone(llama, scorer := TreeScorer(llama, tokens=64, rows=1), asked)
        seen.clear()
        answered(scorer, asked)
    assert [ids.tolist() for ids in seen] == [[[5, 6, 7, 8]]]


def test_only_what_is_asked_reaches_the_head(llama: PreTrainedModel) -> None:
    """Logits are computed for the nodes that are asked, and never for more than `rows` of them at once."""
    given_rows: list[int] = []
    head = llama.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, args, _output: given_rows.append(args[0].shape[1]))
    try:
        answered(TreeScorer(llama, tokens=64, rows=5), _asked())
    finally:
        hook.remove()
    tree = PrefixTree.of([c.tokens[:-1] for c in _asked()])
    needed = {n for at, c in zip(tree.last.tolist(), _asked(), strict=True) for n in tree.path(at, c.scored).tolist()}
    assert max(given_rows) == 5
    assert sum(given_rows) == len(needed)


def test_greedy_tells_what_greedy_decoding_writes(llama: PreTrainedModel) -> None:
    """What the model itself would write is greedy, and no longer so with another last token."""
    context = [7, 77, 177]
    for _ in range(4):
        context.append(int(llama(torch.tensor([context])).logits[0, -1].argmax()))
    written = Continuation(tuple(context), 4)
    other = Continuation((*context[:-1], (context[-1] + 1) % 512), 4)
    found = answered(TreeScorer(llama, tokens=64, rows=_MANY), [written, other])
    assert [likelihood.greedy for likelihood in found] == [True, False]


def test_bfloat16_is_within_its_rounding() -> None:
    """In bfloat16 an answer is as near to float32's as the row alone in bfloat16 is, give or take its rounding."""
    model = tiny_model("llama")
    exact = [alone(model, c).log_probability for c in _asked()]
    half = model.to(torch.bfloat16)
    found = answered(TreeScorer(half, tokens=9, rows=_MANY), _asked())
    for continuation, got, wanted in zip(_asked(), found, exact, strict=True):
        assert got.log_probability == pytest.approx(wanted, abs=0.02 * continuation.scored)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_less_memory_halves_the_stretch(llama: PreTrainedModel, error: type[RuntimeError]) -> None:
    """What runs out of memory is computed again in halves that do not, from the keys and values there were before."""
    asked = _asked(number=30)
    scorer = TreeScorer(llama, tokens=128, rows=_MANY)
    with memory_for(llama, 40, error) as refused:
        found = answered(scorer, asked)
    assert refused == [128, 64]  # and no more: what is left is kept to
    for continuation, got in zip(asked, found, strict=True):
        assert got.log_probability == pytest.approx(alone(llama, continuation).log_probability, abs=1e-5)


def test_too_little_memory_ends_with_what_to_do(llama: PreTrainedModel) -> None:
    """Where not even a few tokens fit, the evaluation ends, saying what was tried and what may help."""
    with memory_for(llama, 4), pytest.raises(EvaluationError) as caught:
        answered(TreeScorer(llama, tokens=64, rows=_MANY), _asked())
    assert str(caught.value) == (
        "memory ran out in a forward pass of 16 tokens, which cannot be cut further. Free memory, evaluate with "
        "--bits 4, or on a machine with more of it; answers that were given are kept"
    )


def test_other_errors_are_no_lack_of_memory(llama: PreTrainedModel) -> None:
    """A token that the model does not have is not tried again in halves."""
    with passes(llama) as seen, pytest.raises(IndexError):
        answered(TreeScorer(llama, tokens=64, rows=_MANY), [Continuation((1, 99_999, 3), 1)])
    assert len(seen) == 1


def test_logits_that_are_nan_end_the_evaluation() -> None:
    """A broken model has no score: not a number would be one."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"^the model's logits are NaN, so that nothing can be said"):
        answered(TreeScorer(model, tokens=64, rows=_MANY), _asked())


def test_progress_counts_nodes_and_answers_come_early(llama: PreTrainedModel) -> None:
    """Progress runs from 0 to all nodes without a step back, and what is known is told before the rest is computed."""
    told: list[tuple[int, int]] = []
    scorer = TreeScorer(llama, tokens=16, rows=_MANY)
    answers = scorer.score(_asked(), lambda done, total: told.append((done, total)))
    next(answers)
    nodes = len(PrefixTree.of([c.tokens[:-1] for c in _asked()]))
    assert 0 < told[-1][0] < nodes
    list(answers)
    assert told[0] == (0, nodes)
    assert told[-1] == (nodes, nodes)
    assert told == sorted(told)


def test_nothing_asked_is_nothing_answered(llama: PreTrainedModel) -> None:
    """No continuations: no answers and no forward pass."""
    with passes(llama) as seen:
        assert answered(TreeScorer(llama, tokens=64, rows=_MANY), []) == []
    assert seen == []
