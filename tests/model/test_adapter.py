"""Adapters on disk are PEFT's: what we write PEFT reads, what PEFT writes we read, and the outputs agree."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter import load_adapter, save_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import lora_layers
from qlora_cli.model.source import ModelSource
from qlora_cli.model.storage import compute_dtype
from qlora_cli.recipe.schema import LoraSection, QuantizationSection
from tests.support.models import FAMILIES, save_tiny_model

CPU = torch.device("cpu")
FLOAT32 = QuantizationSection(bits=16, compute_dtype="float32")
NF4 = QuantizationSection(compute_dtype="float32")


def _trained(folder: Path, quantization: QuantizationSection, section: LoraSection) -> PreTrainedModel:
    """A model whose adapter is not the zero it starts as."""
    model = load_base(ModelSource(str(folder)), quantization, CPU)
    inject(model, section, compute_dtype=compute_dtype(quantization), seed=0)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


def _logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [FLOAT32, NF4], ids=["float32", "nf4"])
def test_peft_reads_ours(family: str, quantization: QuantizationSection, tmp_path: Path) -> None:
    """Every family, plain and NF4: PEFT over the same base gives the same logits to 1e-5."""
    base = save_tiny_model(tmp_path / "base", family)
    model = _trained(base, quantization, LoraSection(rank=4, alpha=8))
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", ModelSource(str(base)))
    theirs = peft.PeftModel.from_pretrained(load_base(ModelSource(str(base)), quantization, CPU), tmp_path / "adapter")
    torch.testing.assert_close(_logits(theirs.eval()), _logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_we_read_pefts(family: str, tmp_path: Path) -> None:
    """An adapter that PEFT wrote, with rsLoRA and patterns of rank and alpha, gives PEFT's logits here."""
    base = save_tiny_model(tmp_path / "base", family)
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "gpt_neox": ("query_key_value", "dense")}
    first, second = names[family]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=[first, second],
        use_rslora=True,
        rank_pattern={second: 2},
        alpha_pattern={second: 16},
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(load_base(ModelSource(str(base)), FLOAT32, CPU), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_base(ModelSource(str(base)), FLOAT32, CPU).eval()
    paths = load_adapter(ours, tmp_path / "adapter", compute_dtype=torch.float32)
    assert len(paths) == 4
    torch.testing.assert_close(_logits(ours), _logits(theirs), rtol=1e-5, atol=1e-5)


def test_files_are_pefts_to_the_letter(tmp_path: Path) -> None:
    """Same tensor names, shapes and metadata as PEFT's own save, and every field that changes the result."""
    base = save_tiny_model(tmp_path / "base")
    (tmp_path / "ours").mkdir()
    model = _trained(base, FLOAT32, LoraSection(rank=4, alpha=8, dropout=0.1))
    save_adapter(model, tmp_path / "ours", ModelSource(str(base), revision="v1"))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=names)
    peft.get_peft_model(load_base(ModelSource(str(base)), FLOAT32, CPU), config).save_pretrained(tmp_path / "theirs")

    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    written, wanted = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert written["revision"] == "v1"
    assert sorted(written["target_modules"]) == sorted(wanted["target_modules"])
    same = ("peft_type", "peft_version", "task_type", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias")
    same += ("fan_in_fan_out", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path")
    assert {name: written[name] for name in same} == {name: wanted[name] for name in same}
    assert set(written) <= set(wanted)


def test_target_names_select_exactly_what_was_adapted(tmp_path: Path) -> None:
    """One layer's q_proj and every v_proj: the config names the one by its path, the others by their name, and PEFT
    finds just those."""
    base = save_tiny_model(tmp_path / "base")
    model = _trained(base, FLOAT32, LoraSection(rank=2, target_modules=r".*\.0\..*q_proj|.*v_proj"))
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", ModelSource(str(base)))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", "v_proj"]
    theirs = peft.PeftModel.from_pretrained(load_base(ModelSource(str(base)), FLOAT32, CPU), tmp_path / "adapter")
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 3
    torch.testing.assert_close(_logits(theirs.eval()), _logits(model), rtol=1e-5, atol=1e-5)


def test_a_loaded_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    """Load, save, compare: tensors bit for bit, ranks that differ kept as patterns."""
    base = save_tiny_model(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, lora_alpha=8)
    theirs = peft.get_peft_model(load_base(ModelSource(str(base)), FLOAT32, CPU), config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_base(ModelSource(str(base)), FLOAT32, CPU)
    load_adapter(model, tmp_path / "theirs", compute_dtype=torch.float32)
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", ModelSource(str(base)))
    ours, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in ours)
    again = peft.PeftModel.from_pretrained(load_base(ModelSource(str(base)), FLOAT32, CPU), tmp_path / "ours")
    torch.testing.assert_close(_logits(again.eval()), _logits(model.eval()), rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path]:
    """A base folder and an adapter folder made on it."""
    base = save_tiny_model(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    model = _trained(base, FLOAT32, LoraSection(rank=4, target_modules=["q_proj"]))
    save_adapter(model, folder, ModelSource(str(base)))
    return base, folder


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _load(base: Path, folder: Path) -> None:
    load_adapter(load_base(ModelSource(str(base)), FLOAT32, CPU), folder, compute_dtype=torch.float32)


def test_a_missing_and_a_mis_shaped_tensor_are_named(adapter: tuple[Path, Path]) -> None:
    """PEFT only warns when a targeted module has no weights; here loading fails and lists every fault."""
    base, folder = adapter
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second = sorted(key for key in tensors if "lora_B" in key)
    del tensors[first]
    tensors[second] = tensors[second][:-1].clone()
    save_file(tensors, file)
    with pytest.raises(ModelError) as caught:
        _load(base, folder)
    assert str(caught.value) == (
        f"{folder}: the adapter does not fit the model:\n"
        f"  missing: {first}\n"
        f"  shape of {second}: expected [64, 4], got [63, 4]"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, got IA3"),
        ({"lora_alpha": None}, "expected a number for lora_alpha, got None"),
        ({"use_dora": True}, "uses use_dora, which this version cannot apply"),
        ({"kasa_config": {"beta": 1}}, "uses kasa_config, which this version cannot apply"),
        ({"field_of_tomorrow": 3}, "uses field_of_tomorrow, which this version cannot apply"),
        (
            {"init_lora_weights": "pissa"},
            "was trained from a changed base (init_lora_weights: pissa), which this version cannot rebuild. Convert it "
            "with PEFT first: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        ),
        (
            {"modules_to_save": ["lm_head"], "bias": "all"},
            "uses bias, modules_to_save, which this version cannot apply",
        ),
    ],
)
def test_what_would_be_applied_wrongly_is_refused(
    adapter: tuple[Path, Path], changes: dict[str, object], message: str
) -> None:
    """A config that asks for more than LoRALinear does is an error, not an approximation."""
    base, folder = adapter
    _edit_config(folder, **changes)
    with pytest.raises(ModelError) as caught:
        _load(base, folder)
    assert str(caught.value) == f"{folder / 'adapter_config.json'}: {message}"


def test_a_rank_that_contradicts_the_config_is_told(adapter: tuple[Path, Path]) -> None:
    """The tensors say rank 4, the config 16: the scale would be wrong, so nothing is guessed, and the model stays."""
    base, folder = adapter
    _edit_config(folder, r=16)
    model = load_base(ModelSource(str(base)), FLOAT32, CPU)
    with pytest.raises(ModelError, match=r"shape of .*q_proj\.lora_A\.weight: expected \[16, 64\], got \[4, 64\]"):
        load_adapter(model, folder, compute_dtype=torch.float32)
    assert not lora_layers(model)


def test_a_loaded_adapter_keeps_the_models_mode(adapter: tuple[Path, Path]) -> None:
    """On a model in eval mode its dropout is off; PEFT's logits, twice."""
    base, folder = adapter
    _edit_config(folder, lora_dropout=0.5)
    model = load_base(ModelSource(str(base)), FLOAT32, CPU)
    load_adapter(model, folder, compute_dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(load_base(ModelSource(str(base)), FLOAT32, CPU), folder)
    assert torch.equal(_logits(model), _logits(model))
    torch.testing.assert_close(_logits(model), _logits(theirs), rtol=1e-5, atol=1e-5)


def test_another_architecture_is_told(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter on a base without its layers names the first one that is not there."""
    _, folder = adapter
    other = save_tiny_model(tmp_path / "other", "gpt2")
    with pytest.raises(ModelError, match=r"has weights for model\.layers\.0\.self_attn\.q_proj, but GPT2LMHeadModel"):
        _load(other, folder)


def test_torn_and_absent_files_are_told(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    """A cut file, an empty folder and broken JSON each have their message."""
    base, folder = adapter
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        _load(base, folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors; expected an adapter folder"):
        _load(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        _load(base, folder)
    with pytest.raises(ModelError, match=r"no adapter_config\.json; expected an adapter folder"):
        _load(base, tmp_path)
