"""The model without its weights is the model that transformers would load, name by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
)

from qlora_cli.errors import ModelError
from qlora_cli.merging.base.skeleton import Skeleton, build_skeleton
from qlora_cli.model.base import load_base
from qlora_cli.model.quantization import bitsandbytes_config
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import FAMILIES, TASK_TYPES, save_tiny_model, tiny_config, tiny_model

PLAIN = QuantizationSection(bits=16)
FOUR_BITS = QuantizationSection()
CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}


def skeleton(folder: Path, task_type: str | None = "CAUSAL_LM", section: QuantizationSection = PLAIN) -> Skeleton:
    return build_skeleton(ModelSource(str(folder)), task_type, section)


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def check_against_loader(folder: Path, made: Skeleton, loader: Any) -> set[str]:
    """Every stored tensor is in the loaded model where the skeleton says; returns those that are said to be in none."""
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    tensors = stored(folder)
    names, combined = made.stored_names(tensors), made.combined(tensors)
    parameters = model.state_dict()
    for name, where in names.items():
        if where is not None:
            assert torch.equal(parameters[where], tensors[name]), name
    filled = {name for name in names.values() if name} | {name for into in combined.values() for name in into}
    tied = {name for group in made.ties if group & filled for name in group}
    assert set(parameters) - filled - tied == set(info["missing_keys"])
    return {name for name, where in names.items() if where is None and name not in combined}


@pytest.mark.parametrize("family", [*FAMILIES, *TASK_TYPES])
def test_names_shapes_and_ties_are_the_models(family: str, tmp_path: Path) -> None:
    """Of every family, from a folder that has no weights at all."""
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    made = skeleton(tmp_path, TASK_TYPES.get(family, "CAUSAL_LM"))
    assert made.architecture == type(model).__name__
    assert made.shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    same = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(parameter, set()).add(name)
    assert {frozenset(names) for names in same.values() if len(names) > 1} == set(made.ties)
    assert set(made.kinds) == {path for path, _ in model.named_modules(remove_duplicate=False) if path}
    assert made.quantized == frozenset()


def test_kinds_and_embeddings_are_told(tmp_path: Path) -> None:
    """Linear, Conv1D, embeddings and what is none of them; where a token goes in and comes out."""
    gpt2 = skeleton(save_tiny_model(tmp_path / "gpt2", "gpt2"))
    assert gpt2.kinds["transformer.h.0.attn.c_attn"] == "conv1d"
    assert gpt2.kinds["transformer.wpe"] == "embedding"
    assert gpt2.kinds["transformer.h.0.ln_1"] == gpt2.kinds["transformer.h"] == "other"
    assert gpt2.kinds["lm_head"] == "linear"
    assert gpt2.shapes["transformer.h.0.attn.c_attn.weight"] == (64, 192)  # [in, out], also where it is in 4 bits
    assert (gpt2.input_embedding, gpt2.output_embedding) == ("transformer.wte", "lm_head")
    opt = skeleton(save_tiny_model(tmp_path / "opt", "opt"))
    assert opt.kinds["model.decoder.embed_positions"] == "embedding"  # a class of its own, derived from nn.Embedding
    bert = skeleton(save_tiny_model(tmp_path / "bert", "bert"), "SEQ_CLS")
    assert (bert.input_embedding, bert.output_embedding) == ("bert.embeddings.word_embeddings", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_four_bits_is_what_training_has_in_four_bits(family: str, tmp_path: Path) -> None:
    """The modules are those that are Linear4bit in the loaded base, and the shapes are those without."""
    folder = save_tiny_model(tmp_path, family)
    made = skeleton(folder, section=FOUR_BITS)
    base = load_base(ModelSource(str(folder)), FOUR_BITS, torch.device("cpu"))
    assert made.quantized == {path for path, module in base.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert made.quantized
    assert made.shapes == skeleton(folder).shapes


@pytest.mark.parametrize("family", TASK_TYPES)
def test_in_four_bits_for_other_tasks(family: str, tmp_path: Path) -> None:
    """T5's `wo` stays in float32, BERT's classifier does not stay: as transformers has it, not by a rule of ours."""
    folder = save_tiny_model(tmp_path, family)
    made = skeleton(folder, TASK_TYPES[family], FOUR_BITS)
    loaded = CLASSES[TASK_TYPES[family]].from_pretrained(folder, quantization_config=bitsandbytes_config(FOUR_BITS))
    assert made.quantized == {path for path, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert made.quantized
    assert not any(path.endswith(".wo") for path in made.quantized)


@pytest.mark.parametrize("family", [*FAMILIES, *TASK_TYPES])
def test_stored_tensors_are_found_in_the_model(family: str, tmp_path: Path) -> None:
    """What save_pretrained writes is loaded under the names that are told, and nothing is passed over."""
    folder = save_tiny_model(tmp_path, family)
    task = TASK_TYPES.get(family, "CAUSAL_LM")
    passed_over = check_against_loader(folder, skeleton(folder, task), CLASSES.get(task, AutoModelForCausalLM))
    assert passed_over == set()


def test_the_prefix_of_the_base_model_is_added(tmp_path: Path) -> None:
    """An encoder stored without a head, read as a classifier: its names get `bert.` in front, the head is missing."""
    with torch.random.fork_rng():
        AutoModel.from_config(tiny_config("bert", 128)).save_pretrained(tmp_path)
    made = skeleton(tmp_path, "SEQ_CLS")
    name = "encoder.layer.0.attention.self.query.weight"
    assert made.stored_names([name]) == {name: f"bert.{name}"}
    passed_over = check_against_loader(tmp_path, made, AutoModelForSequenceClassification)
    assert passed_over == set()


def test_the_prefix_of_the_base_model_is_taken_away(tmp_path: Path) -> None:
    """A causal model read for its features: no `model.` in front, and the head is passed over."""
    folder = save_tiny_model(tmp_path, "llama")
    made = skeleton(folder, "FEATURE_EXTRACTION")
    assert made.architecture == "LlamaModel"
    name = "model.layers.0.mlp.up_proj.weight"
    assert made.stored_names([name]) == {name: "layers.0.mlp.up_proj.weight"}
    passed_over = check_against_loader(folder, made, AutoModel)
    assert passed_over == {"lm_head.weight"}


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    """LayerNorm's gamma and beta are its weight and bias; buffers that a model no longer stores are passed over."""
    folder = save_tiny_model(tmp_path, "bert")
    tensors = stored(folder)
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        tensors[f"bert.embeddings.LayerNorm.{old}"] = tensors.pop(f"bert.embeddings.LayerNorm.{new}")
    tensors["bert.embeddings.position_ids"] = torch.arange(256)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    passed_over = check_against_loader(folder, skeleton(folder, "SEQ_CLS"), AutoModelForSequenceClassification)
    assert passed_over == {"bert.embeddings.position_ids"}


