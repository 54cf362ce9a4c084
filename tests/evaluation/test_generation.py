"""Answers written many at once are those written one by one, whatever is asked together and however memory is."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.generation import Generator
from qlora_cli.evaluation.answering.questions import Prompt
from qlora_cli.evaluation.answering.row_limits import RowLimits, cache_bytes_per_token
from qlora_cli.model.packing import prepare_packing
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

_EOS = 2


@functools.lru_cache
def _model(family: str = "llama") -> PreTrainedModel:
    """Says different words: a random head alone repeats one forever."""
    model = tiny_model(family, vocab_size=len(tiny_tokenizer()), seed=1)
    return _talkative(model)


def _talkative(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id = _EOS
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(12)
    return model


def _quiet(_done: int, _all: int) -> None:
    pass


def _answers(generator: Generator, prompts: Sequence[Prompt]) -> list[str]:
    given_answers = list(generator.generate(prompts, _quiet))
    answers = dict(given_answers)
    assert len(given_answers) == len(answers) == len(prompts)
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _one_by_one(model: PreTrainedModel, prompt: Prompt, end: Sequence[int] = (_EOS,)) -> str:
    """The answer by the book: no cache, no batch, all of it decoded at every token."""
    tokenizer = tiny_tokenizer()
    written: list[int] = []
    until = [text for text in prompt.until if text]
    while len(written) < prompt.max_new_tokens:
        ids = torch.tensor([[*prompt.tokens, *written]])
        written.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
        if written[-1] in end or any(text in tokenizer.decode(written) for text in until):
            break
    answer = tokenizer.decode(written, skip_special_tokens=True)
    for text in until:
        answer = answer.split(text)[0]
    return str(answer)


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """The shape [rows, tokens] of every forward pass."""
    shapes: list[tuple[int, int]] = []

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        shapes.append((rows, tokens))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


_ids = st.integers(3, len(tiny_tokenizer()) - 1)
_until = st.lists(st.sampled_from(["a", " t", "e", "\n", "is", "é", "o ", ""]), max_size=2).map(tuple)


@st.composite
def _prompt_sets(draw: st.DrawFn) -> list[Prompt]:
    """Prompts that begin alike, are equal, are prefixes of one another, or have nothing in common."""
    prompts: list[Prompt] = []
    for _ in range(draw(st.integers(1, 9))):
        tokens: tuple[int, ...] = ()
        if prompts and draw(st.booleans()):
            other = draw(st.sampled_from(prompts)).tokens
            tokens = other[: draw(st.integers(1, len(other)))]
        tokens += tuple(draw(st.lists(_ids, min_size=0 if tokens else 1, max_size=9)))
        prompts.append(Prompt(tokens, draw(_until), draw(st.integers(0, 14))))
    return prompts


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_whatever_is_asked_together_every_answer_is_that_of_its_prompt_alone(family: str) -> None:
    """Rotary, learned and shifted positions; any batch size, so that batches are cut everywhere."""
    model = _model(family)

    @settings(max_examples=30, deadline=None)
    @given(_prompt_sets(), st.one_of(st.none(), st.integers(1, 4)))
    def check(prompts: list[Prompt], batch_size: int | None) -> None:
        generator = Generator(model, tiny_tokenizer(), batch_size=batch_size)
        assert generator.why is None
        assert _answers(generator, prompts) == [_one_by_one(model, prompt) for prompt in prompts]

    check()


@pytest.mark.parametrize("attention", ["eager", "qlora_varlen"])
def test_a_models_attention_may_be_another(attention: str) -> None:
    """transformers' plainest, which adds its masks, and that of training on packed rows."""
    model = _talkative(tiny_model("llama", vocab_size=len(tiny_tokenizer()), seed=1))
    if attention == "eager":
        model.set_attn_implementation("eager")
    else:
        prepare_packing(model)
        assert model.config._attn_implementation == attention
    even = [Prompt((10 + index, 11, 12), ("e",), 9) for index in range(4)]
    uneven = [Prompt((*range(10, 14 + index), 60 + index), ("o",), 9) for index in range(6)]
    generator = Generator(model, tiny_tokenizer())
    assert generator.why is None
    for prompts in (even, uneven):
        assert _answers(generator, prompts) == [_one_by_one(_model(), prompt) for prompt in prompts]


