"""The README of an adapter that was made from others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.merging.folder.markdown import code, fenced, harmless, is_hub_name, plain, table
from qlora_cli.merging.folder.model_card import describe_base, loading_class
from qlora_cli.model.source import ModelSource


@dataclass(frozen=True)
class CardPart:
    """One adapter that went into it.

    Attributes:
        ranks: all that its layers have, in order.
        layers: how many it adapts.
        sha256: of its `adapter_model.safetensors`, in hex.
    """

    name: str
    weight: float
    ranks: Sequence[int]
    layers: int
    sha256: str


def render_adapter_card(
    title: str, base: ModelSource, task_type: str | None, parts: Sequence[CardPart], remarks: Sequence[str] = ()
) -> str:
    """The README, front matter and text.

    Args:
        task_type: PEFT's name for the task.
        remarks: whole sentences.
    """
    name, revision = describe_base(base, Path(base.name))
    data: dict[str, Any] = {"base_model": name, "base_model_relation": "adapter"} if is_hub_name(name) else {}
    data |= {"library_name": "peft", "tags": ["qlora", "lora", "combined"]}
    loader = loading_class(task_type)
    arguments = [json.dumps(name), *([f"revision={json.dumps(revision)}"] if revision else [])]
    at = f", revision {code(revision)}" if revision else ""
    rows = [
        (
            code(part.name),
            f"{part.weight:g}",
            str(part.ranks[0]) if len(part.ranks) == 1 else f"{part.ranks[0]} to {part.ranks[-1]}",
            str(part.layers),
            code(part.sha256),
        )
        for part in parts
    ]
    sections = [
        f"---\n{harmless(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))}---",
        f"# {plain(title)}",
        f"A LoRA adapter for {code(name)}{at}: the sum of these, each times its weight.",
        table(("Adapter", "Weight", "Rank", "Layers", "SHA-256 of adapter_model.safetensors"), rows),
        "The sum is exact: ranks are set side by side, and weights and scales are in B, in float32.",
        *(["\n".join(f"- {plain(remark)}" for remark in remarks)] if remarks else []),
        "## How to load it",
        fenced(
            "from peft import PeftModel\n"
            f"from transformers import {loader}\n\n"
            f"base = {loader}.from_pretrained({', '.join(arguments)})\n"
            'model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on the hub',
            "python",
        ),
    ]
    return "\n\n".join(sections) + "\n"
