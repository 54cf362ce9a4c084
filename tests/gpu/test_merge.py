"""Merging an adapter that was trained on a GPU: the weights are those that training had there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.merging.merge import merge
from qlora_cli.merging.request import MergeRequest
from qlora_cli.model.base import load_base
from qlora_cli.model.quantization import frozen_weight
from qlora_cli.model.source import ModelSource
from qlora_cli.training.run import train
from tests.support.runs import tiny_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_run_of_the_gpu_is_merged_and_verified_there(tmp_path: Path) -> None:
    """Onto what the GPU held, it is the trained model but for rounding; weights without LoRA are that exactly."""
    lora = {"target_modules": ["q_proj", "v_proj"]}
    recipe = tiny_recipe(tmp_path, lora=lora, training={"device": "cuda"})
    train(recipe)
    output = tmp_path / "merged"
    merged = merge(MergeRequest(Path(recipe.output_dir), output, device="cuda", dtype="float32", base="dequantized"))
    assert merged.report.verification is not None
    found = merged.report.verification
    # float32 throughout, another order of summation.
    assert found.merges["dequantized"].mean_kl < 1e-6 < found.reference.effect
    weights = load_file(output / "model.safetensors")
    layer = load_base(ModelSource(recipe.base_model), recipe.quantization, torch.device("cuda", 0)).model.layers[0]
    held = frozen_weight(layer.mlp.up_proj, torch.float32).cpu()
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], held)


def test_both_bases_are_measured_on_the_gpu(tmp_path: Path) -> None:
    """`auto` loads every merged model on the device that was asked for, and stores the best in 4 bits."""
    recipe = tiny_recipe(tmp_path, training={"device": "cuda", "max_steps": 16})
    train(recipe)
    request = MergeRequest(Path(recipe.output_dir), tmp_path / "merged", device="cuda", quantize="nf4", verify_rows=4)
    report = merge(request).report
    assert report.verification is not None
    assert set(report.verification.merges) == {"original", "dequantized"} == set(report.verification.quantized)
