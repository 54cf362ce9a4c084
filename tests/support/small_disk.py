"""Disks of a given size, in memory, for whoever may mount one: in a namespace of its own, anybody may."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ALONE = ("unshare", "--map-root-user", "--mount")  # before a command that mounts


@cache
def may_mount() -> bool:
    """Whether a command that mounts works here, in a namespace of its own."""
    try:
        tried = subprocess.run([*ALONE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    except OSError:
        return False
    return tried.returncode == 0


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of so many bytes at `folder`; what is given makes it another size."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield lambda larger: _mount("-o", f"remount,size={larger}", str(folder))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
