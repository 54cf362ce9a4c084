"""The loss is the sum of what transformers' own loss averages, on every path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, modeling_utils

from qlora_cli.data.batches import Batch
from qlora_cli.training.loss import _slices_by_mask, perplexity, supervised_loss
from tests.support.models import FAMILIES, tiny_model


def _batch() -> Batch:
    """Two rows of 12 and 7 tokens, padded; the first four tokens of each have no loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 200, (2, 12), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :4] = -100
    supervised = int((labels[:, 1:] != -100).sum())
    return Batch(ids, attention, labels, rows=[1, 2], tokens=19, supervised_tokens=supervised)


def _reference(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """transformers' mean loss over its own shifted labels, times the number of them."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    return out.loss * batch.supervised_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_loss_and_gradient(family: str) -> None:
    """Value and gradient in float32, for every family, keeping logits at labels only where it can."""
    batch = _batch()
    ours, theirs = tiny_model(family), tiny_model(family)
    # transformers gained the helper in 5.2x; before it, every family takes the plain path.
    assert _slices_by_mask(ours) == hasattr(modeling_utils, "slice_logits_to_keep")
    loss, wanted = supervised_loss(ours, batch), _reference(theirs, batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-5)
    loss.backward()
    wanted.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


class _RemoteCode(LlamaForCausalLM):
    """Stands for an architecture whose own forward knows nothing of masks over positions."""

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, labels: Any = None) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_an_architecture_that_slices_otherwise_takes_the_plain_path() -> None:
    """It gets whole logits, and the same loss."""
    plain = tiny_model("llama")
    model = _RemoteCode(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert not _slices_by_mask(model)
    torch.testing.assert_close(supervised_loss(model, _batch()), _reference(plain, _batch()), rtol=1e-6, atol=1e-5)


def test_padding_changes_nothing() -> None:
    """More padding on the right leaves the sum where it was."""
    batch = _batch()
    wide = Batch(
        torch.nn.functional.pad(batch.input_ids, (0, 5)),
        torch.nn.functional.pad(batch.attention_mask, (0, 5)),
        torch.nn.functional.pad(batch.labels, (0, 5), value=-100),
        batch.rows,
        batch.tokens,
        batch.supervised_tokens,
    )
    model = tiny_model("llama")
    torch.testing.assert_close(supervised_loss(model, wide), supervised_loss(model, batch), rtol=1e-5, atol=1e-5)


def test_a_blank_batch_costs_nothing_and_still_has_a_gradient() -> None:
    """A process that ran out of rows takes part with a loss of exactly zero."""
    batch = _batch()
    blank = Batch(batch.input_ids, batch.attention_mask, torch.full_like(batch.labels, -100), batch.rows, 0, 0)
    model = tiny_model("llama")
    loss = supervised_loss(model, blank)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_perplexity_of_a_diverged_loss_is_none() -> None:
    """exp overflows a float beyond 709; JSON has no infinity."""
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) is None
    assert np.isclose(perplexity(2.0), 7.38905609893065)
