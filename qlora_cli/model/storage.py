"""In which form the base's weights are stored: in words, and on disk against what the recipe asks for."""

from __future__ import annotations

from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.recipe.schema import QuantizationSection

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def compute_dtype(section: QuantizationSection) -> torch.dtype:
    """The dtype of every product, and of all weights that stay unquantised."""
    return _DTYPES[section.compute_dtype]


def check_stored_quantization(stored: dict[str, Any] | None, section: QuantizationSection) -> None:
    """Refuse a base whose weights are stored quantised otherwise than the recipe says.

    transformers would take the stored form whatever is asked for, or read quantised integers as weights.

    Args:
        stored: `quantization_config` of the base's config.json, None for a plain base.

    Raises:
        ModelError: naming what is stored and what the recipe asks for.
    """
    if stored is None:
        return
    wanted = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": section.quant_type,
        "bnb_4bit_use_double_quant": section.double_quant,
    }
    found = {name: stored.get(name) for name in wanted}
    if section.bits != 4 or found != wanted:
        is_4bit = found["quant_method"] == "bitsandbytes" and found["load_in_4bit"]
        form = f"4-bit {found['bnb_4bit_quant_type']}, double_quant {found['bnb_4bit_use_double_quant']}"
        raise ModelError(
            f"base_model: its weights are stored quantised ({form if is_4bit else found['quant_method']}), and the "
            f"recipe's quantization asks for {describe_storage(section)}. Use the unquantised model, or set "
            "quantization to what is stored, if that is 4-bit by bitsandbytes"
        )


def describe_storage(section: QuantizationSection) -> str:
    """The section in words, such as `NF4, double quantisation, bfloat16 compute`."""
    if section.bits == 16:
        return f"unquantised, {section.compute_dtype}"
    double = ", double quantisation" if section.double_quant else ""
    return f"{section.quant_type.upper()}{double}, {section.compute_dtype} compute"
