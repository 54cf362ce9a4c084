"""Tied embeddings with changes to single tokens, and embeddings of other sizes: which of them stay one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError
from tests.support.merges import (
    adapt,
    load_model,
    merge_adapter,
    model_logits,
    read_config,
    stored_tensors,
    trained_logits,
)
from tests.support.models import save_tiny_model
from tests.support.peft_adapters import WEIGHTS, save_peft_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "gpt2", "gpt2")


TOKENS: dict[str, tuple[Any, bool]] = {
    "of both, the same": ({"wte": [3, 300], "lm_head": [3, 300]}, True),
    "of both, others": ({"wte": [3, 300], "lm_head": [3, 301]}, False),
    "of the head": ({"lm_head": [3, 300]}, False),
}


@pytest.mark.parametrize("which", TOKENS)
def test_tokens_trained_for_one_of_two_tied_embeddings(which: str, base: Path, tmp_path: Path) -> None:
    """PEFT trains both alike only if the input's are named, and no others for the output."""
    tokens, stays = TOKENS[which]
    adapter = adapt(base, tmp_path / "adapter", target_modules=["c_attn"], trainable_token_indices=tokens)
    merge_adapter(adapter, tmp_path / "merged")
    assert ("lm_head.weight" in stored_tensors(tmp_path / "merged")) is not stays
    assert read_config(tmp_path / "merged") == read_config(base) | ({} if stays else {"tie_word_embeddings": False})
    merged, trained = model_logits(load_model(tmp_path / "merged")), trained_logits(load_model(base), adapter)
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-5)


def test_new_tokens_of_tied_embeddings(base: Path, tmp_path: Path) -> None:
    """PEFT saves the grown embedding and its rows under both names; it is one tensor all the same."""
    model = load_model(base)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 5)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], trainable_token_indices=[rows, rows + 3])
    adapter = save_peft_adapter(model, tmp_path / "adapter", config)
    trained = trained_logits(model, adapter)
    merge_adapter(adapter, tmp_path / "merged", base_model=str(base))
    assert read_config(tmp_path / "merged") == read_config(base) | {"vocab_size": rows + 5}
    assert "lm_head.weight" not in stored_tensors(tmp_path / "merged")
    torch.testing.assert_close(model_logits(load_model(tmp_path / "merged")), trained, rtol=0, atol=1e-5)


def test_tokens_of_one_and_lora_on_the_other(base: Path, tmp_path: Path) -> None:
    """PEFT lays the one over the other: refused, and not merged without one of them."""
    settings = {"target_modules": ["c_attn", "lm_head"], "trainable_token_indices": [3, 300]}
    adapter = adapt(base, tmp_path / "adapter", **settings)
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged")
    assert str(caught.value) == (
        f"the adapter in {adapter} and the base model {base} do not fit:\n"
        "  lm_head.weight and transformer.wte.weight: one tensor, and the adapter has single tokens of it trained and "
        "something else as well"
    )


@pytest.mark.parametrize("grown", ["embed_tokens", "lm_head"])
def test_embeddings_of_two_sizes(grown: str, tmp_path: Path) -> None:
    """A vocabulary that is larger in one of them alone would be no model that loads."""
    base = save_tiny_model(tmp_path / "base")
    modules = ["embed_tokens", "lm_head"]
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=modules)
    tensors = load_file(adapter / WEIGHTS)
    tensors |= {name: torch.cat([rows, rows[:5]]) for name, rows in tensors.items() if grown in name}
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged")
    rows = read_config(base)["vocab_size"]
    is_head = [rows + 5, rows] if grown == "lm_head" else [rows, rows + 5]
    assert str(caught.value) == (
        f"the adapter in {adapter} and the base model {base} do not fit: a part of the model alone would have other "
        "numbers of tokens or labels:\n"
        f"  lm_head.weight: would be [{is_head[0]}, 64], and [{is_head[1]}, 64] is what goes with the rest"
    )
