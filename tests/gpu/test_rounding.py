"""A weight that is rounded on a GPU is the one that training holds there."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from qlora_cli.merging.base.rounding import round_weight
from qlora_cli.model.base import load_base
from qlora_cli.model.quantization import frozen_weight
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_weight_is_that_of_the_base_on_the_gpu(
    family: str, quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    """Its rows and its stored parts, bit for bit, by the GPU's own kernels; they come back on the CPU."""
    folder = save_tiny_model(tmp_path, family)
    section = QuantizationSection(quant_type=quant_type, double_quant=double_quant)
    device = torch.device("cuda", 0)
    stored = load_file(folder / "model.safetensors")
    layers = {
        path: layer
        for path, layer in load_base(ModelSource(str(folder)), section, device).named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }
    assert layers
    for path, layer in layers.items():
        weight = stored[f"{path}.weight"]
        transposed = layer.source_cls is Conv1D
        rounded = round_weight(weight.split(50), tuple(weight.shape), section, device, transposed=transposed)
        got = torch.cat([rounded.rows(0, 10), rounded.rows(10, weight.shape[0])])
        assert torch.equal(got.t() if transposed else got, frozen_weight(layer, torch.bfloat16).cpu()), path
        state = rounded.state_tensors()
        assert all(torch.equal(part.cpu(), state[name]) for name, part in layer.state_dict().items() if name != "bias")
