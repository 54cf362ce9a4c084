"""In which form the base's weights are stored: in words, and on disk against what the recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from qlora_cli.errors import ModelError
from qlora_cli.recipe.schema import QuantizationSection

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class WeightForm:
    """How weights that are only read are held: also in ways that no recipe trains over.

    Attributes:
        bits: 4 as `quant_type` and `double_quant` say; 8 is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339); 16 is
            unquantised, whatever the dtype; None, where the files hold them in a way of their own, which is kept.
        compute_dtype: dtype of every product, and of all weights that stay unquantised.
        stored: what the files hold quantised, in words, if they do: it speaks for itself.
    """

    bits: Literal[4, 8, 16] | None
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    stored: str | None = None


# What a recipe asks for is a form, too.
StorageForm: TypeAlias = QuantizationSection | WeightForm


def compute_dtype(section: StorageForm) -> torch.dtype:
    """The dtype of every product, and of all weights that stay unquantised."""
    return _DTYPES[section.compute_dtype]


def check_stored_quantization(stored: dict[str, Any] | None, section: StorageForm) -> None:
    """Refuse a base whose weights are stored quantised otherwise than the recipe says, but for a form that takes them
    as they are.

    transformers would take the stored form whatever is asked for, or read quantised integers as weights.

    Args:
        stored: `quantization_config` of the base's config.json, None for a plain base.

    Raises:
        ModelError: naming what is stored and what the recipe asks for.
    """
    if stored is None or (isinstance(section, WeightForm) and section.stored is not None):
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


def describe_storage(section: StorageForm) -> str:
    """The section in words, such as `NF4, double quantisation, bfloat16 compute`."""
    if isinstance(section, WeightForm) and section.stored is not None:
        return f"{section.stored}, as stored"
    if section.bits == 16:
        return f"unquantised, {section.compute_dtype}"
    if section.bits == 8:
        return f"LLM.int8(), {section.compute_dtype} compute"
    double = ", double quantisation" if section.double_quant else ""
    return f"{section.quant_type.upper()}{double}, {section.compute_dtype} compute"
