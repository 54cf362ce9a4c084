"""A model written in 4 bits is, tensor by tensor, what transformers writes for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.merging.requantize import carry_beside, plan_rounding, quantization_config, write_rounded
from qlora_cli.model.quantization import bitsandbytes_config, keep_layout
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import FAMILIES, TASK_TYPES, save_tiny_model, tiny_model

CPU = torch.device("cpu")
FORMS = {
    "nf4-double": QuantizationSection(),
    "nf4": QuantizationSection(double_quant=False),
    "fp4-double": QuantizationSection(quant_type="fp4"),
    "fp4": QuantizationSection(quant_type="fp4", double_quant=False),
}
ONE_FILE = 10**9


def _save(folder: Path, family: str, dtype: torch.dtype) -> Path:
    tiny_model(family).to(dtype).save_pretrained(folder)
    return folder


def _load(folder: Path, **arguments: Any) -> PreTrainedModel:
    """As any client would."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, architecture).from_pretrained(
        folder, dtype="auto", output_loading_info=True, **arguments
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


def _theirs(folder: Path, section: QuantizationSection, dtype: torch.dtype) -> PreTrainedModel:
    config = bitsandbytes_config(section)
    config.bnb_4bit_compute_dtype = dtype
    return _load(folder, quantization_config=config)


def _round(model: Path, folder: Path, section: QuantizationSection, max_shard_bytes: int = ONE_FILE) -> list[Path]:
    plan = plan_rounding(ModelSource(str(model)), section)
    folder.mkdir()
    carry_beside(plan, model, folder)
    return write_rounded(plan, folder, CPU, max_shard_bytes=max_shard_bytes, report=lambda _: None)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    # Or bitsandbytes repacks for a kernel of its own, which takes no layer of an odd size.
    keep_layout(model)
    ids = torch.arange(5, 29).reshape(2, 12)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def _cases() -> list[tuple[str, str, torch.dtype]]:
    cases = [(family, "nf4-double", torch.bfloat16) for family in (*FAMILIES, *TASK_TYPES)]
    cases += [("gpt2", form, torch.bfloat16) for form in FORMS if form != "nf4-double"]
    return [*cases, ("llama", "nf4", torch.float32), ("gpt2", "fp4-double", torch.float16)]


@pytest.mark.parametrize(("family", "form", "dtype"), _cases())
def test_the_tensors_that_transformers_writes(family: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Names, types, shapes and bytes of every tensor, and `quantization_config`, are those of save_pretrained of the
    same model loaded in 4 bits; a plain from_pretrained loads them, and its logits are that model's."""
    model = _save(tmp_path / "model", family, dtype)
    theirs = _theirs(model, FORMS[form], dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    _round(model, tmp_path / "ours", FORMS[form])
    expected, got = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    written, ours = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours"))
    assert ours["quantization_config"] == written["quantization_config"]
    assert ours["dtype"] == written["dtype"]
    assert torch.equal(_logits(_load(tmp_path / "ours")), _logits(theirs))


def test_shards_and_progress(tmp_path: Path) -> None:
    """A sharded model is read and written in shards; what is reported adds up to what was said beforehand, and the
    space said is enough; nothing but the model is left."""
    model = tmp_path / "model"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(model, max_shard_size="80KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    plan = plan_rounding(ModelSource(str(model)), QuantizationSection())
    (tmp_path / "ours").mkdir()
    reported: list[int] = []
    files = write_rounded(plan, tmp_path / "ours", CPU, max_shard_bytes=70_000, report=reported.append)
    assert len(files) > 3
    assert sorted(files) == sorted((tmp_path / "ours").iterdir())
    # 7 tensors for each of 14 layers: headers and index are not small beside a tiny model.
    written = sum(file.stat().st_size for file in files)
    rounded = sum(plan.tensors[name].nbytes for name in plan.transposed)
    assert sum(reported) == written + rounded
    assert abs(sum(reported) - plan.total_bytes) < 40_000
    assert plan.disk_bytes > written - 40_000
    carry_beside(plan, model, tmp_path / "ours")
    theirs = _theirs(model, QuantizationSection(), torch.bfloat16)
    assert torch.equal(_logits(_load(tmp_path / "ours")), _logits(theirs))


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """A model whose tensors are stored under the names of the model without its head, as GPT-2's on the hub are, is
    rounded under those names and loads."""
    model = _save(tmp_path / "model", "gpt2", torch.bfloat16)
    theirs = _logits(_theirs(model, QuantizationSection(), torch.bfloat16))
    tensors = load_file(model / "model.safetensors")
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(plain, model / "model.safetensors", metadata={"format": "pt"})
    _round(model, tmp_path / "ours", QuantizationSection())
    assert "h.0.attn.c_attn.weight.absmax" in load_file(tmp_path / "ours/model.safetensors")
    assert torch.equal(_logits(_load(tmp_path / "ours")), theirs)


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    """Tokenizer and configurations are carried over; the README and the report of other weights are not."""
    model = save_tiny_model(tmp_path / "model")
    (model / "README.md").write_text("of the merged weights")
    (model / "merge_report.json").write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ 1 }}")
    _round(model, tmp_path / "ours", QuantizationSection())
    left_out = {"README.md", "merge_report.json"}
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {file.name for file in model.iterdir()} - left_out
    assert (tmp_path / "ours/additional_chat_templates/tools.jinja").read_text() == "{{ 1 }}"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "ours"))
    assert after.pop("quantization_config")["bnb_4bit_quant_type"] == "nf4"
    assert after == before


def test_a_model_that_does_not_fit_its_configuration(tmp_path: Path) -> None:
    """Weights that are absent, or of another shape or kind than the configuration has, are listed at once."""
    model = _save(tmp_path / "model", "llama", torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 64)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(64, 64, dtype=torch.uint8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        plan_rounding(ModelSource(str(model)), QuantizationSection())
    assert str(caught.value) == (
        f"{model}: cannot be written in 4 bits:\n"
        "  model.layers.0.mlp.up_proj.weight: should be rounded, but it is not there\n"
        "  model.layers.1.mlp.up_proj.weight: expected [128, 64], got [3, 64]\n"
        "  model.layers.1.self_attn.q_proj.weight: expected floating-point values, got torch.uint8"
    )


def test_a_failure_leaves_nothing_waiting(tmp_path: Path) -> None:
    """What was rounded by then is deleted when a tensor cannot be read."""
    model = _save(tmp_path / "model", "llama", torch.bfloat16)
    plan = plan_rounding(ModelSource(str(model)), QuantizationSection())
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "ours").mkdir()
    with pytest.raises(ModelError, match="has become shorter while it was read"):
        write_rounded(plan, tmp_path / "ours", CPU, max_shard_bytes=ONE_FILE, report=lambda _: None)
    assert not list((tmp_path / "ours").iterdir())


def test_the_dtype_that_a_client_computes_in(tmp_path: Path) -> None:
    """It is that of the weights, whatever the recipe's was."""
    model = _save(tmp_path / "model", "llama", torch.float16)
    plan = plan_rounding(ModelSource(str(model)), QuantizationSection(compute_dtype="float32"))
    assert quantization_config(plan)["bnb_4bit_compute_dtype"] == "float16"
