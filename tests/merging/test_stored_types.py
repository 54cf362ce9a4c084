"""Types of stored tensors: which change with --dtype, which cannot be merged into, and what files may lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BitsAndBytesConfig,
    MambaConfig,
    MambaForCausalLM,
)

from qlora_cli.errors import ModelError
from tests.support.merges import (
    Bases,
    adapt,
    edit_stored,
    load_model,
    merge_adapter,
    model_logits,
    stored_tensors,
    trained_logits,
)
from tests.support.peft_adapters import edit_config
from tests.support.tokenizers import tiny_tokenizer

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize(("dtype", "wide"), [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
def test_what_transformers_keeps_in_float32(dtype: str, wide: torch.dtype, bases: Bases, tmp_path: Path) -> None:
    """T5 is not to be trusted with float16 in one of its layers: no --dtype takes from it what a client would keep.
    What the model does not have at all stays as it is, for others may read it."""
    base = Path(shutil.copytree(bases["t5"], tmp_path / "base"))
    edit_stored(base, {"encoder.rotary_emb.inv_freq": torch.rand(8)})
    adapter = adapt(bases["t5"], tmp_path / "adapter", task="SEQ_2_SEQ_LM", target_modules=["q", "wo"])
    merge_adapter(adapter, tmp_path / "merged", base_model=str(base), dtype=dtype)
    written = stored_tensors(tmp_path / "merged")
    types = {name: tensor.dtype for name, tensor in written.items()}
    assert types.pop("encoder.rotary_emb.inv_freq") == torch.float32
    assert {types.pop(name) for name in list(types) if ".wo." in name} == {wide}
    assert set(types.values()) == {getattr(torch, dtype)}


def test_what_a_model_has_in_float32_whatever_its_type(tmp_path: Path) -> None:
    """Mamba's A and D are made in float32, and read as such into a model of any type."""
    tokenizer = tiny_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", target_modules=["in_proj"])
    merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16")
    loaded = load_model(tmp_path / "merged").state_dict()
    for name, tensor in stored_tensors(tmp_path / "merged").items():
        assert tensor.dtype == loaded[name].dtype, name


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_values_that_mean_something_only_with_a_scale(dtype: torch.dtype, bases: Bases, tmp_path: Path) -> None:
    """A sum of them and the adapter would be nothing; where no configuration tells of it, their type does."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    edit_stored(base, {Q_PROJ: stored_tensors(base)[Q_PROJ].to(dtype)})
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged", base_model=str(base))
    assert str(caught.value) == (
        f"the adapter in {adapter} and the base model {base} do not fit:\n"
        f"  {Q_PROJ}: the base's files hold it as {str(dtype).removeprefix('torch.')}; expected bfloat16, float16 or "
        "float32"
    )


def test_what_transformers_makes_itself_may_be_missing(tmp_path: Path) -> None:
    """BART's checkpoints have no `final_logits_bias`: no file has to hold what every client makes anew."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    layers = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in SIZES.items()}
    config = BartConfig(vocab_size=len(tokenizer), d_model=64, pad_token_id=0, decoder_start_token_id=1, **layers)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    edit_stored(tmp_path / "base", {"final_logits_bias": None})
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", task="SEQ_2_SEQ_LM", target_modules=["q_proj", "fc1"])
    merge_adapter(adapter, tmp_path / "merged")
    assert stored_tensors(tmp_path / "merged").keys() == stored_tensors(tmp_path / "base").keys()
    merged, trained = load_model(tmp_path / "merged"), trained_logits(load_model(tmp_path / "base"), adapter)
    torch.testing.assert_close(model_logits(merged), trained, rtol=0, atol=1e-5)


SIZES = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}


def _stored_in_4_bits(plain: Path, folder: Path) -> Path:
    """As a base of float16 is saved by transformers, with packed values stored as float16 too."""
    section = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_quant_storage=torch.float16,
    )
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=section, dtype=torch.float16).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_in_4_bits_made_plain_has_the_type_of_its_other_weights(bases: Bases, tmp_path: Path) -> None:
    base = _stored_in_4_bits(bases["llama"], tmp_path / "base")
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "merged", base_model=str(base))
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "merged").values()} == {torch.float16}


def test_a_base_in_4_bits_that_is_not_whole(bases: Bases, tmp_path: Path) -> None:
    """What does not describe a 4-bit weight, or one of another shape, is told by the weight's name."""
    base = _stored_in_4_bits(bases["llama"], tmp_path / "base")
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(adapter, base_model_name_or_path=str(base))
    state = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
    text = json.loads(bytes(stored_tensors(base)[state].tolist()))
    narrow = torch.tensor(list(json.dumps(text | {"shape": [32, 64]}).encode()), dtype=torch.uint8)
    start = "the base's weights in 4 bits are not as bitsandbytes stores them:\n"
    fit = f"the adapter in {adapter} and the base model {base} do not fit:\n"
    for name, value, message in (
        (state, narrow, f"{fit}  {Q_PROJ}: expected [64, 64] by the base's config.json, got [32, 64] in its files"),
        (state, None, f"{start}  {Q_PROJ}: expected a quant_state beside it"),
        (state, torch.zeros(3), f"{start}  {Q_PROJ}: Expecting value: line 1 column 1 (char 0)"),
    ):
        edit_stored(base, {name: value})
        with pytest.raises(ModelError) as caught:
            merge_adapter(adapter, tmp_path / "merged")
        assert str(caught.value).startswith(message)


def test_a_base_in_4_bits_that_lacks_its_block_constants(bases: Bases, tmp_path: Path) -> None:
    base = _stored_in_4_bits(bases["llama"], tmp_path / "base")
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    edit_stored(base, {f"{Q_PROJ}.absmax": torch.zeros(3)})
    with pytest.raises(ModelError) as caught:
        merge_adapter(adapter, tmp_path / "merged", base_model=str(base))
    assert str(caught.value) == (
        f"{Q_PROJ}: a 4-bit weight of shape [64, 64] in blocks of 64: expected 2,048 bytes and 64 block constants, got "
        "2,048 and 3"
    )
    assert not (tmp_path / "merged").exists()
