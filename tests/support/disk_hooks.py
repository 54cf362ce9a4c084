"""Every call that changes a disk, below one folder, as a numbered place where a test may do something else.

What Python's own files and Rust write between an open and a close is no place; that they are opened is.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REAL = {
    name: getattr(os, name)
    for name in (
        "open", "close", "write", "fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir", "ftruncate"
    )
}  # fmt: skip
_REAL_OPEN = io.open
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Call:
    """One change of the disk that is about to be made: `perform` makes it.

    Attributes:
        number: counted from 1.
        name: of the function in `os`; `open` is an open for writing.
        path: what is changed; of a rename, what is renamed, and `to` what it becomes.
        data: what is written.
    """

    number: int
    name: str
    path: Path
    perform: Callable[[], Any]
    to: Path | None = None
    data: bytes = b""
    descriptor: int = -1


Act = Callable[[Call], Any]
Tell = Callable[[Mapping[str, Any]], None]


class DiskHooks:
    """Hands every call that changes something below `folder` to `act`, one at a time; for the rest of the process."""

    def __init__(self, folder: Path, act: Act) -> None:
        self._folder = folder
        self._act = act
        self._lock = threading.RLock()
        self._paths: dict[int, Path] = {}
        self._count = 0

    def install(self) -> None:
        """From now on."""
        for name in ("open", "close", "write", "fsync", "ftruncate"):
            setattr(os, name, getattr(self, f"_{name}"))
        for name in ("rename", "replace", "mkdir", "unlink", "remove", "rmdir"):
            setattr(os, name, self._named(name))
        for module in (io, builtins):
            module.open = self._open_file  # type: ignore[attr-defined]

    def _place(
        self, name: str, path: Path | None, perform: Callable[[], Any], *, to: Path | None = None, data: bytes = b"",
        descriptor: int = -1,
    ) -> Any:  # fmt: skip
        if path is None or not path.is_relative_to(self._folder):
            return perform()
        with self._lock:
            self._count += 1
            return self._act(Call(self._count, name, path, perform, to, data, descriptor))

    def _at(self, path: Any, dir_fd: int | None = None) -> Path | None:
        if isinstance(path, int):
            return self._paths.get(path)
        parent = Path.cwd() if dir_fd is None else self._paths.get(dir_fd, Path("/"))
        return parent / os.fsdecode(path)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = self._at(path, dir_fd)

        def perform() -> int:
            descriptor: int = _REAL["open"](path, flags, mode, dir_fd=dir_fd)
            if where is not None:
                self._paths[descriptor] = where
            return descriptor

        return int(self._place("open", where, perform)) if flags & _WRITING else perform()

    def _open_file(self, file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        where = None if isinstance(file, int) or set(mode) <= set("rbt") else self._at(file)
        return self._place("open", where, lambda: _REAL_OPEN(file, mode, *rest, **named))

    def _close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        _REAL["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        def perform() -> int:
            return int(_REAL["write"](descriptor, data))

        where = self._at(descriptor)
        if where is None:
            return perform()
        return int(self._place("write", where, perform, data=bytes(data), descriptor=descriptor))

    def _fsync(self, descriptor: int) -> None:
        self._place("fsync", self._at(descriptor), lambda: _REAL["fsync"](descriptor))

    def _ftruncate(self, descriptor: int, length: int) -> None:
        self._place("ftruncate", self._at(descriptor), lambda: _REAL["ftruncate"](descriptor, length))

    def _named(self, name: str) -> Callable[..., None]:
        def call(path: Any, *rest: Any, **named: Any) -> None:
            to = self._at(rest[0]) if name in ("rename", "replace") else None
            where = self._at(path, named.get("dir_fd"))
            self._place(name, where, lambda: _REAL[name](path, *rest, **named), to=to)

        return call


def counting(tell: Tell) -> Act:
    """Tells the name of each call, and does it."""

    def act(call: Call) -> Any:
        tell({"call": call.name, "path": call.path.name})
        return call.perform()

    return act


def die() -> None:
    """As if somebody had said kill -9: nothing is closed, flushed or told."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def dying_at(number: int, how: str, tell: Tell) -> Act:
    """Kills the process `before` or `after` a place, or in its middle, with half of the bytes written: `torn`."""

    def act(call: Call) -> Any:
        if call.number != number:
            return call.perform()
        tell({"place": f"{how} {call.name} {call.path.name}"})
        if how == "torn" and call.data:
            _REAL["write"](call.descriptor, call.data[: len(call.data) // 2])
        elif how == "after":
            call.perform()
        return die()

    return act


def failing_at(number: int, error: int, *, lasting: bool, tell: Tell) -> Act:
    """Has a place fail as on a disk that is full, or read-only; with `lasting` every later one that would, too.

    Where there is no room, names can still be taken away, and what is there cut shorter.
    """
    fails = {"open", "write", "fsync", "mkdir", "rename", "replace"}
    if error == errno.EROFS:
        fails |= {"unlink", "remove", "rmdir", "ftruncate"}
    failed = False

    def act(call: Call) -> Any:
        nonlocal failed
        if call.name not in fails or not (call.number >= number if lasting or not failed else False):
            return call.perform()
        if not failed:
            tell({"place": f"{call.name} {call.path.name}"})
        failed = True
        raise OSError(error, os.strerror(error), str(call.path))

    return act


def write_now(descriptor: int, data: bytes) -> None:
    """A write that is no place: what the process under test tells."""
    _REAL["write"](descriptor, data)
