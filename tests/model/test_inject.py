"""`lora.target_modules` names what it says, and nothing else is trained."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.errors import ModelError
from qlora_cli.model.inject import find_targets, inject
from qlora_cli.model.lora import lora_layers
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


def test_a_broken_expression_is_told() -> None:
    """Not a traceback out of `re`."""
    with pytest.raises(ModelError, match=r"^lora.target_modules: '\(q_proj' is not a regular expression: missing \)"):
        find_targets(tiny_model("llama"), "(q_proj")


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
