"""The manifest of a checkpoint: what every file in it is, so that damage is seen wherever it is.

    {"format_version": 2, "files": {"state.json": {"bytes": 812, "sha256": "…"}, …}, "sha256": "…"}

The last field is the SHA-256 of the manifest without it, as it is written: so a bit that flips in the manifest is
seen, too. What else lies in the folder is no matter: file browsers and file servers leave files of their own there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

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


class FaultKind(Enum):
    """What a fault means for going on: only what is damaged is lost."""

    DAMAGED = "damaged"
    OTHER_VERSION = "of another version"  # which can go on from it
    UNREADABLE = "unreadable"  # now; it may be whole


@dataclass(frozen=True)
class Fault:
    """What is wrong with a checkpoint, as it follows on its name."""

    text: str
    kind: FaultKind = FaultKind.DAMAGED

    def __str__(self) -> str:
        return self.text


class _Entry(NamedTuple):
    bytes: int
    sha256: str


def find_fault(folder: Path, *, hashes: bool = True) -> Fault | None:
    """What is wrong with a checkpoint's files; None if nothing is.

    Args:
        hashes: whether to read the files; if not, their names and sizes are looked at alone.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder.is_symlink() or (folder / MANIFEST).is_symlink():  # to where nothing is mounted now, for one
            return _unreadable(MANIFEST, error)
        return Fault(f"has no {MANIFEST}")
    except OSError as error:
        return _unreadable(MANIFEST, error)
    try:
        text = data.decode()
        manifest = json.loads(text)
        version, signature = manifest["format_version"], manifest.pop(_SELF, None)
        signed = text == _signed(manifest)
        if version != FORMAT_VERSION and (signature is None or signed):
            told = f"has format version {version}, this is {FORMAT_VERSION}: another version of this tool wrote it"
            return Fault(told, FaultKind.OTHER_VERSION)
        files = manifest["files"].items()
        entries = {_within(name): _Entry(int(entry["bytes"]), entry["sha256"]) for name, entry in files}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return Fault(f"{MANIFEST} is damaged")
    if not signed:
        return Fault(f"{MANIFEST} is damaged")
    return _fault_of_sizes(folder, entries) or (_fault_of_contents(folder, entries) if hashes else None)


def _within(name: str) -> str:
    """The name of a file in the folder; ValueError if it leads out of it."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise ValueError(name)
    return name


def _fault_of_sizes(folder: Path, expected: Mapping[str, _Entry]) -> Fault | None:
    for name, entry in sorted(expected.items()):
        try:
            size = _size(folder / name)
        except (FileNotFoundError, NotADirectoryError) as error:
            places = (folder / name, *(folder / parent for parent in PurePosixPath(name).parents[:-1]))
            if link := next((place for place in places if place.is_symlink()), None):  # the folder's manifest was read
                return _unreadable(link.name, error)
            return Fault(f"{name} is missing")
        except OSError as error:
            return _unreadable(name, error)
        if size != entry.bytes:
            return Fault(f"{name} has {size:,} bytes, {entry.bytes:,} were written")
    return None


def _fault_of_contents(folder: Path, expected: Mapping[str, _Entry]) -> Fault | None:
    for name, entry in expected.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return _unreadable(name, error)
        if found != entry.sha256:
            return Fault(f"{name} is not what was written: its SHA-256 is another")
    return None


def _unreadable(name: str, error: OSError) -> Fault:
    return Fault(f"has a file that cannot be read, {name}: {error.strerror or error}", FaultKind.UNREADABLE)


def _signed(manifest: Mapping[str, Any]) -> str:
    signature = hashlib.sha256(json_text(manifest).encode()).hexdigest()
    return json_text({**manifest, _SELF: signature})


def _size(file: Path) -> int:
    return file.stat().st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
