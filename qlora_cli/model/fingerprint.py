"""What tells one base model from another of the same name, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qlora_cli.model.files import CONFIG_FILE
from qlora_cli.model.source import ModelSource, load_config, reading

HUB_COMMIT = "commit"  # what the fingerprint of a hub model begins with
UNKNOWN_COMMIT = f"{HUB_COMMIT} None"
_SAMPLES = 64  # of a file: any other training of the same model changes nearly every weight
_SAMPLE_BYTES = 4096


def base_fingerprint(source: ModelSource) -> str:
    """The commit of a hub model; of a folder, SHA-256 over its configuration, its code and samples of its safetensors
    files.

    Raises:
        ModelError: if it cannot be read.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    folder = Path(source.name)
    if not folder.is_absolute():
        return f"{HUB_COMMIT} {getattr(load_config(source), '_commit_hash', None)}"
    digest = hashlib.sha256()
    with reading("weights", source):
        digest.update((folder / CONFIG_FILE).read_bytes())
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            _add_samples(digest, file)
    return digest.hexdigest()


def _add_samples(digest: hashlib._Hash, file: Path) -> None:
    """The file's beginning, which says what is in it, and pieces of the rest, evenly."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        for number in range(_SAMPLES):
            opened.seek(size * number // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
