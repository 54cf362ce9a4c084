"""Where rows come from: local files, or a dataset on the hub.

`load_rows` is the only entrance. Nothing here knows what a row means; see `formats`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from qlora_cli.data.files import BadRow, Row, read_file
from qlora_cli.data.tables import tabulate
from qlora_cli.errors import DataError, HubUnreachableError
from qlora_cli.hub import is_unreachable
from qlora_cli.recipe.data_files import data_kind, find_data_files, shown_path
from qlora_cli.recipe.paths import is_local
from qlora_cli.recipe.schema import DatasetSection

_SPLIT_STREAM = 0x5EED  # keeps the held-out rows independent of anything else that is drawn from the seed


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one source, in the order of its files.

    `numbers` (int64, one per row) are 1-based and survive a split: the line of a single .jsonl file, else the
    row. Read rows with `read`, not from `dataset`, whose `json_columns` hold JSON text.
    """

    dataset: datasets.Dataset
    source: str
    fingerprint: str
    numbers: npt.NDArray[np.int64]
    unit: str = "row"
    json_columns: frozenset[str] = frozenset()
    files: tuple[tuple[str, int], ...] = field(default=())  # (name, number before its first row), if several

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, as they stand in the files."""
        return list(self.dataset.column_names)

    def read(self, start: int, stop: int, columns: Sequence[str] | None = None) -> list[Row]:
        """Rows [start, stop), restricted to `columns` if given."""
        names = self.column_names if columns is None else list(columns)
        cells = self.dataset.select_columns(names)[start:stop]
        for name in self.json_columns.intersection(names):
            cells[name] = [None if text is None else json.loads(text) for text in cells[name]]
        return [dict(zip(names, values, strict=True)) for values in zip(*(cells[n] for n in names), strict=True)]

    def where(self, index: int) -> str:
        """What a message calls row `index` (0-based): its source and number, and its file if there are several."""
        return self.locate(int(self.numbers[index]))

    def locate(self, number: int) -> str:
        """As `where`, for an original row number."""
        if not self.files:
            return f"{self.source}, {self.unit} {number}"
        position = bisect.bisect_left(self.files, number, key=lambda file: file[1]) - 1
        name, before = self.files[position]
        return f"{self.source}, row {number} (row {number - before} of {name})"

    def select(self, indices: npt.NDArray[np.int64]) -> Rows:
        """These rows alone, numbered as before."""
        return replace(self, dataset=self.dataset.select(indices), numbers=self.numbers[indices])


def load_rows(section: DatasetSection, *, seed: int) -> tuple[Rows, Rows | None]:
    """Read the training rows and, if the recipe asks for them, the validation rows.

    Raises DataError if a source is missing, unreadable or empty, or too small to split; HubUnreachableError if it is
    on the hub and that gives no answer.
    """
    train = load_training_rows(section)
    if section.validation is not None:
        return train, load_validation_rows(section)
    if section.validation_fraction is not None:
        return hold_out(train, section.validation_fraction, seed)
    return train, None


def load_training_rows(section: DatasetSection) -> Rows:
    """The rows that `train` names, all of them; raises as `load_rows` does."""
    return _load("dataset.train", section.train, section, section.train_split)


def load_validation_rows(section: DatasetSection) -> Rows | None:
    """The rows that `validation` names, if it does; raises as `load_rows` does."""
    if section.validation is None:
        return None
    return _load("dataset.validation", section.validation, section, section.validation_split)


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to train on and those to hold out: always the same ones for a seed. Raises DataError for one row."""
    if len(rows) < 2:
        raise DataError(f"{rows.source}: dataset.validation_fraction needs at least 2 rows, got {len(rows)}.")
    held_out = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    order = np.random.default_rng(np.random.SeedSequence([seed, _SPLIT_STREAM])).permutation(len(rows))
    return rows.select(np.sort(order[held_out:])), rows.select(np.sort(order[:held_out]))


def _load(field: str, name: str, section: DatasetSection, split: str) -> Rows:
    """The rows that a field of the recipe names."""
    rows = _load_files(name, _find(field, name)) if is_local(name) else _load_hub(name, section.hub_config, split)
    if len(rows) == 0:
        raise DataError(f"{rows.source}: there are no rows.")
    return rows


def _find(field: str, name: str) -> list[Path]:
    try:
        return find_data_files(name)
    except DataError as error:
        raise DataError(f"{field}: {error}") from None


def _load_files(name: str, paths: list[Path]) -> Rows:
    source = shown_path(Path(name))
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{shown_path(path)}: the file is empty.")
    if data_kind(paths[0]) == ".parquet":
        dataset, counts, json_columns = *_read_parquet(source, paths), frozenset[str]()
        numbers: list[int] = []
    else:
        dataset, counts, json_columns, numbers = _read_text(paths)
    single = len(paths) == 1
    starts = [0, *np.cumsum(counts).tolist()]
    return Rows(
        dataset=dataset,
        source=source,
        fingerprint=_fingerprint(paths),
        numbers=np.array(numbers if single and numbers else range(1, starts[-1] + 1), dtype=np.int64),
        unit="line" if single and data_kind(paths[0]) == ".jsonl" else "row",
        json_columns=json_columns,
        files=() if single else tuple((p.name, s) for p, s in zip(paths, starts, strict=False)),
    )


def _read_text(paths: list[Path]) -> tuple[Any, list[int], frozenset[str], list[int]]:
    """The dataset, rows per file, columns that hold JSON, and each row's number in its file."""
    counts = [0] * len(paths)
    numbers: list[int] = []

    def rows() -> Iterator[Row]:
        for position, path in enumerate(paths):
            for number, row in read_file(path, shown_path(path)):
                if isinstance(row, BadRow):
                    raise DataError(row.problem)
                counts[position] += 1
                numbers.append(number)
                yield row

    table, json_columns = tabulate(rows())
    return datasets.Dataset(table), counts, json_columns, numbers


def _read_parquet(source: str, paths: list[Path]) -> tuple[Any, list[int]]:
    # Not through `datasets`: its loader fails on files without rows, and logs what it then raises.
    try:
        tables = [pyarrow.parquet.read_table(path) for path in paths]
        table = pa.concat_tables(tables, promote_options="default")
        return datasets.Dataset(table), [part.num_rows for part in tables]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{source}: not readable as Parquet ({_root_cause(error)}).") from error


def _fingerprint(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([path.name, content]).encode())
    return digest.hexdigest()


def _load_hub(name: str, config: str | None, split: str) -> Rows:
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, hub and builder errors share no base class
        kind = HubUnreachableError if _no_answer(error) else DataError
        raise kind(_hub_message(name, config, split, error)) from error
    numbers = np.arange(1, len(dataset) + 1, dtype=np.int64)
    return Rows(dataset, f"{name} ({split})", dataset._fingerprint, numbers)


def _no_answer(error: Exception) -> bool:
    # Offline, `datasets` does not say so if it has another configuration of the dataset in its cache.
    return is_unreachable(error) or str(error).startswith("Couldn't find cache")


def _hub_message(name: str, config: str | None, split: str, error: Exception) -> str:
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
        problem = f"hub_config {config!r} does not fit ({detail}); set dataset.hub_config"
    else:
        problem = detail
    return (
        f"{name}: there is no such local file or folder, so it was taken for a dataset on the hub: {problem}. "
        f"For local data, give a file, a folder or a glob."
    )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    # The hub's second line lists the configurations there are; an example of Python code may follow.
    lines = str(error).strip().splitlines()[:2] or [type(error).__name__]
    return " ".join(line.strip() for line in lines).rstrip(".")
