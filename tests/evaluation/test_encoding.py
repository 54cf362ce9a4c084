"""Texts become the tokens that lm-eval's `hf` backend makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.encoding import Encoder
from tests.support.models import tiny_model
from tests.support.tokenizers import BOS, tiny_tokenizer

LENGTH = 12

TEXTS = st.lists(
    st.sampled_from([BOS, " ", "  ", "\n", "the", " of", " answer", "is", "é", "😀", "<|im_end|>", "."]), max_size=8
).map("".join)


def hf_backend(tokenizer: Any, add_bos_token: bool | None = None) -> HFLM:
    """The oracle, with a context of 12 tokens."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, add_bos_token=add_bos_token)


BACKENDS = {
    (bos, added): hf_backend(tiny_tokenizer(add_bos=bos), added)
    for bos in (False, True)
    for added in (None, False, True)
}


def encoder(bos: bool, added: bool | None) -> Encoder:
    oracle = BACKENDS[bos, added]
    return Encoder(oracle.tokenizer, oracle.config, max_length=LENGTH, add_bos_token=added)


@pytest.mark.parametrize(("bos", "added"), BACKENDS)
@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), max_size=4))
def test_pairs_are_split_and_cut_as_the_hf_backend_does(
    bos: bool, added: bool | None, pairs: list[tuple[str, str]]
) -> None:
    """Spaces at the end of a context, texts that begin with BOS, empty contexts, contexts that are too long."""
    oracle = BACKENDS[bos, added]
    found = list(encoder(bos, added).pairs(pairs))
    for (context, continuation), encoded in zip(pairs, found, strict=True):
        before: list[int] = []
        if context:
            before, after = oracle._encode_pair(context, continuation)
        else:
            after = oracle.tok_encode(continuation, add_special_tokens=False)
        if not before:  # and there is a context, the hf backend gives up: spaces alone are none
            prefix = oracle.prefix_token_id
            before, after = ([prefix], after) if prefix != after[0] else (after[:1], after[1:])
        whole = [*before, *after]
        assert encoded.tokens == tuple(whole[-(LENGTH + 1) :])
        assert encoded.scored == len(after)
        assert encoded.cut == max(0, len(whole) - LENGTH - 1)


@pytest.mark.parametrize(("bos", "added"), BACKENDS)
@settings(max_examples=20, deadline=None)
@given(text=st.lists(TEXTS, max_size=5).map("".join))
def test_windows_are_the_hf_backends(bos: bool, added: bool | None, text: str) -> None:
    """Every token of a long text is scored once, in the windows that lm-eval makes."""
    oracle = BACKENDS[bos, added]
    expected = [
        make_disjoint_window(window)
        for window in get_rolling_token_windows(oracle.tok_encode(text), oracle.prefix_token_id, LENGTH, 1)
    ]
    found = encoder(bos, added).windows(text)
    assert [(window.tokens, window.scored) for window in found] == [((*a, *b), len(b)) for a, b in expected]
    assert all(window.cut == 0 for window in found)


@pytest.mark.parametrize(("bos", "added"), BACKENDS)
@settings(max_examples=20, deadline=None)
@given(text=TEXTS, room=st.integers(1, LENGTH))
def test_prompts_are_the_hf_backends(bos: bool, added: bool | None, text: str, room: int) -> None:
    """A prompt keeps its end, and says how much of its beginning it lost."""
    oracle = BACKENDS[bos, added]
    ids, _ = oracle.tok_batch_encode([text], left_truncate_len=room)
    whole, _ = oracle.tok_batch_encode([text])
    (found,) = encoder(bos, added).prompts([(text, room)])
    assert found.tokens == tuple(int(token) for token in ids[0].tolist())
    assert found.cut == max(0, whole.shape[1] - room)


def test_many_texts_come_back_in_order() -> None:
    """More texts than are encoded at once, equal ones among them."""
    pairs = [(f"{number % 7} of", f" {number}") for number in range(600)]
    one_by_one = [next(encoder(False, None).pairs([pair])) for pair in pairs]
    assert list(encoder(False, None).pairs(pairs)) == one_by_one


def test_a_tokenizer_without_begin_and_end_is_refused_only_where_it_matters() -> None:
    """Without a token to stand before a text, a text without a context cannot be scored; others can."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    made = Encoder(tokenizer, tiny_model("llama", vocab_size=len(tokenizer)).config)
    assert next(made.pairs([("the", " answer")])).scored > 0
    with pytest.raises(EvaluationError, match="give it a bos_token or an eos_token"):
        list(made.pairs([("", "answer")]))
    with pytest.raises(EvaluationError, match="give it a bos_token or an eos_token"):
        made.windows("the answer")
