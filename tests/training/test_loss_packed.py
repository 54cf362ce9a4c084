"""Packed or each in a sequence of its own, rows have the same loss and the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qlora_cli.data.batches import Batch
from qlora_cli.errors import ModelError
from qlora_cli.model import packing
from qlora_cli.model.base import checkpoint_activations, load_base
from qlora_cli.model.lora import bypassed_layers
from qlora_cli.model.packing import BLOCK_DIAGONAL, VARIABLE_LENGTH, prepare_packing
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from qlora_cli.training.loss import supervised_loss
from tests.support.models import save_tiny_model
from tests.support.packing import pack, packing_model, pad_rows, put_lora, rows

# The same float32 sums in another order, relative to the largest entry of each tensor.
TOLERANCE = 1e-5

VARIABLE = ("llama", "gpt2", "qwen2", "mistral", "phi3", "gpt_neox", "opt", "mixtral", "qwen2_moe", "deepseek_v3")
MASKED = ("llama", "gpt2", "qwen2", "gemma2", "gemma3", "mistral-window", "gpt_neox", "mixtral", "qwen2_moe")


def _loss_and_gradients(model: PreTrainedModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Of all LoRA parameters and the embeddings."""
    model.get_input_embeddings().weight.requires_grad_()
    model.zero_grad()
    loss = supervised_loss(model, batch)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def _assert_same(packed: PreTrainedModel, plain: PreTrainedModel, tolerance: float = TOLERANCE) -> None:
    """The packed loss and gradients are those of the same rows unpacked."""
    ours, our_gradients = _loss_and_gradients(packed, pack(rows()))
    theirs, their_gradients = _loss_and_gradients(plain, pad_rows(rows()))
    assert ours == pytest.approx(theirs, rel=tolerance)
    assert our_gradients.keys() == their_gradients.keys()
    assert any("lora_A" in name for name in our_gradients)
    for name, gradient in our_gradients.items():
        wanted = their_gradients[name]
        assert ((gradient - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item() <= tolerance, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", VARIABLE)
def test_variable_length_packs_are_the_rows(family: str, checkpointing: bool) -> None:
    """Loss, every LoRA gradient and the embeddings' gradient in float32, also where activations are recomputed."""
    packed, plain = packing_model(family), packing_model(family)
    if checkpointing:
        checkpoint_activations(packed)
    assert prepare_packing(packed) == VARIABLE_LENGTH
    _assert_same(packed.train(checkpointing), plain.train(checkpointing))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MASKED)
def test_masked_packs_are_the_rows(family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through the block-diagonal mask, with windows shorter than the rows, softcaps and experts."""
    monkeypatch.setattr(packing, "_can_vary", lambda model: False)
    packed, plain = packing_model(family), packing_model(family)
    if checkpointing:
        checkpoint_activations(packed)
    assert prepare_packing(packed) == BLOCK_DIAGONAL
    _assert_same(packed.train(checkpointing), plain.train(checkpointing))


@pytest.mark.parametrize("family", ["bloom", "mpt", "gpt_oss", "jamba", "gemma2", "mistral-window"])
def test_no_family_is_quietly_wrong(family: str) -> None:
    """Whatever the installed transformers does for it: packed as unpacked, or refused by name."""
    packed = packing_model(family)
    try:
        prepare_packing(packed)
    except ModelError as error:
        assert type(packed).__name__ in str(error)  # noqa: PT017 (either end is right)
    else:
        _assert_same(packed, packing_model(family))


@pytest.mark.parametrize("how", [VARIABLE_LENGTH, BLOCK_DIAGONAL])
def test_padding_of_packs_changes_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of it, of whatever token: the same loss and gradients, and nothing that is not a number."""
    if how == BLOCK_DIAGONAL:
        monkeypatch.setattr(packing, "_can_vary", lambda model: False)
    model = packing_model("llama")
    assert prepare_packing(model) == how
    loss, gradients = _loss_and_gradients(model, pack(rows()))
    wide_loss, wide_gradients = _loss_and_gradients(model, pack(rows(), width=45, pad=77))
    assert wide_loss == pytest.approx(loss, rel=TOLERANCE)
    for name, gradient in gradients.items():
        assert torch.isfinite(wide_gradients[name]).all()
        torch.testing.assert_close(wide_gradients[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_a_pack_of_one_row_and_a_blank_one() -> None:
    """A single row with no neighbour is itself; a batch without labels costs exactly nothing and has a gradient."""
    model = packing_model("llama")
    prepare_packing(model)
    one = rows(((9,),))
    assert supervised_loss(model, pack(one)).item() == pytest.approx(supervised_loss(model, pad_rows(one)).item())
    blank = pack(one)
    loss = supervised_loss(model, Batch(blank.input_ids, None, blank.labels.fill_(-100), [], 0, 0, blank.position_ids))
    loss.backward()
    assert loss.item() == 0.0
    assert bypassed_layers(model) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-window"])
def test_batches_that_are_not_packed_stay_as_they_were(family: str) -> None:
    """To the bit: a validation split is not packed, and goes through the prepared model."""
    model, plain = packing_model(family), packing_model(family)
    prepare_packing(model)
    assert torch.equal(supervised_loss(model, pad_rows(rows())), supervised_loss(plain, pad_rows(rows())))


@pytest.mark.parametrize("how", [VARIABLE_LENGTH, BLOCK_DIAGONAL])
def test_packs_on_a_4_bit_base(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NF4 in bfloat16 with checkpointing: the loss agrees to bf16's rounding, a gradient to a few per cent."""
    if how == BLOCK_DIAGONAL:
        monkeypatch.setattr(packing, "_can_vary", lambda model: False)
    source = ModelSource(str(save_tiny_model(tmp_path / "base")))
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = load_base(source, QuantizationSection(), torch.device("cpu"))
        put_lora(model, torch.bfloat16)
        checkpoint_activations(model)
        models.append(model)
    assert prepare_packing(models[0]) == how
    vocabulary = models[0].config.vocab_size
    sequences = [[row % vocabulary for row in each] for each in rows()]
    results = []
    for model, batch in zip(models, (pack(sequences), pad_rows(sequences)), strict=True):
        loss = supervised_loss(model.train(), batch)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters() if p.requires_grad]))
    assert results[0][0] == pytest.approx(results[1][0], rel=2e-3)
    for packed, plain in zip(results[0][1], results[1][1], strict=True):
        assert ((packed - plain).norm() / plain.norm()).item() < 0.05
