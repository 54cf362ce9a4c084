"""Optimizers are what their names say, and learning rates are transformers' schedules."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_cli.recipe.schema import OptimizerName, TrainingSection
from qlora_cli.training.optim import build_optimizer, runs_unpaged
from qlora_cli.training.schedule import learning_rate

CPU = torch.device("cpu")
NAMES: tuple[str, ...] = OptimizerName.__args__


def _section(**values: object) -> TrainingSection:
    return TrainingSection.model_validate(values)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["linear", "cosine", "constant"]),
    total=st.integers(1, 60),
    warmup=st.integers(0, 70),
    peak=st.sampled_from([1e-5, 2e-4, 1.0]),
)
def test_schedules_are_transformers(kind: str, total: int, warmup: int, peak: float) -> None:
    """Step for step the rate that transformers' scheduler of that name gives, warmup longer than the run included."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    section = _section(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=peak)
    for step in range(total):
        assert learning_rate(section, step, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends(name: str) -> None:
    """Each name a recipe can give, large enough that 8-bit states are used: a quadratic falls to a fifth."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 128))
    optimizer = build_optimizer(_section(optimizer=name, learning_rate=3e-2), [parameter], CPU)
    before = parameter.square().mean().item()
    for _ in range(100):
        parameter.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parameter.square().mean().item() < before / 5
    if name.endswith("8bit"):
        assert optimizer.state[parameter]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", NAMES)
def test_names_give_the_right_class_and_settings(name: str) -> None:
    """On a CPU a paged optimizer is its unpaged twin; betas and decay arrive."""
    section = _section(optimizer=name, adam_beta1=0.8, adam_beta2=0.95, weight_decay=0.1)
    optimizer = build_optimizer(section, [nn.Parameter(torch.zeros(2, 2))], CPU)
    wanted = torch.optim.AdamW if name == "adamw_torch" else bnb.optim.Lion if "lion" in name else bnb.optim.AdamW
    assert type(optimizer) is wanted
    group = optimizer.param_groups[0]
    assert tuple(group["betas"]) == (0.8, 0.95)
    assert group["weight_decay"] == 0.1
    assert not getattr(optimizer, "is_paged", False)
    assert runs_unpaged(section, CPU) == name.startswith("paged_")
    assert not runs_unpaged(section, torch.device("cuda"))


def test_paged_32bit_adamw_is_adamw() -> None:
    """bitsandbytes' AdamW against torch's over ten steps, float32; the two place epsilon slightly differently."""
    torch.manual_seed(0)
    start, gradients = torch.randn(32, 8), torch.randn(10, 32, 8)
    results = []
    for name in ("adamw_torch", "paged_adamw_32bit"):
        parameter = nn.Parameter(start.clone())
        optimizer = build_optimizer(_section(optimizer=name, learning_rate=1e-2, weight_decay=0.1), [parameter], CPU)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
