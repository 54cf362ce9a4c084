"""How a target's weights are held while it is scored: as they were in training, as they are, or as was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import SafetensorError, safe_open

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.source import AdapterSource
from qlora_cli.model.files import read_config
from qlora_cli.model.source import ModelSource
from qlora_cli.model.storage import StorageForm, WeightForm, describe_storage

Bits: TypeAlias = Literal[4, 8, 16]
_DType: TypeAlias = Literal["bfloat16", "float16", "float32"]

_DTYPES: dict[str, _DType] = {
    **{name: name for name in ("bfloat16", "float16", "float32")},
    **{"BF16": "bfloat16", "F16": "float16", "F32": "float32"},  # as safetensors writes them
}


def adapter_form(adapter: AdapterSource, bits: Bits | None) -> tuple[StorageForm, tuple[str, ...]]:
    """How an adapter's base is held, and what to say of it.

    Raises:
        ModelError: if the base's own files are quantised, and other bits are asked for.
    """
    trained = adapter.quantization
    if bits is None or bits == trained.bits:
        return trained, ()
    if (stored := read_config(adapter.base).get("quantization_config")) is not None:
        raise ModelError(_already_quantised(adapter.base, bits, _words(stored)))
    form = WeightForm(bits, compute_dtype=trained.compute_dtype)
    return form, (
        f"the adapter was trained over a base in another form ({describe_storage(trained)}) than it is scored over "
        f"({describe_storage(form)}): --bits {bits} asks for that",
    )


def model_form(
    config: Mapping[str, Any], bits: Bits | None, source: ModelSource
) -> tuple[StorageForm, tuple[str, ...]]:
    """How a whole model is held, and what to say of it.

    Args:
        config: its `config.json`.

    Raises:
        ModelError: if its files are quantised, and other bits are asked for.
    """
    dtype = _own_dtype(config, source)
    stored = config.get("quantization_config")
    if stored is None:
        return WeightForm(bits or 16, compute_dtype=dtype), ()
    words, known = _words(stored), _bits(stored)
    if bits is not None and bits != known:
        raise ModelError(_already_quantised(source, bits, words))
    return WeightForm(known, compute_dtype=dtype, stored=words), ()


def _already_quantised(source: ModelSource, bits: Bits, words: str) -> str:
    shown = source.name
    return (
        f"--bits {bits}: the weights of {shown} are stored quantised ({words}), and are scored as they are. Leave "
        "--bits out, or name the model that they were made from"
    )


def _bits(stored: object) -> Bits | None:
    """4 and 8 for what bitsandbytes stored; None for another way."""
    if isinstance(stored, dict):
        if stored.get("load_in_4bit") is True:
            return 4
        if stored.get("load_in_8bit") is True:
            return 8
    return None


def _words(stored: object) -> str:
    """A `quantization_config` in a few words."""
    if not isinstance(stored, dict):
        return str(stored)
    if _bits(stored) == 4:
        kind = str(stored.get("bnb_4bit_quant_type", "fp4")).upper()  # bitsandbytes' own default
        double = ", double quantisation" if stored.get("bnb_4bit_use_double_quant") is True else ""
        return f"{kind}{double}, {str(stored.get('bnb_4bit_compute_dtype', 'float32')).removeprefix('torch.')} compute"
    if _bits(stored) == 8:
        return "LLM.int8()"
    return str(stored.get("quant_method", "in an unknown way"))


def _own_dtype(config: Mapping[str, Any], source: ModelSource) -> _DType:
    """The dtype that the model says it has, or else that of its first weight."""
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and (name := section.get("dtype") or section.get("torch_dtype")):
            return _DTYPES.get(str(name).removeprefix("torch."), "float32")
    folder = Path(source.name)
    if folder.is_absolute() and (first := next(iter(sorted(folder.glob("*.safetensors"))), None)) is not None:
        try:
            with safe_open(first, framework="pt") as opened:
                kinds = [opened.get_slice(key).get_dtype() for key in opened.keys()]  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{first}: not a whole safetensors file: {error}") from None
        return next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), "float32")
    return "float32"  # transformers' own, where nothing is said
