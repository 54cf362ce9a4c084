"""`lora.target_modules` names what it says, and nothing else is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from qlora_cli.errors import ModelError
from qlora_cli.model.inject import find_targets, inject
from qlora_cli.model.lora import LoRALinear, bypassed_layers, lora_layers
from qlora_cli.model.quantization import linear_shape
from qlora_cli.recipe.schema import LoraSection
from tests.support.models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(family: str) -> None:
    """The count of every family is known by hand: two blocks of 7 (Llama-like), 4 (GPT-2, NeoX) or 6 (OPT) layers."""
    model = tiny_model(family)
    targets = find_targets(model, "all-linear")
    assert len(targets) == {"gpt2": 8, "gpt_neox": 8, "opt": 12}.get(family, 14)
    head = model.get_output_embeddings()
    assert not any(model.get_submodule(path) is head for path in targets)


def test_names_match_whole_last_parts() -> None:
    """`proj` is no name of q_proj; `self_attn.q_proj` is."""
    model = tiny_model("llama")
    assert find_targets(model, ["self_attn.q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    with pytest.raises(ModelError, match="no linear layer"):
        find_targets(model, ["proj"])


def test_a_regular_expression_matches_whole_paths() -> None:
    """Layer 1's attention alone."""
    targets = find_targets(tiny_model("llama"), r"model\.layers\.1\.self_attn\.(q|v)_proj")
    assert targets == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_nothing_matched_lists_what_there_is() -> None:
    """The exact text: what was asked, every name with its shape and count, and an example path."""
    with pytest.raises(ModelError) as caught:
        find_targets(tiny_model("gpt2"), ["c_attn", "q_proj"])
    assert str(caught.value) == (
        "lora.target_modules: q_proj: no linear layer of GPT2LMHeadModel has that name. There are:\n"
        "  c_attn                   64 -> 192, 2 of them\n"
        "  c_proj                   64 -> 64, 2 of them\n"
        "  c_fc                     64 -> 256, 2 of them\n"
        "  c_proj                   256 -> 64, 2 of them\n"
        "  lm_head                  64 -> 512, 1 of them\n"
        "A list takes these names; a regular expression must match whole paths such as transformer.h.0.attn.c_attn"
    )


def test_a_name_given_as_a_text_is_told_how_to_be_one() -> None:
    """`q_proj` alone is an expression for a whole path; what was meant is a list, or a longer expression."""
    with pytest.raises(ModelError, match=r"write \[q_proj\] or \.\*\\\.q_proj"):
        find_targets(tiny_model("llama"), "q_proj")


def test_what_a_model_reads_past_is_no_target() -> None:
    """nn.MultiheadAttention multiplies with its projection's weight; LoRA there would do nothing."""
    attention = nn.MultiheadAttention(64, 4)
    assert linear_shape(attention.out_proj) is None
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)


def test_a_layer_that_is_never_called_is_found() -> None:
    """`weight` is there to be looked at; a model that multiplies with it goes past the update, and is told."""
    layer = LoRALinear(nn.Linear(4, 4), rank=1, alpha=1, dropout=0.0, compute_dtype=torch.float32)
    called = LoRALinear(nn.Linear(4, 4), rank=1, alpha=1, dropout=0.0, compute_dtype=torch.float32)
    x = torch.randn(2, 4)
    (called(x) @ layer.weight.t() + layer.bias).sum().backward()
    assert bypassed_layers(nn.ModuleDict({"read": layer, "called": called})) == ["read"]


def test_other_towers_are_left_alone() -> None:
    """In a model that also sees, all-linear is the language model: text alone would not train the rest."""
    config = Gemma3Config(
        text_config={
            "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )  # fmt: skip
    targets = find_targets(Gemma3ForConditionalGeneration(config), "all-linear")
    assert len(targets) == 7
    assert all("language_model" in path for path in targets)


def test_only_a_and_b_are_trained_and_the_seed_decides_their_start() -> None:
    """After inject nothing else has a gradient; the same seed gives the same A, another seed another."""
    section = LoraSection(rank=4, target_modules=["q_proj", "v_proj"])
    starts = []
    for seed in (1, 1, 2):
        model = tiny_model("llama")
        paths = inject(model, section, compute_dtype=torch.float32, seed=seed)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {f"{path}.lora_{letter}" for path in paths for letter in "AB"}
        starts.append(torch.cat([layer.lora_A.flatten() for layer in lora_layers(model).values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
