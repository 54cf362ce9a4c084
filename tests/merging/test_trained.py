"""The trained model, its adapter beside the base, says what PEFT's says; without the adapter, what the base says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    PreTrainedModel,
)

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.source import AdapterSource
from qlora_cli.merging.fidelity.held_out import CheckRow
from qlora_cli.merging.fidelity.outputs import outputs
from qlora_cli.merging.fidelity.trained import adapter_off, trained_model
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import TASK_TYPES, save_tiny_model, tiny_config

CPU = torch.device("cpu")
FLOAT32 = QuantizationSection(bits=16, compute_dtype="float32")
NF4 = QuantizationSection(compute_dtype="float32")


def _base(folder: Path, family: str, quantization: QuantizationSection = FLOAT32) -> PreTrainedModel:
    kinds = {"SEQ_CLS": AutoModelForSequenceClassification, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}
    model_class = kinds.get(TASK_TYPES.get(family, ""), AutoModelForCausalLM)
    return load_base(ModelSource(str(folder)), quantization, CPU, model_class=model_class)


def _source(base: Path, adapter: Path, quantization: QuantizationSection = FLOAT32) -> AdapterSource:
    return AdapterSource(adapter, ModelSource(str(base)), quantization, "the test")


def _row() -> CheckRow:
    ids = torch.arange(5, 29)
    return CheckRow(ids, torch.arange(24) >= 6)


def _peft(
    base: Path, family: str, adapter: Path, quantization: QuantizationSection, **settings: Any
) -> PreTrainedModel:
    """PEFT's model of an adapter that is off its start, saved in `adapter`; and the tensors it was saved with."""
    config = peft.LoraConfig(r=4, lora_alpha=10, task_type=TASK_TYPES.get(family, "CAUSAL_LM"), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_base(base, family, quantization), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        model.save_pretrained(adapter)
        return peft.PeftModel.from_pretrained(_base(base, family, quantization), adapter).eval()


_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "bias of b": ("opt", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "all biases": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled embedding": ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 20, 9]}),
    "classes": ("bert", {"target_modules": ["query", "dense"]}),
    "classes of roberta": ("roberta", {"target_modules": ["value"]}),
    "sequence to sequence": ("t5", {"target_modules": ["q", "wo"]}),
}


@pytest.mark.parametrize(
    ("setting", "quantization"),
    [
        pytest.param(setting, quantization, id=f"{setting}, {name}")
        for setting in _SETTINGS
        for name, quantization in (("float32", FLOAT32), ("nf4", NF4))
        # PEFT trains the classifier whole, which it cannot where that is in 4 bits.
        if not (setting.startswith("classes") and name == "nf4")
    ],
)
def test_it_says_what_peft_says(setting: str, quantization: QuantizationSection, tmp_path: Path) -> None:
    """Of every kind of adapter, over a plain and a 4-bit base, the scores are PEFT's unmerged model's."""
    family, settings = _SETTINGS[setting]
    base = save_tiny_model(tmp_path / "base", family)
    theirs = _peft(base, family, tmp_path / "adapter", quantization, **settings)
    ours = trained_model(_source(base, tmp_path / "adapter", quantization), CPU)
    expected = outputs(theirs.get_base_model(), _row()).scores
    plain = outputs(_base(base, family, quantization).eval(), _row()).scores
    assert not torch.allclose(expected, plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(outputs(ours, _row()).scores, expected, rtol=1e-4, atol=1e-4)
    with adapter_off(ours):
        torch.testing.assert_close(outputs(ours, _row()).scores, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs(ours, _row()).scores, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """Modules that the base lacks are named, before any weight is loaded."""
    opt, llama = save_tiny_model(tmp_path / "opt", "opt"), save_tiny_model(tmp_path / "llama", "llama")
    _peft(opt, "opt", tmp_path / "adapter", FLOAT32, target_modules=["fc1"])
    with pytest.raises(ModelError, match="fc1"):
        trained_model(_source(llama, tmp_path / "adapter"), CPU)


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    """Tokens that were added in training are read and scored as PEFT does; the base knows nothing of them, and says so
    with a score of 0."""
    base = save_tiny_model(tmp_path / "base")
    grown, rows = _base(base, "llama"), _base(base, "llama").config.vocab_size
    grown.resize_token_embeddings(rows + 3)
    config = peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]
    )
    theirs = peft.get_peft_model(grown, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = trained_model(_source(base, tmp_path / "adapter"), CPU)
    row = CheckRow(torch.tensor([5, rows + 2, 9, rows, 7]), torch.tensor([False, True, True, True, True]))
    expected = outputs(theirs.get_base_model(), row).scores
    torch.testing.assert_close(outputs(ours, row).scores, expected, rtol=1e-4, atol=1e-4)
    with adapter_off(ours):
        scores = outputs(ours, row).scores
    assert scores.shape == expected.shape
    assert not scores[:, rows:].any()


def test_a_head_that_the_base_lacks_comes_with_the_adapter(tmp_path: Path) -> None:
    """A classifier trained on a plain language model: there with the adapter, 0 without, never drawn at random."""
    masked = BertForMaskedLM(tiny_config("bert", 512))
    masked.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    # The pooler is not in a language model either, and is trained along.
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", "pooler"])
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = trained_model(_source(tmp_path / "base", tmp_path / "adapter"), CPU)
    expected = outputs(theirs.get_base_model(), _row()).scores
    torch.testing.assert_close(outputs(ours, _row()).scores, expected, rtol=1e-5, atol=1e-5)
    with adapter_off(ours):
        assert not outputs(ours, _row()).scores.any()
