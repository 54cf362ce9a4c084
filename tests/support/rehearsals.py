"""Runs to be rehearsed: where they go, what is in their rows, and what is left of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.events import Stage

REHEARSING = Stage("rehearsing the longest batch")


def into(recipe: Recipe, folder: Path, **training: Any) -> Recipe:
    """The recipe with other training settings, into another folder."""
    data = recipe.model_dump(exclude_unset=True)
    data["training"] |= training
    return Recipe.model_validate(data | {"output_dir": str(folder)})


def bits(run: Path) -> dict[str, bytes]:
    """What a run has trained: its adapter, and the state of its last checkpoint but for the clock."""
    last = max((run / "checkpoints").iterdir())
    files = [run / "adapter" / "adapter_model.safetensors", *(last / name for name in ("random.safetensors",))]
    return {file.name: file.read_bytes() for file in [*files, last / "optimizer.safetensors"]}


def with_extremes(recipe: Recipe) -> Recipe:
    """Among the rows some with much to read, and some with much to learn."""
    rows = Path(recipe.dataset.train)
    odd = [("red " * 20, "apple")] * 3 + [("red", "apple " * 12)] * 3
    rows.write_text(rows.read_text() + "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in odd))
    return recipe
