"""Which base model, and what of it can be read without its weights: tokenizer and configuration.

Light, as transformers goes: what needs model classes or bitsandbytes is in `base`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.errors import HubUnreachableError, ModelError
from qlora_cli.hub import is_unreachable
from qlora_cli.recipe.paths import model_problem

# What the hub's client and the readers below it raise for an absent, unreachable or damaged file.
_LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError, StrictDataclassError
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """Which model: a hub name or a local folder, a revision, and whether its own code may run.

    `asked_with` is the setting or the argument that it was named with, for messages.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    asked_with: str = field(default="base_model", compare=False)

    def arguments(self) -> dict[str, Any]:
        """As every `from_pretrained` takes them."""
        return {
            "pretrained_model_name_or_path": self.name,
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }


def load_tokenizer(base: ModelSource) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token.

    Raises:
        ModelError: if it cannot be found or read.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    tokenizer: PreTrainedTokenizerBase
    with reading("tokenizer", base):
        tokenizer = AutoTokenizer.from_pretrained(**base.arguments())
    return _with_padding(tokenizer)


def load_adapter_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with an adapter, with a padding token.

    Raises:
        ModelError: if it cannot be read.
    """
    tokenizer: PreTrainedTokenizerBase
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder.absolute()), trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise ModelError(f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:400]}") from None
    return _with_padding(tokenizer)


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by token, so any token serves; eos is in every vocabulary.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_config(base: ModelSource) -> PreTrainedConfig:
    """The model's configuration, without its weights: what it can read is known before it is loaded.

    Raises:
        ModelError: if it cannot be found or read.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    config: PreTrainedConfig
    with reading("configuration", base):
        config = AutoConfig.from_pretrained(**base.arguments())
    return config


def context_length(config: PreTrainedConfig) -> int | None:
    """Positions the model was built for, where its configuration says."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def embedding_rows(config: PreTrainedConfig) -> int:
    """Rows of the input embedding: one more than the largest token id it can look up."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ModelError(f"base_model: a {config.model_type} model has no vocabulary, so it is no language model")
    return size


@contextmanager
def reading(part: str, base: ModelSource, remark: Callable[[], str] = str) -> Iterator[None]:
    """Turn whatever keeps `part` of the base from being read into an error of ours; `remark()` is put at its end."""
    _check_folder(base)
    try:
        yield
    except _LOAD_ERRORS as error:
        kind = HubUnreachableError if _no_answer(part, base, error) else ModelError
        raise kind(_cannot_load(part, base, error) + remark()) from None


def _no_answer(part: str, base: ModelSource, error: Exception) -> bool:
    """Whether this is the hub's silence, and nothing against the model."""
    if Path(base.name).is_absolute():
        return False
    if part == "tokenizer" and is_offline_mode():
        # transformers takes one that is not in the cache for one that is broken.
        with suppress(ValueError):  # not a name that a hub would have
            if try_to_load_from_cache(base.name, "tokenizer.json", revision=base.revision) is None:
                return True
    return is_unreachable(error)


def _check_folder(base: ModelSource) -> None:
    """Tell a mistyped path from a hub name before the hub is asked."""
    path = Path(base.name)
    if not path.is_absolute():
        return
    if problem := model_problem(path, str(path)):
        raise ModelError(f"{base.asked_with}: {problem}")
    if list(path.glob("*.bin")) and not list(path.glob("model*.safetensors")):
        raise ModelError(f"{base.asked_with}: {path} {_ONLY_PICKLE}")


_ONLY_PICKLE = "has its weights only as pickle (.bin), which can run code when read. Convert it to safetensors first"


def _cannot_load(part: str, base: ModelSource, error: Exception) -> str:
    reason = " ".join(str(error).split())
    local = Path(base.name).is_absolute()
    # transformers' advice is to allow pickle then; offline it says so, too, of weights that are not in the cache.
    if "use_safetensors=True" in reason and (local or not is_offline_mode()):
        return f"{base.asked_with}: {base.name} {_ONLY_PICKLE}"
    if local:
        return f"{base.asked_with}: the {part} in {base.name} cannot be read: {reason}"
    return (
        f"{base.asked_with}: the {part} of {base.name} (revision {base.revision or 'main'}) cannot be had from the "
        f"hub, and there is no such folder here. Check the name and the network (a private or gated model needs `hf "
        f"auth login`), or give a local folder. The hub client said: {reason[:400]}"
    )
