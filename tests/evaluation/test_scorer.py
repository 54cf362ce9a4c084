"""The way that is chosen: the tree wherever it gives the model's own answers, rows wherever it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from qlora_cli.evaluation.answering.questions import Continuation
from qlora_cli.evaluation.answering.row_scorer import RowScorer
from qlora_cli.evaluation.answering.scorer import _TreeFirst, choose_scorer
from qlora_cli.evaluation.answering.tree_scorer import TreeScorer
from qlora_cli.evaluation.answering.trial import Verdict
from qlora_cli.model.packing import VARIABLE_LENGTH, prepare_packing
from tests.support.continuations import answered, assert_alike, assert_as_alone, passes
from tests.support.models import FAMILIES, tiny_config, tiny_model

_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_OLD: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 24,
}
_KINDS: dict[str, Callable[[], Any]] = {
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "falcon": lambda: transformers.FalconConfig(**_OLD, num_hidden_layers=2, num_attention_heads=4),
    "mistral, window": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=16),
    "gemma2": lambda: transformers.Gemma2Config(**_SHAPE, head_dim=16, sliding_window=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SHAPE, head_dim=16, sliding_window=16),
    "gpt_oss": lambda: transformers.GptOssConfig(**_SHAPE, **_MOE, head_dim=16, sliding_window=16),
    "phi3, longrope": lambda: transformers.Phi3Config(
        **_SHAPE | {"num_key_value_heads": 4},
        pad_token_id=0,
        rope_parameters=_ROPE,
        original_max_position_embeddings=24,
    ),
    "mistral, tiny window": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=8),
    "mamba": lambda: transformers.MambaConfig(**_OLD, num_hidden_layers=2, state_size=8),
    "bloom": lambda: transformers.BloomConfig(**_OLD, n_layer=2, n_head=4),
    "falcon, alibi": lambda: transformers.FalconConfig(**_OLD, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "mpt": lambda: transformers.MptConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=4, max_seq_len=256),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_OLD, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16
    ),
}
# What does not look back on all of a longer row, and how far it does.
_REACH = {"mistral, window": 16, "gemma2": 16, "gemma3": 16, "gpt_oss": 16, "phi3, longrope": 24}
_BY_ROW = {
    "mistral, tiny window": "its attention looks back 8 tokens only",
    "mamba": "its layers keep more than keys and values (LinearAttentionLayer)",
    "bloom": "a trial fails with ValueError (too many values to unpack (expected 2))",
    "falcon, alibi": "its attention counts distances from key to key (ALiBi)",
    "mpt": "its attention counts distances from key to key (ALiBi)",
    "gpt_neo": "its attention has a mask of its own (transformer.h.0.attn.attention.bias)",
}


def _model(kind: str) -> PreTrainedModel:
    if kind in FAMILIES:
        return tiny_model(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(_KINDS[kind](), dtype=torch.float32)
        return made.eval()  # type: ignore[no-any-return]


def _asked(longest: int = 40) -> list[Continuation]:
    """Continuations of every length to the longest, all beginning alike."""
    stem = torch.randint(100, 400, (longest,), generator=torch.Generator().manual_seed(3)).tolist()
    return [Continuation((*stem[:length], 401 + length), 1 + length % 4) for length in range(5, longest)]


@pytest.mark.parametrize("kind", [*FAMILIES, *_KINDS])
def test_the_right_way_and_the_right_answers(kind: str) -> None:
    """Each architecture gets the tree exactly where that gives its answers, and by either way they are its own."""
    model = _model(kind)
    remarks: list[str] = []
    scorer = choose_scorer(model, batch_size=None, remark=remarks.append)
    assert scorer.why == _BY_ROW.get(kind)
    assert scorer.name == ("row by row" if kind in _BY_ROW else "prefix tree")
    name = type(model).__name__
    started = f"{name} is scored row by row, what rows begin with alike computed again for each: {scorer.why}"
    assert remarks == ([started] if kind in _BY_ROW else [])
    with passes(model, of_trees=True) as trees:
        answered(scorer, _asked())
    assert len(trees) == (kind not in _BY_ROW)
    if reach := _REACH.get(kind):
        assert trees[0].numel() == reach  # all begin alike
        assert remarks == [
            f"{39 - reach} continuations of 35 are scored row by row: they are longer than the {reach} tokens that "
            "every layer of the model looks back on"
        ]
    assert_as_alone(model, scorer, _asked())


def test_progress_goes_through_both_parts() -> None:
    """Where some continuations are for the tree and some for rows, progress is told of both as of one."""
    told: list[tuple[int, int]] = []
    scorer = choose_scorer(_model("mistral, window"), batch_size=None, remark=lambda _: None)
    answered(scorer, _asked(30), lambda *both: told.append(both))
    total = 16 + sum(range(17, 30))  # the tree of those up to 16 tokens, and the longer ones
    assert {all_tokens for _, all_tokens in told} == {total}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert (told[0][0], told[-1][0]) == (0, total)


def test_rows_go_on_where_memory_does_not_hold_the_tree() -> None:
    """Keys and values that are kept are what does not fit: what is not answered yet is scored without keeping any."""
    model = tiny_model("llama")
    remarks: list[str] = []
    scorer = choose_scorer(model, batch_size=None, remark=remarks.append)
    asked = _asked()
    wanted = answered(scorer, asked)
    trees = 0

    def lacking(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal trees
        if kwargs["use_cache"]:
            trees += 1
            if trees > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

    tight = TreeScorer(model, tokens=20, rows=512)
    scorer = _TreeFirst(tight, RowScorer(model, tokens=64, rows=512), None, remarks.append)
    told: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(lacking, with_kwargs=True)
    try:
        found = answered(scorer, asked, lambda *both: told.append(both))
    finally:
        hook.remove()
    assert_alike(found, wanted)
    assert remarks == [
        "memory does not hold the keys and values that shared prefixes take: 19 continuations of 35 are scored row by "
        "row"
    ]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_a_longer_row_does_not_turn_the_positions_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, too, LongRoPE's frequencies are those of each row's own length."""
    model = _model("phi3, longrope")
    monkeypatch.setattr("qlora_cli.evaluation.answering.scorer.examine", lambda _: Verdict("it is to go by row"))
    scorer = choose_scorer(model, batch_size=None, remark=lambda _: None)
    assert scorer.name == "row by row"
    assert_as_alone(model, scorer, _asked())


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_batch_size_limits_sequences(kind: str) -> None:
    """At most so many sequences' own tokens are in a forward pass, by either way."""
    model = _model(kind)
    asked = [Continuation((number, 5, 6, 7, 8), 2) for number in range(10, 19)]
    scorer = choose_scorer(model, batch_size=4, remark=lambda _: None)
    with passes(model) as seen:
        answered(scorer, asked)
    assert [ids.numel() for ids in seen] == [16, 16, 4]


