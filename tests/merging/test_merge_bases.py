"""Bases in every form: rounded to 4 bits as training had them, stored in 4 bits, sharded, under other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from qlora_cli.errors import MergeError, ModelError
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.merges import (
    Bases,
    adapt,
    edit_stored,
    load_model,
    merge_adapter,
    model_logits,
    read_config,
    stored_tensors,
    trained_logits,
)
from tests.support.peft_adapters import WEIGHTS, edit_config, peft_merged
from tests.support.tokenizers import tiny_tokenizer

CPU = torch.device("cpu")
FORMS = {
    "nf4": QuantizationSection(double_quant=False, compute_dtype="float32"),
    "nf4-double": QuantizationSection(compute_dtype="float32"),
    "fp4": QuantizationSection(quant_type="fp4", double_quant=False, compute_dtype="float32"),
    "fp4-double": QuantizationSection(quant_type="fp4", compute_dtype="float32"),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def held_in_training(base: Path, section: QuantizationSection) -> dict[str, Tensor]:
    """What bitsandbytes holds of every weight that training has in 4 bits, as the module's class lays it."""
    model = load_base(ModelSource(str(base)), section, CPU)
    turned = model.config.model_type == "gpt2"  # Conv1D
    held = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            held[f"{path}.weight"] = values.t() if turned else values
    return held


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", TARGETS)
def test_dequantized_rounds_what_was_in_four_bits(family: str, form: str, bases: Bases, tmp_path: Path) -> None:
    """Exactly the layers that training has in 4 bits, and to exactly the values that bitsandbytes holds of them; with
    the adapter's sum on those that it is for. All else is byte for byte the base's."""
    base = bases[family]
    adapter = adapt(base, tmp_path / "adapter", target_modules=TARGETS[family])
    merge_adapter(adapter, tmp_path / "merged", base="dequantized", trained_base=form)
    held, before, after = held_in_training(base, FORMS[form]), stored_tensors(base), stored_tensors(tmp_path / "merged")
    rounded = load_model(base)
    rounded.load_state_dict(held, strict=False)
    merged = peft_merged(rounded, adapter)
    assert list(after) == list(before)
    for name, tensor in after.items():
        adapted = any(f".{layer}.weight" in name for layer in TARGETS[family])
        assert torch.equal(tensor, merged[name] if adapted else held.get(name, before[name])), name
    assert len(held) > 7


