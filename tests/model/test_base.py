"""The base is loaded as the recipe's quantization section says, stays as it was, and its failures are told."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_cli.errors import DeviceError, HubUnreachableError, ModelError
from qlora_cli.model.base import choose_device, load_base
from qlora_cli.model.quantization import frozen_weight, measure_storage, misread_layers
from qlora_cli.model.source import ModelSource, load_config, load_tokenizer
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import save_tiny_model, tiny_model
from tests.support.tokenizers import tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_layers_are_what_bitsandbytes_makes_of_them(
    llama: Path, quant_type: str, double_quant: bool, dtype: str
) -> None:
    """Bit for bit the bytes of quantize_4bit; head, embeddings and norms stay in the compute dtype."""
    section = QuantizationSection(quant_type=quant_type, double_quant=double_quant, compute_dtype=dtype)
    model = load_base(ModelSource(str(llama)), section, CPU)
    torch_dtype = getattr(torch, dtype)
    original = tiny_model("llama", vocab_size=model.config.vocab_size).model.layers[1].mlp.up_proj.weight
    packed, state = bnb.functional.quantize_4bit(
        original.to(torch_dtype), blocksize=64, compress_statistics=double_quant, quant_type=quant_type
    )
    layer = model.model.layers[1].mlp.up_proj
    assert torch.equal(layer.weight.data, packed)
    wanted = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(frozen_weight(layer, torch_dtype), wanted)
    plain = (model.lm_head, model.model.embed_tokens, model.model.norm, model.model.layers[0].input_layernorm)
    assert all(module.weight.dtype == torch_dtype for module in plain)
    assert type(model.lm_head) is nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_sixteen_bits_quantise_nothing(llama: Path) -> None:
    """`bits: 16` has no 4-bit layer, and the weights are the file's."""
    model = load_base(ModelSource(str(llama)), QuantizationSection(bits=16, compute_dtype="float32"), CPU)
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    wanted = tiny_model("llama", vocab_size=model.config.vocab_size).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_storage_is_counted_to_the_byte(llama: Path) -> None:
    """4.5 bits without double quantisation; the parameters are those of the unquantised model."""
    section = QuantizationSection(double_quant=False, compute_dtype="float32")
    storage = measure_storage(load_base(ModelSource(str(llama)), section, CPU))
    plain = tiny_model("llama", vocab_size=len(tiny_tokenizer()))
    assert storage.parameters == sum(p.numel() for p in plain.parameters())
    assert storage.quantized_parameters == sum(
        m.weight.numel() for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )
    assert storage.bits_per_quantized_parameter == 4.5
    rest = storage.parameters - storage.quantized_parameters
    assert storage.bytes == storage.quantized_parameters * 4.5 / 8 + rest * 4


