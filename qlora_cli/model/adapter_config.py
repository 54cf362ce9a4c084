"""`adapter_config.json` of a PEFT LoRA: read, checked, and refused where it asks for what would be got wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def read_adapter_config(folder: Path, supported: Collection[str] = ()) -> dict[str, Any]:
    """The parsed `adapter_config.json`.

    Args:
        supported: fields beyond those of plain LoRA that the caller applies.

    Raises:
        ModelError: if there is none, it is no LoRA's, a field has another type than PEFT gives it, or one is set that
            the caller does not apply.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {CONFIG_FILE}; expected an adapter folder") from None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError(f"{file}: expected peft_type LORA, got {kind}")
    wrong = [
        f"{file}: expected {expected} for {field}, got {config.get(field)!r}"
        for field, (expected, fits) in _TYPES.items()
        if not (fits(config[field]) if config.get(field) is not None else field not in _NEEDED)
    ]
    if wrong:
        raise ModelError("\n".join(wrong))
    unknown = [
        name for name, value in config.items() if name not in _KNOWN and name not in supported and value not in _EMPTY
    ]
    if unknown:
        raise ModelError(f"{file}: uses {', '.join(unknown)}, which this version cannot apply")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        # These took a part of the base away when training began, and would have to do so again here.
        raise ModelError(
            f"{file}: was trained from a changed base (init_lora_weights: {config['init_lora_weights']}), which this "
            "version cannot rebuild. Convert it with PEFT first: save_pretrained(…, path_initial_model_for_weight_"
            "conversion=…)"
        )
    return config


def rank_of(config: dict[str, Any], path: str) -> int:
    """The rank that the config gives the layer at this module path."""
    return int(_by_pattern(config, "rank_pattern", path, config["r"]))


def alpha_of(config: dict[str, Any], path: str) -> float:
    """The alpha that the config gives the layer at this module path."""
    return float(_by_pattern(config, "alpha_pattern", path, config["lora_alpha"]))


def scale_of(config: dict[str, Any], path: str) -> float:
    """What B A of this layer is multiplied by: alpha / rank, or alpha / √rank if it is rank-stabilised."""
    rank = rank_of(config, path)
    return alpha_of(config, path) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: dict[str, Any], name: str, path: str, default: float) -> float:
    for key, value in (config.get(name) or {}).items():
        # PEFT takes the keys as expressions for the end of the path.
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return float(value)
    return default


# Fields of PEFT's LoraConfig that are applied here, or that change nothing about a trained adapter. Any other one that
# is set makes a layer of another kind: better refused than read as plain LoRA.
_KNOWN = {
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
    "eva_config",  # how A was drawn
    "megatron_core",  # a module's name, of no effect without megatron_config
    "qalora_group_size",  # of no effect without use_qalora
    "ensure_weight_tying",  # of what modules_to_save would name
}
_EMPTY: tuple[object, ...] = (None, False, {}, [], "none")
# Values of init_lora_weights that leave the base as it is.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")


def _is_number(value: object) -> bool:
    # Python's JSON has NaN, Infinity and integers of any length.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    # JSON can escape half a surrogate pair, which is no character.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _is_expression(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
        return False


def _is_inner(value: object) -> bool:
    """Whether it is an expression by itself and as a part of a longer one."""
    return _is_expression(value) and _is_expression(f"x({value})")


def _is_indices(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _is_pattern(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_is_inner(key) and fits(item) for key, item in value.items())


# What the fields that are applied look like: what is said to be expected, and whether a value is that. An absent field
# or null is its default, but for those that have none.
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
_TEXTS = ("task_type", "base_model_name_or_path", "revision")
_NEEDED = ("r", "lora_alpha")
_LARGEST = 2**53
_NAMES = "a list of names or an expression"
_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a positive integer", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number", _is_number),
    "rank_pattern": ("ranks by expression", lambda value: _is_pattern(value, _is_rank)),
    "alpha_pattern": ("numbers by expression", lambda value: _is_pattern(value, _is_number)),
    "target_modules": (_NAMES, lambda value: _is_words(value) or _is_expression(value)),
    "exclude_modules": (_NAMES, lambda value: _is_words(value) or _is_expression(value)),
    "layers_to_transform": ("layer numbers", lambda value: _is_indices([value]) or _is_indices(value)),
    "layers_pattern": ("names", lambda value: all(map(_is_inner, value if isinstance(value, list) else [value]))),
    "modules_to_save": ("a list of names", _is_words),
    "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    **dict.fromkeys(_FLAGS, ("true or false", _is_flag)),
    **dict.fromkeys(_TEXTS, ("text", _is_text)),
    "trainable_token_indices": (
        "token numbers, or a list of them for each module",
        lambda value: _is_indices(value) or (isinstance(value, dict) and all(map(_is_indices, value.values()))),
    ),
}
