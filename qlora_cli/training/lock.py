"""One run at a time in a run folder.

`.lock` in the folder is locked with the kernel's flock, which ends with its process, however that ends: a run that was
killed leaves no lock. Beside a run the file stays, emptied; a run that has trained nothing takes it back with the
folders that it made (filelock looks whether the file that it locked still has its name). Who holds it is written in it,
for the message to others.

Where the file system has no such locks (some network and FUSE mounts), a file `.lock.held` that is there is the lock.
One whose process is gone is taken over, if that was on this host; of other hosts nothing can be known from here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from accelerate import Accelerator
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from qlora_cli.disk import make_folder, missing_folders, telling_disk_errors
from qlora_cli.errors import OutputError
from qlora_cli.training.devices import by_main_process
from qlora_cli.training.run_folder import RunFolder

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# Seconds to try for: what a killed run had started may hold its lock for a moment longer; and what filelock takes to
# see that a file was left half written.
_PATIENCE = 1.0
_SOFT_PATIENCE = 3.0


class RunLock:
    """The lock of a run folder: taken when it is asked for, and given back at the end of the `with`."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._file = folder.path / ".lock"
        self._marker = folder.path / ".lock.held"
        self._held: BaseFileLock | None = None
        self._made: Sequence[Path] = ()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held is None:
            return
        trained_nothing = not self._folder.holds_a_run()
        # What cannot be written or closed any more must not hide how the run ended; the kernel closes it.
        with contextlib.suppress(OSError):
            os.truncate(self._file, 0)
            if trained_nothing:  # whoever waits for the lock sees that its file is gone
                self._file.unlink()
        with contextlib.suppress(OSError):
            self._held.release()
        self._held = None
        with contextlib.suppress(OSError):  # there is something else in it
            for folder in self._made if trained_nothing else ():
                folder.rmdir()

    def take(self, accelerator: Accelerator, *, resume: bool) -> None:
        """Take it, for all processes of the run, and look again at whether the folder may be written.

        Only then is that sure: another run may have begun there, or ended, since the folder was looked at.

        Raises:
            OutputError: on every process, if another run holds the lock, or if `RunFolder.check` does.
            RunError: on every process, if the lock's file cannot be written.
        """

        def taken() -> None:
            with telling_disk_errors(self._folder.path):
                self._made = missing_folders(self._folder.path)
                make_folder(self._folder.path)
                self._held = self._acquired()
            self._folder.check(resume=resume)

        by_main_process(accelerator, taken)

    def _acquired(self) -> BaseFileLock:
        lock = FileLock(self._file, timeout=_PATIENCE, preserve_lock_file=True, on_acquired=_sign)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(self._in_use(_signature(self._file))) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return self._acquired_softly()
        return lock

    def _acquired_softly(self) -> BaseFileLock:
        lock = SoftFileLock(self._marker, timeout=_SOFT_PATIENCE)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"{self._in_use(_holder(self._marker))}. On this file system a run that is killed may leave its lock: "
                f"if you are sure that it is gone, delete {self._marker}"
            ) from None
        return lock

    def _in_use(self, holder: str | None) -> str:
        by = "another run" if holder is None else f"another run: {holder}"
        advice = "Wait for it, stop it, or name another folder with --output-dir"
        return f"output_dir: {self._folder.path} is in use by {by}. {advice}"


def _sign(descriptor: int) -> None:
    """Write who holds the lock into its file; on a full disk it is held all the same."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{_described(os.getpid(), socket.gethostname(), datetime.now(UTC))}\n".encode())


def _signature(file: Path) -> str | None:
    """What `_sign` wrote; None in the moment before it did."""
    with contextlib.suppress(OSError), file.open(encoding="utf-8", errors="replace") as text:
        return text.readline(1000).strip() or None
    return None


def _holder(marker: Path) -> str | None:
    """Who holds a soft lock; None if its file does not tell."""
    with contextlib.suppress(OSError, ValueError):
        process, host, *_ = marker.read_text(encoding="utf-8", errors="replace").splitlines()
        since = datetime.fromtimestamp(marker.stat().st_mtime, UTC)
        return _described(int(process), host.split("?pidns-")[0], since)  # filelock adds the container, if it is in one
    return None


def _described(process: int, host: str, since: datetime) -> str:
    return f"process {process} on {host}, since {since:%Y-%m-%d %H:%M:%S} UTC"
