"""The generation configuration: what the merged model was taught to stop with has to stop it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.end_of_turn import template_end
from qlora_cli.disk import json_text
from qlora_cli.model.files import read_json_object

GENERATION_FILE = "generation_config.json"

_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# What transformers takes from the model's configuration where there is no file for it.
_FROM_CONFIG = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


def write_generation_config(
    base_folder: Path,
    staging: Path,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    ends_with_eos: bool,
) -> list[str]:
    """The base's `generation_config.json`, byte for byte if it stops at what ends an answer, else with that added.

    Args:
        config: the merged model's `config.json`, which says where to stop if the base has no such file.
        tokenizer: the merged model's; None for one that generates nothing, or whose tokenizer is not to be had.
        ends_with_eos: whether the adapter was trained on texts that end with the tokenizer's eos.

    Returns:
        What was added, as remarks.

    Raises:
        ModelError: if the base's file is no JSON object.
    """
    source = base_folder / GENERATION_FILE
    data = read_json_object(source) if source.is_file() else None
    added = {}
    if tokenizer is not None and (data is not None or _generates(config)):
        stops = _ids(_of_text(config, "eos_token_id") if data is None else data.get("eos_token_id"))
        added = {
            token: why for token, why in _wanted(tokenizer, ends_with_eos=ends_with_eos).items() if token not in stops
        }
    if not added:
        if data is not None:
            shutil.copyfile(source, staging / GENERATION_FILE)
        return []
    if data is None:
        kept = {name: _of_text(config, name) for name in _FROM_CONFIG}
        data = {name: value for name, value in kept.items() if value is not None}
    ids = [*stops, *added]
    data["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    (staging / GENERATION_FILE).write_text(json_text(data), encoding="utf-8")
    return list(added.values())


def _wanted(tokenizer: PreTrainedTokenizerBase, *, ends_with_eos: bool) -> dict[int, str]:
    """What ends an answer: token ids, and the remark that goes with adding each."""
    wanted: dict[int, str] = {}
    eos = tokenizer.eos_token_id
    if (end := template_end(tokenizer)) is not None:
        wanted[end] = _remark(tokenizer, end, "the chat template ends an answer with")
    if ends_with_eos and isinstance(eos, int):
        wanted.setdefault(eos, _remark(tokenizer, eos, "the tokenizer ends a text with"))
    return wanted


def _remark(tokenizer: PreTrainedTokenizerBase, token: int, what: str) -> str:
    text = tokenizer.convert_ids_to_tokens(token)
    return f"{what} {text} ({token}), at which the base does not stop: added to eos_token_id in {GENERATION_FILE}"


def _generates(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith(_WRITERS) for name in config.get("architectures") or [])


def _of_text(config: Mapping[str, Any], name: str) -> Any:
    """A value of the configuration, or of that of its text part."""
    part = config.get("text_config")
    value = part.get(name) if isinstance(part, dict) else None
    return config.get(name) if value is None else value


def _ids(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
