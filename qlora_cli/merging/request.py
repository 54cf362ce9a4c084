"""What is asked of a merge. Without torch: a command makes it before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MergeBase = Literal["original", "dequantized"]


@dataclass(frozen=True)
class MergeRequest:
    """One merge.

    Attributes:
        adapter: a run folder, a checkpoint, or a PEFT LoRA folder.
        output: the folder to make.
        base: what is added to; `auto` tries both where there are both.
        dtype: of the merged weights; None leaves each as the base has it.
        max_shard_size: of the values in one file, as `parse_size` takes it.
        device: `auto`, `cpu` or `cuda`.
        verify: whether what was written is loaded and compared.
        verify_rows: on at most how many rows.
        base_model, revision, trained_base: what to believe in place of what the adapter says; see `find_adapter`.
        allow_unchanged: whether a merge that changes nothing, in a weight or in what the model says, is one.
        quantize: the 4-bit type to store the merged model in; None stores it as it is.
    """

    adapter: Path
    output: Path
    max_shard_size: str = "5GB"
    base: Literal["auto", "original", "dequantized"] = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    verify: bool = True
    verify_rows: int = 32
    base_model: str | None = None
    revision: str | None = None
    trained_base: str | None = None
    allow_unchanged: bool = False
    quantize: Literal["nf4", "fp4"] | None = None
