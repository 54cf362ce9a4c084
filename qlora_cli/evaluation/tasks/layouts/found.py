"""What a task asks for, and the files in which it was found."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qlora_cli.data.files import BadRow, Row
from qlora_cli.errors import DataError, TaskError

PROBLEMS = 5  # that are told of one file


@dataclass(frozen=True)
class DatasetName:
    """A dataset as a task names it: `path` on the hub, `config` of it, and further arguments of `load_dataset`."""

    path: str
    config: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path}, {self.config}" if self.config else self.path


# The names of columns that every row has to have, of those that there are in the file at all.
Needed: TypeAlias = frozenset[str]
# The names of columns of CSV and TSV whose cells may be read as numbers or truth values; None: all of them.
Numbers: TypeAlias = frozenset[str] | None


@dataclass(frozen=True)
class Found:
    """A split that is there: its files, and how a datasets.Dataset is made of them.

    `read` raises TaskError with file and row for what cannot be read, and for a file without rows. `guessed` tells that
    only the cells say which columns are numbers: there is no card that does.
    """

    files: tuple[Path, ...]
    read: Callable[[Needed, Numbers], Any]
    guessed: bool = False


def child(folder: Path, name: str) -> Path | None:
    """The file or folder `name` in `folder`, in whatever case it is written; None if there is none, or several."""
    exact = folder / name
    if exact.exists():
        return exact
    try:
        alike = [path for path in folder.iterdir() if path.name.casefold() == name.casefold()]
    except OSError:  # no folder, or none that may be looked into
        return None
    return alike[0] if len(alike) == 1 else None


def descendant(folder: Path, *names: str) -> Path | None:
    """As `child`, down several levels; names may hold slashes."""
    found: Path | None = folder
    for name in itertools.chain.from_iterable(Path(name).parts for name in names):
        found = child(found, name) if found is not None else None
    return found


def packed_or_not(folder: Path, below: str) -> Path | None:
    """The file `below` a folder, or what it is when it is packed; None if there is neither."""
    paths = (descendant(folder, below + suffix) for suffix in ("", ".gz", ".zst"))
    return next((path for path in paths if path is not None and path.is_file()), None)


def sound_rows(rows: Iterable[tuple[int, Row | BadRow]], shown: str) -> Iterator[tuple[int, Row]]:
    """The rows with their numbers. Raises TaskError for what cannot be read: the first few problems."""
    problems = []
    try:
        for number, row in rows:
            if isinstance(row, BadRow):
                problems.append(row.problem)
                if len(problems) == PROBLEMS:
                    break
            elif not problems:
                yield number, row
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise TaskError("\n".join(problems))


@contextlib.contextmanager
def telling_of_data() -> Iterator[None]:
    """A block in which what is wrong with a file, a DataError, is raised as TaskError."""
    try:
        yield
    except DataError as error:
        raise TaskError(str(error)) from error


def refuse_problems(problems: Iterable[str]) -> None:
    """Raise TaskError with the first few of them, if there are any."""
    some = list(itertools.islice(problems, PROBLEMS))
    if some:
        raise TaskError("\n".join(some))