def test_a_base_in_four_bits_is_chosen_where_nothing_is_measured(bases: Bases, tmp_path: Path) -> None:
    """`auto` without a comparison takes what the adapter was trained against; in 16 bits that is the base itself."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    assert merge_adapter(adapter, tmp_path / "4", trained_base="nf4").report.merged_onto == "dequantized"
    assert merge_adapter(adapter, tmp_path / "16").report.merged_onto == "original"
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "none", base="dequantized")
    assert str(caught.value) == (
        "--base dequantized: no weight was in 4 bits while the adapter was trained (assumed, as nothing tells). Use "
        "--base original, or say how the base was stored with --trained-base"
    )


@pytest.mark.parametrize("family", TARGETS)
def test_a_base_stored_in_four_bits(family: str, bases: Bases, tmp_path: Path) -> None:
    """What it holds is what training had: all is taken out of 4 bits, and the configuration says no more of them."""
    base, plain = tmp_path / "base", bases[family]
    section = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=section).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter = adapt(plain, tmp_path / "adapter", target_modules=TARGETS[family])
    edit_config(adapter, base_model_name_or_path=str(base))
    merge_adapter(adapter, tmp_path / "merged")
    assert "quantization_config" not in read_config(tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "wanted", base_model=str(plain), base="dequantized")
    ours, wanted = stored_tensors(tmp_path / "merged"), stored_tensors(tmp_path / "wanted")
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "refused", base="original")
    assert str(caught.value) == (
        f"--base original: {base} holds its weights in 4 bits alone. Name the model that it was made from with "
        "--base-model, or merge onto what it holds with --base dequantized"
    )


def test_shards(bases: Bases, tmp_path: Path) -> None:
    """A sharded base is read whole and written in shards of the size asked for, with the index that says which."""
    base = tmp_path / "base"
    load_model(bases["llama"]).save_pretrained(base, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj", "gate_proj"])
    merge_adapter(adapter, tmp_path / "merged", max_shard_size="70kB")
    files = sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(files) > len(list(base.glob("*.safetensors"))) > 2
    assert sorted(set(index["weight_map"].values())) == files
    ours, theirs = load_model(tmp_path / "merged").state_dict(), peft_merged(load_model(base), adapter)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_names_without_the_models_prefix(bases: Bases, tmp_path: Path) -> None:
    """GPT-2 as it is on the hub: what the base has keeps its name, what is new has the model's."""
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))
    long = stored_tensors(base)
    short = {name.removeprefix("transformer."): tensor for name, tensor in long.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril() for layer in range(2)}
    edit_stored(base, {**dict.fromkeys(long), **short, **masks})
    adapter = adapt(bases["gpt2"], tmp_path / "adapter", target_modules=["c_attn", "lm_head"])
    merge_adapter(adapter, tmp_path / "merged", base_model=str(base))
    written = stored_tensors(tmp_path / "merged")
    assert written.keys() == short.keys() | masks.keys() | {"lm_head.weight"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    trained = trained_logits(load_model(bases["gpt2"]), adapter)
    torch.testing.assert_close(model_logits(merged), trained, rtol=0, atol=1e-5)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Its experts are stored one by one and held as one: they are carried over, and attention is merged."""
    base = tmp_path / "base"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 4}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=512, **sizes, **heads)).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    for name, options in {"original": {}, "dequantized": {"trained_base": "nf4"}}.items():
        merge_adapter(adapter, tmp_path / name, base=name, **options)
        before, after = stored_tensors(base), stored_tensors(tmp_path / name)
        changed = {tensor for tensor, values in after.items() if not torch.equal(values, before[tensor])}
        assert after.keys() == before.keys()
        kept = ("q_proj", "v_proj") if name == "original" else ("q_proj", "k_proj", "v_proj", "o_proj")
        assert changed == {f"model.layers.0.self_attn.{layer}.weight" for layer in kept}
    trained = trained_logits(load_model(base), adapter)
    torch.testing.assert_close(model_logits(load_model(tmp_path / "original")), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(dtype: str, bases: Bases, tmp_path: Path) -> None:
    """Every weight is of it, rounded once from the sum in float32, and the configuration names it."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    theirs = peft_merged(load_model(bases["llama"]), adapter)
    for name, tensor in stored_tensors(tmp_path / "merged").items():
        assert torch.equal(tensor, theirs[name].to(getattr(torch, dtype))), name
    assert read_config(tmp_path / "merged")["dtype"] == dtype


def test_what_float16_does_not_hold(bases: Bases, tmp_path: Path) -> None:
    """A weight that would become infinite is told of, and nothing is left."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    norm = torch.full_like(stored_tensors(base)["model.norm.weight"], 70000.0)
    edit_stored(base, {"model.norm.weight": norm})
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(MergeError) as caught:
        merge_adapter(adapter, tmp_path / "merged", dtype="float16")
    assert str(caught.value) == (
        "model.norm.weight: a merged value of 7e+04 is more than float16 holds. Choose --dtype bfloat16 or float32"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_names_of_an_earlier_transformers(bases: Bases, tmp_path: Path) -> None:
    """A base whose norms are called gamma and beta, as BERT's on the hub are: written under the names that it has."""
    base = Path(shutil.copytree(bases["bert"], tmp_path / "base"))
    renamed = {
        name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for name in stored_tensors(base)
    }
    old = {renamed[name]: tensor for name, tensor in stored_tensors(base).items()}
    edit_stored(base, {**dict.fromkeys(renamed), **old})
    adapter = adapt(bases["bert"], tmp_path / "adapter", task="SEQ_CLS", target_modules=["query"], bias="all")
    merge_adapter(adapter, tmp_path / "merged", base_model=str(base))
    assert stored_tensors(tmp_path / "merged").keys() == old.keys()
    trained = trained_logits(load_model(bases["bert"]), adapter)
    torch.testing.assert_close(model_logits(load_model(tmp_path / "merged")), trained, rtol=0, atol=1e-5)


def test_every_tensor_stays_in_its_own_dtype(bases: Bases, tmp_path: Path) -> None:
    """A base in bfloat16 with norms in float32: the sum is made in float32 and rounded once to what the base has."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    before = stored_tensors(base)
    halved = {name: values.bfloat16() for name, values in before.items() if "norm" not in name}
    edit_stored(base, dict(halved))
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "merged")
    whole = load_model(bases["llama"])
    whole.load_state_dict({name: values.float() for name, values in halved.items()}, strict=False)
    theirs, after = peft_merged(whole, adapter), stored_tensors(tmp_path / "merged")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


def test_an_adapter_with_other_names_for_the_modules(bases: Bases, tmp_path: Path) -> None:
    """Trained on the model without its head, as its paths show: the same modules, and the same merge."""
    adapter = adapt(bases["gpt2"], tmp_path / "adapter", target_modules=["c_attn"])
    tensors = load_file(adapter / WEIGHTS)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    save_file({name.replace(".transformer.", "."): tensor for name, tensor in tensors.items()}, other / WEIGHTS)
    merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(other, tmp_path / "the-same")
    merged, same = stored_tensors(tmp_path / "merged"), stored_tensors(tmp_path / "the-same")
    assert merged.keys() == same.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in merged.items())
