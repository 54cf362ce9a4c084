"""What a model folder holds beside its weights, carried over from base and adapter.

Configurations are edited as JSON, never read through a class: what this version of transformers does not know stays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_cli.disk import json_text
from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.source import AdapterSource, read_adapter_json
from qlora_cli.merging.folder.stop_tokens import write_generation_config
from qlora_cli.merging.folder.tokenizer_files import CarriedTokenizer, carry_tokenizer
from qlora_cli.model.files import CONFIG_FILE, read_json_object

# Of a processor or of sentence-transformers; they say nothing of weights.
_OTHERS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
    "*_Normalize/config.json",
)
_LICENCES = ("licen[cs]e*", "notice*", "copying*", "use_policy*")
_TEXTS = ("", ".txt", ".md", ".rst")


@dataclass(frozen=True)
class Surroundings:
    """What was written, by name; the remarks are whole sentences for the screen and the model's README."""

    files: tuple[str, ...]
    tokenizer_from: str  # `the adapter`, `the base`, or "" where neither has one
    remarks: tuple[str, ...] = ()


def carry_over(
    base_folder: Path,
    adapter: AdapterSource,
    staging: Path,
    *,
    dtype: str | None,
    config_changes: Mapping[str, Any] | None = None,
) -> Surroundings:
    """Write everything but weights and README into `staging`: configuration, generation configuration, tokenizer with
    its chat template, the model's own code, licence files.

    Args:
        dtype: `bfloat16`, `float16` or `float32`, which the configuration shall name; None leaves it as it is.
        config_changes: values of `config.json` that the merge changes, such as `tie_word_embeddings`, `vocab_size`,
            `architectures` and `num_labels`.

    Raises:
        ModelError: if a configuration or the tokenizer cannot be read. OSError passes through.
    """
    config = read_json_object(base_folder / CONFIG_FILE)
    task = read_adapter_json(adapter.folder).get("task_type")
    edited = edit_config(config, dtype=dtype, changes=config_changes or {})
    _write_json(staging / CONFIG_FILE, edited)
    _copy_code(base_folder, staging, config)
    _copy_matching(base_folder, staging, _OTHERS)
    _copy_licences(base_folder, staging)
    carried = carry_tokenizer(base_folder, adapter, staging)
    tokenizer = _load(adapter, carried, staging) if carried.origin else None
    remarks = list(carried.remarks)
    if tokenizer is not None:
        remarks += _beyond_the_vocabulary(tokenizer, edited)
        if task == "SEQ_CLS" and edited.get("pad_token_id") is None and tokenizer.pad_token_id is not None:
            # A decoder that classifies finds the last word of a padded text by it.
            edited["pad_token_id"] = tokenizer.pad_token_id
            _write_json(staging / CONFIG_FILE, edited)
    own = carried.origin == "the adapter" or adapter.run is not None
    generates = task in (None, "CAUSAL_LM")
    remarks += write_generation_config(
        base_folder, staging, edited, tokenizer if generates else None, ends_with_eos=own
    )
    files = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
    return Surroundings(tuple(files), carried.origin, tuple(remarks))


def edit_config(config: Mapping[str, Any], *, dtype: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The merged model's `config.json`: the base's, with no word of quantisation, of the new dtype, and changed.

    A value that the base has within the configuration of its text part is changed there.
    """
    edited: dict[str, Any] = json.loads(json.dumps(config))  # a copy, whole
    edited.pop("_name_or_path", None)  # where somebody once had it
    parts = [edited, *(part for name, part in edited.items() if name.endswith("_config") and isinstance(part, dict))]
    for part in parts:
        for name in ("quantization_config", "_pre_quantization_dtype"):
            part.pop(name, None)
        if dtype is not None:
            part.update({name: dtype for name in ("dtype", "torch_dtype") if name in part})
    if dtype is not None and "torch_dtype" not in edited:
        edited["dtype"] = dtype
    for name, value in changes.items():
        if name == "num_labels":
            _set_labels(edited, int(value))
            continue
        holders = [part for part in (edited, edited.get("text_config")) if isinstance(part, dict) and name in part]
        for holder in holders or [edited]:
            holder[name] = value
    return edited


def _set_labels(config: dict[str, Any], count: int) -> None:
    """The number of labels is that of their names; those that the base has stay if there are as many."""
    names = config.get("id2label")
    if isinstance(names, dict) and len(names) == count:
        return
    config.pop("num_labels", None)
    config["id2label"] = {str(label): f"LABEL_{label}" for label in range(count)}
    config["label2id"] = {f"LABEL_{label}": label for label in range(count)}


def _load(adapter: AdapterSource, carried: CarriedTokenizer, staging: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer as a client of the merged folder gets it; None if that needs code which may not run here."""
    trusted = adapter.base.trust_remote_code
    config = staging / "tokenizer_config.json"
    if not trusted and config.is_file() and read_json_object(config).get("auto_map"):
        return None
    tokenizer: PreTrainedTokenizerBase
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(staging), trust_remote_code=trusted)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{carried.folder}: the tokenizer cannot be read: {reason[:400]}") from None
    return tokenizer


def _beyond_the_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any]) -> list[str]:
    part = config.get("text_config")
    rows = (part if isinstance(part, dict) and "vocab_size" in part else config).get("vocab_size")
    largest = max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder])
    if not isinstance(rows, int) or largest < rows:
        return []
    return [
        f"the tokenizer has tokens up to id {largest:,}, but the model has embeddings for {rows:,} tokens: a text with "
        "one of the others cannot be read"
    ]


def _copy_code(base_folder: Path, staging: Path, config: Mapping[str, Any]) -> None:
    """The model's own Python files, where its configuration or its tokenizer's names some that lie beside it."""
    named = [config.get("auto_map")]
    file = base_folder / "tokenizer_config.json"
    if file.is_file():
        named.append(read_json_object(file).get("auto_map"))
    if any(named):
        _copy_matching(base_folder, staging, ("*.py", "*/*.py"))


def _copy_matching(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            _copy(file, target / file.relative_to(source))


def _copy_licences(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        is_licence = any(fnmatch(file.name.lower(), pattern) for pattern in _LICENCES)
        if is_licence and file.suffix.lower() in _TEXTS:
            _copy(file, target / file.name)


def _copy(file: Path, target: Path) -> None:
    """The bytes alone: in the hub's cache these are links to files that nobody may write."""
    if file.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json_text(data), encoding="utf-8")
