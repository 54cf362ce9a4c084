"""Attention over packed rows, each row by itself: nothing of a neighbour is computed, so there is nothing to mask.

Given to transformers as an attention function of its own name, which a model takes through its config. On a GPU the
rows go through one variable-length flash kernel; elsewhere each goes through PyTorch's causal attention in turn.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "qlora_varlen"

# What transformers hands every attention function and plain causal attention has no use for.
_WITHOUT_EFFECT = frozenset(
    {
        "cu_seq_lens_k",
        "max_length_k",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)
# torch 2.12 is the first that is documented to take fewer key than query heads.
_VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def register_varlen() -> None:
    """Make `VARLEN` known to transformers; a second time changes nothing."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, varlen_mask)


def run_lengths(position_ids: Tensor) -> dict[str, Any]:
    """Where rows begin and how long they are, under the names that transformers gives them.

    Computed once for a forward pass, and handed through the model to every layer's attention.

    Args:
        position_ids: [batch, seq], 0 at the first token of every row and nowhere else.

    Returns:
        `cu_seq_lens_q`, `cu_seq_lens_k`: int32 [rows + 1], where each row begins in the flattened batch, and its end.
        `max_length_q`, `max_length_k`: tokens of the longest row.
    """
    flat = position_ids.flatten()
    starts = (flat == 0).nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=flat.numel()).to(torch.int32)
    longest = int(flat.max()) + 1
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def varlen_mask(**arguments: Any) -> Tensor | None:
    """The mask for `varlen_attention`: none for packed rows; a batch with padding gets what SDPA gets.

    So do layers with a window, with chunks or with tokens that see ahead; packed, `varlen_attention` refuses those.
    """
    plainly_causal = arguments.get("local_size") is None and not arguments.get("use_vmap")
    if arguments["attention_mask"] is None and plainly_causal:
        return None
    mask: Tensor | None = sdpa_mask(**arguments)
    return mask


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each packed row to itself; of a batch that is not packed, what SDPA does.

    Args:
        module: the layer that asks.
        query: [batch, heads, seq, dim].
        key, value: [batch, key heads, seq, dim]; each key head serves heads / key heads query heads.
        attention_mask: for a batch that is not packed.
        dropout: share of attention weights dropped.
        scaling: of the products; None is 1 / sqrt(dim).
        is_causal: None is what `module` says of itself.
        cu_seq_lens_q: int32 [rows + 1], from `run_lengths`; None for a batch that is not packed.
        max_length_q: tokens of the longest row.
        others: what else the model says; anything that would change the result is refused.

    Returns:
        [batch, seq, heads, value dim], and no attention weights.

    Raises:
        NotImplementedError: for packed rows, if the layer is not causal or asks for more than that.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        outputs: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
        return outputs
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _WITHOUT_EFFECT)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if unknown or not causal or attention_mask is not None or query.shape[2] != key.shape[2]:
        raise NotImplementedError(", ".join(unknown) or "attention that is not plainly causal")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [batch * seq, heads, dim]
    if _has_kernel(query, key, value, dropout):
        attended = _at_once(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    else:
        attended = _row_by_row(q, k, v, cu_seq_lens_q, dropout, scaling)
    return attended.view(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the variable-length kernel computes this: it has no dropout, and heads of multiples of 8 up to 256."""
    if not query.is_cuda or torch.version.hip is not None or dropout > 0 or query.shape[-1] % 8:
        return False
    # torch's own answer for this GPU, dtype and size of head.
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])
    return bool(torch.backends.cuda.can_use_flash_attention(asked))


def _at_once(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None) -> Tensor:
    """All rows in one kernel: [tokens, heads, dim] each, and so the output."""
    groups: dict[str, Any] = {"enable_gqa": True}
    if not _VARLEN_TAKES_GROUPS:
        groups = {}
        key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    causal = (-1, 0)  # as far back as the row goes, nothing ahead
    attended = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=causal, **groups
    )
    return cast(Tensor, attended)  # a pair only where more is asked for


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """One row after the other through SDPA: [tokens, heads, dim] each, and so the output."""
    lengths = bounds.diff().tolist()
    key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    # Split, not sliced: the gradient of a slice is as large as what it was cut from.
    rows = zip(*(torch.split(x, lengths) for x in (query, key, value)), strict=True)
    attended = []
    for row in rows:
        q, k, v = (x.transpose(0, 1)[None] for x in row)  # [1, heads, length, dim]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        attended.append(out[0].transpose(0, 1))
    return torch.cat(attended)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, key heads, dim] to [tokens, heads, dim], each key head as often as there are query heads to it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
