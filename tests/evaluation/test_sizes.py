"""Plans of memory can be made for every language model that transformers has, however its configuration is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_cli.evaluation.answering import memory
from qlora_cli.evaluation.answering.memory import planned_rows, planned_tokens
from qlora_cli.evaluation.answering.row_limits import cache_bytes_per_token
from qlora_cli.evaluation.answering.sizes import size


def _planned(config: Any) -> tuple[int, int, int]:
    """The plans for a bfloat16 model of this configuration, as on a GPU."""
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    model: Any = SimpleNamespace(
        config=config, dtype=torch.bfloat16, get_input_embeddings=lambda: SimpleNamespace(weight=weight)
    )
    return planned_tokens(model), planned_rows(model), cache_bytes_per_token(model)


@pytest.fixture(autouse=True)
def _forty_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 40 << 30)


def test_every_architecture_can_be_planned_for() -> None:
    """Sizes that differ by layer, that come as lists or are not there end no run."""
    planned = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config = kind()
        except Exception:  # has no defaults, and may be an encoder-decoder
            continue
        tokens, rows, cache = _planned(config)
        assert 256 <= tokens <= 4096, kind.model_type
        assert rows >= 1, kind.model_type
        assert cache > 0, kind.model_type
        planned += 1
    assert planned > 100


def test_sizes_that_differ_by_layer_are_the_largest() -> None:
    """Gemma 4's heads are wider in some layers, and Gemma 3n's blocks have a list of widths."""
    shape = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    gemma4 = transformers.AutoConfig.for_model("gemma4_text", **shape, head_dim=16, global_head_dim=32)
    assert size(gemma4, "head_dim", 1) == 32
    assert _planned(gemma4)[2] == 2 * 6 * 2 * 32 * 2
    gemma3n = transformers.AutoConfig.for_model("gemma3n_text", num_hidden_layers=3, intermediate_size=[8, 32, 16])
    assert size(gemma3n, "intermediate_size", 1) == 32


def test_what_is_not_told_is_what_is_usual() -> None:
    """Nothing, None, zero, a truth value and an empty list are no sizes."""
    for value in (None, 0, True, [], "12"):
        assert size(SimpleNamespace(width=value), "width", 7) == 7
    assert size(SimpleNamespace(), "width", 7) == 7
