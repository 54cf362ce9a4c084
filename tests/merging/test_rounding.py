"""A weight rounded here is the weight that bitsandbytes holds in training, bit for bit, however it is cut."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import MergeError, ModelError
from qlora_cli.merging.base.rounding import Rounded, read_rounded, round_weight, state_shapes
from qlora_cli.model.base import load_base
from qlora_cli.model.quantization import bitsandbytes_config, frozen_weight
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import FAMILIES, TASK_TYPES, save_tiny_model

CPU = torch.device("cpu")
SECTIONS = [
    QuantizationSection(quant_type=quant_type, double_quant=double_quant)
    for quant_type in ("nf4", "fp4")
    for double_quant in (True, False)
]
NAMES = [f"{section.quant_type}{'-double' if section.double_quant else ''}" for section in SECTIONS]
sections = pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
# Every family both ways, and a Linear and a Conv1D one all four.
CASES = [
    pytest.param(family, section, id=f"{family}-{name}")
    for family in (*FAMILIES, *TASK_TYPES)
    for section, name in zip(SECTIONS, NAMES, strict=True)
    if family in ("llama", "gpt2") or name in ("nf4-double", "fp4")
]


def load_in_four_bits(folder: Path, family: str, section: QuantizationSection) -> PreTrainedModel:
    if family not in TASK_TYPES:
        return load_base(ModelSource(str(folder)), section, CPU)
    loader = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForSequenceClassification
    return loader.from_pretrained(
        folder, quantization_config=bitsandbytes_config(section), dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def layers(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {path: module for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def all_rows(rounded: Rounded, step: int = 50) -> Tensor:
    rows = rounded.shape[0]
    return torch.cat([rounded.rows(first, min(first + step, rows)) for first in range(0, rows, step)])


@pytest.mark.parametrize(("family", "section"), CASES)
def test_every_weight_is_that_of_the_loaded_base(family: str, section: QuantizationSection, tmp_path: Path) -> None:
    """Of each 4-bit layer of each family: its rows, and every tensor that a checkpoint would store of it."""
    folder = save_tiny_model(tmp_path, family)
    model = load_in_four_bits(folder, family, section)
    stored = load_file(folder / "model.safetensors")
    found = layers(model)
    assert found
    for path, layer in found.items():
        weight = stored[f"{path}.weight"]
        transposed = layer.source_cls is Conv1D
        rounded = round_weight(weight.split(50), tuple(weight.shape), section, CPU, transposed=transposed)
        wanted = frozen_weight(layer, torch.bfloat16)
        got = all_rows(rounded)
        assert rounded.shape == tuple(got.shape) == tuple(weight.shape)
        assert got.dtype == rounded.dtype == torch.bfloat16
        assert torch.equal(got.t() if transposed else got, wanted), path
        held = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
        state = rounded.state_tensors()
        assert list(state) == list(held)
        assert all(torch.equal(state[name], held[name]) for name in held), path


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@sections
def test_a_weight_that_is_stored_in_four_bits(family: str, section: QuantizationSection, tmp_path: Path) -> None:
    """Read back from what transformers saves, it is what the layer holds; Conv1D's in the model's own orientation."""
    folder = save_tiny_model(tmp_path / "plain", family)
    model = load_in_four_bits(folder, family, section)
    model.save_pretrained(tmp_path / "stored")
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    for path, layer in layers(model).items():
        prefix = f"{path}."
        parts = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(f"{prefix}weight")}
        transposed = layer.source_cls is Conv1D
        rounded = read_rounded(parts, section, CPU, transposed=transposed)
        got = all_rows(rounded)
        assert torch.equal(got.t() if transposed else got, frozen_weight(layer, torch.bfloat16)), path
        again = rounded.state_tensors()
        assert set(again) == set(parts)
        assert all(torch.equal(again[name], parts[name]) for name in parts)


def meaning(packed: Tensor, state: bnb.functional.QuantState) -> Tensor:
    """What the bytes stand for, computed plainly: code times block constant, value by value."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    values = state.shape.numel()
    constants = absmax.float().repeat_interleave(state.blocksize)[:values]
    return (state.code[codes[:values].long()] * constants).to(state.dtype).view(state.shape)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 192]))),
    section=st.sampled_from(SECTIONS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    transposed=st.booleans(),
    cuts=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_cut(
    shape: tuple[int, int], section: QuantizationSection, dtype: torch.dtype, transposed: bool, cuts: int, seed: int
) -> None:
    """Rows that are no whole blocks, an odd number of values, cut anywhere: as bitsandbytes rounds the whole."""
    shape = shape[::-1] if transposed else shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0] *= seed % 2  # a block of nothing but zeros now and then
    whole = (weight.t() if transposed else weight).to(dtype).contiguous()
    packed, state = bnb.functional.quantize_4bit(
        whole, compress_statistics=section.double_quant, quant_type=section.quant_type
    )
    rounded = round_weight(weight.split(cuts), shape, section, CPU, dtype=dtype, transposed=transposed)
    wanted = {"weight": packed} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    got = rounded.state_tensors()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    plain = meaning(packed, state)
    assert torch.equal(all_rows(rounded, cuts), plain.t() if transposed else plain)
    if whole.shape[1] % 64 == 0:
        assert torch.equal(plain, bnb.functional.dequantize_4bit(packed, state).view(whole.shape))
    told = state_shapes(shape, section, dtype=dtype, transposed=transposed)
    known = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in wanted.items() if name in told}
    assert list(told.items()) == list(known.items())
    unknown = {name for name in wanted if name not in told}
    assert unknown == ({f"weight.quant_state.bitsandbytes__{section.quant_type}"} if section.double_quant else set())


