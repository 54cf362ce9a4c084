"""Rows that share a sequence are learned as rows by themselves are."""

from __future__ import annotations

import datetime
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from qlora_cli.data.batches import collate
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.units import Units, make_units
from qlora_cli.model.lora import lora_layers
from qlora_cli.model.packing import prepare_packing
from qlora_cli.model.source import ModelSource, load_config, load_tokenizer
from qlora_cli.recipe.schema import Recipe
from qlora_cli.selftest.differences import largest, relative_to_largest
from qlora_cli.selftest.events import Measured
from qlora_cli.selftest.lora_model import lora_model
from qlora_cli.selftest.workbench import Workbench
from qlora_cli.training.loss import supervised_loss
from qlora_cli.training.preparation import prepare

_ROWS = 12
# float32 sums in another order, in attention that is computed another way: 1e-6 is usual. Rows that see each other
# make it 2e-3 in the loss and 0.5 in the gradient.
BOUND = 1e-4
# The compute dtype of most recipes has three digits, and its own kernel on a GPU: 1e-2 is usual.
HALF_BOUND = 0.1


def check_packed(bench: Workbench) -> Measured:
    """Compare the loss of the same rows in packs and by themselves, and its gradient for every LoRA matrix.

    No two rows see each other in a pack, so both are the same sums but for their order.
    """
    full, half = (_compare(bench, dtype) for dtype in ("float32", "bfloat16"))
    return Measured(
        full.loss <= BOUND and full.gradient <= BOUND and half.gradient <= HALF_BOUND,
        figure={"loss": full.loss, "gradient": full.gradient, "gradient in bfloat16": half.gradient},
        bound={"loss": BOUND, "gradient": BOUND, "gradient in bfloat16": HALF_BOUND},
        detail=f"{_ROWS} rows in {full.packs} packs, kept apart by {half.how}: the loss differs by {full.loss:.1e} of "
        f"itself from that of the rows alone, the gradient by {full.gradient:.1e} of a matrix's largest entry, and in "
        f"bfloat16 by {half.gradient:.1e}",
    )


class _Compared(NamedTuple):
    """Relative differences, the number of packs, and what keeps rows in one apart."""

    loss: float
    gradient: float
    packs: int
    how: str


def _compare(bench: Workbench, dtype: str) -> _Compared:
    recipe = bench.recipe(
        "packed", rows=_ROWS, quantization={"compute_dtype": dtype}, dataset={"packing": True, "max_length": 200}
    )
    rows, pad_token_id = _encoded(recipe)
    model = lora_model(recipe, bench.device)
    wanted_loss, wanted = _loss_and_gradients(model, make_units(rows, None, recipe.training.seed), pad_token_id)
    how = prepare_packing(model)
    packs = make_units(rows, recipe.dataset.pack_to, recipe.training.seed)
    got_loss, got = _loss_and_gradients(model, packs, pad_token_id)
    gradient = largest(relative_to_largest(a, b) for a, b in zip(got, wanted, strict=True))
    return _Compared(abs(got_loss - wanted_loss) / abs(wanted_loss), gradient, len(packs), how)


def _encoded(recipe: Recipe) -> tuple[EncodedRows, int]:
    """The recipe's rows, and the token that fills up shorter ones."""
    source = ModelSource(recipe.base_model)
    tokenizer, seed = load_tokenizer(source), recipe.training.seed
    split, _ = prepare(recipe.dataset, tokenizer, load_config(source), seed=seed, today=datetime.date(2023, 5, 14))
    return split.kept, int(tokenizer.pad_token_id or 0)


def _loss_and_gradients(model: PreTrainedModel, units: Units, pad_token_id: int) -> tuple[float, list[torch.Tensor]]:
    """The loss per supervised token of all rows, and its gradients for A and B of every layer, on the CPU."""
    batch = collate(units, range(len(units)), pad_token_id).to(model.device)
    loss = supervised_loss(model, batch) / batch.supervised_tokens
    trained = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    return loss.item(), [gradient.cpu() for gradient in torch.autograd.grad(loss, trained)]
