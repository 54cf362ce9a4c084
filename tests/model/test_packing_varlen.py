"""Variable-length attention is attention under a block-diagonal mask, and says so when it is asked for more."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qlora_cli.model import varlen
from qlora_cli.model.varlen import run_lengths, varlen_attention

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]])


def _tensors(heads: int = 4, key_heads: int = 4, dim: int = 16, value_dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 8, dim), (2, key_heads, 8, dim), (2, key_heads, 8, value_dim)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def _masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """What it must equal: SDPA with a mask of rows and causality, as [batch, seq, heads, dim]."""
    row = (POSITIONS == 0).cumsum(-1)
    mask = (row[:, :, None] == row[:, None]) & torch.ones(8, 8, dtype=torch.bool).tril()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scale).transpose(1, 2)


def test_where_rows_begin() -> None:
    """Bounds go through the flattened batch; a token that is a row of its own counts."""
    found = run_lengths(POSITIONS)
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 4, 5, 8, 14, 16]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 6


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [{}, {"key_heads": 2}, {"key_heads": 1, "value_dim": 24}, {"dim": 20}])
def test_equals_masked_attention(shape: dict[str, int], scale: float | None) -> None:
    """Output and gradients in float32, with grouped heads and values of another width; sums of a few values near 1 are
    rounded by up to a few times 1e-7, more on some processors than on others."""
    ours, theirs = _tensors(**shape), _tensors(**shape)
    out, weights = varlen_attention(nn.Module(), *ours, None, scaling=scale, **run_lengths(POSITIONS))
    assert weights is None
    wanted = _masked(*theirs, scale)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=5e-6)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    wanted.backward(upstream)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("takes_groups", [False, True])
def test_the_kernel_is_asked_for_the_same(takes_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of torch's kernel, called as its signature allows: flattened rows, their bounds, causal, the scale; key
    heads as they are where it takes fewer of them, else repeated."""
    signature = inspect.signature(varlen.varlen_attn)

    def double(*args: Any, **options: Any) -> torch.Tensor:
        given = signature.bind(*args, **options).arguments
        assert given["window_size"] == (-1, 0)
        assert given["max_q"] == given["max_k"] == 6
        assert given["cu_seq_q"] is given["cu_seq_k"]
        assert given.get("enable_gqa", False) == takes_groups == (given["key"].shape[1] == 2)
        tokens = given["query"], given["key"], given["value"]
        return varlen._row_by_row(*tokens, given["cu_seq_q"], 0.0, given["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", double)
    monkeypatch.setattr(varlen, "_VARLEN_TAKES_GROUPS", takes_groups)
    monkeypatch.setattr(varlen, "_has_kernel", lambda *args: True)
    tensors = _tensors(key_heads=2)
    out, _ = varlen_attention(nn.Module(), *tensors, None, scaling=0.3, **run_lengths(POSITIONS))
    torch.testing.assert_close(out, _masked(*tensors, 0.3), rtol=1e-5, atol=1e-6)


def test_dropout_is_done() -> None:
    """Of attention weights, each kept one scaled up; the first token of a row attends to itself or to nothing."""
    query, key, value = _tensors()
    torch.manual_seed(0)
    out, _ = varlen_attention(nn.Module(), query, key, value, None, dropout=0.5, **run_lengths(POSITIONS))
    first, own = out[:, 0], value[:, :, 0]  # [batch, heads, dim]
    kept = torch.isclose(first, 2 * own).all(-1)
    dropped = (first == 0).all(-1)
    assert (kept ^ dropped).all()
    assert kept.any()
    assert dropped.any()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"sliding_window": 4, "s_aux": torch.zeros(4)}, "s_aux, sliding_window"),
        ({"is_causal": False}, "attention that is not plainly causal"),
    ],
)
def test_what_it_cannot_do_is_not_ignored(asked: dict[str, Any], message: str) -> None:
    """A softcap, sinks, a window, tokens that see ahead: an error, on which `prepare_packing` turns to the mask."""
    with pytest.raises(NotImplementedError, match=f"^{message}$"):
        varlen_attention(nn.Module(), *_tensors(), None, **asked, **run_lengths(POSITIONS))


def test_what_changes_nothing_is_no_hindrance() -> None:
    """Names that transformers passes along to every layer, and features that are off."""
    idle = {"position_ids": POSITIONS, "use_cache": False, "sliding_window": None, "softcap": None}
    out, _ = varlen_attention(nn.Module(), *_tensors(), None, **idle, **run_lengths(POSITIONS))
    assert torch.isfinite(out).all()
