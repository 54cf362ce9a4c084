"""The manifest of a checkpoint: what every file in it is, so that damage is seen wherever it is.

    {"format_version": 2, "files": {"state.json": {"bytes": 812, "sha256": "…"}, …}, "sha256": "…"}

The last field is the SHA-256 of the manifest without it, as it is written: so a bit that flips in the manifest is
seen, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_cli.disk import json_text

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_SELF = "sha256"


def manifest_text(files: Mapping[str, bytes]) -> str:
    """The manifest of these files, by their names within the folder."""
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(files.items())
    }
    return _signed({"format_version": FORMAT_VERSION, "files": entries})


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except OSError:
        return f"has no {MANIFEST}"
    except ValueError:
        return f"{MANIFEST} is damaged"
    try:
        manifest = json.loads(text)
        version, signature, expected = manifest["format_version"], manifest.pop(_SELF, None), dict(manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    if version != FORMAT_VERSION and (signature is None or text == _signed(manifest)):
        return f"has format version {version}, this is {FORMAT_VERSION}: another version of this tool wrote it"
    if text != _signed(manifest):
        return f"{MANIFEST} is damaged"
    return _fault_of_files(folder, expected)


def _fault_of_files(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> str | None:
    try:
        sizes = _sizes(folder)
        for name in sorted(expected.keys() | sizes.keys()):
            if name not in sizes:
                return f"{name} is missing"
            if name not in expected:
                return f"{name} does not belong there"
            if sizes[name] != expected[name]["bytes"]:
                return f"{name} has {sizes[name]:,} bytes, {expected[name]['bytes']:,} were written"
        for name, entry in expected.items():
            if _sha256(folder / name) != entry["sha256"]:
                return f"{name} is not what was written: its SHA-256 is another"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _signed(manifest: Mapping[str, Any]) -> str:
    signature = hashlib.sha256(json_text(manifest).encode()).hexdigest()
    return json_text({**manifest, _SELF: signature})


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
