"""LoRALinear is PEFT's LoRA layer in output and gradients, and keeps less alive between the passes."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.model.lora import LoRALinear, _LoRAProduct, adapters_disabled, lora_layers, lora_parameters
from qlora_cli.model.quantization import frozen_weight

# Two orders of the same float32 sums: relative to the largest entry, they differ in the last few bits.
FLOAT32_TOLERANCE = 1e-5


def _linear4bit(quant_type: str, double_quant: bool, dtype: torch.dtype = torch.float32) -> Callable[..., nn.Module]:
    def build(in_features: int, out_features: int, bias: bool) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            in_features,
            out_features,
            bias=bias,
            compute_dtype=dtype,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
        layer.load_state_dict(nn.Linear(in_features, out_features, bias=bias).to(dtype).state_dict())
        return layer.to("cpu")  # quantises here

    return build


def _conv1d(in_features: int, out_features: int, bias: bool) -> nn.Module:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer


BASES: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias=bias),
    "conv1d": _conv1d,
    "nf4": _linear4bit("nf4", False),
    "nf4-double": _linear4bit("nf4", True),
    "fp4": _linear4bit("fp4", False),
    "fp4-double": _linear4bit("fp4", True),
}


class _Holder(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def _pair(base: nn.Module, rank: int, alpha: float, dropout: float) -> tuple[LoRALinear, nn.Module]:
    """Our layer and PEFT's over one base, with the same A and B."""
    ours = LoRALinear(base, rank=rank, alpha=alpha, dropout=dropout, compute_dtype=torch.float32)
    ours.initialize(torch.Generator().manual_seed(0))
    nn.init.normal_(ours.lora_B)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=["proj"],
        fan_in_fan_out=isinstance(base, Conv1D),
    )
    theirs = peft.inject_adapter_in_model(config, _Holder(base))
    layer = theirs.proj
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.lora_A)
        layer.lora_B["default"].weight.copy_(ours.lora_B)
    return ours, theirs


def _assert_close(got: Tensor, wanted: Tensor) -> None:
    scale = wanted.abs().max().clamp(min=1e-6)
    assert ((got - wanted).abs().max() / scale).item() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=12, deadline=None)
@given(
    in_blocks=st.integers(1, 12),
    out_features=st.integers(1, 80),
    rank=st.integers(1, 24),
    alpha=st.sampled_from([1.0, 8.0, 16.0, 64.0]),
    rows=st.sampled_from([(1,), (3,), (2, 5), (2, 1, 3)]),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10_000),
)
def test_output_and_gradients_are_pefts(
    kind: str,
    in_blocks: int,
    out_features: int,
    rank: int,
    alpha: float,
    rows: tuple[int, ...],
    bias: bool,
    dropout: float,
    seed: int,
) -> None:
    """Forward, input gradient, and the gradients of A and B, in float32; dropout present but off (eval mode)."""
    torch.manual_seed(seed)
    base = BASES[kind](8 * in_blocks, out_features, bias)
    ours, theirs = _pair(base, rank, alpha, dropout)
    ours.train(dropout == 0)
    theirs.train(dropout == 0)
    x = torch.randn(*rows, 8 * in_blocks)
    upstream = torch.randn(*rows, out_features)

    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out_ours, out_theirs = ours(x_ours), theirs(x_theirs)
    out_ours.backward(upstream)
    out_theirs.backward(upstream)

    layer = theirs.proj
    _assert_close(out_ours, out_theirs)
    _assert_close(x_ours.grad, x_theirs.grad)
    _assert_close(ours.lora_A.grad, layer.lora_A["default"].weight.grad)
    _assert_close(ours.lora_B.grad, layer.lora_B["default"].weight.grad)


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_handwritten_backward_is_the_derivative(with_mask: bool) -> None:
    """gradcheck in float64, with and without a dropout mask."""
    torch.manual_seed(0)
    base = nn.Linear(7, 5).double()
    layer = LoRALinear(base, rank=3, alpha=6, dropout=0.4, compute_dtype=torch.float64)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(x.shape) > 0.4 if with_mask else None
    assert torch.autograd.gradcheck(lambda *inputs: _LoRAProduct.apply(*inputs, keep, layer), (x, a, b))


