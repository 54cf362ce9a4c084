"""Where the merged model goes: nothing there before, room enough, and one merge at a time."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qlora_cli.disk import staging_folder, sync, sync_folder, telling_disk_errors
from qlora_cli.errors import OutputError
from qlora_cli.recipe.paths import expand_home

if sys.platform != "win32":  # where two merges into one folder are the user's to avoid
    import fcntl

# Left free beside what is written: small files, and what a file system keeps for itself.
_SPARE = 64 * 2**20
# How a system says that there is something where a folder should go.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def check_output(given: Path) -> Path:
    """Refuse a folder that must not or cannot be written, before anything is read; returns its absolute path.

    Raises:
        OutputError: if it holds anything, is no folder, is the current one, cannot be made, or another merge is writing
            it.
    """
    output = _resolved(given)
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output: {output} is a file; expected an empty folder, or nothing, there")
    existing = _existing(output)
    if not existing.is_dir():
        raise OutputError(f"--output: {existing} is no folder, so {output} cannot be made")
    if existing == output and any(output.iterdir()):
        raise OutputError(
            f"--output: {output} is not empty. Name another folder, or delete it: nothing is ever written over"
        )
    if existing == output == Path.cwd():
        raise OutputError(
            f"--output: {output} is the current folder, which would be replaced. Name one that is to be made in it"
        )
    # It takes its name by being renamed: what must be writable is the folder that it stands in.
    writable = output.parent if existing == output else existing
    if not os.access(writable, os.W_OK | os.X_OK):
        raise OutputError(f"--output: {writable} cannot be written, so {output} cannot be made there")
    if _is_being_written(staging_folder(output)):
        raise OutputError(_busy(output))
    return output


def check_space(output: Path, needed: int, *, saving: str = "") -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        needed: bytes that will stand on the disk at once.
        saving: how to need less, as the end of the message.

    Raises:
        OutputError: with what is needed and what is free.
    """
    # What a killed merge left is taken away first.
    stale, left = staging_folder(output), 0
    if stale.is_dir():
        left = sum(file.stat().st_size for file in stale.rglob("*") if file.is_file())
    free = shutil.disk_usage(_existing(output)).free + left
    if needed + _SPARE > free:
        raise OutputError(
            f"--output: {_size(needed + _SPARE)} are needed to write {output}, and {_size(free)} are free there. Free "
            f"some, or name a folder on another disk{saving}"
        )


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` whole if the block ends well and is gone if it does not.

    A kill leaves it beside `output`, under another name; the next one to write there takes it away.

    Args:
        output: as `check_output` gives it.

    Raises:
        OutputError: if another merge is writing there, or something came to be at `output` meanwhile.
        RunError: if the disk refuses.
    """
    staging = staging_folder(output)
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        with telling_disk_errors(output), ExitStack() as held:
            output.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_claimed(staging, output))
            try:
                yield staging
                sync_folder(staging)
                _take_name(staging, output)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            sync(output.parent)
    except BaseException:
        for folder in made:  # the innermost first; what holds something else by now stays
            with suppress(OSError):
                folder.rmdir()
        raise


def _resolved(given: Path) -> Path:
    """The absolute path, with links followed."""
    try:
        output = Path(expand_home(str(given))).resolve()
        if not output.name:
            raise ValueError("it has no name of its own")
        with suppress(FileNotFoundError, NotADirectoryError):
            staging_folder(output).lstat()  # the longest name that will be made there
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"--output: {given} cannot be a folder: {reason}") from None
    return output


def _existing(path: Path) -> Path:
    """The path itself, or the innermost folder around it that is there."""
    while not path.exists():
        path = path.parent
    return path


def _give_way(output: Path) -> None:
    """Take an empty folder away now, where it is known in the end that it can be."""
    try:
        output.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OutputError(
                f"--output: {output} is a mount point, which cannot be replaced. Name a folder that is to be made in "
                f"it, such as {output / 'merged'}"
            ) from None
        if error.errno in _TAKEN:
            raise OutputError(_taken(output)) from None
        raise


def _take_name(staging: Path, output: Path) -> None:
    """What came to be there meanwhile stays, and what was written goes; but an empty folder gives way."""
    try:
        staging.rename(output)
    except OSError as error:
        if error.errno in _TAKEN:
            raise OutputError(_taken(output)) from None
        raise


@contextmanager
def _claimed(staging: Path, output: Path) -> Iterator[None]:
    """Make the folder anew and hold a lock on it: that needs no file, and is gone with the process however it ends.

    The folder around it is locked for that moment, or two merges that begin at once would each take away what the other
    has just made.
    """
    with ExitStack() as held:
        with _locked(staging.parent, wait=True):
            if _is_being_written(staging):
                raise OutputError(_busy(output))
            _give_way(output)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            held.enter_context(_locked(staging, wait=False))
        yield


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _is_being_written(staging: Path) -> bool:
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(staging, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _taken(output: Path) -> str:
    return f"--output: something else came to be at {output} meanwhile, and nothing is ever written over"


def _busy(output: Path) -> str:
    return f"--output: another merge is writing {output} at this moment"


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
