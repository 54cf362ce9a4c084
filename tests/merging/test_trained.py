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
    PreTrainedModel,
)

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapter_source import AdapterSource
from qlora_cli.merging.held_out import CheckRow
from qlora_cli.merging.outputs import outputs
from qlora_cli.merging.trained import adapter_off, trained_model
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import TASK_TYPES, save_tiny_model

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


@pytest.mark.parametrize("quantization", [FLOAT32, NF4], ids=["float32", "nf4"])
@pytest.mark.parametrize("setting", _SETTINGS)
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
