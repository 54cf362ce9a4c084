"""The data of a recipe as the rules between its fields look at it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora_cli.errors import Mistake
from qlora_cli.recipe.values import position_of
from qlora_cli.recipe.yaml_source import Path, Place, Value, dotted, value_at

TRAIN: Path = ("dataset", "train")
VALIDATION: Path = ("dataset", "validation")


class GivenSource(NamedTuple):
    """One of the sources of rows: where it stands, where its path does, and what it says itself."""

    at: Path
    named_at: Path
    said: Mapping[str, Value]

    @property
    def path(self) -> str:
        """Its file, folder, glob or hub name."""
        return str(self.said["path"])

    @property
    def is_local(self) -> bool:
        """Whether it is a path, which has become an absolute one, and not a hub name."""
        return os.path.isabs(self.path)  # noqa: PTH117


class Facts:
    """The data by paths; what is of the wrong type is told elsewhere, and here only looked at.

    `hinted` are fields that were meant, with a value that is not known; `told`, the names of those that something is
    wrong with already.
    """

    def __init__(
        self,
        data: dict[str, Value],
        places: Mapping[Path, Place],
        hinted: set[Path],
        told: frozenset[str] = frozenset(),
    ) -> None:
        self._data, self._places, self._hinted, self._told = data, places, hinted, told

    def get(self, path: Path) -> Any:
        return value_at(self._data, path)

    def given(self, path: Path) -> bool:
        """Whether there is a value, or at least one was meant."""
        return self.get(path) is not None or path in self._hinted

    def is_told(self, path: Path) -> bool:
        """Whether something is wrong with the field itself: what it is to be is not known before that is mended."""
        return dotted(path) in self._told

    def is_argument(self, path: Path) -> bool:
        """Whether it comes from a `--set`, and not from a file."""
        return path in self._places and self._places[path].key.line == 0

    def is_local(self, path: Path) -> bool:
        """Whether there is a path, which has become an absolute one, and not a hub name."""
        value = self.get(path)
        return isinstance(value, str) and os.path.isabs(value)  # noqa: PTH117

    def sources(self, rows: Path) -> list[GivenSource]:
        """The sources that a field of rows names, alone or in a list, but for those that cannot be read."""
        value = self.get(rows)
        items = [((*rows, number), item) for number, item in enumerate(value)] if isinstance(value, list) else []
        found = []
        for at, item in items or [(rows, value)]:
            said = item if isinstance(item, dict) else {"path": item}
            if isinstance(said.get("path"), str) and said["path"]:
                found.append(GivenSource(at, (*at, "path") if item is said else at, said))
        return found

    def mistake(self, path: Path, message: str, suggestion: str | None = None) -> Mistake:
        return Mistake(position_of(path, self._places), dotted(path), message, suggestion)

    def key_mistake(self, path: Path, message: str, suggestion: str | None = None) -> Mistake:
        return Mistake(self._places[path].key, dotted(path), message, suggestion)

    def line(self, path: Path) -> str:
        """` (line 7)`, or the argument, where another field stands."""
        place = self._places.get(path)
        if place is None:
            return ""
        return f" (line {place.key.line})" if place.key.line else f" ({place.key})"

    def later(self, a: Path, b: Path) -> tuple[Path, Path]:
        """Both paths, the one that stands further down first."""
        return (a, b) if self._places[a].key > self._places[b].key else (b, a)
