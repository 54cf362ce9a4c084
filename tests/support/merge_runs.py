"""A run to be merged: a tiny base, rows, and an adapter that does something, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from transformers import AutoModelForCausalLM

from qlora_cli.recipe.schema import Recipe
from tests.support.adapters import write_run
from tests.support.peft_adapters import save_peft_adapter
from tests.support.runs import tiny_recipe


def merge_run(folder: Path, **recipe: Any) -> Recipe:
    """The recipe of a finished run in `folder / "run"`, over a base in `folder / "llama"` that was in 4 bits."""
    made = tiny_recipe(folder, **recipe)
    run = write_run(made, adapter=False)
    save_adapter(Path(made.base_model), run.adapter)
    return made


def save_adapter(base: Path, folder: Path, *, seed: int = 1) -> Path:
    """A random adapter of rank 4 on two kinds of layers of the model in `base`, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return save_peft_adapter(model, folder, config, seed=seed)
