"""Where rows come from: local files, or a dataset on the hub. Nothing here knows what a row means; see `formats`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from qlora_cli.data.files import BadRow, Row, read_file
from qlora_cli.errors import DataError, HubUnreachableError
from qlora_cli.hub import is_unreachable
from qlora_cli.recipe.data_files import data_kind, find_data_files, shown_path
from qlora_cli.recipe.paths import is_local
from qlora_cli.recipe.schema import SourceSection

_HUB_BATCH = 1000  # rows that are taken from Arrow at a time

# Told how much further a source has been read: bytes of files, rows of a dataset.
Advanced = Callable[[int], None]


class SourceRow(NamedTuple):
    """A row, or what is wrong with it: its file (by position among the source's) and what it is called there."""

    file: int
    number: int
    row: Row | BadRow


@dataclass(frozen=True, eq=False)
class Source:
    """Rows that can be read, again and again, from the first to the last.

    `name` is what messages call it, `files` what they call its files, `unit` what is counted in those: lines or rows.
    `fingerprint` changes with the content, and is None where that cannot be known. `size` is what `read` tells the
    sum of, None where there is no telling.
    """

    section: SourceSection
    name: str
    files: tuple[str, ...]
    unit: str
    size: int | None
    opened: Callable[[Advanced], Generator[SourceRow, None, None]] = field(repr=False)
    fingerprinted: Callable[[], str | None] = field(repr=False)

    @cached_property
    def fingerprint(self) -> str | None:
        """Reads all files, the first time."""
        return self.fingerprinted()

    def read(self, advanced: Advanced = lambda _: None) -> Generator[SourceRow, None, None]:
        """The rows in order. Raises DataError where a file cannot be read on."""
        return self.opened(advanced)

    def where(self, row: SourceRow) -> str:
        """What a message calls a row."""
        return f"{self.files[row.file]}, {self.unit} {row.number}"


def open_source(field_name: str, section: SourceSection, *, streaming: bool = False) -> Source:
    """The source that a field of the recipe names; its format is not looked at.

    Raises DataError if it is missing or empty, HubUnreachableError if it is on the hub and that gives no answer.
    """
    if not is_local(section.path):
        return _hub_source(section, streaming=streaming)
    try:
        paths = find_data_files(section.path)
    except DataError as error:
        raise DataError(f"{field_name}: {error}") from None
    return _file_source(section, paths)


def _file_source(section: SourceSection, paths: list[Path]) -> Source:
    files = tuple(shown_path(path) for path in paths)
    stamps = [_stamp(path) for path in paths]
    sizes = [size for size, _ in stamps]
    for name, size in zip(files, sizes, strict=True):
        if size == 0:
            raise DataError(f"{name}: the file is empty.")

    def rows(advanced: Advanced) -> Generator[SourceRow, None, None]:
        for position, path in enumerate(paths):
            for number, row in read_file(path, files[position], advanced):
                yield SourceRow(position, number, row)
            # Or what was read would be kept under the fingerprint of something else.
            if not path.exists() or _stamp(path) != stamps[position]:
                raise DataError(f"{files[position]}: the file was changed while it was read. Start again.")

    unit = "line" if data_kind(paths[0]) == ".jsonl" else "row"
    return Source(section, shown_path(Path(section.path)), files, unit, sum(sizes), rows, lambda: _of_files(paths))


def _stamp(path: Path) -> tuple[int, int]:
    """Its size, and when it was changed last."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{shown_path(path)}: cannot be read: {error.strerror or error}.") from error
        digest.update(json.dumps([path.name, content]).encode())
    return digest.hexdigest()


def _hub_source(section: SourceSection, *, streaming: bool) -> Source:
    split = section.split or "train"
    try:
        dataset = datasets.load_dataset(section.path, section.hub_config, split=split, streaming=streaming)
    except Exception as error:  # network, hub and builder errors share no base class
        kind = HubUnreachableError if _no_answer(error) else DataError
        raise kind(_hub_message(section, split, error)) from error
    name = f"{section.path} ({split})"
    if streaming:
        # What comes may be other rows tomorrow: nothing says that it is the same.
        return Source(section, name, (name,), "row", None, lambda a: _dataset_rows(dataset, name, a), lambda: None)
    fingerprint = dataset._fingerprint
    return Source(
        section, name, (name,), "row", len(dataset), lambda a: _dataset_rows(dataset, name, a), lambda: fingerprint
    )


def _dataset_rows(dataset: Any, name: str, advanced: Advanced) -> Generator[SourceRow, None, None]:
    classes = {c: kind for c, kind in (dataset.features or {}).items() if isinstance(kind, datasets.ClassLabel)}
    number = 0
    batches = dataset.iter(batch_size=_HUB_BATCH)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # of a stream, as above
            kind = HubUnreachableError if _no_answer(error) else DataError
            raise kind(f"{name}, after row {number}: cannot be read on: {_root_cause(error)}.") from error
        if batch is None:
            return
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(batch, values, strict=True))
            row |= {name: _label(kind, row[name]) for name, kind in classes.items()}
            yield SourceRow(0, number, row)
        advanced(len(next(iter(batch.values()), [])))


def _label(kind: datasets.ClassLabel, value: int | None) -> str | None:
    """The name of a label, whose number means nothing outside the dataset; a hidden one is -1."""
    return None if value is None or value < 0 else str(kind.int2str(value))


def _no_answer(error: Exception) -> bool:
    # Offline, `datasets` does not say so if it has another configuration of the dataset in its cache.
    return is_unreachable(error) or str(error).startswith("Couldn't find cache")


def _hub_message(section: SourceSection, split: str, error: Exception) -> str:
    detail = _root_cause(error)
    if _no_answer(error):
        problem = "the hub cannot be reached"
    elif "gated" in str(error):
        problem = "it is gated; accept its terms on the hub and log in with `hf auth login`"
    elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
        problem = "the hub has no such dataset, or it is private"
    elif "split" in str(error).lower():
        problem = f"it has no split {split!r} ({detail}); set dataset.train_split or dataset.validation_split"
    elif "config" in str(error).lower():
        problem = f"hub_config {section.hub_config!r} does not fit ({detail}); set dataset.hub_config"
    else:
        problem = detail
    return (
        f"{section.path}: there is no such local file or folder, so it was taken for a dataset on the hub: {problem}. "
        f"For local data, give a file, a folder or a glob."
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    # The hub's second line lists the configurations there are; an example of Python code may follow.
    lines = str(error).strip().splitlines()[:2] or [type(error).__name__]
    return " ".join(line.strip() for line in lines).rstrip(".")