def test_dropout_acts_on_the_input_of_a_alone() -> None:
    """With dropout on, the output is W0 x + s B A drop(x) for the mask that the seed gives."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 8), rank=4, alpha=8, dropout=0.25, compute_dtype=torch.float32)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    torch.manual_seed(5)
    out = layer.train()(x)
    torch.manual_seed(5)
    keep = torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.75)
    wanted = layer.base(x) + 2 * ((x * keep / 0.75) @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4-double"])
def test_starts_as_the_base(kind: str) -> None:
    """B is zero: before training the layer's output is the frozen layer's, and A is Kaiming-uniform."""
    torch.manual_seed(0)
    base = BASES[kind](64, 48, True)
    layer = LoRALinear(base, rank=8, alpha=16, dropout=0.0, compute_dtype=torch.float32)
    layer.initialize(torch.Generator().manual_seed(1))
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.lora_B, torch.zeros(48, 8))
    bound = (1 / 64) ** 0.5  # kaiming_uniform with a = sqrt(5): 1 / sqrt(fan_in)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_nothing_large_is_kept_for_the_backward_pass() -> None:
    """Neither the dequantised weight nor a float32 copy of a bf16 input is saved: x, x Aᵀ, A and B are all."""
    torch.manual_seed(0)
    base = _linear4bit("nf4", True, torch.bfloat16)(256, 128, False)
    layer = LoRALinear(base, rank=4, alpha=8, dropout=0.0, compute_dtype=torch.bfloat16)
    x = torch.randn(32, 256, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    own = {p.untyped_storage().data_ptr() for p in (x, layer.lora_A, layer.lora_B)}
    extra = sum(size for pointer, size in storages.items() if pointer not in own)
    assert extra == 32 * 4 * 2  # x Aᵀ: 32 tokens, rank 4, two bytes
    assert x.untyped_storage().data_ptr() in storages


def test_no_gradient_is_computed_for_what_needs_none() -> None:
    """The first layer's input has no gradient, and the frozen weight and bias never get one."""
    base = nn.Linear(8, 8)
    layer = LoRALinear(base, rank=2, alpha=2, dropout=0.0, compute_dtype=torch.float32)
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    assert x.grad is None
    assert base.weight.grad is None
    assert base.bias.grad is None
    assert layer.lora_B.grad is not None


def test_disabled_adapters_give_the_base_and_come_back() -> None:
    """Inside adapters_disabled the model is the base; afterwards, even after an error, it is itself again."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 8), rank=2, alpha=2, dropout=0.0, compute_dtype=torch.float32)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    model = _Holder(layer)
    x = torch.randn(3, 8)
    before = model(x)
    with adapters_disabled(model):
        torch.testing.assert_close(model(x), layer.base(x))
    with pytest.raises(RuntimeError), adapters_disabled(model):
        model(torch.randn(3, 5))  # a shape that does not fit
    assert torch.equal(model(x), before)
    assert not torch.allclose(before, layer.base(x))


def test_update_is_the_difference_to_the_frozen_weight() -> None:
    """W0 + update() gives the layer's output."""
    torch.manual_seed(0)
    base = BASES["nf4"](64, 16, False)
    layer = LoRALinear(base, rank=4, alpha=2, dropout=0.0, compute_dtype=torch.float32)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    _assert_close(x @ (frozen_weight(base, torch.float32) + layer.update()).t(), layer(x))


def test_only_linear_layers_can_be_wrapped() -> None:
    """Anything else is refused by name."""
    with pytest.raises(TypeError, match=r"^expected Linear, Linear4bit, Linear8bitLt or Conv1D, got Embedding$"):
        LoRALinear(nn.Embedding(4, 4), rank=1, alpha=1, dropout=0.0, compute_dtype=torch.float32)


def test_layers_and_parameters_are_found_in_order() -> None:
    """lora_layers names paths; lora_parameters gives A and B of each, and nothing frozen."""
    first = LoRALinear(nn.Linear(4, 4), rank=1, alpha=1, dropout=0.0, compute_dtype=torch.float32)
    second = LoRALinear(nn.Linear(4, 4), rank=1, alpha=1, dropout=0.0, compute_dtype=torch.float32)
    model = nn.Sequential(first, nn.ReLU(), second)
    assert list(lora_layers(model)) == ["0", "2"]
    wanted = [first.lora_A, first.lora_B, second.lora_A, second.lora_B]
    assert [id(p) for p in lora_parameters(model)] == [id(p) for p in wanted]
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in wanted]
