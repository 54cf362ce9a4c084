"""A small task that a tiny model can learn in seconds, and recipes that train on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_cli.recipe.schema import Recipe
from tests.support.models import save_tiny_model

# One word answers another: learnable by any architecture within a few dozen steps.
_PAIRS = (("red", "apple"), ("blue", "sky"), ("green", "leaf"), ("black", "night"), ("white", "snow"))


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """`count` prompt/completion rows of different lengths, as JSON lines."""
    rows = []
    for index in range(start, start + count):
        colour, thing = _PAIRS[index % len(_PAIRS)]
        prompt = " ".join([colour] * (1 + index % 4))
        rows.append({"prompt": prompt, "completion": " ".join([thing] * (1 + index % 3))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(
    folder: Path,
    family: str = "llama",
    *,
    rows: int = 32,
    validation_rows: int = 8,
    quantization: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe over a tiny model and dataset, both made in `folder` if they are not there yet."""
    base, train, validation = folder / family, folder / f"train-{rows}.jsonl", folder / "validation.jsonl"
    if not base.exists():
        save_tiny_model(base, family)
    write_rows(train, rows)
    data: dict[str, Any] = {"train": str(train), "max_length": 128}
    if validation_rows:
        write_rows(validation, validation_rows, start=1000)
        data["validation"] = str(validation)
    steps = {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "lr_scheduler_type": "constant"}
    return Recipe.model_validate(
        {
            "base_model": str(base),
            "quantization": {"compute_dtype": "float32"} | (quantization or {}),
            "lora": {"rank": 8, "alpha": 16} | (lora or {}),
            "dataset": data | (dataset or {}),
            "training": steps | {"per_device_train_batch_size": 4, "device": "cpu"} | (training or {}),
            "output_dir": str(folder / "run"),
        }
    )


def read_metrics(run: Path, event: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]
