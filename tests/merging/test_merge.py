"""The merged folder, loaded by plain transformers, is the model that was trained, of every family and kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qlora_cli.errors import ModelError
from tests.support.merges import (
    Bases,
    adapt,
    edit_stored,
    load_model,
    merge_adapter,
    model_logits,
    read_config,
    save_masked_model,
    set_config,
    stored_tensors,
    trained_logits,
)
from tests.support.models import TASK_TYPES
from tests.support.peft_adapters import LAYERS, parameters, peft_merged, save_peft_adapter


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def check(base: Path, adapter: Path, output: Path) -> None:
    """The merged model is PEFT's, bit for bit, and says what base and adapter say together."""
    merged = load_model(output)
    theirs = peft_merged(load_model(base), adapter)
    ours = parameters(merged)
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert torch.equal(ours[name], wanted), name
    torch.testing.assert_close(model_logits(merged), trained_logits(load_model(base), adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", ["plain", "dora"])
@pytest.mark.parametrize("family", LAYERS)
def test_every_family(family: str, setting: str, bases: Bases, tmp_path: Path) -> None:
    """Nine architectures, in float32."""
    base, task = bases[family], TASK_TYPES.get(family, "CAUSAL_LM")
    adapter = adapt(base, tmp_path / "adapter", task=task, target_modules=LAYERS[family], use_dora=setting == "dora")
    merge_adapter(adapter, tmp_path / "merged")
    check(base, adapter, tmp_path / "merged")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "patterns": (
        "gpt_neox",
        {"target_modules": ["query_key_value"], "rank_pattern": {".*0.*": 2}, "alpha_pattern": {".*1.*": 3}},
    ),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of adapted layers": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases of B": ("opt", {"target_modules": ["q_proj"], "lora_bias": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "some tokens": ("gpt_neox", {"target_modules": ["dense"], "trainable_token_indices": {"embed_in": [3, 300]}}),
    "head": ("llama", {"target_modules": ["lm_head", "o_proj"], "use_dora": True}),
    "every linear layer": ("opt", {"target_modules": "all-linear"}),
    "Conv1D, said by the config": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind: str, bases: Bases, tmp_path: Path) -> None:
    """What PEFT trains beside plain LoRA is merged; the configuration stays as it is."""
    family, settings = KINDS[kind]
    adapter = adapt(bases[family], tmp_path / "adapter", **settings)
    merge_adapter(adapter, tmp_path / "merged")
    check(bases[family], adapter, tmp_path / "merged")
    assert read_config(tmp_path / "merged") == read_config(bases[family])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_vocabulary_that_grew(family: str, bases: Bases, tmp_path: Path) -> None:
    """Tied (GPT-2) or not: as many rows as the adapter has, and the configuration says so; ties stay."""
    base = bases[family]
    model = load_model(base)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 7)
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"]}[family]
    config = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", target_modules=targets)
    adapter = save_peft_adapter(model, tmp_path / "adapter", config)
    trained = trained_logits(model, adapter)
    merge_adapter(adapter, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert merged.config.vocab_size == rows + 7
    assert read_config(tmp_path / "merged") == read_config(base) | {"vocab_size": rows + 7}
    torch.testing.assert_close(model_logits(merged), trained, rtol=0, atol=1e-5)
    assert ("lm_head.weight" in stored_tensors(tmp_path / "merged")) == (family == "llama")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_a_new_head_for_a_classifier(family: str, bases: Bases, tmp_path: Path) -> None:
    """A base without that head, or with one for another number of labels: class and labels are in the configuration."""
    base = bases[family]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"]}[family]
    config = peft.LoraConfig(r=4, lora_alpha=10, task_type="SEQ_CLS", target_modules=targets)
    adapter = save_peft_adapter(model, tmp_path / "adapter", config)
    expected = trained_logits(model, adapter)
    merge_adapter(adapter, tmp_path / "merged")
    written = tmp_path / "merged"
    merged = AutoModelForSequenceClassification.from_pretrained(written)
    assert merged.config.num_labels == 5
    assert read_config(written)["architectures"] == [type(merged).__name__]
    torch.testing.assert_close(model_logits(merged), expected, rtol=0, atol=1e-5)


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["c_attn", "lm_head"]},
    "embedding": {"target_modules": ["wte"]},
    "embedding, saved": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    "head, saved": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "both": {"target_modules": ["wte", "lm_head"]},
    "both, saved": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    "tokens": {"target_modules": ["c_attn"], "trainable_token_indices": [3, 300]},
    "tied on purpose, not heard": {
        "target_modules": ["c_attn"],
        "modules_to_save": ["wte"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("what", TIED)
def test_tied_embeddings(what: str, bases: Bases, tmp_path: Path) -> None:
    """With an adapter on one of them, or two on both, they are no longer one; where training kept them one they are."""
    base = bases["gpt2"]
    adapter = adapt(base, tmp_path / "adapter", **TIED[what])
    merge_adapter(adapter, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    stays = what == "tokens"
    expected = {} if stays else {"tie_word_embeddings": False}
    assert read_config(tmp_path / "merged") == read_config(base) | expected
    assert ("lm_head.weight" in stored_tensors(tmp_path / "merged")) is not stays
    torch.testing.assert_close(model_logits(merged), trained_logits(load_model(base), adapter), rtol=0, atol=1e-5)


def test_tied_on_purpose(bases: Bases, tmp_path: Path) -> None:
    """Where PEFT trained both as one (`ensure_weight_tying`), they stay one, though the adapter holds both."""
    base = bases["gemma"]
    for kind, settings in {"LoRA": {"target_modules": ["embed_tokens"]}, "saved": SAVED}.items():
        adapter = adapt(base, tmp_path / kind / "adapter", ensure_weight_tying=True, **settings)
        merge_adapter(adapter, tmp_path / kind / "merged")
        assert read_config(tmp_path / kind / "merged") == read_config(base)
        assert "lm_head.weight" not in stored_tensors(tmp_path / kind / "merged")
        merged, trained = load_model(tmp_path / kind / "merged"), trained_logits(load_model(base), adapter)
        torch.testing.assert_close(model_logits(merged), trained, rtol=0, atol=1e-5)


SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}


@pytest.mark.parametrize("module", ["lm_head", "shared", "embed_tokens"])
def test_embeddings_that_are_always_tied(module: str, bases: Bases, tmp_path: Path) -> None:
    """T5 reads `tie_word_embeddings: false` as another scale of its outputs, and ties all the same: refused."""
    adapter = adapt(bases["t5"], tmp_path / "adapter", task="SEQ_2_SEQ_LM", target_modules=["q", module])
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged")
    assert str(caught.value) == (
        f"the adapter in {adapter} and the base model {bases['t5']} do not fit: these are one tensor in this "
        "architecture, whatever its configuration says, and the adapter changes only a part of them:\n"
        "  decoder.embed_tokens.weight, encoder.embed_tokens.weight, lm_head.weight, shared.weight"
    )


@pytest.mark.parametrize("said", [False, True])
def test_a_base_whose_files_hold_two_embeddings(said: bool, bases: Bases, tmp_path: Path) -> None:
    """T5 1.1 says so in its configuration; where none says so, transformers goes by the files: so does the merge."""
    family, task = ("t5", "SEQ_2_SEQ_LM") if said else ("gemma", "CAUSAL_LM")
    base = Path(shutil.copytree(bases[family], tmp_path / "base"))
    embedding = "shared.weight" if said else "model.embed_tokens.weight"
    head = 0.1 * torch.randn(stored_tensors(base)[embedding].shape, generator=torch.Generator().manual_seed(3))
    edit_stored(base, {"lm_head.weight": head})
    if said:
        set_config(base, tie_word_embeddings=False)
    layer = "q" if said else "q_proj"
    adapter = adapt(base, tmp_path / "adapter", task=task, target_modules=[layer, "lm_head"])
    merge_adapter(adapter, tmp_path / "merged")
    check(base, adapter, tmp_path / "merged")
    assert read_config(tmp_path / "merged") == read_config(base)
    assert torch.equal(stored_tensors(tmp_path / "merged")[embedding], stored_tensors(base)[embedding])


def test_a_tied_tensor_that_is_stored_twice(bases: Bases, tmp_path: Path) -> None:
    """Both copies are changed alike where they stay one."""
    base = Path(shutil.copytree(bases["gemma"], tmp_path / "base"))
    edit_stored(base, {"lm_head.weight": stored_tensors(base)["model.embed_tokens.weight"].clone()})
    adapter = adapt(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 300])
    merge_adapter(adapter, tmp_path / "merged")
    check(base, adapter, tmp_path / "merged")
    written = stored_tensors(tmp_path / "merged")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


@pytest.mark.parametrize("module", ["decoder", "word_embeddings", None])
def test_a_masked_language_model(module: str | None, tmp_path: Path) -> None:
    """BERT ties the bias of its head as well: once untied, both are written, and under both names."""
    base = save_masked_model(tmp_path / "base")
    targets = ["query"] if module is None else ["query", module]
    adapter = adapt(base, tmp_path / "adapter", task=None, target_modules=targets, bias="none" if module else "all")
    merge_adapter(adapter, tmp_path / "merged")
    trained = trained_logits(load_model(base), adapter)
    torch.testing.assert_close(model_logits(load_model(tmp_path / "merged")), trained, rtol=0, atol=1e-5)
    assert read_config(tmp_path / "merged")["tie_word_embeddings"] is (module is None)
    assert ("cls.predictions.decoder.bias" in stored_tensors(tmp_path / "merged")) is (module is not None)
