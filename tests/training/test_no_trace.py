"""What is trained without a trace was never trained."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_cli.recipe.schema import OptimizerName, TrainingSection
from qlora_cli.training.no_trace import no_trace
from qlora_cli.training.optim import build_optimizer
from qlora_cli.training.optimizer_state import flatten_state

CPU = torch.device("cpu")
NAMES: tuple[str, ...] = OptimizerName.__args__


class _Model(nn.Module):
    """One parameter that is large enough for 8-bit states, one that is not, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.Parameter(torch.randn(64, 128))
        self.small = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))
        self.drop = nn.Dropout(0.5).eval()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [self.large, self.small]


def _train(model: _Model, optimizer: Optimizer, seeds: Sequence[int]) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def _made(name: str) -> tuple[_Model, Optimizer]:
    model = _Model()
    section = TrainingSection.model_validate({"optimizer": name, "learning_rate": 1e-2, "weight_decay": 0.1})
    return model, build_optimizer(section, model.trained, CPU)


def _initialised(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """The state that the optimizer itself makes before a first step."""
    if isinstance(optimizer, Optimizer8bit):
        for index, parameter in enumerate(parameters):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    else:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        group = optimizer.param_groups[0]
        optimizer._init_group(group, [], [], [], [], [], [])
        optimizer.zero_grad()


def _assert_same_state(found: Optimizer, wanted: Optimizer) -> None:
    (tensors, scalars), (other_tensors, other_scalars) = flatten_state(found), flatten_state(wanted)
    assert scalars == other_scalars
    assert tensors.keys() == other_tensors.keys()
    assert tensors
    for key, tensor in tensors.items():
        assert tensor.dtype == other_tensors[key].dtype, key
        assert torch.equal(tensor, other_tensors[key]), key
    assert found.state_dict()["param_groups"] == wanted.state_dict()["param_groups"]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_optimizer_is_as_before_its_first_step(name: str) -> None:
    """Every leaf of its state, in the same memory, is that of a state just made; what it trains then has the same
    bits."""
    model, optimizer = _made(name)
    with no_trace(model, optimizer, CPU):
        _train(model, optimizer, [1, 2])
        optimizer.param_groups[0]["lr"] = 0.0
        held = {
            value.data_ptr() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        }
    untouched, other = _made(name)
    _initialised(other, untouched.trained)
    _assert_same_state(optimizer, other)
    assert held == {
        value.data_ptr() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    }
    untouched, other = _made(name)
    _train(model, optimizer, [3, 4])
    _train(untouched, other, [3, 4])
    _assert_same_state(optimizer, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))


def _fail_inside(model: _Model, optimizer: Optimizer) -> None:
    before = model.large.detach().clone()
    with no_trace(model, optimizer, CPU):
        _train(model, optimizer, [4, 5])
        assert not torch.equal(model.large, before)
        raise KeyError("in the middle")


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_that_has_trained_is_as_it_was(name: str) -> None:
    """After three steps, then two without a trace, also if they end in an error: nothing of the two is there."""
    model, optimizer = _made(name)
    untouched, other = _made(name)
    _train(model, optimizer, [1, 2, 3])
    _train(untouched, other, [1, 2, 3])
    with pytest.raises(KeyError, match="in the middle"):
        _fail_inside(model, optimizer)
    _assert_same_state(optimizer, other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))


def _draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(1).item()]


def test_draws_gradients_buffers_and_modes_are_as_before() -> None:
    """Python's generator, NumPy's and torch's go on where they were, each module is in the mode that it was in, a
    buffer that was replaced is the one before, and no gradient is left."""
    model, optimizer = _made("adamw_torch")
    model.train()
    model.drop.eval()
    seen = model.seen
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = _draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with no_trace(model, optimizer, CPU):
        _draws()
        model.large.grad = torch.ones_like(model.large)
        model.seen = torch.ones(2)
        seen += 1
        model.eval()
        model.drop.train()
    assert _draws() == wanted
    assert model.seen is seen
    assert torch.equal(seen, torch.zeros(2))
    assert (model.training, model.drop.training) == (True, False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_row_that_stretched_frequencies_is_forgotten() -> None:
    """With dynamic NTK scaling, the rotary embedding is in everything what it was."""
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=4, max_position_embeddings=16, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config)
    rotary = model.model.rotary_emb
    before = dict(vars(rotary)), {name: (b, b.clone()) for name, b in rotary.named_buffers(remove_duplicate=False)}
    optimizer = torch.optim.AdamW(model.parameters())
    with no_trace(model, optimizer, CPU):
        model(input_ids=torch.zeros(1, 40, dtype=torch.int64))
        assert rotary.max_seq_len_cached == 40
    plain = {name: value for name, value in vars(rotary).items() if not name.startswith("_")}
    assert plain == {name: value for name, value in before[0].items() if not name.startswith("_")}
    for name, (buffer, value) in before[1].items():
        assert getattr(rotary, name) is buffer
        assert torch.equal(buffer, value)
