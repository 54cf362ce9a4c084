"""The data of tasks out of a folder, without the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.layouts import glue, hub_folders, mmlu
from qlora_cli.evaluation.tasks.layouts.found import DatasetName, Found, Needed, Numbers
from qlora_cli.recipe.data_files import near_name, shown_path

_USUAL = ("train", "validation", "test", "dev")


class DataRoot:
    """A folder in which datasets are filed under their hub names, or as their authors give them out.

    Nothing is looked into before it is asked for, and no file is read twice.
    """

    def __init__(self, folder: Path) -> None:
        """Raises TaskError if there is no such folder."""
        if not folder.is_dir():
            shown = shown_path(folder)
            if folder.exists():
                raise TaskError(f"--data-root: {shown} is a file. Give the folder that holds the data.")
            raise TaskError(f"--data-root: {shown}: there is no such folder{near_name(folder)}")
        self.folder = folder
        self._read: dict[tuple[tuple[Path, ...], Numbers], tuple[Needed, Any]] = {}

    def find(self, dataset: DatasetName, split: str) -> Found | None:
        """The files of a split; None if it is not there."""
        finders: tuple[Callable[[Path, DatasetName, str], Found | None], ...]
        # What authors give out first: `glue/RTE/train.tsv` is a table in the dataset's own name `glue`, too, and what
        # its cells mean only its own reader knows.
        finders = (mmlu.find, glue.find, hub_folders.find)
        return next(filter(None, (find(self.folder, dataset, split) for find in finders)), None)

    def places(self, dataset: DatasetName, split: str) -> list[str]:
        """Where the split was looked for, for messages."""
        below = (hub_folders.place(dataset, split), mmlu.place(dataset, split), glue.place(dataset, split))
        return [shown_path(self.folder / place) for place in below if place]

    def splits(self, dataset: DatasetName) -> list[str]:
        """The names of the splits that are there."""
        names = [*hub_folders.splits(self.folder, dataset), *_USUAL, "validation_matched", "validation_mismatched"]
        return [name for name in dict.fromkeys(names) if self.find(dataset, name)]

    def read(self, found: Found, needed: Needed, numbers: Numbers = None) -> Any:
        """A datasets.Dataset. Raises TaskError, with file and row, for what cannot be read."""
        key = (found.files, numbers if found.guessed else None)
        kept = self._read.get(key)
        if kept is None or not needed <= kept[0]:
            kept = self._read[key] = (needed, found.read(needed, numbers))
        return kept[1]