def test_double_quantisation_stores_the_papers_bits_per_parameter() -> None:
    """QLoRA, section 3: 8/64 + 32/(64 · 256) = 0.127 bits in place of 0.5. One float32 offset comes on top."""
    layer = bnb.nn.Linear4bit(4096, 1024, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    bits = measure_storage(layer).bits_per_quantized_parameter
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_an_evaluation_does_not_repack_the_base(llama: Path) -> None:
    """bitsandbytes rewrites 4-bit weights in place at the first eval forward on some CPUs; ours stay as they are."""
    model = load_base(ModelSource(str(llama)), QuantizationSection(), CPU)
    # What decides it, also where this CPU would not repack.
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(4, 20)[None])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_folder_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    """An absolute path that is not there is told without asking the hub."""
    with pytest.raises(ModelError) as caught:
        load_config(ModelSource(str(tmp_path / "nothing")))
    assert str(caught.value) == (f"base_model: {tmp_path / 'nothing'}: there is no such folder.")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    """The message says what is missing."""
    with pytest.raises(ModelError, match=r"holds no config\.json, so it is not a model folder\.$"):
        load_base(ModelSource(str(tmp_path)), QuantizationSection(), CPU)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    """Weights that are there only as .bin are never unpickled."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only as pickle \(\.bin\), which can run code when read"):
        load_base(ModelSource(str(tmp_path)), QuantizationSection(), CPU)


def test_a_stray_safetensors_file_does_not_open_the_way_to_a_pickle(llama: Path, tmp_path: Path) -> None:
    """An adapter beside a pickled model: still refused."""
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has its weights only as pickle \(\.bin\)"):
        load_base(ModelSource(str(tmp_path)), QuantizationSection(), CPU)


@pytest.mark.parametrize("stored", ["fp4", "int8"])
def test_a_base_stored_quantised_otherwise_is_refused(stored: str, llama: Path, tmp_path: Path) -> None:
    """transformers would take the stored form in silence, and with bits: 16 read integers as weights."""
    if stored == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(tmp_path)
    form = "4-bit fp4, double_quant False" if stored == "fp4" else "bitsandbytes"
    for section, asked in (
        (QuantizationSection(), "NF4, double quantisation, bfloat16 compute"),
        (QuantizationSection(bits=16), "unquantised, bfloat16"),
    ):
        with pytest.raises(ModelError) as caught:
            load_base(ModelSource(str(tmp_path)), section, CPU)
        assert str(caught.value).startswith(
            f"base_model: its weights are stored quantised ({form}), and the recipe's quantization asks for {asked}."
        )
    if stored == "fp4":
        same = QuantizationSection(quant_type="fp4", double_quant=False)
        assert measure_storage(load_base(ModelSource(str(tmp_path)), same, CPU)).bits_per_quantized_parameter == 4.5


def test_an_unreachable_hub_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message: the name, the hub, the ways out; no traceback of the client's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError) as caught:
        load_tokenizer(ModelSource("no-such-org/no-such-model"))
    message = str(caught.value)
    assert message.startswith(
        "base_model: the tokenizer of no-such-org/no-such-model (revision main) cannot be had from the hub, and there "
        "is no such folder here. Check the name and the network"
    )
    assert "\n" not in message


def test_torn_weights_are_told(llama: Path, tmp_path: Path) -> None:
    """A safetensors file cut short is a ModelError that names the folder."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"^base_model: the model in .* cannot be read: "):
        load_base(ModelSource(str(tmp_path)), QuantizationSection(), CPU)


def test_absent_weights_are_not_drawn_at_random(llama: Path, tmp_path: Path) -> None:
    """A checkpoint that lacks a tensor is refused; transformers alone would fill it with noise and go on."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_base(ModelSource(str(tmp_path)), QuantizationSection(), CPU)
    assert str(caught.value) == (
        f"base_model: {tmp_path} lacks 1 of the model's weights: model.layers.0.mlp.up_proj.weight"
    )


def test_a_tokenizer_without_padding_gets_one(tmp_path: Path) -> None:
    """Padding is masked by position, so the end-of-text token serves."""
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(ModelSource(str(tmp_path))).pad_token == tokenizer.eos_token


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_and_absent_is_told() -> None:
    """A DeviceError, exit code 2, that says what this torch is; auto takes the CPU."""
    with pytest.raises(
        DeviceError, match=r"^training.device: cuda was asked for, but torch .* sees no GPU\. "
    ) as caught:
        choose_device("cuda")
    assert caught.value.exit_code == 2
    assert choose_device("auto") == choose_device("cpu") == CPU


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("in_features", [48, 64, 80, 100])
def test_layers_that_bitsandbytes_misreads_are_found(in_features: int, double_quant: bool) -> None:
    """On CPUs with AVX-512, bitsandbytes 0.50 takes other blocks' constants for rows of 48 values: against plain
    arithmetic on the codes, a layer is told to be misread exactly where it is."""
    weight = torch.randn(33, in_features, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear4bit(in_features, 33, bias=False, compress_statistics=double_quant, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double_quant, quant_type="nf4")
    layer = layer.to(CPU)
    state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).long()
    absmax = state.absmax
    if double_quant:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    plain = state.code[codes][: weight.numel()] * absmax.float().repeat_interleave(64)[: weight.numel()]
    wrong = not torch.allclose(bnb.functional.dequantize_4bit(layer.weight.data, state).reshape(-1), plain, atol=1e-5)
    assert misread_layers(nn.Sequential(layer)) == (["0"] if wrong else [])


def test_a_base_that_would_be_misread_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than trained over weights that are not its own."""
    monkeypatch.setattr("qlora_cli.model.base.misread_layers", lambda model: ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ModelError) as refused:
        load_base(ModelSource(str(llama)), QuantizationSection(), CPU)
    assert str(refused.value) == (
        "quantization.bits: bitsandbytes reads 4-bit weights wrongly on this CPU where rows are no multiple of 64 "
        f"values, as in 1 layers of {llama}, model.layers.0.mlp.up_proj the first. Set quantization.bits to 16, "
        "or use a GPU"
    )
