"""Tiny models of the kinds that packing meets, and the same rows packed and padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_cli.data.batches import Batch
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import lora_layers
from qlora_cli.recipe.schema import LoraSection

_WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_SHAPE: dict[str, Any] = _WIDE | {"vocab_size": 512, "max_position_embeddings": 256}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHORT_NAMES = {"vocab_size": 512, "n_layer": 2, "n_head": 4}

# What is dropped at random would hide what is compared; windows are shorter than the longest rows below.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "gpt2": (
        "gpt2",
        _SHORT_NAMES | {"n_embd": 64, "n_positions": 256, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "qwen2": ("qwen2", _GROUPED),
    "gemma2": ("gemma2", _GROUPED | {"head_dim": 16, "sliding_window": 8}),  # softcap, and every other layer a window
    "gemma3": ("gemma3_text", _GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "mistral": ("mistral", _GROUPED | {"sliding_window": None}),
    "mistral-window": ("mistral", _GROUPED | {"sliding_window": 8}),
    "phi3": ("phi3", _GROUPED | {"pad_token_id": 0, "eos_token_id": 1, "sliding_window": None}),
    "gpt_neox": ("gpt_neox", _SHAPE),
    "opt": ("opt", _SHAPE | {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "mixtral": ("mixtral", _GROUPED | _EXPERTS),
    "qwen2_moe": ("qwen2_moe", _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 64}),
    "deepseek_v3": (  # keys and values of different widths
        "deepseek_v3",
        _SHAPE
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 24, "first_k_dense_replace": 2},
    ),
    "bloom": ("bloom", _SHORT_NAMES | {"hidden_size": 64}),
    "mpt": ("mpt", {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "gpt_oss": ("gpt_oss", _GROUPED | _EXPERTS | {"head_dim": 16, "sliding_window": 8}),
    "mamba": ("mamba", {"vocab_size": 512, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}),
    "jamba": (
        "jamba",
        _GROUPED | _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
}


def packing_model(family: str, *, lora: bool = True, **changes: Any) -> PreTrainedModel:
    """A random float32 model in eval mode with LoRA layers that do something; the same call, the same weights."""
    name, shape = _CONFIGS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(shape | changes))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if lora:
            put_lora(model, torch.float32)
    return model


def put_lora(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """LoRA layers on all linear ones, with B away from zero so that A has a gradient."""
    inject(model, LoraSection(rank=4, alpha=8), compute_dtype=dtype, seed=0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.05)


# Longer than a window of 8, shorter, and a single token; the second sequence has padding.
LENGTHS = ((13, 5, 1, 9), (7, 15))


def rows(lengths: tuple[tuple[int, ...], ...] = LENGTHS, *, seed: int = 0) -> list[list[torch.Tensor]]:
    """Random token ids for each row of each sequence, int64 [length]."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(4, 500, (length,), generator=generator) for length in each] for each in lengths]


def pack(sequences: list[list[torch.Tensor]], *, width: int | None = None, pad: int = 3) -> Batch:
    """Rows one after the other, every token but a row's first supervised."""
    width = width or max(sum(map(len, each)) for each in sequences)
    ids = torch.full((len(sequences), width), pad)
    positions = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for number, each in enumerate(sequences):
        used = sum(map(len, each))
        lengths = [*map(len, each), width - used]
        ids[number, :used] = torch.cat(each)
        positions[number] = torch.cat([torch.arange(length) for length in lengths])
        labels[number, :used] = ids[number, :used].masked_fill(positions[number, :used] == 0, -100)
    return _batch(ids, None, labels, positions)


def pad_rows(sequences: list[list[torch.Tensor]], *, pad: int = 3) -> Batch:
    """The same rows, each in a sequence of its own, padded to the longest."""
    flat = [row for each in sequences for row in each]
    ids = torch.full((len(flat), max(map(len, flat))), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(flat):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
        labels[number, 1 : len(row)] = row[1:]
    return _batch(ids, mask, labels, None)


def _batch(ids: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor, positions: torch.Tensor | None) -> Batch:
    supervised = int((labels[:, 1:] != -100).sum())
    tokens = int((ids != 3).sum())
    return Batch(ids, mask, labels, rows=[], tokens=tokens, supervised_tokens=supervised, position_ids=positions)
