"""What an adapter does to a parameter is, bit for bit, what PEFT's merge_and_unload does to it in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from qlora_cli.merging.adapters.changes import BiasUpdate, LowRank
from qlora_cli.merging.adapters.replacements import Replacement, TokenRows
from qlora_cli.merging.adapters.tensors import AdapterTensors
from tests.support.models import TASK_TYPES, save_tiny_model, tiny_model
from tests.support.peft_adapters import (
    LAYERS,
    WEIGHTS,
    edit_tensors,
    merged,
    parameters,
    peft_merged,
    read,
    save_peft_adapter,
)

_EMBEDDINGS = {
    "llama": "embed_tokens",
    "gemma": "embed_tokens",
    "gpt2": "wte",
    "bert": "word_embeddings",
    "t5": "shared",
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "power of two": {"lora_alpha": 8},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {".*0.*": 2}, "alpha_pattern": {".*1.*": 3}},
}


def _compare(family: str, folder: Path, /, **settings: Any) -> set[str]:
    """Merge by both and compare every parameter of the model; returns those that the adapter changed."""
    model = tiny_model(family)
    config = peft.LoraConfig(r=4, task_type=TASK_TYPES.get(family, "CAUSAL_LM"), **{"lora_alpha": 10} | settings)
    save_peft_adapter(model, folder, config)
    before, ours, theirs = parameters(model), merged(model, folder), peft_merged(model, folder)
    # PEFT merges an embedding in place, which moves a head that is tied to it as well: not what was trained.
    tied = {name for name in before if any(before[name].data_ptr() == before[done].data_ptr() for done in ours)}
    for name, wanted in theirs.items():
        if name in ours or name not in tied:
            assert torch.equal(ours.get(name, before[name]), wanted), name
    assert all(not torch.equal(ours[name], before[name]) for name in ours)
    return set(ours)


@pytest.mark.parametrize("setting", _SETTINGS)
@pytest.mark.parametrize("family", LAYERS)
def test_every_family_is_merged_as_peft_merges_it(family: str, setting: str, tmp_path: Path) -> None:
    """Nine architectures, linear layers and Conv1D; rows come in blocks, the result is bit for bit PEFT's."""
    changed = _compare(family, tmp_path, target_modules=LAYERS[family], **_SETTINGS[setting])
    assert sum(name.endswith(f"{LAYERS[family][0]}.weight") for name in changed) >= 2


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", _EMBEDDINGS)
def test_embeddings_are_merged_as_peft_merges_them(family: str, dora: bool, tmp_path: Path) -> None:
    """LoRA and DoRA of an embedding, Gemma's scaled one too; DoRA's norms run over the tokens."""
    layers = [_EMBEDDINGS[family], LAYERS[family][0]]
    changed = _compare(family, tmp_path, target_modules=layers, use_dora=dora)
    assert any(name.endswith(f"{_EMBEDDINGS[family]}.weight") for name in changed)


def test_biases_that_were_trained_are_merged(tmp_path: Path) -> None:
    """The bias beside B (lora_bias) is scaled and added; saved biases (bias: all) take the base's place first."""
    changed = _compare("opt", tmp_path / "both", target_modules=["q_proj", "fc1"], lora_bias=True, bias="all")
    assert {"model.decoder.layers.0.fc1.bias", "model.decoder.final_layer_norm.bias"} <= changed
    changed = _compare("gpt_neox", tmp_path / "one", target_modules=["query_key_value"], lora_bias=True)
    assert changed == {
        f"gpt_neox.layers.{layer}.attention.query_key_value.{part}" for layer in (0, 1) for part in ("weight", "bias")
    }


def test_saved_modules_are_merged(tmp_path: Path) -> None:
    """Whole modules, a container of several too (RoBERTa's classifier), and what PEFT writes twice beside bias: all."""
    saved = ["lm_head", "embed_tokens", "norm"]
    changed = _compare("llama", tmp_path / "llama", target_modules=["q_proj"], modules_to_save=saved)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= changed
    changed = _compare("roberta", tmp_path / "roberta", target_modules=["query"], bias="all")
    assert {"classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight"} <= changed
    assert (
        "base_model.model.classifier.original_module.dense.bias"
        in read(tiny_model("roberta"), tmp_path / "roberta").unused
    )


