"""Where a merge may write."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_cli.errors import OutputError
from qlora_cli.recipe.data_files import shown_path


def check_output(output: Path) -> None:
    """Refuse a folder that must not or cannot be written, before anything is read.

    Raises:
        OutputError: if it is a file, is not empty, or cannot be made: it is written beside its place, and renamed.
    """
    shown = shown_path(output)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        kind = "a symbolic link" if output.is_symlink() else "a file"
        raise OutputError(f"--output: {shown} is {kind}; expected a folder that is empty, or nothing, there")
    try:
        if output.exists() and any(output.iterdir()):
            raise OutputError(f"--output: {shown} is not empty; name another folder, or delete it")
    except OSError as error:
        raise OutputError(f"--output: {shown} cannot be read: {error.strerror or error}") from None
    existing = output.absolute().parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"--output: {shown_path(existing)} is no folder, so {shown} cannot be made")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"--output: {shown_path(existing)} cannot be written, so {shown} cannot be made there")
