"""An adapter on the hub, fetched as far as it is needed: a repository that holds no model, but what training added."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE

# The tokenizer and its templates, which are small.
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def fetch_adapter(name: str, revision: str | None) -> Path | None:
    """The hub's snapshot of an adapter, with its tokenizer if it has one; None if this is the name of none.

    Whatever else is wrong with the name is told by whoever asks for a model of that name.

    Raises:
        ModelError: if it has its weights only as pickle.
    """
    try:
        folder = Path(hf_hub_download(name, CONFIG_FILE, revision=revision)).parent
    except (EntryNotFoundError, OSError, ValueError):  # no such file, no such name, no answer; no name of a hub
        return None
    try:
        hf_hub_download(name, WEIGHTS_FILE, revision=folder.name)
    except EntryNotFoundError:
        raise ModelError(
            f"TARGET: {name} (revision {revision or 'main'}) has an {CONFIG_FILE}, but its {WEIGHTS_FILE} cannot be "
            "had. Pickle (.bin) can run code when read, and is refused: if that is what it has, convert it with PEFT"
        ) from None
    if not is_offline_mode():
        # Without them, the base's tokenizer serves.
        with suppress(EntryNotFoundError, OSError):
            snapshot_download(name, revision=folder.name, allow_patterns=list(_BESIDE))
    return folder