def test_token_rows_are_merged(tmp_path: Path) -> None:
    """Single rows of an embedding (trainable_token_indices), as a list or by module; they hold for a tied head too."""
    _compare("llama", tmp_path / "list", target_modules=["q_proj"], trainable_token_indices=[3, 500, 7])
    _compare("gpt2", tmp_path / "dict", target_modules=["c_attn"], trainable_token_indices={"wte": [0, 511]})
    change = read(tiny_model("gpt2"), tmp_path / "dict").changes["transformer.wte.weight"]
    assert isinstance(change, TokenRows)
    assert change.follows_ties
    assert not change.does_nothing(read(tiny_model("gpt2"), tmp_path / "dict").tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stored_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Their numbers are taken as they are; products and sums are in float32, as PEFT's are."""
    model = tiny_model("llama")
    save_peft_adapter(model, tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    stored = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(stored, tmp_path / WEIGHTS)
    theirs = peft_merged(model, tmp_path)
    for name, ours in merged(model, tmp_path).items():
        assert torch.equal(ours, theirs[name])


@pytest.mark.parametrize("targeted", [False, True])
def test_a_vocabulary_that_grew(targeted: bool, tmp_path: Path) -> None:
    """PEFT saves embeddings that were made larger, beneath LoRA too; the merged ones have the adapter's rows."""
    base = save_tiny_model(tmp_path / "base")
    grown = AutoModelForCausalLM.from_pretrained(base)
    rows = grown.config.vocab_size + 9
    grown.resize_token_embeddings(rows)
    targets = ["q_proj", "embed_tokens", "lm_head"] if targeted else ["q_proj"]
    save_peft_adapter(grown, tmp_path / "adapter", peft.LoraConfig(r=4, target_modules=targets))
    ours = merged(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    theirs = peft_merged(grown, tmp_path / "adapter")
    assert len(ours["model.embed_tokens.weight"]) == len(ours["lm_head.weight"]) == rows
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_size_of_the_blocks_changes_nothing(tmp_path: Path) -> None:
    """One row at a time or all at once: the same bits, with norms along rows and down columns."""
    model = tiny_model("gpt2")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "wte", "lm_head"], use_dora=True, fan_in_fan_out=True)
    save_peft_adapter(model, tmp_path, config)
    single, whole = merged(model, tmp_path, rows=1), merged(model, tmp_path, rows=100_000)
    assert all(torch.equal(single[name], whole[name]) for name in whole)


def test_what_does_not_fit_the_base_is_one_line() -> None:
    """Expected and got; a parameter that the base has not, and shapes that differ. Heads and embeddings may grow."""
    low = LowRank("w.weight", "a", "b", 1.0, "conv1d", (4, 6))
    assert low.problem((4, 6)) is None
    assert low.problem((6, 4)) == "w.weight: the adapter is for [4, 6], the base has [6, 4]"
    assert low.problem(None) == "w.weight: the adapter changes it, the base has no parameter of that name"
    assert LowRank("w.weight", "a", "b", 1.0, "linear", (8, 6), over="c", resizable=True).problem((5, 6)) is None
    assert BiasUpdate("w.bias", "c", 1.0, (3,)).problem((4,)) == "w.bias: the adapter is for [3], the base has [4]"
    head = Replacement("h.weight", "h", (9, 6), resizable=True)
    assert head.problem((8, 6)) is None
    assert head.problem(None) is None
    assert head.problem((8, 5)) == "h.weight: the adapter is for [9, 6], the base has [8, 5]"
    assert Replacement("n.weight", "n", (9,), resizable=False).problem((8,)) is not None
    tokens = TokenRows("e.weight", "t", (2, 8), 6)
    assert tokens.problem((9, 6)) is None
    assert tokens.problem((8, 6)) == "e.weight: the adapter has a row for token 8, the base has 8 rows"
    assert tokens.problem((9, 5)) == "e.weight: the adapter is for [9, 6], the base has [9, 5]"


def test_an_adapter_that_does_nothing_is_told(tmp_path: Path) -> None:
    """A zero B, or a zero A as an embedding starts with: known without the base. What is saved whole does something."""
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["model.norm"])
    fresh = peft.get_peft_model(model, config)
    fresh.save_pretrained(tmp_path)
    idle = read(tiny_model("llama"), tmp_path)
    assert {name: change.does_nothing(idle.tensors) for name, change in idle.changes.items()} == {
        "model.embed_tokens.weight": False,  # PEFT saved the embedding beneath the LoRA as well
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.1.self_attn.q_proj.weight": True,
        "model.norm.weight": False,
    }
    key = "model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(tmp_path, **{key: torch.ones(64, 4), "model.embed_tokens.base_layer.weight": None})
    busy = read(tiny_model("llama"), tmp_path)
    assert not busy.changes["model.layers.1.self_attn.q_proj.weight"].does_nothing(busy.tensors)
    assert busy.changes["model.embed_tokens.weight"].does_nothing(busy.tensors)


def test_a_large_weight_is_never_there_twice(tmp_path: Path) -> None:
    """Beside the product of B and A, merging 64 MB of weights holds a few blocks of them."""
    rows, width = 4096, 4096
    a, b = torch.randn(8, width), torch.randn(rows, 8)
    save_file({"a": a, "b": b}, tmp_path / WEIGHTS)
    change = LowRank("w.weight", "a", "b", 2.0, "linear", (rows, width))
    adapter = AdapterTensors(tmp_path / WEIGHTS)

    def peak(take: Callable[[], object]) -> int:
        """Bytes that torch had allocated beyond those at the start, at the most."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            take()
        held = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    def merge() -> None:
        for rows_ in change.merged(adapter, lambda: (torch.zeros(256, width) for _ in range(0, rows, 256))):
            del rows_

    assert rows * width * 4 < peak(merge) < rows * width * 4 * 1.3
    assert peak(merge) < rows * width * 4 * 0.3  # the product's memory is there from the first time


def test_changes_that_are_merged_by_turns_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two at once from one adapter: each has memory of its own for its product."""
    model = tiny_model("llama")
    save_peft_adapter(model, tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    read_in, before = read(model, tmp_path), parameters(model)

    def start(name: str) -> Iterator[torch.Tensor]:
        return read_in.changes[name].merged(read_in.tensors, lambda: (rows.clone() for rows in before[name].split(8)))

    names = list(read_in.changes)
    expected = {name: torch.cat(list(start(name))) for name in names}  # and leaves memory to be used again
    running = [start(name) for name in names]
    for name, blocks in zip(names, zip(*zip(*running, strict=True), strict=True), strict=True):
        assert torch.equal(torch.cat(blocks), expected[name])
