"""Where the merged model goes: nothing there before, room enough, and one merge at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_cli.disk import replacing_folder, staging_folder
from qlora_cli.errors import OutputError

if sys.platform != "win32":  # where two merges into one folder are the user's to avoid
    import fcntl

# Left free beside what is written: small files, and what a file system keeps for itself.
_SPARE = 64 * 2**20


def check_output(output: Path) -> None:
    """Refuse a folder that must not or cannot be written, before anything is read.

    Raises:
        OutputError: if it holds anything, is no folder, cannot be made, or another merge is writing it.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output: {output} is a file; expected an empty folder, or nothing, there")
    if not output.name:
        raise OutputError(f"--output: {output} has no name of its own: name a folder that is to be made")
    existing = output
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"--output: {existing} is no folder, so {output} cannot be made")
    # It takes its name by being renamed: what must be writable is the folder that it stands in.
    writable = output.parent if existing == output else existing
    if not os.access(writable, os.W_OK | os.X_OK) or not os.access(existing, os.R_OK):
        raise OutputError(f"--output: {writable} cannot be written")
    if existing == output and any(output.iterdir()):
        raise OutputError(
            f"--output: {output} is not empty. Name another folder, or delete it: nothing is ever written over"
        )
    if _is_being_written(staging_folder(output)):
        raise OutputError(f"--output: another merge is writing {output} at this moment")


def check_space(output: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        needed: bytes that will stand on the disk at once.

    Raises:
        OutputError: with what is needed and what is free.
    """
    existing = output.resolve()
    while not existing.exists():
        existing = existing.parent
    # What a killed merge left is taken away first.
    stale = staging_folder(output)
    left = sum(file.stat().st_size for file in stale.rglob("*") if file.is_file()) if stale.is_dir() else 0
    free = shutil.disk_usage(existing).free + left
    if needed + _SPARE > free:
        raise OutputError(
            f"--output: {(needed + _SPARE) / 1e9:.2f} GB are needed to write {output}, and {free / 1e9:.2f} GB are "
            "free there. Free some, or name a folder on another disk; one --base in place of auto needs about half"
        )


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` whole if the block ends well and is gone if it does not.

    Raises:
        RunError: if the disk refuses.
    """
    with replacing_folder(output) as staging, _marked(staging):
        yield staging


@contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder itself: it needs no file, and is gone with the process however that ends."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_being_written(staging: Path) -> bool:
    if sys.platform == "win32" or not staging.is_dir():
        return False
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