def test_half_precision_and_dropout_are_no_obstacle() -> None:
    """A bfloat16 model in eval mode gets the tree; the trial leaves the random state as it was."""
    model = tiny_model("llama").to(torch.bfloat16)
    before = torch.random.get_rng_state()
    assert choose_scorer(model, batch_size=None, remark=lambda _: None).name == "prefix tree"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_prepared_for_packing_is_scored_in_its_tree() -> None:
    """The attention that training gives a model for packed rows takes the tree's mask, too."""
    model = tiny_model("llama")
    assert prepare_packing(model) == VARIABLE_LENGTH
    scorer = choose_scorer(model, batch_size=None, remark=lambda _: None)
    assert scorer.name == "prefix tree"
    assert_as_alone(model, scorer, _asked())


class _NoPositions(LlamaForCausalLM):
    """Counts positions itself, from the number of keys."""

    def forward(self, **inputs: Any) -> Any:
        return super().forward(**inputs | {"position_ids": None})


class _NoMask(LlamaForCausalLM):
    """Lets every token see all before it."""

    def forward(self, **inputs: Any) -> Any:
        mask: Tensor | None = inputs.get("attention_mask")
        four = mask is not None and mask.ndim == 4
        return super().forward(**inputs | ({"attention_mask": None} if four else {}))


class _NoCache(LlamaForCausalLM):
    """Forgets the keys and values that it is given."""

    def forward(self, **inputs: Any) -> Any:
        return super().forward(**inputs | {"past_key_values": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [_NoPositions, _NoMask, _NoCache])
def test_the_trial_finds_out_what_no_configuration_tells(kind: type[LlamaForCausalLM], dtype: torch.dtype) -> None:
    """A model that takes no heed of positions, of the mask or of the cache is found out on itself, and goes by row."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Weights larger than at the start of training: what is seen is to matter.
        config = tiny_config("llama", 512)
        config.initializer_range = 0.2
        model = kind(config).eval().to(dtype)
    scorer = choose_scorer(model, batch_size=None, remark=lambda _: None)
    assert scorer.name == "row by row"
    assert scorer.why is not None
    assert scorer.why.startswith(("in a trial its logits differed by", "a trial fails with"))
