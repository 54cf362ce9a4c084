"""Where encoded rows are kept from one run to the next.

`$XDG_CACHE_HOME/qlora`, else `~/.cache/qlora`: a folder per key, only ever there whole. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from qlora_cli.errors import OutputError

_UNUSED_DAYS = 30  # after which an entry makes room for another
_DAY = 86_400.0
_UNFINISHED = ".encoding-"

T = TypeVar("T")


def cache_folder() -> Path:
    """Where entries are; it need not exist. Raises RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()) / "qlora"


def cached(key: str | None, build: Callable[[Path], None], read: Callable[[Path], T | None]) -> T:
    """What `read` makes of the entry for `key`, which `build` fills if it is not there or not whole.

    Of several processes that want the same entry one builds it, and the others wait. Without a key, or where nothing
    can be kept, the entry is a folder that is gone once it has been read; what was opened stays open.

    Raises:
        OutputError: if the disk is full.
    """
    folder = _usable_folder() if key is not None else None
    try:
        return _throwaway(build, read) if folder is None or key is None else _kept(folder, key, build, read)
    except OSError as error:
        place = folder or Path(tempfile.gettempdir())
        raise OutputError(
            f"{place}: the encoded rows cannot be kept there: {error.strerror or error}. Make room, or set "
            f"{'XDG_CACHE_HOME' if folder else 'TMPDIR'} to a folder elsewhere."
        ) from error


def _usable_folder() -> Path | None:
    """The cache folder, made if need be; None where that cannot be, as in a container without a home."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows may be private
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _kept(folder: Path, key: str, build: Callable[[Path], None], read: Callable[[Path], T | None]) -> T:
    entry, lock = folder / key, folder / f"{key}.lock"
    with FileLock(lock):
        _touch(lock)  # or another process might take it for one of long ago
        found = read(entry)
        if found is None:
            prefix = f"{_UNFINISHED}{key}-"
            for left in folder.glob(f"{prefix}*"):  # by a killed process, since the lock is here
                _remove(left)
            with _staging(folder, prefix) as staging:
                build(staging)
                _remove(entry)
                staging.rename(entry)
            found = _whole(read(entry), entry)
            _make_room(folder, keep=entry)
        _touch(entry)
    return found


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody may just have deleted it
        os.utime(path)


def _throwaway(build: Callable[[Path], None], read: Callable[[Path], T | None]) -> T:
    with _staging(None, _UNFINISHED) as staging:
        build(staging)
        return _whole(read(staging), staging)


def _whole(found: T | None, entry: Path) -> T:
    if found is None:
        raise OSError(f"{entry}: what was just written there does not come back")
    return found


@contextlib.contextmanager
def _staging(folder: Path | None, prefix: str) -> Iterator[Path]:
    """A new folder, gone at the end unless it was renamed."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _make_room(folder: Path, keep: Path) -> None:
    """Delete what nobody has used for long, and what a killed process left."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            days = (time.time() - path.stat().st_mtime) / _DAY
            left = path.name.startswith(_UNFINISHED) and days > 1
            if path != keep and (days > _UNUSED_DAYS or left):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
