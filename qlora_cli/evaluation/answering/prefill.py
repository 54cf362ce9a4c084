"""Prompts are read: those that begin alike, together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qlora_cli.evaluation.answering.row_cache import RowCache
from qlora_cli.evaluation.answering.rows import Row


@torch.no_grad()
def read_rows(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[RowCache, Tensor]:
    columns = max(row.length for row in rows)
    ids = torch.zeros((len(rows), columns), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, columns - row.length :] = torch.tensor(row.prompt.tokens)
        mask[place, columns - row.length :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, past_key_values=DynamicCache())
    return RowCache([(layer.keys, layer.values) for layer in out.past_key_values.layers]), out.logits[:, -1]