def test_what_prompts_begin_with_alike_is_read_once_over_all_batches() -> None:
    """Every node of the prompts' prefix tree passes through the model exactly once, however few rows fit at once."""
    shared = tuple(range(10, 60))
    prompts = [Prompt((*shared, 100 + index, 200 + index), (), 3) for index in range(9)]
    model = _model()
    with _calls(model) as shapes:
        generator = Generator(model, tiny_tokenizer(), batch_size=2, stop_ids=())
        assert generator.why is None
        shapes.clear()
        _answers(generator, prompts)
    assert sum(tokens for rows, tokens in shapes if tokens > 1) == len(shared) + 2 * len(prompts)


def test_equal_prompts_are_answered_once_and_all_of_them_are() -> None:
    """The same question three times costs one row; other stop texts or lengths are another question."""
    same = Prompt((5, 6, 7), ("zz",), 8)
    prompts = [same, Prompt((5, 6, 7), ("qq",), 8), same, Prompt((5, 6, 7), ("zz",), 2), same]
    model = _model()
    with _calls(model) as shapes:
        generator = Generator(model, tiny_tokenizer(), stop_ids=())
        assert generator.why is None
        shapes.clear()
        answers = _answers(generator, prompts)
    assert max(rows for rows, _ in shapes) == 3
    assert answers[0] == answers[2] == answers[4]
    assert answers == [_one_by_one(model, prompt, ()) for prompt in prompts]


def test_rows_that_are_complete_leave_the_batch() -> None:
    """The one long answer is written alone once the short ones are there, and comes last."""
    prompts = [Prompt((10 + index, 11, 12), (), 40 if index == 3 else 4) for index in range(8)]
    model = _model()
    generator = Generator(model, tiny_tokenizer(), stop_ids=())
    assert generator.why is None
    with _calls(model) as shapes:
        order = [index for index, _ in generator.generate(prompts, _quiet)]
    assert order[-1] == 3
    assert [rows for rows, tokens in shapes if tokens == 1] == [8] * 3 + [1] * 36


def test_few_complete_rows_stay_until_leaving_pays_and_write_nothing() -> None:
    """Taking out one row of sixteen would copy fifteen; its answer is the same, and it comes at once."""
    prompts = [Prompt((10 + index, 11), (), 2 if index == 5 else 20) for index in range(16)]
    model = _model()
    with _calls(model) as shapes:
        generator = Generator(model, tiny_tokenizer(), stop_ids=())
        answers = dict(generator.generate(prompts, _quiet))
    assert shapes[-1][0] == 16
    assert next(iter(answers)) == 5
    assert answers == {index: _one_by_one(model, prompt, ()) for index, prompt in enumerate(prompts)}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": False, "num_beams": 2}])
def test_a_complete_row_beside_longer_answers_stays_within_the_models_positions(
    family: str, sampling: dict[str, Any]
) -> None:
    """A row that fills the context stays in a batch whose other rows go on for longer than it could."""
    model = _model(family)
    full = Prompt(tuple(3 + place % 90 for place in range(250)), (), 6, sampling)
    others = [Prompt((3 + row, 7, 50 + row), (), 40, sampling) for row in range(15)]
    answers = _answers(Generator(model, tiny_tokenizer(), stop_ids=()), [full, *others])
    if not sampling:
        assert answers == [_one_by_one(model, prompt, ()) for prompt in [full, *others]]


