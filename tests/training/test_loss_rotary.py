"""What a batch's loss is does not depend on the batches before it, also where frequencies grow with the longest row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from qlora_cli.data.batches import Batch
from qlora_cli.model.rotary import rewind_rotary
from qlora_cli.training.loss import supervised_loss

_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16,
}


def _llama() -> PreTrainedModel:
    return _made(LlamaConfig(**_SHAPE, rope_parameters=_DYNAMIC))


def _gemma() -> PreTrainedModel:
    """Two sets of frequencies, one for each type of layer, of which one grows."""
    kinds = {"full_attention": _DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    layers = ["sliding_attention", "full_attention"]
    return _made(Gemma3TextConfig(**_SHAPE, head_dim=16, layer_types=layers, rope_parameters=kinds))


def _made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _batch(length: int) -> Batch:
    ids = torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(length))
    return Batch(ids, torch.ones_like(ids), ids, rows=[0, 1], tokens=2 * length, supervised_tokens=2 * length - 2)


@pytest.mark.parametrize("make", [_llama, _gemma])
@pytest.mark.parametrize("length", [9, 16, 24])
def test_a_longer_batch_before_it_changes_no_bit(make: Any, length: int) -> None:
    """After 40 tokens in a model for 16: the loss and the gradient of a shorter batch, also of one that is itself
    beyond the 16, are those of a model that has seen nothing."""
    fresh, other = make(), make()
    supervised_loss(other, _batch(40)).backward()
    other.zero_grad()
    for model in (fresh, other):
        loss = supervised_loss(model, _batch(length))
        loss.backward()
        model.loss = loss.detach()
    assert torch.equal(fresh.loss, other.loss)
    for (name, p), q in zip(fresh.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def _frequencies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}


@pytest.mark.parametrize("make", [_llama, _gemma])
def test_rewound_it_is_as_it_was_made(make: Any) -> None:
    """The frequencies are those of the start, for another row to stretch, and one tensor for one name."""
    model = make()
    start = _frequencies(model)
    for _ in range(2):
        supervised_loss(model, _batch(40))
        assert any(not torch.equal(value, start[name]) for name, value in _frequencies(model).items())
        rewind_rotary(model)
        assert all(torch.equal(value, start[name]) for name, value in _frequencies(model).items())
    buffers = [buffer for name, buffer in model.named_buffers(remove_duplicate=False) if "inv_freq" in name]
    assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers)
