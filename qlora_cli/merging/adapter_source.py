"""What is to be merged: where the adapter is, over which base it was trained, and how that was stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection, Recipe
from qlora_cli.training.run_folder import RunFolder


@dataclass(frozen=True)
class AdapterSource:
    """An adapter on disk and what is known of its training.

    Attributes:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        base: the model it was trained over.
        quantization: how the base was stored while it was trained.
        told_by: who says so, as in `the run's recipe`; it is said to the user.
        run: the run it comes from, if it comes from one.
        recipe: that run's recipe.
        step: the optimizer step of a checkpoint; None for a finished run or a folder from elsewhere.
    """

    folder: Path
    base: ModelSource
    quantization: QuantizationSection
    told_by: str
    run: RunFolder | None = None
    recipe: Recipe | None = None
    step: int | None = None