def mixtral(folder: Path) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=128, **shape, num_key_value_heads=2, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_what_the_loader_fuses_is_told(tmp_path: Path) -> None:
    """Experts are stored one by one and held as one tensor: each of them is named with the parameter it goes into."""
    folder = mixtral(tmp_path)
    made = skeleton(folder)
    first = "model.layers.0.block_sparse_moe.experts.0"
    assert made.combined(stored(folder)) == {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight": (f"model.layers.0.mlp.experts.{into}",)
        for expert in (0, 1)
        for part, into in (("w1", "gate_up_proj"), ("w2", "down_proj"), ("w3", "gate_up_proj"))
    }
    assert made.stored_names([f"{first}.w1.weight"]) == {f"{first}.w1.weight": None}
    passed_over = check_against_loader(folder, made, AutoModelForCausalLM)
    assert passed_over == set()


def test_modules_by_other_names(tmp_path: Path) -> None:
    """An adapter's path: as it is, by an earlier version's name, with or without the prefix, or of no module."""
    mixture = skeleton(mixtral(tmp_path / "mixtral"))
    assert mixture.module("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert mixture.module("model.layers.0.block_sparse_moe.gate") == "model.layers.0.mlp.gate"
    assert mixture.module("layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert mixture.module("model.layers.0.block_sparse_moe.experts.0.w1") is None  # part of a fused tensor
    assert mixture.module("model.layers.1.self_attn.q_proj") is None
    bert = skeleton(save_tiny_model(tmp_path / "bert", "bert"), "FEATURE_EXTRACTION")
    assert bert.module("bert.encoder.layer.0.attention") == "encoder.layer.0.attention"


def test_a_model_that_also_sees(tmp_path: Path) -> None:
    """Adapted as CAUSAL_LM it is the class that its configuration names, by an earlier version's names too."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    parts = {"vision_config": CLIPVisionConfig(**shape), "text_config": LlamaConfig(**shape, vocab_size=128)}
    config = LlavaConfig(**parts)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    made = skeleton(tmp_path, section=FOUR_BITS)
    assert made.architecture == "LlavaForConditionalGeneration"
    earlier, now = "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"
    assert made.module(earlier) == now
    assert made.stored_names([f"{earlier}.weight"]) == {f"{earlier}.weight": f"{now}.weight"}
    assert now in made.quantized
    assert check_against_loader(tmp_path, made, AutoModelForImageTextToText) == set()
    grown = build_skeleton(ModelSource(str(tmp_path)), "CAUSAL_LM", PLAIN, config_changes={"vocab_size": 130})
    assert grown.shapes["lm_head.weight"] == (130, 64)


def test_a_base_stored_in_four_bits(tmp_path: Path) -> None:
    """Its parts go with their weight, and what it leaves out of quantisation is left out here."""
    folder = save_tiny_model(tmp_path / "plain", "llama")
    config = bitsandbytes_config(FOUR_BITS)
    assert config is not None
    config.llm_int8_skip_modules = ["lm_head", "down_proj"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "stored")
    made = skeleton(tmp_path / "stored", section=FOUR_BITS)
    assert made.quantized == {path for path, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert "model.layers.0.mlp.down_proj" not in made.quantized
    tensors = stored(tmp_path / "stored")
    assert made.stored_names(tensors) == {name: name for name in tensors}
    part = "layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    assert made.stored_names([part]) == {part: f"model.{part}"}
    assert made.stored_names(["nothing.weight.absmax"]) == {"nothing.weight.absmax": None}


def test_a_base_stored_otherwise_is_refused(tmp_path: Path) -> None:
    """What is stored in 4 bits was not trained in 16."""
    folder = save_tiny_model(tmp_path, "llama")
    set_config(folder, quantization_config=bitsandbytes_config(FOUR_BITS).to_dict())
    with pytest.raises(ModelError, match=r"weights are stored quantised \(4-bit nf4, double_quant True\)"):
        skeleton(folder)


def test_changes_to_the_configuration(tmp_path: Path) -> None:
    """A vocabulary that grew, labels of one's own, a head of its own: the shapes and ties of the trained model."""
    source = ModelSource(str(save_tiny_model(tmp_path / "llama", "llama")))
    grown = build_skeleton(source, "CAUSAL_LM", PLAIN, config_changes={"vocab_size": 777})
    assert grown.shapes["model.embed_tokens.weight"] == grown.shapes["lm_head.weight"] == (777, 64)
    assert build_skeleton(source, "SEQ_CLS", PLAIN, config_changes={"num_labels": 5}).shapes["score.weight"] == (5, 64)
    assert grown.ties == ()
    tied = build_skeleton(source, "CAUSAL_LM", PLAIN, config_changes={"tie_word_embeddings": True})
    assert tied.ties == (frozenset({"model.embed_tokens.weight", "lm_head.weight"}),)


def test_an_unnamed_task_is_what_the_base_is(tmp_path: Path) -> None:
    """An adapter that says nothing of its task was trained on the class that the base's configuration names."""
    assert skeleton(save_tiny_model(tmp_path / "t5", "t5"), None).architecture == "T5ForConditionalGeneration"
    folder = save_tiny_model(tmp_path / "llama", "llama")
    assert skeleton(folder, None).architecture == "LlamaForCausalLM"
    set_config(folder, architectures=None)
    assert skeleton(folder, None).architecture == "LlamaForCausalLM"


def test_the_configured_attention_need_not_be_here(tmp_path: Path) -> None:
    """A configuration that asks for flash attention is no hindrance: nothing is computed."""
    folder = save_tiny_model(tmp_path, "llama")
    set_config(folder, attn_implementation="flash_attention_2", _attn_implementation="flash_attention_2")
    assert skeleton(folder).architecture == "LlamaForCausalLM"


def test_a_task_that_is_unknown_or_not_the_models_is_told(tmp_path: Path) -> None:
    """Both name the base's side of it."""
    folder = save_tiny_model(tmp_path, "llama")
    with pytest.raises(ModelError, match=r"^task_type: expected one of CAUSAL_LM, SEQ_CLS, .*, got DIFFUSION$"):
        skeleton(folder, "DIFFUSION")
    with pytest.raises(ModelError, match=r"base_model: the model in .* cannot be read: .*LlamaConfig"):
        skeleton(folder, "SEQ_2_SEQ_LM")
    set_config(save_tiny_model(tmp_path / "t5", "t5"), architectures=["Mine"])
    with pytest.raises(ModelError, match=r"base_model: the model in .* cannot be read: .*T5Config"):
        skeleton(tmp_path / "t5", "CAUSAL_LM")
