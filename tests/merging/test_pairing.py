"""Every change has its place and every tensor its source, or all that is wrong is told at once, before anything is
written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import HrmTextConfig, HrmTextForCausalLM, MixtralConfig, MixtralForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.reading import read_changes
from qlora_cli.merging.base.packed import PackedTensor, gather
from qlora_cli.merging.base.skeleton import build_skeleton
from qlora_cli.merging.pairing import Pairing, pair
from qlora_cli.merging.tensors.files import read_model_tensors
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.merges import Bases, adapt, edit_stored, merge_adapter, stored_tensors
from tests.support.peft_adapters import edit_tensors
from tests.support.tokenizers import tiny_tokenizer

PLAIN = QuantizationSection(bits=16)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def _pair(base: Path, adapter: Path) -> Pairing:
    def skeleton(**changes: object):
        return build_skeleton(ModelSource(str(base)), "CAUSAL_LM", PLAIN, config_changes=changes)

    made = skeleton()
    changes = read_changes(adapter, made.kinds, made.module)
    stored = read_model_tensors(base)
    return pair(stored, made, changes, lambda: skeleton(tie_word_embeddings=False), described="these two")


def _copy(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder))


def test_every_tensor_has_a_source_and_every_change_a_place(bases: Bases, tmp_path: Path) -> None:
    """In the order of the base's files; what the adapter does not change is the base's own."""
    adapter = adapt(bases["gpt2"], tmp_path / "adapter", target_modules=["c_attn"], bias="lora_only")
    pairing = _pair(bases["gpt2"], adapter)
    stored = read_model_tensors(bases["gpt2"])
    assert [target.name for target in pairing.targets] == list(stored)
    assert [target.base for target in pairing.targets] == list(stored.values())
    assert [target.shape for target in pairing.targets] == [tensor.shape for tensor in stored.values()]
    changed = {target.name: target for target in pairing.changed}
    layers = [f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)]
    assert changed.keys() == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert all(changed[f"{layer}.weight"].kind == "conv1d" for layer in layers)
    assert pairing.config_changes == {}


def test_all_that_does_not_fit_is_told_at_once(bases: Bases, tmp_path: Path) -> None:
    """Missing, mis-shaped by the base's own configuration, and mis-shaped by the adapter."""
    base = _copy(bases["llama"], tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    rows = torch.zeros(32, 64)
    changes = {"model.layers.0.mlp.up_proj.weight": None, "model.layers.1.input_layernorm.weight": torch.ones(32)}
    edit_stored(base, {**changes, "model.layers.0.self_attn.q_proj.weight": rows})
    short = torch.ones(4, 96)
    edit_tensors(adapter, **{"model.layers.1.mlp.down_proj.lora_A.weight": short})
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged")
    assert str(caught.value) == (
        f"the adapter in {adapter} and the base model {base} do not fit:\n"
        "  model.layers.0.self_attn.q_proj.weight: expected [64, 64] by the base's config.json, got [32, 64] in its "
        "files\n"
        "  model.layers.0.mlp.up_proj.weight: missing from the base's files\n"
        "  model.layers.1.input_layernorm.weight: expected [64] by the base's config.json, got [32] in its files\n"
        "  model.layers.0.self_attn.q_proj.weight: the adapter is for [64, 64], the base has [32, 64]\n"
        "  model.layers.1.mlp.down_proj.weight: the adapter is for [64, 96], the base has [64, 128]"
    )
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base(bases: Bases, tmp_path: Path) -> None:
    """Every weight that it is for and that has another shape is named; so is every module that is not there."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["k_proj", "v_proj"])
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged", base_model=str(bases["gemma"]))
    lines = "\n".join(
        f"  model.layers.{layer}.self_attn.{name}.weight: the adapter is for [32, 64], the base has [16, 64]"
        for layer in (0, 1)
        for name in ("k_proj", "v_proj")
    )
    described = f"the adapter in {adapter} and the base model {bases['gemma']} do not fit:\n"
    assert str(caught.value) == described + lines
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged", base_model=str(bases["gpt2"]))
    lines = "\n".join(
        f"  the base has no module model.layers.{layer}.self_attn.{name}, the adapter has 2 tensors for it"
        for layer in (0, 1)
        for name in ("k_proj", "v_proj")
    )
    assert str(caught.value) == f"{adapter}: the adapter cannot be applied:\n{lines}"


def test_a_tensor_that_is_stored_under_two_names(bases: Bases, tmp_path: Path) -> None:
    """With and without the model's prefix: which of the two the loader takes is not guessed at."""
    base = _copy(bases["llama"], tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_stored(base, {name.removeprefix("model."): stored_tensors(base)[name]})
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ModelError) as caught:
        _pair(base, adapter)
    first, second = sorted((name, name.removeprefix("model.")))
    assert str(caught.value) == (
        f"these two do not fit:\n  {name}: the base holds it twice, as {first} and as {second}"
    )


def test_what_the_loader_puts_together_is_not_changed(tmp_path: Path) -> None:
    """An adapter on the experts of a mixture: their weights are stored one by one, under other names."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=64, **sizes, **heads)).save_pretrained(tmp_path / "base")
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["experts"])
    with pytest.raises(ModelError) as caught:
        _pair(tmp_path / "base", adapter)
    experts, stored = "model.layers.0.mlp.experts", "model.layers.0.block_sparse_moe.experts.0"
    because = "which are put together when it is loaded: a change to it cannot be written"
    assert str(caught.value) == (
        "these two do not fit:\n"
        f"  {experts}.down_proj: the base's files hold it in pieces, such as {stored}.w2.weight, {because}\n"
        f"  {experts}.gate_up_proj: the base's files hold it in pieces, such as {stored}.w1.weight, {because}"
    )


@pytest.mark.parametrize("missing", ["model.layers.1.self_attn.q_proj.lora_A.weight", "lm_head.weight", "bias"])
def test_an_adapter_with_a_tensor_missing(missing: str, bases: Bases, tmp_path: Path) -> None:
    """A half of a pair, a module that was saved whole, one of many biases: each is missed by name."""
    base = bases["gpt_neox" if missing == "bias" else "llama"]
    if missing == "bias":
        adapter = adapt(base, tmp_path / "adapter", target_modules=["query_key_value"], bias="all")
        name, said = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias", "bias is all, the adapter has no {}"
    else:
        adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
        name, said = missing, "modules_to_save names lm_head, the adapter has no {}"
    edit_tensors(adapter, **{name: None})
    lines = [said.format(name)]
    if "lora_A" in name:
        lines = [
            f"B without A: base_model.model.{name.replace('lora_A', 'lora_B')}",
        ]
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged")
    expected = "\n".join(f"  {line}" for line in lines)
    assert str(caught.value) == f"{adapter}: the adapter cannot be applied:\n{expected}"


def test_weights_that_cannot_be_rounded_as_they_were(tmp_path: Path) -> None:
    """Linear layers that the base's files hold as one tensor: merged onto the original weights and said, or refused."""
    base = tmp_path / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    HrmTextForCausalLM(HrmTextConfig(vocab_size=384, **sizes, head_dim=16)).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter", target_modules=["o_proj"])
    said = (
        f"{base} holds 24 of the weights that were in 4 bits in pieces, which are put together when it is loaded, "
        "such as model.H_module.layers.0.self_attn.gate_proj.weight"
    )
    report = merge_adapter(adapter, tmp_path / "merged", trained_base="nf4").report
    assert report.merged_onto == "original"
    assert f"merged onto the original weights alone, as {said}" in report.remarks
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "refused", trained_base="nf4", base="dequantized")
    assert str(caught.value) == (
        f"--base dequantized: {said}: these cannot be rounded as they were. Use --base original"
    )


def test_parts_of_a_weight_in_four_bits(bases: Bases, tmp_path: Path) -> None:
    """What bitsandbytes stores beside a weight belongs to it, and to no other."""
    form = json.dumps({"dtype": "float16", "shape": [4, 8]}).encode()
    names = ("a.weight", "a.weight.absmax", "b.weight", "c.absmax")
    tensors = {name: torch.zeros(2) for name in names}
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(form), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    found = gather(read_model_tensors(tmp_path))
    packed = found.pop("a.weight")
    assert isinstance(packed, PackedTensor)
    assert packed.parts.keys() == {"weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"}
    assert (packed.dtype, packed.shape) == (torch.float16, (4, 8))
    assert found.keys() == {"b.weight", "c.absmax"}