@pytest.mark.parametrize("transposed", [False, True])
def test_bitsandbytes_is_given_a_little_at_a_time(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of many pieces: none has more than a million values, and together they are the whole one's bits."""
    section = SECTIONS[0]
    shape = (1100, 3 * 1024) if not transposed else (3 * 1024, 1100)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = (weight.t() if transposed else weight).contiguous()
    packed, state = bnb.functional.quantize_4bit(whole, compress_statistics=True, quant_type="nf4")
    quantize, given = bnb.functional.quantize_4bit, []

    def counted(values: Tensor, **arguments: object) -> tuple[Tensor, bnb.functional.QuantState]:
        given.append(values.numel())
        return quantize(values, **arguments)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", counted)
    rounded = round_weight(weight.split(900), shape, section, CPU, transposed=transposed)
    assert max(given) <= 1 << 20
    assert sum(given) == weight.numel()
    assert torch.equal(rounded.state_tensors()["weight"], packed)
    plain = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(all_rows(rounded, 500), plain.t() if transposed else plain)


def test_a_weight_is_rounded_in_the_compute_dtype() -> None:
    """A float32 file trained in bfloat16 is bfloat16 before it is 4 bits, as transformers loads it."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_weight([weight], (64, 64), QuantizationSection(compute_dtype="bfloat16"), CPU)
    same = round_weight([weight.to(torch.bfloat16)], (64, 64), QuantizationSection(compute_dtype="bfloat16"), CPU)
    other = round_weight([weight], (64, 64), QuantizationSection(compute_dtype="float32"), CPU)
    assert torch.equal(rounded.rows(0, 64), same.rows(0, 64))
    assert not torch.equal(rounded.rows(0, 64).float(), other.rows(0, 64))
    assert other.rows(0, 64).dtype == torch.float32


@pytest.mark.parametrize("rows", [63, 65])
def test_blocks_that_are_not_the_whole_weight_are_told(rows: int) -> None:
    """Too few or too many values are an error, not a weight with a hole."""
    with pytest.raises(
        MergeError, match=rf"^rounding to 4 bits: expected 4,096 values \(\[64, 64\]\), got {rows * 64:,}"
    ):
        round_weight([torch.ones(rows, 64)], (64, 64), SECTIONS[0], CPU)


@pytest.mark.parametrize("missing", ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_an_incomplete_stored_weight_is_told(missing: str) -> None:
    """Whichever of its parts is not there."""
    parts = round_weight([torch.ones(64, 64)], (64, 64), SECTIONS[0], CPU).state_tensors()
    del parts[missing]
    with pytest.raises(ModelError, match="not the parts of a 4-bit weight"):
        read_rounded(parts, SECTIONS[0], CPU)


def test_stored_parts_that_do_not_go_together_are_told() -> None:
    """Bytes of another weight: expected and got."""
    parts = round_weight([torch.ones(64, 64)], (64, 64), SECTIONS[0], CPU).state_tensors()
    parts["weight"] = parts["weight"][:100]
    with pytest.raises(ModelError) as told:
        read_rounded(parts, SECTIONS[0], CPU)
    assert str(told.value) == (
        "a 4-bit weight of shape [64, 64] in blocks of 64: expected 2,048 bytes and 64 block constants, got 100 and 64"
    )
