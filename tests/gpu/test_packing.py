"""On a CUDA device: packs go through the variable-length kernel, and are the rows that they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.data.batches import Batch
from qlora_cli.model import packing, varlen
from qlora_cli.model.base import checkpoint_activations, load_base
from qlora_cli.model.packing import BLOCK_DIAGONAL, VARIABLE_LENGTH, packed_inputs, prepare_packing
from qlora_cli.model.source import ModelSource
from qlora_cli.model.varlen import run_lengths, varlen_attention
from qlora_cli.recipe.schema import QuantizationSection
from qlora_cli.training.loss import supervised_loss
from tests.support.models import save_tiny_model
from tests.support.packing import pack, packing_model, pad_rows, put_lora, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# The flash kernel is for Ampere and later.
needs_flash = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="no flash attention"
)
LONG = ((200, 77, 1, 130), (64, 256))


def _cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two ways each call of variable-length attention took."""
    taken: list[str] = []

    def spy(name: str) -> Any:
        real = getattr(varlen, name)

        def call(*args: Any) -> torch.Tensor:
            taken.append(name)
            return real(*args)

        return call

    for name in ("_at_once", "_row_by_row"):
        monkeypatch.setattr(varlen, name, spy(name))
    return taken


def _pieces(*, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = max(map(sum, LONG))
    shapes = [(2, heads, width, dim), (2, key_heads, width, dim), (2, key_heads, width, dim)]
    return [torch.randn(shape, generator=generator).to(_cuda(), dtype).requires_grad_() for shape in shapes]


@needs_flash
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(4, 4, 64), (8, 2, 128), (3, 1, 40), (2, 2, 256)])
def test_the_kernel_is_attention_row_by_row(
    heads: int, key_heads: int, dim: int, dtype: torch.dtype, kernels: list[str]
) -> None:
    """Output and gradients, to the rounding of the dtype, of what float32 gives for each row in turn."""
    position_ids = pack(rows(LONG)).position_ids
    assert position_ids is not None
    given = run_lengths(position_ids.to(_cuda()))
    ours = _pieces(heads=heads, key_heads=key_heads, dim=dim, dtype=dtype)
    exact = [x.detach().float().requires_grad_() for x in ours]
    out, _ = varlen_attention(nn.Module(), *ours, None, **given)
    wanted, _ = varlen_attention(nn.Module(), *exact, None, **given)
    # Heads above 192 are trained by the kernel on data-centre GPUs only.
    assert kernels in (["_at_once", "_row_by_row"], ["_row_by_row", "_row_by_row"] if dim > 192 else [])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(_cuda(), dtype)
    out.backward(upstream)
    wanted.backward(upstream.float())
    limit = 8 * torch.finfo(dtype).eps
    pairs = [(out, wanted), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]
    for got, right in pairs:
        assert ((got.float() - right).norm() / right.norm()).item() < limit


@pytest.mark.parametrize("what", ["float32", "dropout", "odd heads"])
def test_what_the_kernel_cannot_do_goes_row_by_row(what: str, kernels: list[str]) -> None:
    """float32, dropped attention weights, heads that are no multiple of 8: still rows apart, not an error."""
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    tensors = _pieces(heads=2, key_heads=1, dim=20 if what == "odd heads" else 64, dtype=dtype)
    position_ids = pack(rows(LONG)).position_ids
    assert position_ids is not None
    dropout = 0.1 if what == "dropout" else 0.0
    out, _ = varlen_attention(nn.Module(), *tensors, None, dropout=dropout, **run_lengths(position_ids.to(_cuda())))
    assert kernels == ["_row_by_row"]
    assert torch.isfinite(out).all()


def _gradients(model: PreTrainedModel, batch: Batch) -> tuple[float, torch.Tensor]:
    """The loss, and all LoRA gradients in one row, float32."""
    model.zero_grad()
    loss = supervised_loss(model, batch.to(_cuda()))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


@needs_flash
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_bfloat16_packs_are_the_float32_rows(family: str, checkpointing: bool, kernels: list[str]) -> None:
    """Through the kernel in bfloat16 against padded rows in float32: loss and gradients to bf16's rounding."""
    model = packing_model(family, lora=False).to(_cuda(), torch.bfloat16)
    plain = packing_model(family, lora=False).to(torch.bfloat16).to(_cuda(), torch.float32)  # the same weights
    for each, dtype in ((model, torch.bfloat16), (plain, torch.float32)):
        torch.manual_seed(0)
        put_lora(each, dtype)
    if checkpointing:
        checkpoint_activations(model)
    assert prepare_packing(model) == VARIABLE_LENGTH
    assert set(kernels) == {"_at_once"}
    loss, gradient = _gradients(model.train(), pack(rows()))
    exact_loss, exact_gradient = _gradients(plain.train(), pad_rows(rows()))
    # On a CPU these are 3e-5 and 0.008.
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert ((gradient - exact_gradient).norm() / exact_gradient.norm()).item() < 0.05


@pytest.mark.parametrize("how", [VARIABLE_LENGTH, BLOCK_DIAGONAL])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_float32_packs_are_the_rows(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, in float32 without TF32, to the rounding of other orders of the same sums."""
    if how == BLOCK_DIAGONAL:
        monkeypatch.setattr(packing, "_can_vary", lambda model: False)
    model, plain = packing_model(family).to(_cuda()), packing_model(family).to(_cuda())
    assert prepare_packing(model) == how
    loss, gradient = _gradients(model, pack(rows()))
    exact_loss, exact_gradient = _gradients(plain, pad_rows(rows()))
    assert loss == pytest.approx(exact_loss, rel=1e-4)
    assert ((gradient - exact_gradient).norm() / exact_gradient.norm()).item() < 1e-4


@needs_flash
def test_neighbours_do_not_change_a_row_on_the_gpu() -> None:
    """Not one bit of its logits in bfloat16: every shape is the same, so every kernel is."""
    model = packing_model("llama", lora=False).to(_cuda(), torch.bfloat16)
    prepare_packing(model)
    ours, others = rows(), rows(seed=1)
    others[0][1] = ours[0][1]  # 13 tokens, these 5, 1, 9
    found = []
    for sequences in (ours, others):
        batch = pack(sequences).to(_cuda())
        assert batch.position_ids is not None
        with torch.no_grad():
            found.append(model(input_ids=batch.input_ids, use_cache=False, **packed_inputs(model, batch.position_ids)))
    assert torch.equal(found[0].logits[0, 13:18], found[1].logits[0, 13:18])


@needs_flash
def test_a_4_bit_base_takes_the_kernel(tmp_path: Path, kernels: list[str]) -> None:
    """NF4 in bfloat16, checkpointing: prepared, and the packed loss is the padded one to bf16's rounding."""
    model = load_base(ModelSource(str(save_tiny_model(tmp_path / "base"))), QuantizationSection(), _cuda())
    put_lora(model, torch.bfloat16)
    checkpoint_activations(model)
    assert prepare_packing(model) == VARIABLE_LENGTH
    assert set(kernels) == {"_at_once"}
    vocabulary = model.config.vocab_size
    sequences = [[row % vocabulary for row in each] for each in rows()]
    packed, _ = _gradients(model.train(), pack(sequences))
    padded, _ = _gradients(model, pad_rows(sequences))
    assert packed == pytest.approx(padded, rel=1e-2)
