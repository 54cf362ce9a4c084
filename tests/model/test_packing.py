"""Rows of a pack do not see each other, and a model in which they would is refused before the first step."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.model import packing
from qlora_cli.model.base import checkpoint_activations
from qlora_cli.model.packing import BLOCK_DIAGONAL, VARIABLE_LENGTH, packed_inputs, prepare_packing
from tests.support.packing import pack, packing_model, rows

VARIABLE = ("llama", "gpt2", "qwen2", "mistral", "phi3", "gpt_neox", "opt", "mixtral", "qwen2_moe", "deepseek_v3")
# Windows, chunks, sinks and softcaps are the mask's.
MASKED = ("gemma2", "gemma3", "mistral-window")
WAYS = [*((family, VARIABLE_LENGTH) for family in VARIABLE), *((family, BLOCK_DIAGONAL) for family in MASKED)]


def _logits(model: PreTrainedModel, sequences: list[list[torch.Tensor]], **shape: Any) -> torch.Tensor:
    batch = pack(sequences, **shape)
    assert batch.position_ids is not None
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, use_cache=False, **packed_inputs(model, batch.position_ids))
    return output.logits


@pytest.mark.parametrize(("family", "how"), WAYS)
def test_the_way_that_is_taken(family: str, how: str) -> None:
    """Variable-length attention wherever it computes the same, else the mask; on a CPU too, where it is the faster."""
    assert prepare_packing(packing_model(family)) == how


@pytest.mark.parametrize(
    ("family", "how"),
    [*WAYS, *((family, BLOCK_DIAGONAL) for family in VARIABLE if family != "opt")],  # OPT's mask knows no positions
)
def test_neighbours_do_not_change_a_row(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one bit of a row's logits, whatever stands before it, after it and in the padding. Experts may group tokens
    otherwise, which is rounding."""
    if how == BLOCK_DIAGONAL:
        monkeypatch.setattr(packing, "_can_vary", lambda model: False)
    model = packing_model(family)
    assert prepare_packing(model) == how
    ours, others = rows(), rows(seed=1)
    others[0][1] = ours[0][1]  # 13 tokens, these 5, 1, 9
    before, after = (_logits(model, each, pad=pad)[0, 13:18] for each, pad in ((ours, 3), (others, 400)))
    if family in ("mixtral", "qwen2_moe"):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-window"])
def test_a_row_is_the_same_anywhere_in_a_pack(family: str) -> None:
    """First, in the middle and last, in either sequence: positions begin anew with each row."""
    model = packing_model(family)
    prepare_packing(model)
    (a, b, c, d), (e, f) = rows()
    first = _logits(model, [[a, b, c, d], [e, f]])[0, :13]
    for sequences, number, start in (([[b, c, a], [e, f]], 0, 6), ([[d, b], [e, a]], 1, 7)):
        again = _logits(model, sequences)[number, start : start + 13]
        torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_a_model_with_a_running_state_is_refused(family: str) -> None:
    """A state-space layer carries on from row to row; the message names the model, the danger and the way out."""
    model = packing_model(family, lora=False)
    usual = model.config._attn_implementation
    name = type(model).__name__
    wanted = f"dataset.packing: rows in one pack would see each other in {name}; set packing: false"
    with pytest.raises(ModelError, match=f"^{re.escape(wanted)}$"):
        prepare_packing(model)
    assert model.config._attn_implementation == usual


class _Deaf(LlamaForCausalLM):
    """Stands for remote code whose attention goes over the whole sequence, whatever the positions."""

    def forward(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None
    ) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


class _WithoutPositions(LlamaForCausalLM):
    """Stands for remote code that takes no positions at all."""

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


class _OfAMask(LlamaForCausalLM):
    """Stands for remote code that cannot do without a mask."""

    def forward(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None
    ) -> Any:
        length = attention_mask.shape[1]
        return super().forward(input_ids[:, :length], attention_mask=attention_mask, use_cache=use_cache)


class _Leaking(LlamaForCausalLM):
    """Keeps attention apart, but lets a hundredth of a token into the next one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].mlp.register_forward_hook(lambda m, args, out: out + 0.01 * out.roll(1, dims=1))


class _Counting(GPT2LMHeadModel):
    """Keeps rows apart, but counts its learned positions through the whole pack."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        count = self._count
        self.transformer.wpe.register_forward_pre_hook(lambda m, args: (count(args[0]),))

    @staticmethod
    def _count(positions: torch.Tensor) -> torch.Tensor:
        return torch.arange(positions.shape[-1])[None]


@pytest.mark.parametrize(
    ("kind", "family", "fault"),
    [
        (_Deaf, "llama", "rows in one pack would see each other"),
        (_WithoutPositions, "llama", "rows in one pack would see each other"),
        (_Leaking, "llama", "rows in one pack would see each other"),
        (_OfAMask, "llama", "a trial pack fails with AttributeError ('NoneType' object has no attribute 'shape')"),
        (_Counting, "gpt2", "a row in a pack would not be computed as it is alone"),
    ],
)
def test_a_model_that_mixes_rows_is_refused(kind: type[PreTrainedModel], family: str, fault: str) -> None:
    """By what it does, not by its name: attention, something beside attention, or positions that go on."""
    model = kind(packing_model(family, lora=False).config)
    wanted = f"dataset.packing: {fault} in {kind.__name__}; set packing: false"
    with pytest.raises(ModelError, match=f"^{re.escape(wanted)}$"):
        prepare_packing(model)


def test_attention_that_is_not_the_models_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were variable-length attention wrong for a model, the mask would be taken."""

    def off(*inputs: Any) -> torch.Tensor:
        return 1.5 * inputs[0]

    monkeypatch.setattr("qlora_cli.model.varlen._row_by_row", off)
    model = packing_model("mistral")
    assert prepare_packing(model) == BLOCK_DIAGONAL
    assert model.config._attn_implementation == "sdpa"


def test_chunks_that_are_counted_from_the_packs_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers before 5.2x lays Llama 4's chunks over the whole pack; the trial pack is too short to show it."""
    model = packing_model("mistral-window")
    model.config.attention_chunk_size = 8192
    monkeypatch.setattr(packing, "masking_utils", SimpleNamespace(packed_sequence_compatibility_function=None))
    prepare_packing(model)
    monkeypatch.setattr(packing, "masking_utils", SimpleNamespace())
    with pytest.raises(
        ModelError, match=r"^dataset\.packing: a row in a pack would not be computed as it is alone in "
    ):
        prepare_packing(model)


@pytest.mark.parametrize("training", [False, True])
def test_the_trial_leaves_no_trace(training: bool) -> None:
    """Gradients, weights, hooks, random state and the mode of every module are as before, checkpointing on or off."""
    model = packing_model("llama").train(training)
    model.model.layers[0].eval()  # a part in a mode of its own
    checkpoint_activations(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    hooks = list(model.get_input_embeddings()._forward_hooks)
    state = torch.get_rng_state()
    prepare_packing(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert list(model.get_input_embeddings()._forward_hooks) == hooks


def test_a_second_time_is_the_same() -> None:
    """A model that was prepared before, say for a run that went on, is prepared again."""
    model = packing_model("llama")
    assert prepare_packing(model) == prepare_packing(model) == VARIABLE_LENGTH


def test_a_wrapped_model_gets_what_it_needs() -> None:
    """Data parallelism wraps the prepared model; its rows stay apart."""
    model = packing_model("llama")
    prepare_packing(model)
    wrapper = nn.Module()
    wrapper.module = model
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert packed_inputs(wrapper, positions).keys() == packed_inputs(model, positions).keys() > {"position_ids"}
