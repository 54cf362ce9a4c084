"""How a task gets its rows: from the data root if there is one, else from the hub as lm-eval does it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.data_root import DataRoot
from qlora_cli.evaluation.tasks.layouts.found import DatasetName, Needed, Numbers
from qlora_cli.hub import is_unreachable
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.recipe.paths import looks_local

# What `datasets` reads files by, in the place of a dataset's name: the files are the task's own business.
_LOADERS = ("arrow", "csv", "json", "pandas", "parquet", "text", "xml", "webdataset")


class MissingSplitError(TaskError):
    """A split is not below the data root.

    Attributes:
        places: where it was looked for.
        there: the splits that the dataset has.
        instead: the split that the task can be asked about in its place, if that is allowed.
    """

    def __init__(self, dataset: DatasetName, split: str, places: list[str], there: list[str]) -> None:
        self.dataset, self.split, self.places, self.there = dataset, split, places, there
        self.instead: str | None = None
        super().__init__(f"no {split!r} split of {dataset}")


class SilentHubError(TaskError):
    """The hub gave no answer when it was asked for a dataset."""


@dataclass
class Supply:
    """The source of one task's rows.

    Attributes:
        root: the data root, if one was given.
        needed: columns that every row must have, of those that are there.
        zero_shot: whether no examples will be asked for: then none are read.
        numbers: columns of CSV and TSV that may be numbers; None: all. The others are texts.
        files: those that were read so far, by split.
        guessed: whether cells were among them, whose kind nothing but the cells says.
    """

    root: DataRoot | None
    needed: Needed = frozenset()
    zero_shot: bool = False
    numbers: Numbers = None
    files: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    guessed: bool = False

    @property
    def all_files(self) -> list[Path]:
        """Those of all splits that were read."""
        return [file for files in self.files.values() for file in files]

    def files_of(self, split: str | None) -> list[Path]:
        """Those of a split, or of all where it is not known."""
        return list(self.files.get(split or "", ())) or self.all_files

    def dataset(self, task: Any, as_usual: Callable[[], None]) -> Any:
        """What `task.dataset` is to be: splits by name. `as_usual` is how lm-eval fetches it."""
        name = dataset_name(task.DATASET_PATH, task.DATASET_NAME, getattr(task.config, "dataset_kwargs", None))
        if self.root is not None and not brings_own(name, getattr(task.config, "custom_dataset", None)):
            return Splits(self, self.root, name)
        try:
            as_usual()
        except Exception as error:  # of the network, the hub, a builder, a task's own code
            raise _telling(error, name) from error
        return task.dataset

    def missing(self, name: DatasetName, splits: list[str]) -> list[MissingSplitError]:
        """Those of the splits that are not below the root."""
        root = self.root
        if root is None:
            return []
        return [_missing(root, name, split) for split in dict.fromkeys(splits) if not root.find(name, split)]


class Splits(dict[str, Any]):
    """The splits of a dataset by name, each read when it is asked for. Raises MissingSplitError, or TaskError with
    file and row."""

    def __init__(self, supply: Supply, root: DataRoot, name: DatasetName) -> None:
        super().__init__()
        self._supply, self._root, self._name = supply, root, name

    def __missing__(self, split: str) -> Any:
        found = self._root.find(self._name, split)
        if found is None:
            raise _missing(self._root, self._name, split)
        self._supply.files[split] = found.files
        self._supply.guessed |= found.guessed
        self[split] = self._root.read(found, self._supply.needed, self._supply.numbers)
        return self[split]


def brings_own(name: DatasetName, custom: object) -> bool:
    """Whether the rows of a task come from a function, or from files of its own, not from a dataset of the hub."""
    files = name.arguments.get("data_files")
    return callable(custom) or (name.path in _LOADERS and "hf://" not in str(files)) or looks_local(name.path)


def dataset_name(path: object, config: object, arguments: object) -> DatasetName:
    """The dataset by what a task's file says, where a configuration may look like a number."""
    return DatasetName(
        str(path), None if config is None else str(config), arguments if isinstance(arguments, Mapping) else {}
    )


def _missing(root: DataRoot, name: DatasetName, split: str) -> MissingSplitError:
    return MissingSplitError(name, split, root.places(name, split), root.splits(name))


def _telling(error: Exception, name: DatasetName) -> TaskError:
    """What is to be told of a dataset that did not come."""
    if isinstance(error, TaskError):
        return error
    if isinstance(error, ImportError):
        return TaskError(needs_package(error))
    # Offline, `datasets` does not say so if it has another configuration of the dataset in its cache.
    if is_unreachable(error) or str(error).startswith("Couldn't find cache"):
        return SilentHubError(str(name))
    if "scripts are no longer supported" in str(error) or "trust_remote_code" in str(error):
        return TaskError(
            f"its dataset {name} needs code from the hub, which is not run. File its rows under --data-root DIR."
        )
    if "gated" in str(error):
        return TaskError(
            f"its dataset {name} is gated: accept its terms on the hub and log in with `hf auth login`, "
            f"or file its rows under --data-root DIR."
        )
    return TaskError(f"its dataset {name} could not be had: {_root_cause(error)}.")


def needs_package(error: ImportError) -> str:
    """What to do about a package that a task imports."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"it needs the package {package}, which is not installed: pip install {package}"
        return f"it needs {error.name}, which the installed {package} has not: it was written for another version."
    return f"it needs what is not installed here: {_summary(error)}."


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return _summary(error)


def _summary(error: BaseException) -> str:
    """The kind of an error and its message, on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def describe_failure(error: BaseException, files: list[Path]) -> str:
    """Why a task could not be made of its rows, with the files that were read for it."""
    if isinstance(error, ImportError):
        return needs_package(error)
    if isinstance(error, SystemExit):
        return f"its code ends the program, with sys.exit({error.code!r}). Look at its functions, or leave it out."
    if isinstance(error, IndexError) and "size 0" in str(error):
        return f"its `process_docs` leaves no row to ask about of {', '.join(map(shown_path, files)) or 'its dataset'}."
    read = f" Its rows are those of {', '.join(dict.fromkeys(map(shown_path, files)))}." if files else ""
    return f"it cannot be set up: {_summary(error)}.{read}"
