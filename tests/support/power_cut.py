"""What a disk holds after a power cut: of files what was fsynced, of folders the names that were when they were.

Of what was not fsynced a file system may have written anything or nothing. Three of the ways are tried:

nothing: none of it; a file that was never fsynced and has a name is empty.
names: the names of all folders, and none of the bytes: what journals of names alone leave.
some: of each file and folder, all of it or nothing, as drawn; of files half of it, too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.disk_hooks import Act, Call, Tell, die

WAYS = ("nothing", "names", "some")


@dataclass(eq=False)
class _File:
    """A file, with the bytes that the disk holds for certain."""

    durable: bytes = b""
    now: bytes | None = None  # what it holds when the power goes; None once it has no name any more


@dataclass(eq=False)
class _Folder:
    """A folder: its names as they are, and as the disk holds them for certain."""

    names: dict[str, _File | _Folder] = field(default_factory=dict)
    durable: dict[str, _File | _Folder] = field(default_factory=dict)


class Journal:
    """Follows what is done below `root`, all of which is durable when it begins."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _found(root)

    def do(self, call: Call) -> Any:
        """Do what is asked, and keep what it means."""
        if call.name == "mkdir":
            done = call.perform()
            self._folder(call.path.parent).names[call.path.name] = _Folder()
            return done
        if call.name in ("rename", "replace") and call.to is not None:
            moved = self._node(call.path)
            done = call.perform()
            del self._folder(call.path.parent).names[call.path.name]
            self._folder(call.to.parent).names[call.to.name] = moved
            return done
        done = call.perform()
        if call.name in ("unlink", "remove", "rmdir"):
            self._folder(call.path.parent).names.pop(call.path.name, None)
        elif call.name == "fsync":
            self._synced(call.path)
        else:
            self._node(call.path)
        return done

    def cut(self, way: str, draw: random.Random, image: Path) -> None:
        """Write into `image` what the disk may hold when the power goes now."""
        self._look(self._top, self._root)
        _put(self._top, image, way, draw)

    def _synced(self, path: Path) -> None:
        node = self._node(path)
        if isinstance(node, _File):
            node.durable = path.read_bytes()
        else:
            _meet(node, path)
            node.durable = dict(node.names)

    def _look(self, folder: _Folder, path: Path) -> None:
        _meet(folder, path)
        for name, node in folder.names.items():
            if isinstance(node, _File):
                node.now = (path / name).read_bytes()
            else:
                self._look(node, path / name)

    def _folder(self, path: Path) -> _Folder:
        node = self._node(path)
        if not isinstance(node, _Folder):
            raise TypeError(f"{path} is no folder")
        return node

    def _node(self, path: Path) -> _File | _Folder:
        node: _File | _Folder = self._top
        here = self._root
        for name in path.relative_to(self._root).parts:
            here = here / name
            if isinstance(node, _File):
                raise TypeError(f"{here.parent} is no folder")
            node = node.names.setdefault(name, _Folder() if here.is_dir() else _File())
        return node


def _meet(folder: _Folder, path: Path) -> None:
    """Take in what others have made there, such as Rust."""
    there = {entry.name: entry for entry in path.iterdir()}
    folder.names = {name: node for name, node in folder.names.items() if name in there}
    for name, entry in there.items():
        folder.names.setdefault(name, _Folder() if entry.is_dir() else _File())


def _found(path: Path) -> _Folder:
    """A folder all of which the disk holds."""
    names = {
        entry.name: _found(entry) if entry.is_dir() else _File(durable=entry.read_bytes()) for entry in path.iterdir()
    }
    return _Folder(dict(names), names)


def _put(folder: _Folder, image: Path, way: str, draw: random.Random) -> None:
    image.mkdir()
    survives = {"nothing": False, "names": True, "some": draw.random() < 0.5}[way]
    for name, node in (folder.names if survives else folder.durable).items():
        if isinstance(node, _Folder):
            _put(node, image / name, way, draw)
        else:
            (image / name).write_bytes(_held(node, way, draw))


def _held(file: _File, way: str, draw: random.Random) -> bytes:
    if way != "some" or file.now is None:
        return file.durable
    return draw.choice([file.durable, file.now, file.now[: max(len(file.durable), len(file.now) // 2)]])


def cutting_at(number: int, way: str, root: Path, image: Path, tell: Tell) -> Act:
    """Cuts the power before a place: what the disk then holds is in `image`, and the process is gone."""
    journal = Journal(root)

    def act(call: Call) -> Any:
        if call.number != number:
            return journal.do(call)
        tell({"place": f"power cut ({way}) before {call.name} {call.path.name}"})
        journal.cut(way, random.Random(number), image)
        return die()

    return act