def test_a_complete_row_does_not_turn_the_positions_of_the_others() -> None:
    """Dynamic rotary positions are made for the furthest one in a batch."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), max_position_embeddings=64, rope_parameters=rope, **shape)
    model = LlamaForCausalLM(config).eval()
    full = Prompt(tuple(3 + place for place in range(55)), (), 6)
    others = [Prompt((3 + row, 7, 50 + row), (), 40) for row in range(15)]
    generator = Generator(model, tiny_tokenizer(), stop_ids=())
    assert generator.why is None  # the trial is over before passes are watched
    furthest: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: furthest.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    try:
        _answers(generator, [full, *others])
    finally:
        handle.remove()
    assert max(furthest) < 64


@pytest.mark.parametrize("batch_size", [None, 1])
def test_an_answer_may_end_at_once(batch_size: int | None) -> None:
    """The end as first token, no token allowed, one token allowed, a prompt of one token."""
    model = _model()
    first = int(model(torch.tensor([[9, 8]]), use_cache=False).logits[0, -1].argmax())
    generator = Generator(model, tiny_tokenizer(), batch_size=batch_size, stop_ids=[first])
    text = tiny_tokenizer().decode([first])
    assert _answers(generator, [Prompt((9, 8), (), 9), Prompt((9, 8), (text,), 9), Prompt((9, 8), (), 0)]) == [
        text,  # an end that is a word is part of the answer, as in lm-eval, unless its text is a stop text
        "",
        "",
    ]
    others = [Prompt((9,), (), 1), Prompt((9, 8), (), 1)]
    assert _answers(generator, others) == [_one_by_one(model, prompt, [first]) for prompt in others]


def test_a_stop_text_may_be_the_very_last_thing() -> None:
    """Of several tokens, complete with the last token allowed; and one token short of it, it is no stop text."""
    model, tokenizer = _model(), tiny_tokenizer()
    tokens = (30, 31, 32)
    whole = _one_by_one(model, Prompt(tokens, (), 12), ())
    ids = torch.tensor([tokens])
    written = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:]
    last_two = tokenizer.decode(written[-2:])
    assert whole.index(last_two) == len(whole) - len(last_two), "the stop text must not come earlier"
    generator = Generator(model, tokenizer, stop_ids=())
    prompts = [Prompt(tokens, (last_two,), 12), Prompt(tokens, (last_two,), 11)]
    assert _answers(generator, prompts) == [whole[: -len(last_two)], tokenizer.decode(written[:11])]


class _Exhausted:
    """A forward hook that makes memory run out whenever a pass has more rows or tokens than fit."""

    def __init__(self, rows: int, tokens: int = 10**9, *, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.rows, self.tokens, self.error, self.failures = rows, tokens, error, 0

    def __call__(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        if rows > self.rows or tokens > self.tokens:
            self.failures += 1
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("borrowed", [False, True])
def test_when_memory_runs_out_fewer_rows_are_written_and_every_answer_comes(
    error: type[Exception], borrowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our loop and by transformers'; told in a sentence each time."""
    model = _model()
    if borrowed:
        monkeypatch.setattr(model.generation_config, "no_repeat_ngram_size", 30)
    prompts = [Prompt((*range(10, 14 + index % 5), 60 + index), ("e",), 3 + index % 7) for index in range(12)]
    remarks: list[str] = []
    generator = Generator(model, tiny_tokenizer(), remark=remarks.append)
    assert (generator.why is not None) is borrowed
    hook = _Exhausted(rows=3, error=error)
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        answers = _answers(generator, prompts)
    finally:
        handle.remove()
    assert answers == [_one_by_one(model, prompt) for prompt in prompts]
    if borrowed:
        assert remarks.pop(0).startswith("Greedy answers are written by transformers' generate")
    assert hook.failures == len(remarks) >= 2
    assert remarks[0] == (
        "Memory did not suffice to write 12 answers at once on cpu; going on with at most 6 of their length at once."
    )


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_memory_may_run_out_at_any_pass(at: int) -> None:
    """Between batches, too, what they share is read again where it has to be, and nothing comes twice."""
    model = _model()
    prompts = [Prompt((*range(10, 40), 60 + index // 3, 100 + index), ("e",), 5) for index in range(12)]
    expected = _answers(Generator(model, tiny_tokenizer()), prompts)
    generator = Generator(model, tiny_tokenizer(), batch_size=4)
    assert generator.why is None
    passes = 0

    def fail_once(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes in (at, at + 1, at + 2):  # a pass over the prompts is tried again with fewer tokens first
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.register_forward_pre_hook(fail_once)
    try:
        answers = _answers(generator, prompts)
    finally:
        handle.remove()
    assert answers == expected


def test_when_prompts_do_not_fit_into_one_pass_they_are_read_in_smaller_ones() -> None:
    """Down to sixteen tokens at once, without fewer rows."""
    model = _model()
    prompts = [Prompt((*range(10, 60), 100 + index), (), 4) for index in range(6)]
    remarks: list[str] = []
    generator = Generator(model, tiny_tokenizer(), remark=remarks.append)
    assert generator.why is None
    handle = model.register_forward_pre_hook(_Exhausted(rows=99, tokens=20), with_kwargs=True)
    try:
        answers = _answers(generator, prompts)
    finally:
        handle.remove()
    assert answers == [_one_by_one(model, prompt) for prompt in prompts]
    assert remarks == []


def test_short_answers_do_not_pay_for_long_ones() -> None:
    """Two long rows do not fit together and are written one by one; many short ones are still written at once."""
    model = _model()
    long = [Prompt((100 + index, *range(10, 90)), (), 4) for index in range(2)]
    short = [Prompt((120 + index, 11, 12), (), 4) for index in range(8)]
    generator = Generator(model, tiny_tokenizer(), stop_ids=())
    assert generator.why is None

    def fail(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        if len(given["input_ids"]) > 1 and given["position_ids"].max() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with _calls(model) as shapes:
        handle = model.register_forward_pre_hook(fail, with_kwargs=True)
        try:
            answers = _answers(generator, long + short)
        finally:
            handle.remove()
    assert answers == [_one_by_one(model, prompt, ()) for prompt in long + short]
    assert [rows for rows, tokens in shapes if tokens == 1][-9:] == [1] * 6 + [8] * 3


def test_fewer_rows_are_read_as_fast_as_before() -> None:
    """Where a batch does not fit however little is read at once, the next ones do not pay for the attempts."""
    model = _model()
    prompts = [Prompt((100 + index, *range(10, 60)), (), 2) for index in range(8)]
    generator = Generator(model, tiny_tokenizer(), batch_size=4)
    assert generator.why is None

    def fail_at_first(*_: Any) -> None:
        if len(shapes) <= 5:  # 204 tokens, and halves of them down to 12
            raise torch.OutOfMemoryError("CUDA out of memory")

    with _calls(model) as shapes:
        handle = model.register_forward_pre_hook(fail_at_first)
        try:
            answers = _answers(generator, prompts)
        finally:
            handle.remove()
    assert answers == [_one_by_one(model, prompt) for prompt in prompts]
    read = [tokens for _, tokens in shapes if tokens > 1]
    assert read == [204, 102, 51, 25, 12] + [102] * 4


def test_what_does_not_fit_alone_is_told() -> None:
    """With its lengths, and what to do."""
    model = _model()
    generator = Generator(model, tiny_tokenizer())
    assert generator.why is None
    handle = model.register_forward_pre_hook(_Exhausted(rows=0), with_kwargs=True)
    try:
        with pytest.raises(EvaluationError) as refused:
            _answers(generator, [Prompt((5, 6, 7), (), 9)])
    finally:
        handle.remove()
    assert str(refused.value) == (
        "a prompt of 3 tokens and its answer of up to 9 do not fit into the memory of cpu, even alone\n"
        "    Free memory there, load the model in fewer bits (`--bits 4`), or shorten the prompts (`--num-fewshot`); "
        "answers that were given are kept."
    )


def test_another_fault_of_the_model_is_not_taken_for_memory() -> None:
    """It comes out as it is."""
    model = _model()
    generator = Generator(model, tiny_tokenizer())
    assert generator.why is None

    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    handle = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            _answers(generator, [Prompt((5, 6, 7), (), 9)])
    finally:
        handle.remove()


def _windowed() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=24,
    )
    torch.manual_seed(1)
    return _talkative(MistralForCausalLM(config).eval())


def _recurrent() -> PreTrainedModel:
    config = MambaConfig(vocab_size=len(tiny_tokenizer()), hidden_size=32, num_hidden_layers=2, state_size=4)
    torch.manual_seed(1)
    return _talkative(MambaForCausalLM(config).eval())


@pytest.mark.parametrize("made", [_windowed, _recurrent])
def test_models_whose_cache_is_their_own_are_left_to_generate(made: Any) -> None:
    """A sliding window: what reaches beyond it. A recurrent state: everything. The answers are those of rows alone."""
    model = made()
    short = [Prompt((*range(10, 16), 60 + index), ("e",), 8) for index in range(4)]
    long = [Prompt((*range(10, 40 + index), 60 + index), ("o",), 8 - index % 3) for index in range(4)]
    remarks: list[str] = []
    generator = Generator(model, tiny_tokenizer(), batch_size=3, remark=remarks.append)
    assert _answers(generator, short + long) == [_one_by_one(model, prompt) for prompt in short + long]
    if made is _windowed:
        assert generator.why is None
        assert remarks == [
            "4 answers may become longer than the 24 tokens that every layer of the model looks back on; written by "
            "transformers' generate, which takes longer"
        ]
    else:
        told = f"Greedy answers are written by transformers' generate, which takes longer: {generator.why}"
        assert remarks == [told]


@pytest.mark.parametrize("sampling", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_a_model_that_says_nothing_is_told(sampling: dict[str, Any]) -> None:
    """NaN is greedy decoding's likeliest token, whichever that is; here the evaluation ends."""
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer()))
    generator = Generator(model, tiny_tokenizer())
    assert generator.why is None
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(EvaluationError) as refused:
        _answers(generator, [Prompt((5, 6, 7), (), 4, sampling)])
    assert str(refused.value) == (
        "the model's logits are NaN, so that nothing can be written. Look at its weights, or try another --bits; "
        "answers that were given are kept"
    )


def test_sampled_answers_are_the_same_each_time_and_leave_the_random_state_alone() -> None:
    """Equal prompts get answers of their own; arguments are transformers'; the seed is the generator's."""
    model = _model()
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 50}
    prompts = [Prompt((5, 6, 7), (), 12, sampling)] * 6
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = _answers(Generator(model, tiny_tokenizer(), seed=1), prompts)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == _answers(Generator(model, tiny_tokenizer(), seed=1), prompts)
    assert first != _answers(Generator(model, tiny_tokenizer(), seed=2), prompts)
    assert len(set(first)) > 1


def test_greedy_arguments_are_greedy() -> None:
    """`do_sample: false` and a temperature of 0 are what our loop does; a temperature alone asks for sampling."""
    model = _model()
    greedy = Prompt((5, 6, 7), (), 6, {"do_sample": False, "temperature": 0.0})
    drawn = Prompt((5, 6, 7), (), 6, {"temperature": 5.0})
    generator = Generator(model, tiny_tokenizer(), stop_ids=())
    assert generator.why is None
    with _calls(model) as shapes:
        answers = _answers(generator, [greedy, greedy, Prompt((5, 6, 7), (), 6)])
    assert len(set(answers)) == 1
    assert max(rows for rows, _ in shapes) == 1
    assert _answers(generator, [drawn] * 8) != [answers[0]] * 8


def test_beams_are_searched_and_end_each_by_its_own_stop_texts() -> None:
    """Against transformers' own search, prompt by prompt, cut afterwards."""
    model, tokenizer = _model(), tiny_tokenizer()
    prompts = [Prompt((5 + index, 6, 7), (), 6 + index, {"num_beams": 3, "do_sample": False}) for index in range(3)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt.tokens])
        out = model.generate(
            ids, num_beams=3, do_sample=False, max_new_tokens=prompt.max_new_tokens, eos_token_id=None, pad_token_id=0
        )
        expected.append(tokenizer.decode(out[0, 3:], skip_special_tokens=True))
    generator = Generator(model, tokenizer, batch_size=1, stop_ids=())
    assert _answers(generator, prompts) == expected


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"do_sample": True, "temprature": 0.5}, "do_sample=True, temprature=0.5"),
        ({"num_beams": 4, "num_return_sequences": 2}, "num_beams=4, num_return_sequences=2"),
    ],
)
def test_arguments_that_transformers_cannot_use_are_told(sampling: dict[str, Any], told: str) -> None:
    """With what was given, transformers' own words, and where they come from."""
    generator = Generator(_model(), tiny_tokenizer())
    with pytest.raises(EvaluationError) as refused:
        _answers(generator, [Prompt((5, 6, 7), (), 4, sampling)])
    assert str(refused.value).startswith(f"transformers' generate could not be used with {told}: ")
    assert "`generation_kwargs`" in str(refused.value)


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}])
def test_progress_counts_tokens_up_to_all_that_may_be_written(sampling: dict[str, Any]) -> None:
    """It rises while answers are written, never falls, ends at the whole; one that ends early counts in full."""
    prompts = [Prompt((10 + index % 5, 11), ("e",), 9, sampling) for index in range(6)]
    told: list[tuple[int, int]] = []
    list(Generator(_model(), tiny_tokenizer()).generate(prompts, lambda done, whole: told.append((done, whole))))
    assert {whole for _, whole in told} == {6 * 11}
    done = [count for count, _ in told]
    assert done == sorted(done)
    assert done[-1] == 6 * 11
    assert len(set(done)) > 7


def test_nothing_asked_is_nothing_answered() -> None:
    """And the model is not looked at for it."""
    with _calls(_model()) as shapes:
        assert _answers(Generator(_model(), tiny_tokenizer()), []) == []
    assert shapes == []


def test_a_batch_is_as_many_rows_as_keys_and_values_have_room_for() -> None:
    """Two layers of two heads, 16 wide, keys and values in float32: 512 bytes a token."""
    model = _model()
    assert cache_bytes_per_token(model) == 512
    limits = RowLimits(model, None, lambda _: None)
    assert limits.room(2**20) == 2**31 // (512 * 2**20)
    assert limits.room(16) == 32
    assert RowLimits(model, 5, lambda _: None).room(16) == 5
    assert limits.room(2**40) == 1
