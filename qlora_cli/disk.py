"""Files and folders replaced whole: what was there or what was to be there, whenever a kill comes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.errors import RequestError, RunError

_PIECE = 1 << 22  # bytes in one write: a writer that is to stop is asked in between


@contextmanager
def telling_disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into a message; what was saved before stays as it was."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: could not be written: {error.strerror or error}") from None
    except Exception as error:
        # Libraries in Rust raise what they like, such as tokenizers a bare Exception; the number is always there.
        number = re.search(r"\(os error (\d+)\)$", str(error))
        if number is None:
            raise
        raise RunError(f"{path}: could not be written: {os.strerror(int(number[1]))}") from None


@contextmanager
def telling_read_errors() -> Iterator[None]:
    """Turn a failed look at a file or folder that was named, such as a name that is too long, into a message."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{error.filename or 'a file'}: cannot be read: {error.strerror or error}") from None


@contextmanager
def replacing_folder(target: Path, go_on: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A fresh folder to write into; when the block ends well it takes `target`'s name, whole, fsynced.

    `go_on` is called right before that, and may raise.

    A failure inside the block leaves `target` as it was. So does a kill, but for one between the two renames of a
    replacement: then the next call puts the old folder back before anything else.
    """
    staging = staging_folder(target)
    old = target.with_name(f".{target.name}.old")
    with telling_disk_errors(target):
        _put_back(old, target)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    try:
        with telling_disk_errors(target):
            yield staging
            sync_folder(staging)
            go_on()
            if target.exists():
                target.rename(old)
            staging.rename(target)
            sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what is told; the next call tries again
            _put_back(old, target)
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path, replaced: str) -> None:
    """Take away what kills left in `folder` of what was written or removed there, and put back what was half replaced.

    For a folder that nobody else writes into at the time. The names that are left in it are on disk afterwards: one
    that a kill came right after may not be, and what it takes the place of is deleted next.

    Args:
        replaced: a pattern for the folders in it that `replacing_folder` writes; no other is put back.

    Raises:
        RunError: if that cannot be done.
    """
    if not folder.is_dir():
        return
    with telling_disk_errors(folder):
        for old in list(folder.glob(f".{replaced}.old")):
            _put_back(old, old.with_name(old.name[1:].removesuffix(".old")))
        for left in [*folder.glob(".*.writing"), *folder.glob(".*.removing")]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        sync(folder)


def missing_folders(folder: Path) -> list[Path]:
    """The folders that have to be made for this one to be there, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and have the disk hold their names.

    That of the one above `folder` may be there and not be on disk, if a kill came right after it was made.

    Raises:
        RunError: if it cannot be made.
    """
    with telling_disk_errors(folder):
        missing = missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in dict.fromkeys([folder, folder.parent, *missing]):
            with contextlib.suppress(PermissionError):  # one may make a folder where one may not look
                sync(path.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder away at once: a kill leaves all of it, or nothing under its name. What cannot be removed stays."""
    gone = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def staging_folder(target: Path) -> Path:
    """Where `replacing_folder` writes what is to become `target`: beside it, so that a rename is all that is left."""
    return target.with_name(f".{target.name}.writing")


def _put_back(old: Path, target: Path) -> None:
    """Undo the first of two renames, if the second did not happen."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file whole: readers see the old one or the new one."""
    write_text(path, json_text(data))


def json_text(data: Mapping[str, Any]) -> str:
    """An object as our JSON files hold it: indented, letters as they are."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole."""
    staging = path.with_name(f".{path.name}.writing")
    with telling_disk_errors(path):
        write_bytes(staging, text.encode())
        sync(staging)
        staging.replace(path)
        sync(path.parent)


def append_text(path: Path, text: str) -> None:
    """Add to the end of a text file, in one write; all of it or, if that fails, nothing."""
    with telling_disk_errors(path):
        before = path.stat().st_size if path.exists() else 0
        try:
            _write(path, text.encode(), os.O_APPEND, lambda: None)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise


def write_bytes(path: Path, data: bytes | memoryview, go_on: Callable[[], None] = lambda: None) -> None:
    """Write a file piece by piece, and call `go_on` before each, which may raise. Raises OSError, too."""
    _write(path, data, os.O_TRUNC, go_on)


def _write(path: Path, data: bytes | memoryview, flag: int, go_on: Callable[[], None]) -> None:
    view = memoryview(data)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag | getattr(os, "O_BINARY", 0), 0o666)
    try:
        start = 0
        while start < len(view):
            go_on()
            start += os.write(descriptor, view[start : start + _PIECE])
    finally:
        os.close(descriptor)


def size_text(number: int) -> str:
    """A number of bytes as a person reads it."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number} bytes"


def sync_folder(folder: Path) -> None:
    """Have the disk hold a folder with all that is in it before going on."""
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, of other machines mostly, have no such thing for folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
