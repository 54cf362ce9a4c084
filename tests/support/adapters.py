"""Adapters on disk as runs and other tools leave them, and run folders around them, made without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qlora_cli.model.adapter import CONFIG_FILE, WEIGHTS_FILE
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.run_folder import RunFolder
from tests.support.checkpoints import write_some


def write_adapter(folder: Path, base: str | None, *, seed: int = 0, **config: Any) -> Path:
    """A LoRA adapter of one layer, of rank 2, over what `base` names."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(2, 64, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(64, 2, generator=generator),
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings | config), encoding="utf-8")
    return folder


def write_run(
    recipe: Recipe, *, status: str = "completed", steps: tuple[int, ...] = (), adapter: bool = True
) -> RunFolder:
    """A run folder of this recipe: a checkpoint for each of `steps`, each with weights of its own, and an adapter."""
    run = RunFolder(Path(recipe.output_dir))
    run.create()
    run.recipe.write_text(dump_recipe(recipe), encoding="utf-8")
    run.record.write_text(json.dumps({"status": status, "started_at": "2026-11-01T00:00:00+00:00"}), encoding="utf-8")
    for step in steps:
        made = write_adapter(run.path / "made", recipe.base_model, seed=step)
        write_some(run.checkpoints, step, adapter={file.name: file.read_bytes() for file in made.iterdir()})
        shutil.rmtree(made)
    if adapter:
        write_adapter(run.adapter, recipe.base_model, seed=max(steps, default=0))
    return run
